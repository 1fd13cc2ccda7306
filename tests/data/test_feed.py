"""The rows of a run and their order are the same on any number of ranks, and go on exactly after a resume."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from nextblock.config.errors import UsageError
from nextblock.config.run import load_config
from nextblock.data.cursors import Cursor
from nextblock.data.feed import Feed, merged, usual_shards
from nextblock.data.records import Record, Records
from nextblock.data.rows import Rows
from nextblock.model.parent import byte_tokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    lengths = np.random.default_rng(0).integers(1, 40, 300)
    path.write_text("\n".join(json.dumps({"text": f"{i:03d}" + "x" * n}) for i, n in enumerate(lengths)))
    return str(path)


def feed(source: str, shards: int | None, rank: int = 0, ranks: int = 1) -> Feed:
    data = {"sources": [{"path": source}], "row_length": 48, "held_out": 0.1, "shards": shards}
    config = load_config({"data": data, "growth": {"b_max": 1}}).data
    return Feed(config, byte_tokenizer(), seed=3, batch_rows=12, rank=rank, ranks=ranks)


def batches(feeds: list[Feed], count: int) -> list[Rows]:
    """Global batches: the rows of all ranks, in order."""
    found = []
    for _ in range(count):
        whole = Rows.cat([one.next() for one in feeds])
        found.append(whole.take(whole.number.argsort()))
    return found


def same(a: list[Rows], b: list[Rows]) -> bool:
    return all(torch.equal(getattr(x, n), getattr(y, n)) for x, y in zip(a, b, strict=True) for n in vars(x))


@pytest.mark.parametrize(("shards", "ranks"), [(1, 2), (2, 2), (4, 2), (2, 4), (3, 2), (6, 4)])
def test_any_number_of_ranks_reads_the_rows_that_one_reads(corpus, shards, ranks):
    wanted = batches([feed(corpus, shards)], 30)
    assert [row for rows in wanted for row in rows.number.tolist()] == list(range(360))
    feeds = [feed(corpus, shards, rank, ranks) for rank in range(ranks)]
    assert same(batches(feeds, 30), wanted)


def test_where_the_ranks_divide_the_shards_no_shard_is_read_twice(corpus):
    for shards, ranks in ((4, 2), (4, 4), (6, 3)):
        owned = [s for rank in range(ranks) for s in feed(corpus, shards, rank, ranks).state()["shards"]]
        assert sorted(owned) == sorted(map(str, range(shards)))


@pytest.mark.parametrize("count", [10, 12, 2])
def test_the_shards_of_a_source_read_every_document_once_an_epoch(count):
    records = Records(lambda index: Record({"text": str(index)}, ""), count)
    cursors = [Cursor(records, [0], (s, 4)) for s in range(4)]
    taken = [cursors[i % 4].take().value["text"] for i in range(6 * count)]
    assert taken == [whole.take().value["text"] for whole in [Cursor(records, [0])] for _ in range(6 * count)]
    for epoch in range(6):
        assert sorted(map(int, taken[epoch * count : (epoch + 1) * count])) == list(range(count))


def test_reading_goes_on_exactly_on_another_number_of_ranks(corpus):
    wanted = batches([feed(corpus, 4)], 40)
    before = [feed(corpus, 4, rank, 4) for rank in range(4)]
    assert same(batches(before, 17), wanted[:17])
    state = json.loads(json.dumps(merged([one.state() for one in before])))
    for ranks in (1, 2):
        after = [feed(corpus, 4, rank, ranks) for rank in range(ranks)]
        for one in after:
            one.next()  # reads ahead, which must be forgotten
            one.load_state(state)
        assert same(batches(after, 23), wanted[17:])


def test_a_look_at_the_next_batch_does_not_take_it(corpus):
    one = feed(corpus, 1)
    state, rows = one.state(), one.peek()
    assert one.state() == state
    assert same([one.next()], [rows])
    assert one.state() != state


def test_a_source_that_vanishes_stops_at_the_batch_that_needs_it_with_its_name(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    one = feed(str(path), 1)
    one.next()
    path.unlink()
    with pytest.raises(UsageError, match=r"a\.txt cannot be read.*restore it"):
        batches([one], 1000)


def test_a_streamed_data_set_smaller_than_its_shards_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    data = {"sources": [{"path": str(tmp_path), "format": "hub"}], "shards": 4, "row_length": 32, "held_out": 0}
    config = load_config({"data": data, "growth": {"b_max": 1}}).data
    with pytest.raises(UsageError, match=r"is empty in shard 3 of 4; lower data\.shards"):
        Feed(config, byte_tokenizer(), seed=0, batch_rows=4)


@pytest.mark.parametrize(("batch_rows", "shards"), [(12, 6), (8, 8), (64, 8), (7, 7), (22, 2), (11, 1)])
def test_the_usual_shards_are_the_most_that_divide_the_batch(corpus, batch_rows, shards):
    config = load_config({"data": {"sources": [{"path": corpus}]}}).data
    assert usual_shards(config, batch_rows) == shards


def test_by_default_each_rank_reads_a_part_of_its_own_and_the_rows_are_the_same(corpus):
    wanted = batches([feed(corpus, None)], 20)
    for ranks in (2, 3, 6):
        feeds = [feed(corpus, None, rank, ranks) for rank in range(ranks)]
        assert same(batches(feeds, 20), wanted)
        owned = [s for one in feeds for s in one.state()["shards"]]
        assert sorted(owned) == sorted(map(str, range(6)))


def test_a_run_keeps_its_shards_when_the_batch_of_a_stage_is_another(corpus):
    before = feed(corpus, None)
    batches([before], 9)
    after = [
        Feed(before._config, byte_tokenizer(), seed=3, batch_rows=16, rank=rank, ranks=ranks)
        for ranks in (1, 2)
        for rank in range(ranks)
    ]
    for one in after:
        one.load_state(before.state())
    rows = batches([before], 4)
    wanted = Rows.cat(rows)
    assert same(batches(after[:1], 3), [wanted.slice(k, k + 16) for k in (0, 16, 32)])
    assert same(batches(after[1:], 3), [wanted.slice(k, k + 16) for k in (0, 16, 32)])
