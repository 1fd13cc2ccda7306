"""What `nextblock bench decode` and `nextblock tune` do around the measuring: prompts, progress, files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from nextblock.config.errors import UsageError
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.decoding.request import end_tokens
from nextblock.measure.bench.decoding import bench_decode, compares_compiled, count_calls
from nextblock.measure.bench.forwards import POSITIONS, random_prompts, time_forwards
from nextblock.measure.bench.prompts import Options, Prompts, file_prompts, task_prompts
from nextblock.measure.machine import MEMORY_MEANING, environment
from nextblock.measure.progress import progress


def wide_console() -> Console:
    """Standard output; where it is no terminal, wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def read_prompts(task: str, file: Path | None, count: int, split: str) -> Prompts:
    """The file's prompts if one is given, else the task's."""
    return task_prompts(task, split, count) if file is None else file_prompts(file, count)


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
    device = lm.decoder.device
    if prompts is None:
        encoded, ends = random_prompts(lm.decoder.vocabulary, cache_length, max([1, *batches])), []
    else:
        encoded, ends = prompts.encode(lm), end_tokens(lm.decoder, lm.tokenizer)
    if any(size < 1 for size in batches):
        raise UsageError(f"batch={min(batches)} must be at least 1")
    calls = sum(
        count_calls(compares_compiled(lm), len(encoded), len(variants), size, rounds, len(assisted))
        for size in batches
    )
    total = (calls if variants else 0) + (len(POSITIONS) * rounds * len(batches) if forwards else 0)
    done = 0
    decode: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    with progress("timing") as update:

        def advance() -> None:
            nonlocal done
            done += 1
            update(done, total)

        for size in batches if variants else ():
            speeds = bench_decode(
                lm,
                encoded,
                variants,
                batch=size,
                ends=ends,
                rounds=rounds,
                max_new_tokens=max_new_tokens,
                assisted=assisted,
                on_call=advance,
            )
            decode += [speed.as_dict() for speed in speeds]
        for size in batches if forwards else ():
            found = time_forwards(lm, cache_length=cache_length, batch=size, rounds=rounds, on_call=advance)
            times += [time.as_dict() for time in found]
    return {
        "model": model,
        "parameters": sum(p.numel() for p in lm.model.parameters()),
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "environment": environment(device),
        "prompts": prompts.source if prompts else f"{cache_length} random tokens",
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
        "memory": MEMORY_MEANING.get(device.type),
        "decode": decode,
        "forwards": times,
    }


def write_results(results: Mapping[str, Any], figure: Figure, output: Path) -> tuple[Path, Path]:
    """Write the figures as JSON at `output`, and the plot beside it as PNG; returns both paths.

    Raises:
        UsageError: the folder cannot be written.
    """
    plot = output.with_suffix(".png")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        figure.savefig(plot)
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}") from None
    return output, plot


def check_output(output: Path | None) -> None:
    """Refuse, before anything is measured, an output that is no JSON file."""
    if output is None:
        return
    if not output.absolute().parent.is_dir():
        raise UsageError(f"--output {output}: the folder {output.parent} does not exist; make it, or name another")
    if output.suffix != ".json" or output.is_dir():
        raise UsageError(f"--output {output} is not the name of a .json file; the plot is written beside it as .png")
