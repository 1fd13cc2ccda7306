"""Accuracy on a task, with its decoding figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nextblock.config.errors import UsageError
from nextblock.data.tasks import Task
from nextblock.decoding.lm import BlockDiffusionLM


@dataclass(frozen=True)
class TaskScore:
    """How one mode does on one task.

    tokens_per_forward: generated tokens over forwards, all of them counted: prefill, denoise, check, commit.
    equal_to_ar: share of prompts whose tokens equal AR mode's; None when there was nothing to compare with.
    """

    task: str
    mode: str
    threshold: float | None
    block_size: int
    accuracy: float
    examples: int
    tokens_per_forward: float
    equal_to_ar: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def score_task(
    lm: BlockDiffusionLM,
    task: Task,
    *,
    mode: str,
    examples: int = 200,
    threshold: float | None = 0.9,
    block_size: int | None = None,
    batch_size: int = 25,
    max_new_tokens: int = 160,
    split: str = "test",
    first: int = 0,
    reference: Sequence[str] | None = None,
    on_example: Callable[[int], None] | None = None,
) -> tuple[TaskScore, list[str]]:
    """Accuracy and tokens per forward of one mode on one task, greedy; `bench.scores` adds speeds.

    Args:
        lm: the model.
        task: a built-in task.
        mode: "ar", "diffusion" or "speculative".
        examples: held-out prompts, decoded in batches of `batch_size`.
        first: number of the first problem; settings are best chosen on others than those that are reported.
        reference: AR mode's answers to the same prompts, to compare with.
        on_example: called with the number of prompts just done.
    Returns:
        The score, and the answers in order.
    Raises:
        UsageError: a model without tokenizer, or a mode that it cannot decode in.
    """
    if lm.tokenizer is None:
        raise UsageError("this model folder has no tokenizer; scoring a task reads and writes text")
    cases = [task.example(split, index) for index in range(first, first + examples)]
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": max_new_tokens}
    if mode != "ar" and block_size is not None:
        options["block_size"] = block_size
    if mode == "diffusion":
        options["threshold"] = threshold
    answers: list[str] = []
    row_forwards = new_tokens = 0.0
    for start in range(0, examples, batch_size):
        prompts = [case.prompt for case in cases[start : start + batch_size]]
        out = lm.generate(prompts, **options)
        answers += out.texts
        new_tokens += out.stats.new_tokens
        row_forwards += out.stats.new_tokens / max(out.stats.tokens_per_forward, 1e-9)
        if on_example:
            on_example(len(prompts))
    right = sum(task.grade(answer, case) for answer, case in zip(answers, cases, strict=True))
    equal = None
    if reference is not None:
        equal = sum(a == b for a, b in zip(answers, reference, strict=True)) / examples
    size = 1 if mode == "ar" else int(block_size or (lm.settings.block_size if lm.settings else 1))
    score = TaskScore(
        task=task.name,
        mode=mode,
        threshold=threshold if mode == "diffusion" else None,
        block_size=size,
        accuracy=right / examples,
        examples=examples,
        tokens_per_forward=new_tokens / row_forwards,
        equal_to_ar=equal,
    )
    return score, answers
