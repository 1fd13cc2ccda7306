"""A fact to be found in a long text, of one, two and four times one length: does what was learned on short rows hold
on longer ones?

Several people have codes, told in one sentence each among sentences about other things; the question asks for one
code. Prompts fill a stated number of bytes to within one sentence.
"""

from __future__ import annotations

import random
from functools import partial

from nextblock.tasks.example import ANSWER_MARKER, Example, Task, draw, final_answer_is

NAME = "planted_fact"
LENGTHS = {NAME: 440, f"{NAME}_2x": 930, f"{NAME}_4x": 1910}
"""Bytes of a prompt by task; with its answer it fits 1, 2 or 4 times 490 bytes."""

_NAMES = ("Ann", "Mia", "Zoe", "Eva", "Lily", "Ruth", "Nina", "Sara", "Tom", "Ben", "Sam", "Leo", "Max", "Dan", "Omar")
_FACTS = 5
_PLACES = ("house", "garden", "school", "shop", "park", "street", "market", "river")
_STATES = ("old", "quiet", "open", "far away", "new", "small", "closed today", "full of people")


def _filler(rng: random.Random) -> str:
    return f"The {rng.choice(_PLACES)} is {rng.choice(_STATES)}."


def _propose(rng: random.Random, length: int) -> Example:
    people = rng.sample(_NAMES, _FACTS)
    codes = [str(rng.randint(100_000, 999_999)) for _ in people]
    facts = [f"The code of {name} is {code}." for name, code in zip(people, codes, strict=True)]
    asked = rng.randrange(_FACTS)
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
    propose = partial(_propose, length=LENGTHS[name])
    return Task(name, partial(draw, NAME, propose=propose), final_answer_is, max_new_tokens=64)
