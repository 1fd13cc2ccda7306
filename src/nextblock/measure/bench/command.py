"""What the commands that measure do around the measuring: the terminal, the prompts, the files of figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nextblock.config.errors import UsageError
from nextblock.config.files import write_json
from nextblock.config.progress import counter, progress
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.measure.bench.contest import make_batches
from nextblock.measure.bench.decoding import bench_decode, check_length, compares_compiled, count_calls
from nextblock.measure.bench.forwards import POSITIONS, check_widths, random_prompts, time_forwards
from nextblock.measure.bench.prompts import Options, Prompts
from nextblock.measure.bench.prompts import read_prompts as read_prompts
from nextblock.measure.machine import MEMORY_MEANING, environment
from nextblock.model.decoder import end_tokens


def run_bench(
    lm: BlockDiffusionLM,
    *,
    model: str,
    prompts: Prompts | None,
    variants: Sequence[Options],
    batches: Sequence[int],
    rounds: int,
    max_new_tokens: int,
    forwards: bool,
    cache_length: int,
    assisted: Sequence[tuple[str, Options]] = (),
    tell: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Time decoding, and forward passes if asked for, with a bar on standard error.

    Args:
        model: its name, for the JSON.
        prompts: None: random tokens, `cache_length` of them, and no end tokens (a model of random weights).
        variants: of decoding; none: only forward passes.
        assisted: transformers' assisted decodings to time beside its plain one, at batch 1.
        tell: called with what was measured, also where a later part of it fails.
    Returns:
        What is written as JSON: `decode` and `forwards` hold `Speed` and `ForwardTime` as plain values.
    """
    if prompts is None:
        encoded, ends = random_prompts(lm.decoder.vocabulary, cache_length, max([1, *batches])), []
    else:
        encoded, ends = prompts.encode(lm), end_tokens(lm.decoder, lm.tokenizer)
    decoded, passed = batches if variants else (), batches if forwards else ()
    if decoded:
        check_length(lm, encoded, max_new_tokens)
    if passed:
        check_widths(lm, cache_length, POSITIONS)
    for size in batches:  # all of them, before the first is measured
        make_batches(encoded if decoded else [[0]] * max(1, size), size)
    common = (compares_compiled(lm), len(encoded), len(variants))
    calls = sum(count_calls(*common, size, rounds, len(assisted)) for size in decoded)
    limits: dict[str, Any] = {"ends": ends, "rounds": rounds, "max_new_tokens": max_new_tokens, "assisted": assisted}
    results: dict[str, Any] = {
        "model": model,
        **_about(lm, prompts.source if prompts else f"{cache_length} random tokens"),
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "decode": [],
        "forwards": [],
    }
    try:
        with progress("timing") as update:
            advance = counter(update, calls + len(POSITIONS) * rounds * len(passed))
            for n in decoded:
                speeds = bench_decode(lm, encoded, variants, batch=n, on_call=advance, **limits)
                results["decode"] += map(asdict, speeds)
            for n in passed:
                times = time_forwards(lm, cache_length=cache_length, batch=n, rounds=rounds, on_call=advance)
                results["forwards"] += map(asdict, times)
    finally:
        if results["decode"] or results["forwards"]:
            tell(results)
    return results


def _about(lm: BlockDiffusionLM, prompts: str) -> dict[str, Any]:
    """What figures depend on beside the options."""
    return {
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "environment": environment(lm.decoder.device),
        "prompts": prompts,
        "memory": MEMORY_MEANING.get(lm.decoder.device.type),
    }


def write_results(results: Mapping[str, Any], figure: Figure, output: Path) -> tuple[Path, Path]:
    """Write the figures as JSON at `output`, the plot beside it as PNG; both paths. UsageError if it cannot be."""
    plot = output.with_suffix(".png")
    write_json(results, output)
    try:
        figure.savefig(plot)
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}") from None
    return output, plot
