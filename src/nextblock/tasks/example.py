"""What a task is, and how its problems are split into train and test.

A problem has a *key*: its quantities and operations, without names, objects or wording. A stable
hash of the key puts it on one side for good, so no wording of a test problem is ever in train.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar, cast, get_args

from nextblock.config.errors import UsageError, nearest

Split = Literal["train", "test"]
Candidate = TypeVar("Candidate")

# One key in TEST_SHARE is a test problem.
TEST_SHARE = 8
ANSWER_MARKER = "The answer is "


@dataclass(frozen=True)
class Example:
    """One problem. All text is ASCII.

    Attributes:
        prompt: what the model is given.
        completion: the reference answer with its written steps, without an end token.
        answer: the final answer; for `functions` the hidden assertions, as source text.
        key: what makes the problem (quantities and operations); equal for every wording of it.
    """

    prompt: str
    completion: str
    answer: str
    key: str


@dataclass(frozen=True)
class Task:
    """An exactly scored task.

    Attributes:
        name: `word_problems`, `algebra`, `functions`, `human_eval` or `planted_fact`.
        example: (split, index) -> Example; pure, random access, any index >= 0 (below `count`).
        grade: (generated completion up to the end token, example) -> right or wrong.
        count: test problems; None: no end.
        max_new_tokens: enough for an answer.
        stop: text at which an answer may be given up, as what follows is not graded.
    """

    name: str
    example: Callable[[str, int], Example]
    grade: Callable[[str, Example], bool]
    count: int | None = None
    max_new_tokens: int = 160
    stop: tuple[str, ...] = ()


def split_of(task: str, key: str) -> Split:
    """The side of the split that the problem `key` of `task` is on, for ever and on every machine."""
    digest = hashlib.sha256(f"{task}\n{key}".encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") % TEST_SHARE == 0 else "train"


def draw(task: str, split: str, index: int, propose: Callable[[random.Random], Example]) -> Example:
    """Problem number `index` of a split: the first proposal whose key lies on that side.

    Args:
        task: name of the task; part of the seed and of the key's hash.
        split: `train` or `test`.
        index: any integer >= 0. Indices are independent draws, so late ones may repeat a problem.
        propose: makes a problem from a random generator.

    Raises:
        UsageError: an unknown split or a negative index.
    """
    sides = get_args(Split)
    if split not in sides:
        raise UsageError(f"task split '{split}' does not exist{nearest(split, sides)}")
    if index < 0:
        raise UsageError(f"task example index {index} is negative; use 0 or more")
    seed = hashlib.sha256(f"{task}\n{split}\n{index}".encode()).digest()
    rng = random.Random(int.from_bytes(seed[:8], "big"))
    side = cast(Split, split)
    while True:
        example = propose(rng)
        if split_of(task, example.key) == side:
            return example


def final_answer_is(completion: str, problem: Example) -> bool:
    """True when the completion states one final answer, as its last statement, and it is `problem.answer`.

    The text must hold `The answer is ` exactly once and end with that statement: the marker, the
    answer in the reference's own spelling, and a full stop; white space around the text is ignored.
    So `14.5`, `140`, `14 apples`, a missing full stop (a cut-off number), a second answer, or words
    after the answer are all wrong. The steps before it are not scored, as in GSM8K.
    """
    parts = completion.strip().split(ANSWER_MARKER)
    return len(parts) == 2 and parts[1] == f"{problem.answer}."
