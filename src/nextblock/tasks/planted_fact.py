"""Word problems whose story stands somewhere in a longer text, in texts up to one length and of one, two and four
times that length: does what was learned on short rows hold on longer ones?

Sentences about other things stand before the story and between it and its question. `planted_fact` has all lengths
up to that of training, since a model learns to look far back only from texts in which it need not.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

from nextblock.tasks import word_problems
from nextblock.tasks.example import Example, Task, final_answer_is

NAME = "planted_fact"
LENGTHS = {NAME: (160, 420), f"{NAME}_1x": (420, 420), f"{NAME}_2x": (910, 910), f"{NAME}_4x": (1890, 1890)}
"""Least and most bytes of a prompt by task, to within a sentence; with their answers they fit 1, 2 or 4 times 490."""

_PLACES = ("house", "garden", "school", "shop", "park", "street", "market", "river", "tower", "museum")
_STATES = ("old", "quiet", "open", "far away", "new", "small", "closed today", "full of people", "green", "near")


def _filler(rng: random.Random) -> str:
    return f"The {rng.choice(_PLACES)} is {rng.choice(_STATES)}. "


def _example(split: str, index: int, name: str) -> Example:
    problem = word_problems.TASK.example(split, index)
    rng = random.Random(f"{name} {split} {index}")
    begin, end = len("Q: "), problem.prompt.rindex("How many")
    room, sentences = rng.randint(*LENGTHS[name]) - len(problem.prompt), []
    while len(sentence := _filler(rng)) <= room:
        sentences.append(sentence)
        room -= len(sentence)
    before = rng.randint(0, len(sentences))
    parts = (*sentences[:before], problem.prompt[begin:end], *sentences[before:])
    return replace(problem, prompt=f"Q: {''.join(parts)}{problem.prompt[end:]}")


def task(name: str) -> Task:
    """The task of that name in `LENGTHS`."""
    return Task(name, partial(_example, name=name), final_answer_is, max_new_tokens=100)
