"""Accuracy on a built-in task, with the tokens that a forward pass gains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nextblock.config.errors import UsageError
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.decoding.options import DecodingConfig, with_stored
from nextblock.measure.statistics import mcnemar, wilson
from nextblock.tasks import Task


@dataclass(frozen=True)
class TaskScore:
    """How one mode does on one task.

    threshold: of diffusion mode; None: one token per denoising step.
    interval: of the accuracy, 95 % (`statistics.wilson`).
    tokens_per_forward: generated tokens over forwards, all of them counted: prefill, denoise, check, commit.
    equal_to_ar: share of prompts whose text equals AR mode's; None when there was nothing to compare with.
    p_value: of as many right answers as AR mode's to the same prompts (`statistics.mcnemar`); None as before.
    """

    task: str
    mode: str
    threshold: float | None
    block_size: int
    accuracy: float
    examples: int
    interval: tuple[float, float]
    tokens_per_forward: float
    equal_to_ar: float | None
    p_value: float | None


def _whole_blocks(config: DecodingConfig) -> dict[str, Any]:
    """The option by which no pass depends on the machine, where it has a say."""
    return {"draft_length": None} if config.mode == "speculative" and config.draft_length == "auto" else {}


def score_task(
    lm: BlockDiffusionLM,
    task: Task,
    *,
    examples: int = 200,
    first: int = 0,
    split: str = "test",
    batch_size: int = 25,
    reference: Sequence[str] | None = None,
    on_example: Callable[[int], None] = lambda more: None,
    **options: Any,
) -> tuple[TaskScore, list[str]]:
    """Accuracy and tokens per forward of one mode on one task; `bench.scores` adds speeds.

    Greedy unless `options` say else; sampled answers draw from `first` as the seed, whatever the batch size. Whole
    blocks are drafted unless `options` say else, so that passes depend neither on the batch nor on the machine.

    Args:
        examples: held-out prompts, decoded in batches of `batch_size`.
        first: number of the first problem; settings are best chosen on others than those that are reported.
        reference: AR mode's answers to the same prompts, to compare with.
        on_example: called with the number of prompts just done.
        options: of `generate`, its mode among them; `max_new_tokens` is the task's if not given.
    Returns:
        The score, and the answers in order.
    Raises:
        UsageError: a model without tokenizer, or a mode that it cannot decode in.
    """
    if lm.tokenizer is None:
        raise UsageError("this model folder has no tokenizer; scoring a task reads and writes text")
    cases = [task.example(split, index) for index in range(first, first + examples)]
    config = with_stored(lm.settings, options := {"max_new_tokens": task.max_new_tokens, **options})
    options = {**_whole_blocks(config), **options}
    answers, forwards, new_tokens = list[str](), 0, 0
    for start in range(0, examples, batch_size):
        prompts = [case.prompt for case in cases[start : start + batch_size]]
        out = lm.generate(prompts, stop=task.stop, **{"seed": first + start, **options})
        answers += out.texts
        new_tokens += out.stats.new_tokens
        forwards += sum(out.stats.row_forwards.values())
        on_example(len(prompts))
    right = [task.grade(answer, case) for answer, case in zip(answers, cases, strict=True)]
    equal = p_value = None
    if reference is not None:
        told = list(zip(answers, reference, right, cases, strict=True))
        before = [known if answer == other else task.grade(other, case) for answer, other, known, case in told]
        equal, p_value = sum(answer == other for answer, other, *_ in told) / examples, mcnemar(before, right)
    size = 1 if config.mode == "ar" or lm.settings is None else config.block_size or lm.settings.block_size
    return TaskScore(
        task=task.name,
        mode=config.mode,
        threshold=config.threshold if config.mode == "diffusion" else None,
        block_size=size,
        accuracy=sum(right) / examples,
        examples=examples,
        interval=wilson(sum(right) / examples, examples),
        tokens_per_forward=new_tokens / forwards,
        equal_to_ar=equal,
        p_value=p_value,
    ), answers
