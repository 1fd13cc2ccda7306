"""A fact to be found in a text, in texts up to one length and of one, two and four times that length: does what was
learned on short rows hold on longer ones?

One to five people have codes, told in one sentence each among sentences about other things; the question asks for one
code. A model learns this only where short texts stand among the long ones, so `planted_fact` has all lengths.
"""

from __future__ import annotations

import random
from functools import partial

from nextblock.tasks.example import ANSWER_MARKER, Example, Task, draw, final_answer_is

NAME = "planted_fact"
LENGTHS = {NAME: (150, 440), f"{NAME}_1x": (440, 440), f"{NAME}_2x": (930, 930), f"{NAME}_4x": (1910, 1910)}
"""Least and most bytes of a prompt by task, to within a sentence; with their answers they fit 1, 2 or 4 times 490."""

_NAMES = ("Ann", "Mia", "Zoe", "Eva", "Lily", "Ruth", "Nina", "Sara", "Tom", "Ben", "Sam", "Leo", "Max", "Dan", "Omar")
_MOST = 5
_PLACES = ("house", "garden", "school", "shop", "park", "street", "market", "river")
_STATES = ("old", "quiet", "open", "far away", "new", "small", "closed today", "full of people")


def _filler(rng: random.Random) -> str:
    return f"The {rng.choice(_PLACES)} is {rng.choice(_STATES)}."


def _propose(rng: random.Random, least: int, most: int) -> Example:
    people, length = rng.sample(_NAMES, rng.randint(1, _MOST)), rng.randint(least, most)
    codes = [str(rng.randint(100_000, 999_999)) for _ in people]
    facts = [f"The code of {name} is {code}." for name, code in zip(people, codes, strict=True)]
    asked = rng.randrange(len(people))
    question = f"Q: What is the code of {people[asked]}?\nA:"
    room, sentences = length - len(question) - sum(len(fact) + 1 for fact in facts), []
    while len(sentence := _filler(rng)) < room:
        sentences.append(sentence)
        room -= len(sentence) + 1
    for fact in facts:
        sentences.insert(rng.randint(0, len(sentences)), fact)
    completion = f" {facts[asked]} {ANSWER_MARKER}{codes[asked]}."
    return Example(f"{' '.join(sentences)}\n{question}", completion, codes[asked], codes[asked])


def task(name: str) -> Task:
    """The task of that name in `LENGTHS`."""
    least, most = LENGTHS[name]
    propose = partial(_propose, least=least, most=most)
    return Task(name, partial(draw, NAME, propose=propose), final_answer_is, max_new_tokens=64)
