"""Functions of one integer or one string for the task `functions`."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

from nextblock.tasks.list_functions import Draft

_LETTERS = "abcdeilmnoprstu"

_int_draft, _str_draft = partial(Draft, "int"), partial(Draft, "str")


def _int_clamp(rng: random.Random) -> Draft:
    low = rng.randint(2, 30)
    high = low + rng.randint(2, 30)
    return _int_draft(
        f"Return {{v}} limited to the range from {low} to {high}.",
        f"if {{v}} < {low}:\n    return {low}\nif {{v}} > {high}:\n    return {high}\nreturn {{v}}",
        f"clamp {low} {high}",
        (low, high),
    )


def _two_divisors(rng: random.Random) -> tuple[int, int]:
    """Two divisors of which neither divides the other, so that both of them matter."""
    while True:
        a, b = rng.sample(range(2, 16), 2)
        if a % b and b % a:
            return a, b


def _int_divisible(rng: random.Random) -> Draft:
    a, b = _two_divisors(rng)
    word, doc = rng.choice((("and", "both {a} and {b}"), ("or", "{a} or {b} or both")))
    return _int_draft(
        f"Return whether {{v}} is divisible by {doc.format(a=a, b=b)}.",
        f"return {{v}} % {a} == 0 {word} {{v}} % {b} == 0",
        f"divisible {word} {sorted((a, b))}",
        (a, b, a * b),
    )


def _int_between(rng: random.Random) -> Draft:
    low = rng.randint(2, 30)
    high = low + rng.randint(2, 30)
    return _int_draft(
        f"Return whether {{v}} is between {low} and {high}, both included.",
        f"return {low} <= {{v}} <= {high}",
        f"between {low} {high}",
        (low, high),
    )


def _int_formula(rng: random.Random) -> Draft:
    a, b = rng.randint(2, 20), rng.randint(2, 30)
    doc, code = rng.choice(
        (
            ("{a} times {{v}}, plus {b}", "{a} * {{v}} + {b}"),
            ("{a} times {{v}}, minus {b}", "{a} * {{v}} - {b}"),
            ("the square of {{v}}, plus {b}", "{{v}} * {{v}} + {b}"),
            ("the remainder of {{v}} divided by {a}, plus {b}", "{{v}} % {a} + {b}"),
            ("the distance between {{v}} and {b}, times {a}", "abs({{v}} - {b}) * {a}"),
        )
    )
    return _int_draft(
        f"Return {doc.format(a=a, b=b)}.",
        f"return {code.format(a=a, b=b)}",
        f"formula {code.format(a=a, b=b)}",
        (a, b),
    )


def _int_branch(rng: random.Random) -> Draft:
    k, m, b = rng.randint(2, 30), rng.randint(2, 9), rng.randint(2, 30)
    return _int_draft(
        f"Return {{v}} times {m} if {{v}} is greater than {k}, else {{v}} plus {b}.",
        f"if {{v}} > {k}:\n    return {{v}} * {m}\nreturn {{v}} + {b}",
        f"branch {k} {m} {b}",
        (k,),
    )


def _int_multiples(rng: random.Random) -> Draft:
    a, b = _two_divisors(rng)
    return _int_draft(
        f"Return the sum of the multiples of {a} or {b} from 1 to {{v}}.",
        "total = 0\n"
        "for x in range(1, {v} + 1):\n"
        f"    if x % {a} == 0 or x % {b} == 0:\n"
        "        total += x\n"
        "return total",
        f"multiples {sorted((a, b))}",
        (a, b, a + b, 2 * a, 2 * b),
    )


def _str_slice(rng: random.Random) -> Draft:
    a, b = rng.randint(1, 6), rng.randint(2, 6)
    doc, code = rng.choice(
        (
            ("the first {a} and then the last {b} characters of {{v}}", "{{v}}[:{a}] + {{v}}[-{b}:]"),
            ("{{v}} without its first {a} and last {b} characters", "{{v}}[{a}:-{b}]"),
            ("every {b}th character of {{v}}, from index {a} on", "{{v}}[{a}::{b}]"),
            (
                "{{v}} with its first {b} characters moved to the end, all {a} times",
                "({{v}}[{b}:] + {{v}}[:{b}]) * {a}",
            ),
        )
    )
    doc = doc.format(a=a, b=b).replace("2th", "2nd").replace("3th", "3rd")
    return _str_draft(f"Return {doc}.", f"return {code.format(a=a, b=b)}", f"str {code.format(a=a, b=b)}")


def _str_cut(rng: random.Random) -> Draft:
    k, mark = rng.randint(2, 20), rng.choice(".-+*!")
    return _str_draft(
        f"Return {{v}}, cut to {k} characters plus '{mark}' if it is longer.",
        f"if len({{v}}) > {k}:\n    return {{v}}[:{k}] + '{mark}'\nreturn {{v}}",
        f"cut {k} {mark}",
        (k,),
    )


def _str_pad(rng: random.Random) -> Draft:
    k, mark = rng.randint(5, 30), rng.choice(".-+*_0")
    word, method = rng.choice((("left", "rjust"), ("right", "ljust")))
    return _str_draft(
        f"Return {{v}} padded on the {word} with '{mark}' to {k} characters.",
        f"return {{v}}.{method}({k}, '{mark}')",
        f"{method} {k} {mark}",
        (k,),
    )


def _str_letters(rng: random.Random) -> Draft:
    a, b = rng.sample(_LETTERS, 2)
    doc, code = rng.choice(
        (
            ("{{v}} with each '{a}' replaced by '{b}'", "{{v}}.replace('{a}', '{b}')"),
            ("how often '{a}' or '{b}' occurs in {{v}}", "{{v}}.count('{a}') + {{v}}.count('{b}')"),
            ("whether {{v}} starts with '{a}' or ends with '{b}'", "{{v}}.startswith('{a}') or {{v}}.endswith('{b}')"),
            ("{{v}} without each '{a}' and '{b}'", "{{v}}.replace('{a}', '').replace('{b}', '')"),
        )
    )
    code = code.format(a=a, b=b)
    # Counting and removing do not depend on the order of the two letters.
    ordered = "startswith" in code or f"'{a}', '{b}'" in code
    first, last = (a, b) if ordered else sorted((a, b))
    shape = code.replace(f"'{a}'", "A").replace(f"'{b}'", "B")
    return _str_draft(
        f"Return {doc.format(a=a, b=b)}.", f"return {code}", f"letters {shape} {first} {last}", near=a + b
    )


def _str_words(rng: random.Random) -> Draft:
    k, letter = rng.randint(1, 6), rng.choice(_LETTERS)
    which, condition, near = rng.choice(
        (
            (f"longer than {k} letters", f"len(w) > {k}", ""),
            (f"shorter than {k + 1} letters", f"len(w) < {k + 1}", ""),
            (f"that start with '{letter}'", f"w.startswith('{letter}')", letter),
            (f"that hold '{letter}'", f"'{letter}' in w", letter),
        )
    )
    mark = rng.choice("-+/_.:")
    doc, code = rng.choice(
        (
            (f"Return a list of the words in {{v}} {which}.", f"[w for w in {{v}}.split() if {condition}]"),
            (
                f"Join the words in {{v}} {which} with '{mark}'.",
                f"'{mark}'.join(w for w in {{v}}.split() if {condition})",
            ),
        )
    )
    return _str_draft(doc, f"return {code}", f"words {code}", near=near)


def _str_join(rng: random.Random) -> Draft:
    k, mark = rng.randint(2, 20), rng.choice("-+/_.:")
    doc, code = rng.choice(
        (
            (f"Repeat {{v}} {k} times with '{mark}' between.", f"'{mark}'.join([{{v}}] * {k})"),
            (
                f"Join the words of {{v}} in reverse order with '{mark}', then add {k}.",
                f"'{mark}'.join({{v}}.split()[::-1]) + '{k}'",
            ),
        )
    )
    return _str_draft(doc, f"return {code}", f"join {code}")


Template = Callable[[random.Random], Draft]
INT_TEMPLATES: tuple[Template, ...] = (
    _int_clamp,
    _int_divisible,
    _int_between,
    _int_formula,
    _int_branch,
    _int_multiples,
)
STR_TEMPLATES: tuple[Template, ...] = (_str_slice, _str_cut, _str_pad, _str_letters, _str_words, _str_join)
