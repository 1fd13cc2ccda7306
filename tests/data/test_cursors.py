"""Laws of the order in which sources are read."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextblock.config.errors import UsageError
from nextblock.config.sections import Source
from nextblock.data import cursors
from nextblock.data.cursors import Cursor, HubStream, Shuffle
from nextblock.data.records import Record, Records
from samples import jsonl, texts


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


@pytest.mark.parametrize("shards", [1, 3, 16])
@pytest.mark.parametrize("counts", [[[0, 5]], [[0, 5], [2, 8]], [[0, 2], [1, 3], [4, 40]]])
def test_epochs_before_a_source_grew_have_its_first_records_and_those_after_all(shards: int, counts: list) -> None:
    lengths = [[count for first, count in counts if first <= epoch][-1] for epoch in range(9)]
    orders = [Shuffle(length, [7, epoch]) for epoch, length in enumerate(lengths)]
    wanted = [order[place] for order, length in zip(orders, lengths, strict=True) for place in range(length)]
    records = Records(lambda index: Record({"text": str(index)}, ""), counts[-1][1])
    cursors = [Cursor(records, [7], (s, shards)) for s in range(shards)]
    for cursor in cursors:
        cursor.counts = counts
    assert [int(cursors[i % shards].take().value["text"]) for i in range(len(wanted))] == wanted


class Flaky:
    """Rows of a stream that fails before some of them, each time as often as is said."""

    def __init__(self, stream: Any, failures: dict[int, int]) -> None:
        self._stream, self._failures = stream, failures
        self.state_dict, self.load_state_dict = stream.state_dict, stream.load_state_dict
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        for row in self._stream:
            if self._failures.get(self.read, 0):
                self._failures[self.read] -= 1
                raise ConnectionError("no route to host")
            self.read += 1
            yield row


def streamed(tmp_path: Path, count: int, **options: Any) -> tuple[HubStream, list[Any]]:
    """A stream of `count` rows, and the rows."""
    (tmp_path / "data").mkdir(exist_ok=True)
    rows = texts(count)
    jsonl(tmp_path / "data" / "train.jsonl", rows)
    return HubStream(Source(path=str(tmp_path / "data"), format="hub"), **options), rows


def flaky(stream: HubStream, failures: dict[int, int]) -> HubStream:
    stream._stream = Flaky(stream._stream, failures)  # pyright: ignore[reportAttributeAccessIssue]
    return stream


def test_a_stream_that_fails_is_tried_again_and_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(cursors, "sleep", waited.append)
    stream, rows = streamed(tmp_path, 12)
    flaky(stream, {0: 1, 5: 3, 9: 99})
    assert [stream.take().value for _ in range(9)] == rows[:9]
    assert waited == [1, 1, 4, 15]
    with pytest.raises(UsageError, match="stopped: no route to host"):
        stream.take()
    assert waited[4:] == list(cursors.RETRY_SECONDS)


def test_a_shuffled_stream_that_fails_gives_the_rows_of_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cursors, "sleep", lambda seconds: None)
    monkeypatch.setattr(cursors, "SHUFFLED_ROWS", 5)
    steady, rows = streamed(tmp_path, 12, seed=[3, 0])
    failing = flaky(streamed(tmp_path, 12, seed=[3, 0])[0], {0: 1, 7: 2, 11: 4})
    wanted = [steady.take() for _ in range(30)]
    assert [failing.take() for _ in range(30)] == wanted
    given = [record.value for record in wanted]
    key = str
    for epoch in (0, 12):
        for group in (slice(0, 5), slice(5, 10), slice(10, 12)):
            assert sorted(given[epoch:][group], key=key) == sorted(rows[group], key=key)
    assert given[:12] != rows
    assert given[12:24] != given[:12]


def test_memory_of_a_shuffled_stream_is_bounded_by_rows_and_by_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cursors, "SHUFFLED_BYTES", 1000)
    stream, _ = streamed(tmp_path, 200, seed=[0, 0])
    for _ in range(400):
        stream.take()
        assert sum(record.bytes for record in stream._group[:-1]) < 1000 + 300


@pytest.mark.parametrize("group", [1, 5, 12, 100])
def test_a_shuffled_stream_resumes_at_the_next_row_wherever_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    monkeypatch.setattr(cursors, "SHUFFLED_ROWS", group)
    stream, _ = streamed(tmp_path, 12, seed=[0, 1])
    states, records = [], []
    for _ in range(30):
        states.append(json.loads(json.dumps(stream.state())))
        records.append((stream.take(), stream.epoch))
    for at in (0, 1, 4, 5, 6, 11, 12, 13, 17, 24, 25):
        again, _ = streamed(tmp_path, 12, seed=[0, 1])
        again.take()
        again.load_state(states[at])
        assert [(again.take(), again.epoch) for _ in range(30 - at)] == records[at:], at
