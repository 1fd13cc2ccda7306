"""Laws of the row stream: order, resuming, filling, counting."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nextblock.config.errors import UsageError
from nextblock.config.sections import DataConfig
from nextblock.data.rows import Rows
from nextblock.data.stream import RowStream
from nextblock.model.parent import byte_tokenizer
from samples import (
    CHAT,
    TOKENIZER,
    assistant,
    documents_of,
    jsonl,
    marked_bytes,
    refusal,
    same,
    stream,
    texts,
    user,
)

MIXTURES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "many short ones": lambda rng: rng.lognormal(4.8, 1.0, 3000),
    "long ones": lambda rng: rng.lognormal(6.0, 0.7, 3000),
    "up to half a row": lambda rng: rng.uniform(50, 500, 3000),
    "around half a row": lambda rng: rng.uniform(100, 600, 3000),
}


@pytest.mark.parametrize("lengths", MIXTURES)
@pytest.mark.parametrize("row_length", [1024, 2048])
def test_mixed_lengths_fill_98_percent_of_the_rows(tmp_path: Path, row_length: int, lengths: str) -> None:
    sizes = MIXTURES[lengths](np.random.default_rng(1)).astype(int) + 1
    source = jsonl(tmp_path / "a.jsonl", [{"text": "x" * int(n)} for n in sizes])
    rows = stream(source, row_length=row_length).next(260)
    assert (rows.document >= 0).float().mean() >= 0.98


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 250), st.integers(1, 90))
def test_resuming_at_any_row_gives_exactly_the_next_rows(done: int, rows: int) -> None:
    sources = ({"path": "task:algebra", "weight": 2}, {"path": "task:word_problems", "examples": 40})
    first, second = (stream(*sources, row_length=256, seed=4) for _ in range(2))
    if done:
        first.next(done)
    state = json.loads(json.dumps(first.state()))
    expected = first.next(rows)
    second.load_state(state)
    assert same(second.next(rows), expected)
    assert second.state() == first.state()


def test_rows_do_not_depend_on_how_they_are_asked_for(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts(50))
    one, many = stream(source), stream(source)
    parts = [many.next(n) for n in (1, 70, 3, 126)]
    joined = Rows(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Rows)))
    assert same(one.next(200), joined)
    assert joined.number.tolist() == list(range(200))


def test_another_seed_gives_another_order(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts(300))
    assert not same(stream(source, seed=0).next(8), stream(source, seed=1).next(8))


def test_every_epoch_gives_every_document_once(tmp_path: Path) -> None:
    rows = [{"text": f"{i:02d}"} for i in range(40)]
    many = stream(jsonl(tmp_path / "a.jsonl", rows), row_length=60)
    # A chunk is 64 rows of 20 documents, which is 32 epochs of 40.
    found = Counter(documents_of(many.next(64)))
    assert found == {f"{i:02d}<|end|>": 32 for i in range(40)}


def test_a_document_shorter_than_a_block_alone_fills_rows(tmp_path: Path) -> None:
    rows = stream(jsonl(tmp_path / "a.jsonl", [{"text": "x"}]), row_length=32).next(3)
    assert set(documents_of(rows)) == {"x<|end|>"}


def test_truncated_and_skipped_documents_are_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b" * 99},
        {"prompt": "a" * 99, "completion": "b"},
    ]
    many = stream(jsonl(tmp_path / "a.jsonl", rows), row_length=16)
    first = documents_of(many.next(64))
    lost = many.state()["lost"]
    # Each epoch has one that is cut and one that is left out, whatever their order.
    assert lost["truncated"] == pytest.approx(lost["skipped"], abs=1)
    assert lost["truncated"] >= sum("b" * 9 in text for text in first) > 10
    assert not any(text.startswith("a" * 9) for text in documents_of(many.next(64)))


def test_prompts_that_fill_every_row_are_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "a" * 99, "completion": "b"}])
    assert "row_length=16" in refusal(source, row_length=16)


def test_a_file_that_vanishes_mid_run_is_named(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts(20))
    many = stream(source)
    Path(source).unlink()
    with pytest.raises(UsageError, match=r"a\.jsonl"):
        many.next(5000)


def test_special_tokens_in_contents_are_counted_with_the_first_place(tmp_path: Path) -> None:
    rows = [{"text": "fine"}, {"messages": [user("<|end|>"), assistant("a <|end|> <|end|>")]}, {"text": "<|end|>?"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig.model_validate(
        {"sources": [{"path": str(tmp_path / "a.jsonl"), "examples": 2}], "row_length": 64, "held_out": 0.0}
    )
    stream = RowStream(config, byte_tokenizer(), seed=0)
    stream.next(1)
    lost = stream.state()["lost"]
    assert lost["spelled"] > 3
    assert lost["spelled"] % 3 == 0
    assert lost["spelled_at"] == f"{tmp_path / 'a.jsonl'}:2"
    again = RowStream(config, byte_tokenizer(), seed=0)
    again.load_state(stream.state())
    assert again.state() == stream.state()
    assert all((again.next(40).tokens == stream.next(40).tokens).all() for _ in range(3))
    assert again.state()["lost"] == stream.state()["lost"]


@pytest.mark.parametrize("taken", [0, 1, 70, 200])
def test_sources_added_and_weighted_anew_count_from_the_next_chunk_on(tmp_path: Path, taken: int) -> None:
    """Rows of the chunk in work stay; what follows is what the new mixture makes from the chunk's end on."""
    a, b = (
        jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n} " + "x" * (n % 50)} for n in range(300)])
        for name in ("a", "b")
    )
    new = ({"path": a, "weight": 2}, {"path": b, "weight": 3})
    old, wanted = stream(a), stream(a)
    if taken:
        assert same(old.next(taken), wanted.next(taken))
    state = json.loads(json.dumps(old.state()))
    left = []
    while wanted.state()["taken"]:  # to the border of the chunk
        left.append(wanted.next(1))
    border = wanted.state()
    bent = stream(*new)
    bent.load_state(state)
    before = [bent.next(1) for _ in left]
    assert all(same(one, other) for one, other in zip(left, before, strict=True))
    assert not any("b" in text.split()[0] for row in before for text in documents_of(row))
    fresh = stream(*new)
    fresh.load_state({**border, "weights": [2, 3]})
    after = bent.next(300)
    assert same(after, fresh.next(300))
    assert 0.4 < sum(text.startswith("b") for text in documents_of(after)) / len(documents_of(after)) < 0.8
    assert set(after.number.tolist()) == set(range(taken + len(left), taken + len(left) + 300))


def test_a_stop_in_the_chunk_in_which_sources_were_added_resumes_to_the_same_rows(tmp_path: Path) -> None:
    a, b = (jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {n}"} for n in range(90)]) for name in ("a", "b"))
    old = stream(a)
    old.next(5)
    bent = stream(a, b)
    bent.load_state(old.state())
    bent.next(3)
    state = json.loads(json.dumps(bent.state()))
    again = stream(a, b)
    again.load_state(state)
    assert same(again.next(500), bent.next(500))


BROKEN = [
    '{"text": "cut',
    '{"body": "no field"}',
    '{"text": "\\ud800"}',
    json.dumps({"messages": [user("2?"), assistant(None)]}),
    json.dumps({"messages": [user("2?"), assistant("a \U0010a000 b")]}),
]


def with_broken_lines(path: Path, every: int = 10) -> tuple[str, list[dict[str, str]]]:
    """A file of texts in which lines that cannot be used stand; and the texts."""
    rows = texts(120, longest=60)
    lines = [json.dumps(row) for row in rows]
    for number, line in enumerate(BROKEN):
        lines.insert(every * (number + 3), line)
    path.write_text("\n".join(lines))
    return str(path), rows


def skipping(path: str, skip: bool = True) -> RowStream:
    config = DataConfig.model_validate(
        {"sources": [{"path": path}], "row_length": 64, "held_out": 0.0, "skip_unusable": skip}
    )
    return RowStream(config, TOKENIZER, seed=0)


@pytest.mark.parametrize("line", BROKEN)
def test_a_record_that_cannot_be_tokenised_is_named_before_the_first_row(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join([*(json.dumps(row) for row in texts(60)), line]))
    with pytest.raises(UsageError, match=r"a\.jsonl:61.*; data\.skip_unusable=true leaves such documents out"):
        skipping(str(tmp_path / "a.jsonl"), skip=False)


def test_a_chat_whose_roles_do_not_alternate_is_named_before_the_first_row(tmp_path: Path) -> None:
    alternate = "{% if messages[0].role != 'user' %}{{ raise_exception('roles') }}{% endif %}"
    strict = marked_bytes(template=alternate + CHAT)
    chats = [{"messages": [user("a"), assistant("b")]}, {"messages": [assistant("b"), user("a")]}]
    with pytest.raises(UsageError, match=r"a\.jsonl:2: the chat template fails: roles; data\.skip_unusable"):
        stream(jsonl(tmp_path / "a.jsonl", chats), tokenizer=strict)


def test_records_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path) -> None:
    path, rows = with_broken_lines(tmp_path / "a.jsonl")
    with pytest.warns(UserWarning, match=r"a\.jsonl:\d+.*; left out, as all that cannot be used"):
        reading = skipping(path)
    found = reading.next(512)  # some epochs
    assert set(documents_of(found)) == {row["text"] + "<|end|>" for row in rows}
    lost = reading.state()["lost"]
    assert lost["unusable"] == lost["skipped"] > 0
    assert "a.jsonl:" in lost["unusable_at"]


@pytest.mark.filterwarnings("ignore:.*left out, as all")
def test_a_run_that_a_record_stopped_goes_on_without_it_as_if_it_always_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nextblock.data.sources.CHECKED_DOCUMENTS", 0)  # as large data are: read when drawn
    monkeypatch.setattr("nextblock.data.stream.CHUNK_ROWS", 4)
    monkeypatch.setattr("nextblock.data.stream.BATCH_DOCUMENTS", 2)
    path, _ = with_broken_lines(tmp_path / "a.jsonl")
    stopped, whole, states = skipping(path, skip=False), skipping(path), []

    def to_the_end() -> None:
        for _ in range(200):
            states.append(json.loads(json.dumps(stopped.state())))
            assert same(stopped.next(1), whole.next(1))

    with pytest.raises(UsageError, match=r"data\.skip_unusable=true leaves such documents out"):
        to_the_end()
    assert len(states) > 1
    again, undisturbed = skipping(path), skipping(path)
    again.load_state(states[-1])
    undisturbed.next(len(states) - 1)
    assert same(again.next(99), undisturbed.next(99))
    with_broken_lines(tmp_path / "a.jsonl", every=7)
    with pytest.raises(UsageError, match=r"holds other text .*data\.skip_unusable=true leaves out those"):
        skipping(path).load_state(states[-1])


def test_of_empty_documents_alone_the_run_says_so(tmp_path: Path) -> None:
    assert "for all are empty" in refusal(jsonl(tmp_path / "a.jsonl", [{"text": ""}, {"text": " "}]))
