"""The rows of a run and their order are the same on any number of ranks, and go on exactly after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch

import nextblock.data.stream as streams
from nextblock.config.errors import UsageError
from nextblock.config.run import load_config
from nextblock.config.sections import Source
from nextblock.data.cursors import Cursor
from nextblock.data.feed import Feed, merged, usual_shards
from nextblock.data.mixture import part_bytes
from nextblock.data.records import Record, Records
from nextblock.data.rows import Rows
from nextblock.model.parent import byte_tokenizer
from nextblock.workflows.store_writer import merge, part_name, write_part


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


def write(place: Path, first: int, last: int, kind: str) -> str:
    """Documents first..last-1 at the end of a source."""
    rng = np.random.default_rng(first)
    rows = [{"text": f"{n:03d}" + "x" * int(rng.integers(1, 40))} for n in range(first, last)]
    if kind == "jsonl":
        with (place / "a.jsonl").open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        return str(place / "a.jsonl")
    folder = place / "data"
    folder.mkdir(exist_ok=True)
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{first:03d}.parquet")
    elif kind == "texts":
        for row in rows:
            (folder / f"{row['text'][:3]}.txt").write_text(row["text"])
    else:
        source = place / f"{first:03d}.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = int(first > 0)
        part = folder / part_name(run, 0, 1)
        write_part(part, Source(path=str(source)), byte_tokenizer(), part=(0, 1), part_bytes=part_bytes(48))
        merge(folder, run)
    return str(folder)


def same(a: list[Rows], b: list[Rows]) -> bool:
    return all(torch.equal(getattr(x, n), getattr(y, n)) for x, y in zip(a, b, strict=True) for n in vars(x))


def numbers(batches: list[Rows]) -> list[int]:
    """Those with which documents begin."""
    firsts = [(rows, ((rows.position == 0) & (rows.document >= 0)).nonzero().tolist()) for rows in batches]
    return [int(str(byte_tokenizer().decode(rows.tokens[r, c : c + 3]))) for rows, at in firsts for r, c in at]


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


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHUNK_ROWS", 4)
    monkeypatch.setattr(streams, "MOST_ROWS", 8)


@pytest.mark.parametrize(
    ("kind", "shards", "before"),
    [("jsonl", 1, 0), ("jsonl", 3, 5), ("parquet", 4, 2), ("texts", 1, 7), ("store", 1, 8), ("store", 3, 9)],
)
@pytest.mark.usefixtures("short_chunks")
def test_documents_added_while_a_run_was_stopped_come_in_with_the_first_epoch_that_no_shard_has_begun(
    tmp_path: Path, kind: str, shards: int, before: int
) -> None:
    """The rows are those of a run that knew from its beginning which of its epochs has how many documents."""
    source = write(tmp_path, 0, 100, kind)
    old = [feed(source, shards, rank, 2) for rank in range(2)]
    rows = batches(old, before)
    state = json.loads(json.dumps(merged([one.state() for one in old])))
    write(tmp_path, 100, 160, kind)
    new = [feed(source, shards, rank, 3) for rank in range(3)]
    said = [one.load_state(state) for one in new]
    assert said[0] == said[1] == said[2]
    epoch = int(
        said[0][0].removeprefix("data.sources.0 had 100 documents, has 160: those added come in with its epoch ")
    )
    rows += batches(new, 20)
    again = json.loads(json.dumps(merged([one.state() for one in new])))
    wanted = feed(source, shards)
    begun = wanted.state()
    for shard in begun["shards"].values():
        shard["counts"] = [[[0, 100], [int(epoch) - 1, 160]]]
    assert wanted.load_state(begun) == []
    assert same(rows, batches([wanted], before + 20))
    assert {number >= 100 for number in numbers(rows[:before])} <= {False}
    assert {number >= 100 for number in numbers(rows[before:])} == {False, True}
    one = feed(source, shards)  # stopped once more
    assert one.load_state(again) == []
    assert same(batches([one], 9), batches(new, 9))


@pytest.mark.parametrize("taken", [1, 4, 6])
@pytest.mark.usefixtures("short_chunks")
def test_a_source_that_grows_twice_leaves_what_was_read_as_it_was(tmp_path: Path, taken: int) -> None:
    """Twenty documents: a chunk of rows has several epochs, and each growth meets one in work."""
    source, counts, rows, one = write(tmp_path, 0, 20, "jsonl"), [[0, 20]], [], feed(str(tmp_path / "a.jsonl"), 3)
    for first, last in ((20, 33), (33, 90)):
        rows += batches([one], taken)
        state = json.loads(json.dumps(one.state()))
        write(tmp_path, first, last, "jsonl")
        one = feed(source, 3)
        (said,) = one.load_state(state)
        counts.append([int(said.rsplit(" ", 1)[1]) - 1, last])
    rows += batches([one], 25)
    wanted = feed(source, 3)
    begun = wanted.state()
    for shard in begun["shards"].values():
        shard["counts"] = [counts]
    wanted.load_state(begun)
    assert same(rows, batches([wanted], len(rows)))


def _prefix(place: Path) -> None:
    text = (place / "a.jsonl").read_text()
    (place / "a.jsonl").write_text(text.replace("000x", "000y") + text)


def _shorter(place: Path) -> None:
    (place / "a.jsonl").write_text("".join((place / "a.jsonl").open().readlines()[:-1]))


REPLACED: dict[str, tuple[str, Any]] = {
    "a beginning that changed": ("jsonl", _prefix),
    "a line less": ("jsonl", _shorter),
    "a file between the others": ("texts", lambda place: (place / "data" / "0005.txt").write_text("x")),
    "a text that grew": ("texts", lambda place: (place / "data" / "099.txt").open("a").write("more")),
    "a file less": ("texts", lambda place: (place / "data" / "099.txt").unlink()),
}


@pytest.mark.parametrize("what", REPLACED)
def test_a_source_that_has_changed_otherwise_is_refused_by_name(tmp_path: Path, what: str) -> None:
    kind, change = REPLACED[what]
    source = write(tmp_path, 0, 100, kind)
    state = feed(source, 2).state()
    change(tmp_path)
    with pytest.raises(
        UsageError, match=r"(a\.jsonl|data) holds other text than when .*documents may be added, at its end"
    ):
        feed(source, 2).load_state(state)
