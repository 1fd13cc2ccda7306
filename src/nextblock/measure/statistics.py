"""How sure a figure is: the interval of a share, and the test of two answers to the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence


def wilson(share: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share seen in so many trials   (Wilson 1927)."""
    n = max(trials, 1)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Exact two-sided p-value that both are right equally often, from the same prompts   (McNemar 1947).

    Only prompts that one answers right and the other does not tell them apart; under equality each of these falls to
    either with probability 1/2.
    """
    pairs = list(zip(first, second, strict=True))
    gained, lost = sum(b and not a for a, b in pairs), sum(a and not b for a, b in pairs)
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)
