"""Models and modes on a built-in task: accuracy of each, and their speeds, for which they take turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nextblock.config.progress import Update, counter
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.measure.accuracy import score_task
from nextblock.measure.bench.contest import alternate, compared, our_mode
from nextblock.measure.bench.prompts import Options, task_prompts
from nextblock.model.decoder import end_tokens
from nextblock.tasks import Task

TIMED, ROUNDS = 4, 4  # prompts of a round, decoded one at a time; rounds


def score_modes(
    wanted: Sequence[tuple[str, BlockDiffusionLM, Options]],
    task: Task,
    *,
    examples: int,
    first: int = 0,
    batch_size: int = 25,
    max_new_tokens: int | None = None,
    on_prompt: Update = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Score each model and mode on a task, then time all of them in turns, at batch 1.

    Args:
        wanted: name, model and decoding options of each; the models must share a tokenizer. Modes are compared with
            the answers of the last ar mode before them, or of the first one at all.
        examples, first, batch_size: as of `score_task`.
        max_new_tokens: default: the task's.
        on_prompt: called with prompts done and prompts in all.
    Returns:
        For each, in order, the fields of `TaskScore`, `model` (the name) and `tokens_per_second`, the median over
        rounds. Where one is in ar mode also `speedup` over the first of those, the median of the ratios within a
        round, with the least and the largest (`speedup_low`, `speedup_high`).
    """
    timed, max_new_tokens = min(TIMED, examples), max_new_tokens or task.max_new_tokens
    advance = counter(on_prompt, len(wanted) * (examples + ROUNDS * timed))
    common: Any = {"examples": examples, "first": first, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    in_ar = [options["mode"] == "ar" for _, _, options in wanted]
    first_ar = in_ar.index(True) if any(in_ar) else None
    rows: list[dict[str, Any]] = [{} for _ in wanted]
    reference: list[str] | None = None
    for i in sorted(range(len(wanted)), key=lambda i: i != first_ar):  # the others are compared with it
        name, lm, options = wanted[i]
        score, answers = score_task(
            lm, task, reference=None if in_ar[i] else reference, on_example=advance, **common, **options
        )
        reference = answers if in_ar[i] else reference
        rows[i] = {"model": name, **asdict(score)}

    lm = wanted[0][1]
    prompts = [[ids] for ids in task_prompts(task.name, "test", timed, first).encode(lm)]
    ends = end_tokens(lm.decoder, lm.tokenizer)
    contestants = [our_mode(lm, options, max_new_tokens, ends, task.stop) for _, lm, options in wanted]
    for contestant in contestants:
        contestant.run(prompts[0])  # warm up
    results = alternate(contestants, [prompts] * ROUNDS, advance)
    for row, own in zip(rows, results, strict=True):
        figures = compared(own, results[first_ar or 0])
        row |= figures if first_ar is not None else {"tokens_per_second": figures["tokens_per_second"]}
    return rows
