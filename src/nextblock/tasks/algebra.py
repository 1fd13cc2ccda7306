"""Algebra in written steps (solve, expand, evaluate): a small stand-in for MATH.

Prompts are about 25 to 50 bytes, completions 45 to 105; sizes of all numbers are below 200. An expanded polynomial
must be written as the reference writes it: falling powers, no zero terms.
"""

from __future__ import annotations

import random
from functools import partial

from nextblock.tasks.example import ANSWER_MARKER, Example, Task, draw, final_answer_is

NAME = "algebra"


def _signed(value: int) -> str:
    """A term after another one: ` + 3` or ` - 3`."""
    return f" + {value}" if value >= 0 else f" - {-value}"


def _monomial(coefficient: int, variable: str) -> str:
    """`3x`, `x`, `-x`; the coefficient is not 0."""
    if abs(coefficient) == 1:
        return variable if coefficient == 1 else f"-{variable}"
    return f"{coefficient}{variable}"


def _added(coefficient: int, variable: str) -> str:
    """A monomial after another term: ` + 3x` or ` - x`."""
    return f" {'+' if coefficient > 0 else '-'} {_monomial(abs(coefficient), variable)}"


def _polynomial(square: int, linear: int, constant: int) -> str:
    """`2x^2 - x + 3`, terms with coefficient 0 left out; `0` when there is none."""
    terms = [_added(k, variable) for k, variable in ((square, "x^2"), (linear, "x")) if k]
    text = "".join(terms + [_signed(constant)] * bool(constant))
    return f"-{text[3:]}" if text.startswith(" - ") else text.removeprefix(" + ") or "0"


def _made(question: str, steps: list[str], answer: str, key: str) -> Example:
    written = "".join(f" {step}." for step in steps)
    return Example(f"{question}\nSteps:", f"{written} {ANSWER_MARKER}{answer}.", answer, key)


def _solve_linear(rng: random.Random) -> Example:
    """a*x + b = c and a*x - b = c."""
    a, x = rng.randint(2, 9), rng.randint(2, 12)
    b = rng.randint(1, 30)
    if rng.random() < 0.5 and a * x - b > 0:
        b = -b
    c = a * x + b
    undo = f"{c} - {b}" if b > 0 else f"{c} + {-b}"
    steps = [f"{a}x = {undo}", f"{a}x = {a * x}", f"x = {a * x} / {a}", f"x = {x}"]
    return _made(f"Solve: {a}x{_signed(b)} = {c}", steps, str(x), f"solve {a} {b} 0 {c}")


def _solve_factor(rng: random.Random) -> Example:
    """a*(x + b) = c and a*(x - b) = c, with c / a at most 20."""
    a, x, b = rng.randint(2, 9), rng.randint(2, 11), rng.randint(1, 9)
    if rng.random() < 0.5 and x - b > 0:
        b = -b
    inner = x + b
    undo = f"{inner} - {b}" if b > 0 else f"{inner} + {-b}"
    steps = [f"x{_signed(b)} = {a * inner} / {a}", f"x{_signed(b)} = {inner}", f"x = {undo}", f"x = {x}"]
    # The same equation multiplied out has the same key.
    return _made(f"Solve: {a}(x{_signed(b)}) = {a * inner}", steps, str(x), f"solve {a} {a * b} 0 {a * inner}")


def _solve_both_sides(rng: random.Random) -> Example:
    """a*x + b = c*x + d with a > c and d > b > 0."""
    c, difference, x, b = rng.randint(2, 7), rng.randint(2, 7), rng.randint(2, 9), rng.randint(1, 20)
    a, d = c + difference, b + difference * x
    steps = [
        f"{a}x - {c}x = {d} - {b}",
        f"{difference}x = {difference * x}",
        f"x = {difference * x} / {difference}",
        f"x = {x}",
    ]
    return _made(f"Solve: {a}x + {b} = {c}x + {d}", steps, str(x), f"solve {a} {b} {c} {d}")


def _expand_product(rng: random.Random) -> Example:
    """(a*x + p)(b*x + q) with small coefficients."""
    a, b = (1, 1) if rng.random() < 0.5 else (rng.randint(1, 4), rng.randint(1, 4))
    p, q = (rng.choice((-1, 1)) * rng.randint(1, 9) for _ in range(2))
    ax, bx = _monomial(a, "x"), _monomial(b, "x")
    outer, inner = a * q, p * b
    middle = _polynomial(0, outer + inner, 0)
    steps = [
        f"{ax}*{bx} = {_monomial(a * b, 'x^2')}",
        f"{ax}*{q} = {_monomial(outer, 'x')}",
        f"{p}*{bx} = {_monomial(inner, 'x')}",
        f"{p}*{q} = {p * q}",
        f"{_monomial(outer, 'x')}{_added(inner, 'x')} = {middle}",
    ]
    answer = _polynomial(a * b, outer + inner, p * q)
    # The factors commute, and so do their signs; the product is what makes the problem.
    return _made(f"Expand: ({ax}{_signed(p)})({bx}{_signed(q)})", steps, answer, f"expand {answer}")


def _expand_factor(rng: random.Random) -> Example:
    """k*(a*x + b) + c*x."""
    k, a, b, c = rng.randint(2, 9), rng.randint(1, 9), rng.randint(1, 9), rng.randint(1, 9)
    b, c = rng.choice((-1, 1)) * b, rng.choice((-1, 1)) * c
    ax, kax, cx = _monomial(a, "x"), _monomial(k * a, "x"), _added(c, "x")
    middle = _polynomial(0, k * a + c, 0)
    steps = [f"{k}*{ax} = {kax}", f"{k}*{b} = {k * b}", f"{kax}{cx} = {middle}"]
    answer = _polynomial(0, k * a + c, k * b)
    return _made(f"Expand: {k}({ax}{_signed(b)}){cx}", steps, answer, f"expand {k} {a} {b} {c}")


def _evaluate_products(rng: random.Random) -> Example:
    """a*b + c*d, also as a*x + c*y with values for x and y; a difference stays positive."""
    a, b, c, d = (rng.randint(2, 9) for _ in range(4))
    minus = a * b > c * d and rng.random() < 0.5
    sign, total = ("-", a * b - c * d) if minus else ("+", a * b + c * d)
    question = (
        f"Evaluate: {a}x {sign} {c}y at x = {b}, y = {d}"
        if rng.random() < 0.5
        else f"Evaluate: {a}*{b} {sign} {c}*{d}"
    )
    steps = [f"{a}*{b} = {a * b}", f"{c}*{d} = {c * d}", f"{a * b} {sign} {c * d} = {total}"]
    pairs = sorted((tuple(sorted((a, b))), tuple(sorted((c, d)))))
    return _made(question, steps, str(total), f"products {sign} {pairs}")


def _evaluate_brackets(rng: random.Random) -> Example:
    """a*(b + c) + d with the bracket in 2..9; each sign may be a minus."""
    a, inner = rng.randint(2, 9), rng.randint(2, 9)
    if rng.random() < 0.5 and inner > 2:
        b = rng.randint(1, inner - 1)
        c = inner - b
    else:
        c = -rng.randint(1, 20)
        b = inner - c
    d = rng.randint(1, 30)
    if rng.random() < 0.5 and a * inner - d > 0:
        d = -d
    total = a * inner + d
    steps = [f"{b}{_signed(c)} = {inner}", f"{a}*{inner} = {a * inner}", f"{a * inner}{_signed(d)} = {total}"]
    key = f"brackets {a} {sorted((b, c))} {d}"
    return _made(f"Evaluate: {a}*({b}{_signed(c)}){_signed(d)}", steps, str(total), key)


def _evaluate_square(rng: random.Random) -> Example:
    """x^2 + a*x + b at a digit x, where no partial result is negative."""
    x, a, b = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 20)
    if rng.random() < 0.5 and x > a:
        a = -a
    partial = x * x + a * x
    if rng.random() < 0.5 and partial > b:
        b = -b
    steps = [
        f"{x}*{x} = {x * x}",
        f"{abs(a)}*{x} = {abs(a) * x}",
        f"{x * x}{_signed(a * x)} = {partial}",
        f"{partial}{_signed(b)} = {partial + b}",
    ]
    question = f"Evaluate: {_polynomial(1, a, b)} at x = {x}"
    return _made(question, steps, str(partial + b), f"square {x} {a} {b}")


# A third of the problems each: solve, expand, evaluate.
_KINDS = (
    (_solve_linear, _solve_factor, _solve_both_sides),
    (_expand_product, _expand_product, _expand_factor),
    (_evaluate_products, _evaluate_brackets, _evaluate_square),
)


def _propose(rng: random.Random) -> Example:
    return rng.choice(rng.choice(_KINDS))(rng)


TASK = Task(NAME, partial(draw, NAME, propose=_propose), final_answer_is)
