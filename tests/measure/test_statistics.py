"""Intervals and tests against published and enumerated values."""

from __future__ import annotations

import itertools

import pytest

from nextblock.measure.statistics import mcnemar, wilson


@pytest.mark.parametrize(
    ("right", "trials", "low", "high"),
    [  # from the quadratic that the interval solves, (p - x)^2 = z^2 x (1 - x) / n, at z = 1.96
        (0, 10, 0.0, 0.277535),
        (10, 10, 0.722465, 1.0),
        (5, 10, 0.236590, 0.763410),
        (81, 263, 0.255291, 0.366216),
    ],
)
def test_the_wilson_interval_has_its_known_values(right, trials, low, high):
    assert wilson(right / trials, trials) == pytest.approx((low, high), abs=2e-4)


def test_its_ends_are_where_the_share_seen_is_z_standard_errors_away():
    for share, n in itertools.product((0.1, 0.5, 0.93), (7, 200)):
        for end in wilson(share, n):
            assert abs(share - end) == pytest.approx(1.96 * (end * (1 - end) / n) ** 0.5)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (0, 5, 0.0625), (2, 10, 0.0385742), (6, 6, 1.0), (1, 8, 0.0390625)],
)
def test_mcnemar_is_the_two_sided_binomial_test_of_the_prompts_that_differ(gained, lost, p):
    first = [False] * gained + [True] * lost + [True, False, True]
    second = [True] * gained + [False] * lost + [True, False, True]
    assert mcnemar(first, second) == pytest.approx(p, abs=1e-6)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_mcnemar_counts_the_outcomes_that_are_no_likelier():
    for n, k in itertools.product(range(1, 9), range(9)):
        if k <= n:
            outcomes = [sum(flips) for flips in itertools.product((0, 1), repeat=n)]
            extreme = sum(abs(count - n / 2) >= abs(k - n / 2) for count in outcomes)
            assert mcnemar([False] * k + [True] * (n - k), [True] * k + [False] * (n - k)) == extreme / 2**n
