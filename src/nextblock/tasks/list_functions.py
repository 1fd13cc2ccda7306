"""Functions of a list of numbers (filter, map, reduce, slice) for the task `functions`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial


@dataclass(frozen=True)
class Draft:
    """A function before it gets a name: what it takes, says and does.

    Attributes:
        kind: type of its one parameter, `list` (of int), `int` or `str`.
        doc: docstring; `{v}` stands for the parameter.
        body: lines of the body, without the indentation that all of them share; `{v}` likewise.
        key: the computation and its constants.
        constants: integers that the hidden cases must come close to.
        near: text that the hidden cases of a `str` function should hold.
    """

    kind: str
    doc: str
    body: str
    key: str
    constants: tuple[int, ...] = ()
    near: str = ""


_list_draft = partial(Draft, "list")


def _filter(rng: random.Random) -> tuple[str, str, tuple[int, ...]]:
    """Words after the parameter, condition on x, constants."""
    k, d = rng.randint(2, 30), rng.randint(2, 9)
    return rng.choice(
        (
            (f"greater than {k}", f"x > {k}", (k,)),
            (f"less than {k}", f"x < {k}", (k,)),
            (f"not equal to {k}", f"x != {k}", (k,)),
            (f"divisible by {d}", f"x % {d} == 0", (d,)),
            (f"not divisible by {d}", f"x % {d} != 0", (d,)),
        )
    )


def _map(rng: random.Random) -> tuple[str, str, tuple[int, ...]]:
    """Words, expression of x, constants."""
    k, m = rng.randint(2, 30), rng.randint(2, 9)
    return rng.choice(
        ((f"plus {k}", f"x + {k}", (k,)), (f"minus {k}", f"x - {k}", (k,)), (f"times {m}", f"x * {m}", (m,)))
    )


def _list_pipeline(rng: random.Random) -> Draft:
    """[map(x) for x in v if filter(x)]"""
    which, condition, near = _filter(rng)
    how, expression, more = _map(rng)
    return _list_draft(
        f"Return a list of x {how} for each x in {{v}} {which}.",
        f"return [{expression} for x in {{v}} if {condition}]",
        f"list {expression} if {condition}",
        near + more,
    )


def _list_filter(rng: random.Random) -> Draft:
    which, condition, near = _filter(rng)
    return _list_draft(
        f"Return a list of the numbers in {{v}} {which}.",
        f"return [x for x in {{v}} if {condition}]",
        f"list x if {condition}",
        near,
    )


def _list_map(rng: random.Random) -> Draft:
    how, expression, near = _map(rng)
    return _list_draft(
        f"Return a list of x {how} for each x in {{v}}.",
        f"return [{expression} for x in {{v}}]",
        f"list {expression}",
        near,
    )


def _list_sum(rng: random.Random) -> Draft:
    which, condition, near = _filter(rng)
    how, expression, more = rng.choice((("", "x", ()), _map(rng)))
    what = f"x {how} for each x" if how else "the numbers"
    return _list_draft(
        f"Return the sum of {what} in {{v}} {which}.",
        f"total = 0\nfor x in {{v}}:\n    if {condition}:\n        total += {expression}\nreturn total",
        f"sum {expression} if {condition}",
        near + more,
    )


def _list_count(rng: random.Random) -> Draft:
    which, condition, near = _filter(rng)
    return _list_draft(
        f"Count the numbers in {{v}} {which}.",
        f"count = 0\nfor x in {{v}}:\n    if {condition}:\n        count += 1\nreturn count",
        f"count if {condition}",
        near,
    )


def _list_any_all(rng: random.Random) -> Draft:
    which, condition, near = _filter(rng)
    word, function = rng.choice((("any number", "any"), ("every number", "all")))
    return _list_draft(
        f"Return whether {word} in {{v}} is {which}.",
        f"return {function}({condition} for x in {{v}})",
        f"{function} {condition}",
        near,
    )


def _list_extreme(rng: random.Random) -> Draft:
    which, condition, near = _filter(rng)
    word, function = rng.choice((("largest", "max"), ("smallest", "min")))
    default = rng.randint(0, 9)
    return _list_draft(
        f"Return the {word} number in {{v}} {which}, or {default} if there is none.",
        f"return {function}((x for x in {{v}} if {condition}), default={default})",
        f"{function} if {condition} default {default}",
        near,
    )


def _list_replace(rng: random.Random) -> Draft:
    old, new = rng.sample(range(2, 40), 2)
    return _list_draft(
        f"Return a copy of {{v}} with each {old} replaced by {new}.",
        f"return [{new} if x == {old} else x for x in {{v}}]",
        f"replace {old} {new}",
        (old, new),
    )


def _list_slice(rng: random.Random) -> Draft:
    start, step = rng.randint(1, 6), rng.randint(2, 6)
    doc, code = rng.choice(
        (
            (
                f"Skip the first {start} items of {{v}}, then return every item number {step}.",
                f"{{v}}[{start}::{step}]",
            ),
            (f"Return {{v}} without its first {start} and last {step} items.", f"{{v}}[{start}:-{step}]"),
            (
                f"Return the first {start} and then the last {step} items of {{v}}.",
                f"{{v}}[:{start}] + {{v}}[-{step}:]",
            ),
        )
    )
    return _list_draft(doc, f"return {code}", f"str {code}")


def _list_insert(rng: random.Random) -> Draft:
    first, last = rng.randint(2, 40), rng.randint(2, 40)
    return _list_draft(
        f"Return {{v}} with {first} put before and {last} put after its items.",
        f"return [{first}] + {{v}} + [{last}]",
        f"surround {first} {last}",
    )


LIST_TEMPLATES: tuple[Callable[[random.Random], Draft], ...] = (
    *(_list_pipeline, _list_pipeline, _list_filter, _list_map, _list_sum, _list_sum, _list_count),
    *(_list_any_all, _list_extreme, _list_replace, _list_slice, _list_insert),
)
