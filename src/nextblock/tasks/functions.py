"""Short Python functions from a docstring, scored by running them: a small stand-in for HumanEval.

Prompts (signature and docstring) are about 60 to 110 bytes, completions (the body) 20 to 110; `answer` holds eight or
more assertions that compare the function with the reference.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence
from functools import partial
from textwrap import indent
from typing import Any

from nextblock.tasks.example import Example, Task, draw
from nextblock.tasks.list_functions import LIST_TEMPLATES, Draft
from nextblock.tasks.sandbox import evaluate_python
from nextblock.tasks.scalar_functions import INT_TEMPLATES, STR_TEMPLATES

NAME = "functions"

_TEMPLATES = LIST_TEMPLATES + INT_TEMPLATES + STR_TEMPLATES
_FUNCTIONS = ("f", "solve", "compute", "helper", "process", "apply", "task", "func", "result", "step")
_PARAMETERS = {
    "list": ("nums", "values", "items", "data"),
    "int": ("n", "num", "value", "number"),
    "str": ("s", "text", "line", "word"),
}
_WORDS = ("tree", "a", "sun", "letter", "on", "paper", "rail", "moon", "lamp", "to", "simple", "river", "cat")
_CASES = 8


def _numbers(rng: random.Random, constants: Sequence[int], count: int) -> list[int]:
    """Integers around the constants (where nearly right code goes wrong), their multiples, and others."""
    close = [k + shift for k in constants for shift in (-1, 0, 0, 1)]
    multiples = [k * rng.randint(2, 6) for k in constants]
    pool = close + multiples + [rng.randint(-9, 60) for _ in range(6)]
    return [rng.choice(pool) for _ in range(count)]


def _text(rng: random.Random, near: str, length: int) -> str:
    """Words of lower-case letters, in which the letters of `near` are frequent."""
    words = [rng.choice(_WORDS) for _ in range(length)]
    for place in range(len(words)):
        if near and rng.random() < 0.6:
            letter, other = rng.choice(near), rng.choice(near)
            words[place] = rng.choice((letter + words[place], words[place] + other, letter + other))
    return " ".join(words)


def _arguments(rng: random.Random, draft: Draft) -> Sequence[list[int] | int | str]:
    """`_CASES` arguments or a few more: random ones, boundaries, and the empty or the zero case."""
    if draft.kind == "list":
        close = [k + shift for k in draft.constants for shift in (-1, 0, 1)]
        singles = [[number] for number in rng.sample(close, min(3, len(close)))]
        return [[], list(range(20)), close, *singles] + [
            _numbers(rng, draft.constants, rng.randint(4, 12)) for _ in range(_CASES - 2)
        ]
    if draft.kind == "int":
        close = [max(0, k + shift) for k in draft.constants for shift in (-1, 0, 1)]
        return [*dict.fromkeys([0, *close, *(rng.randint(1, 80) for _ in range(_CASES))])]
    if draft.constants:
        return ["", *("x" * (k + shift) for k in draft.constants for shift in (-1, 0, 1)), _text(rng, "", 6)]
    edges = [draft.near[0] + "x", "x" + draft.near[-1]] if draft.near else [" ".join((*_WORDS, "evening", "mountain"))]
    return ["", *edges] + [_text(rng, draft.near, rng.randint(2, 7)) for _ in range(_CASES - 2)]


def _outputs(source: str, name: str, arguments: Sequence[Any]) -> list[Any]:
    """What our own reference returns; `source` is only ever made from the templates."""
    namespace: dict[str, Any] = {}
    exec(compile(source, "<reference>", "exec"), namespace)
    return [namespace[name](argument) for argument in arguments]


def _propose(rng: random.Random) -> Example:
    draft = rng.choice(_TEMPLATES)(rng)
    name, parameter = rng.choice(_FUNCTIONS), rng.choice(_PARAMETERS[draft.kind])
    prompt = f'def {name}({parameter}):\n    """{draft.doc.format(v=parameter)}"""\n'
    completion = indent(draft.body.format(v=parameter), "    ")
    arguments = _arguments(rng, draft)
    outputs = _outputs(prompt + completion, name, arguments)
    assertions = [f"assert {name}({given!r}) == {out!r}" for given, out in zip(arguments, outputs, strict=True)]
    return Example(prompt, completion, "\n".join(assertions), draft.key)


def grade(completion: str, problem: Example) -> bool:
    """True when the function made of prompt and completion passes every hidden assertion.

    The code runs in the sandbox. Only the calls are handed to it; the expected values stay here and
    are compared with the `repr` of what came back, so the answer cannot fake an equality, and `True`
    is not 1. Anything else (an exception, no end in time, an early exit, a forbidden act) is wrong.
    """
    calls: list[str] = []
    expected: list[str] = []
    for statement in ast.parse(problem.answer).body:
        assert isinstance(statement, ast.Assert)
        assert isinstance(statement.test, ast.Compare)
        calls.append(ast.unparse(statement.test.left))
        expected.append(repr(ast.literal_eval(statement.test.comparators[0])))
    return evaluate_python(problem.prompt + completion, calls) == expected


TASK = Task(NAME, partial(draw, NAME, propose=_propose), grade)
