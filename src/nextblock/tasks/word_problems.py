"""Word problems of two or three arithmetic steps, solved in writing: a small stand-in for GSM8K.

Prompts are about 80 to 150 bytes, completions 40 to 75; every number lies in 2..198.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial

from nextblock.tasks.example import ANSWER_MARKER, Example, Task, draw, final_answer_is

NAME = "word_problems"

_SHE = ("Ann", "Mia", "Zoe", "Eva", "Lily", "Ruth", "Nina", "Sara")
_HE = ("Tom", "Ben", "Sam", "Leo", "Max", "Dan", "Omar", "Jack")
_THINGS = ("apples", "books", "cards", "coins", "pens", "shells", "stamps", "cookies", "marbles", "plums")
_HOLDERS = ("boxes", "bags", "jars", "shelves", "trays")
_GOODS = ("pen", "cup", "hat", "toy", "kite", "lamp", "ball", "drum")
_GAINS = ("buys {n} more", "finds {n} more", "gets {n} more", "wins {n} more")
_LOSSES = ("gives {n} to {friend}", "loses {n}", "sells {n}", "gives {n} away")

Step = tuple[int, str, int]
Story = tuple[str, list[Step]]


def _value(step: Step) -> int:
    left, operation, right = step
    if operation == "+":
        return left + right
    if operation == "-":
        return left - right
    return left * right if operation == "*" else left // right


def _people(rng: random.Random) -> tuple[str, str, str]:
    """A name, its pronoun, and another person's name."""
    name = rng.choice(_SHE + _HE)
    friend = rng.choice([other for other in _SHE + _HE if other != name])
    return name, "She" if name in _SHE else "He", friend


def _change(rng: random.Random, have: int, friend: str) -> tuple[str, Step]:
    """One gain or loss that keeps the count in 2..99, and its step."""
    amount = rng.randint(2, 20)
    gain = have < amount + 2 or (have + amount <= 99 and rng.random() < 0.5)
    wording = rng.choice(_GAINS if gain else _LOSSES)
    return wording.format(n=amount, friend=friend), (have, "+" if gain else "-", amount)


def _changes(rng: random.Random, count: int) -> Story:
    """Two or three changes to what somebody has."""
    name, pronoun, friend = _people(rng)
    thing, start = rng.choice(_THINGS), rng.randint(3, 50)
    wordings: list[str] = []
    steps: list[Step] = []
    for _ in range(count):
        wording, step = _change(rng, _value(steps[-1]) if steps else start, friend)
        wordings, steps = [*wordings, wording], [*steps, step]
    told, now = f"{', '.join(wordings[:-1])} and {wordings[-1]}", " now" if count > 2 else ""
    return f"{name} has {start} {thing}. {pronoun} {told}. How many {thing} does {name} have{now}?", steps


def _groups(rng: random.Random) -> Story:
    name, pronoun, friend = _people(rng)
    thing, holder = rng.choice(_THINGS), rng.choice(_HOLDERS)
    count, each = rng.randint(2, 9), rng.randint(2, 9)
    change, step = _change(rng, count * each, friend)
    text = (
        f"{name} has {count} {holder} with {each} {thing} in each. {pronoun} {change}. "
        f"How many {thing} does {name} have?"
    )
    return text, [(count, "*", each), step]


def _compare(rng: random.Random) -> Story:
    name, _, friend = _people(rng)
    thing, have = rng.choice(_THINGS), rng.randint(4, 40)
    if rng.random() < 0.5:
        more = rng.randint(2, 20)
        relation, step = f"{more} more {thing} than", (have, "+", more)
    else:
        fewer = rng.randint(2, min(20, have - 2))
        relation, step = f"{fewer} fewer {thing} than", (have, "-", fewer)
    text = f"{name} has {have} {thing}. {friend} has {relation} {name}. How many {thing} do they have together?"
    return text, [step, (have, "+", _value(step))]


def _times(rng: random.Random) -> Story:
    name, _, friend = _people(rng)
    thing, have, factor = rng.choice(_THINGS), rng.randint(2, 9), rng.randint(2, 9)
    together = rng.random() < 0.5
    question = f"How many {thing} do they have together?" if together else f"How many more does {friend} have?"
    text = f"{name} has {have} {thing}. {friend} has {factor} times as many as {name}. {question}"
    product: Step = (have, "*", factor)
    last: Step = (have, "+", have * factor) if together else (have * factor, "-", have)
    return text, [product, last]


def _prices(rng: random.Random) -> Story:
    name, _, _ = _people(rng)
    one, other = rng.sample(_GOODS, 2)
    a, b, c, d = (rng.randint(2, 9) for _ in range(4))
    text = (
        f"A {one} costs {a} dollars and a {other} costs {b} dollars. "
        f"{name} buys {c} {one}s and {d} {other}s. How many dollars does {name} pay?"
    )
    return text, [(c, "*", a), (d, "*", b), (c * a, "+", d * b)]


def _money_left(rng: random.Random) -> Story:
    name, pronoun, _ = _people(rng)
    good, count, price = rng.choice(_GOODS), rng.randint(2, 9), rng.randint(2, 9)
    have = count * price + rng.randint(2, 18)
    text = (
        f"{name} has {have} dollars. {pronoun} buys {count} {good}s for {price} dollars each. "
        f"How many dollars are left?"
    )
    return text, [(count, "*", price), (have, "-", count * price)]


def _share(rng: random.Random) -> Story:
    name, pronoun, _ = _people(rng)
    thing, friends, each = rng.choice(_THINGS), rng.randint(2, 9), rng.randint(2, 9)
    total = friends * each
    if total >= 6 and rng.random() < 0.5:
        found = rng.randint(2, min(20, total - 2))
        step, change, shared = (total - found, "+", found), f"finds {found} more", "them all"
    else:
        lost = rng.randint(2, 20)
        step, change, shared = (total + lost, "-", lost), f"loses {lost}", "the rest"
    text = (
        f"{name} has {step[0]} {thing} and {change}. {pronoun} shares {shared} equally among {friends} friends. "
        f"How many {thing} does each get?"
    )
    return text, [step, (total, "/", friends)]


def _reading(rng: random.Random) -> Story:
    name, pronoun, _ = _people(rng)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    extra = rng.randint(2, 20)
    total = a * b + extra
    if rng.random() < 0.5:
        text = (
            f"{name} reads {a} pages a day for {b} days. {pronoun} reads {extra} more pages on Sunday. "
            f"How many pages does {name} read?"
        )
        return text, [(a, "*", b), (a * b, "+", extra)]
    text = (
        f"A book has {total} pages. {name} reads {a} pages a day for {b} days. "
        f"How many pages does {name} still have to read?"
    )
    return text, [(a, "*", b), (total, "-", a * b)]


_STORIES: tuple[Callable[[random.Random], Story], ...] = (
    *(partial(_changes, count=count) for count in (2, 2, 3, 3)),
    *(_groups, _compare, _times, _prices, _money_left, _share, _reading),
)


def _propose(rng: random.Random) -> Example:
    text, steps = rng.choice(_STORIES)(rng)
    written = " ".join(f"{step[0]} {step[1]} {step[2]} = {_value(step)}." for step in steps)
    answer = str(_value(steps[-1]))
    # Every wording of a problem names the same numbers and needs the same operations, in whatever order.
    quantities = sorted(int(number) for number in re.findall(r"\d+", text))
    operations = sorted(operation for _, operation, _ in steps)
    key = f"{' '.join(operations)} : {' '.join(map(str, quantities))}"
    return Example(f"Q: {text}\nA:", f" {written} {ANSWER_MARKER}{answer}.", answer, key)


TASK = Task(NAME, partial(draw, NAME, propose=_propose), final_answer_is)
