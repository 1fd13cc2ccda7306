"""What the commands that measure do around the measuring: the terminal, the prompts, the files of figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from nextblock.config.errors import UsageError
from nextblock.config.progress import counter, progress
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.measure.bench.decoding import bench_decode, compares_compiled, count_calls
from nextblock.measure.bench.forwards import POSITIONS, random_prompts, time_forwards
from nextblock.measure.bench.prompts import Options, Prompts
from nextblock.measure.bench.prompts import read_prompts as read_prompts
from nextblock.measure.machine import MEMORY_MEANING, environment
from nextblock.model.decoder import end_tokens


def wide_console() -> Console:
    """Standard output; where it is no terminal, wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


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
) -> dict[str, Any]:
    """Time decoding, and forward passes if asked for, with a bar on standard error.

    Args:
        model: its name, for the JSON.
        prompts: None: random tokens, `cache_length` of them, and no end tokens (a model of random weights).
        variants: of decoding; none: only forward passes.
        batches: batch sizes, each on its own.
        assisted: transformers' assisted decodings to time beside its plain one, at batch 1.
    Returns:
        What is written as JSON: `decode` and `forwards` hold `Speed` and `ForwardTime` as plain values.
    """
    if any(size < 1 for size in batches):
        raise UsageError(f"batch={min(batches)} must be at least 1")
    if prompts is None:
        encoded, ends = random_prompts(lm.decoder.vocabulary, cache_length, max([1, *batches])), []
    else:
        encoded, ends = prompts.encode(lm), end_tokens(lm.decoder, lm.tokenizer)
    decoded, passed = batches if variants else (), batches if forwards else ()
    common = (compares_compiled(lm), len(encoded), len(variants))
    calls = sum(count_calls(*common, size, rounds, len(assisted)) for size in decoded)
    limits: dict[str, Any] = {"ends": ends, "rounds": rounds, "max_new_tokens": max_new_tokens, "assisted": assisted}
    with progress("timing") as update:
        advance = counter(update, calls + len(POSITIONS) * rounds * len(passed))
        speeds = [bench_decode(lm, encoded, variants, batch=n, on_call=advance, **limits) for n in decoded]
        widths: Any = {"cache_length": cache_length, "rounds": rounds}
        times = [time_forwards(lm, batch=n, on_call=advance, **widths) for n in passed]
    return {
        "model": model,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "environment": environment(lm.decoder.device),
        "prompts": prompts.source if prompts else f"{cache_length} random tokens",
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "memory": MEMORY_MEANING.get(lm.decoder.device.type),
        "decode": [asdict(speed) for each in speeds for speed in each],
        "forwards": [asdict(time) for each in times for time in each],
    }


def write_json(figures: Any, output: Path | None) -> None:
    """Write plain values as JSON, where an output is named. UsageError if it cannot be."""
    if output is None:
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}") from None


def write_results(results: Mapping[str, Any], figure: Figure, output: Path) -> tuple[Path, Path]:
    """Write the figures as JSON at `output`, the plot beside it as PNG; both paths. UsageError if it cannot be."""
    plot = output.with_suffix(".png")
    write_json(results, output)
    try:
        figure.savefig(plot)
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}") from None
    return output, plot


def check_output(output: Path | None) -> None:
    """Refuse, before anything is measured, an output that is no JSON file."""
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"--output {output}: the folder {output.parent} does not exist; make it, or name another")
    if output is not None and (output.suffix != ".json" or output.is_dir()):
        raise UsageError(f"--output {output} is not the name of a .json file; end it in .json")
