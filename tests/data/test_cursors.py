"""Laws of the order in which sources are read."""

from __future__ import annotations

import sys
from collections import Counter

import numpy as np
import pytest

from nextblock.data.cursors import Shuffle


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 17, 100, 1000, 1023])
def test_a_shuffle_holds_every_place_once(count):
    order = Shuffle(count, [3, 1])
    assert sorted(order[place] for place in range(count)) == list(range(count))


def test_every_order_of_a_few_documents_comes_about_as_often():
    orders = Counter(tuple(Shuffle(4, [0, epoch])[place] for place in range(4)) for epoch in range(4800))
    # 24 orders, 200 times each: chi-square with 23 degrees of freedom stays below 60 but once in 30,000 times.
    assert sum((orders[order] - 200) ** 2 / 200 for order in orders) + 200 * (24 - len(orders)) < 60


def test_neighbours_are_sent_anywhere():
    count = 100_000
    places = np.array([Shuffle(count, [1])[place] for place in range(20_000)])
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.03
    assert np.histogram(places, 20)[0] == pytest.approx(1000, rel=0.2)


def test_a_shuffle_of_a_million_times_more_documents_takes_no_more_memory():
    few, many = Shuffle(10**4, [0]), Shuffle(10**10, [0])
    assert sum(map(sys.getsizeof, vars(many).values())) <= sum(map(sys.getsizeof, vars(few).values())) + 16
    assert 0 <= many[10**10 - 1] < 10**10
