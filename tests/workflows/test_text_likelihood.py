"""Text that is scored: the same from any kind of file and in any batch, and bad input in one line."""

from __future__ import annotations

import json
from dataclasses import replace

import datasets
import pytest

import nextblock as nb
from nextblock.config.run import load_config
from nextblock.config.sections import Source
from nextblock.tasks import TASKS
from nextblock.workflows.prepare import prepare
from nextblock.workflows.text_likelihood import text_likelihood

TEXTS = [f"Q: Leo has {n} bags with {n + 2} coins in each.\nA: {n * (n + 2)}." for n in range(3, 9)]


@pytest.fixture(scope="module")
def lm() -> nb.BlockDiffusionLM:
    return nb.load("tiny-bd", device="cpu")


def score(lm, path, field="text", **options):
    source = Source(path=str(path), text_field=field, split=None)
    options = {"block_sizes": [1, 4], "draws": 2, "row_length": 80, **options}
    return text_likelihood(lm, source, **options).measures


def figures(found):
    return [(one.measure, one.block_size, one.bytes, one.tokens, pytest.approx(one.value)) for one in found]


def test_jsonl_parquet_and_hub_rows_of_the_same_texts_cost_the_same_in_any_batch(lm, tmp_path, monkeypatch):
    rows = [{"body": text} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    hub = datasets.Dataset.from_list(rows).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    done: list[tuple[int, int]] = []
    found = score(lm, tmp_path / "a.jsonl", "body", batch_rows=1, on_documents=lambda *at: done.append(at))
    assert done[-1] == (6, 6)
    assert figures(score(lm, tmp_path / "a.parquet", "body", batch_rows=4)) == figures(found)
    assert figures(score(lm, "owner/name", "body")) == figures(found)


def test_blocks_of_one_cost_what_ar_does_and_nothing_is_drawn(lm, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    exact, ones, fours = score(lm, tmp_path / "a.txt")
    assert ones.value == pytest.approx(exact.value, rel=1e-6)
    assert ones.standard_error == 0 == exact.standard_error
    assert fours.standard_error is not None
    assert fours.standard_error > 0
    nats = exact.value * exact.bytes * 0.6931471805599453
    assert exact.perplexity == pytest.approx(2.718281828459045 ** (nats / exact.tokens))


def test_bytes_are_those_of_the_text_where_a_token_is_a_part_of_a_character(lm, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "日本語"}\n' * 4)
    exact, *_ = score(lm, tmp_path / "a.jsonl")
    assert exact.bytes == 4 * (len("日本語".encode()) - 1), "the first byte is given"


def test_what_is_cut_or_left_out_is_counted(lm, tmp_path):
    rows = [{"prompt": "a" * 100, "completion": "b"}, {"prompt": "a" * 50, "completion": "b" * 100}, {"text": "c"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = text_likelihood(lm, Source(path=str(tmp_path / "a.jsonl")), block_sizes=[1], row_length=64)
    assert (found.documents, found.truncated, found.skipped, found.row_length) == (3, 1, 1, 64)
    assert found.measures[0].tokens == 14 + 1
    assert text_likelihood(lm, Source(path=str(tmp_path / "a.jsonl")), row_length=10**6).row_length == 2048
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(nb.UsageError, match="none of its 1 documents has anything to score within row_length=64"):
        text_likelihood(lm, Source(path=str(tmp_path / "a.jsonl")), row_length=64)


def test_a_token_store_of_another_tokenizer_is_refused(lm, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n' * 3)
    other = nb.load("tiny-ar").tokenizer
    other.add_tokens(["me te"])
    other.save_pretrained(tmp_path / "tokenizer")
    config = {
        "model": {"path": "tiny-ar", "tokenizer": str(tmp_path / "tokenizer")},
        "data": {"sources": [{"path": str(tmp_path / "a.jsonl")}], "row_length": 64},
    }
    prepare(load_config(config), tmp_path / "store")
    store = next(path for path in (tmp_path / "store").iterdir() if path.is_dir())
    with pytest.raises(nb.UsageError, match="tokenizer"):
        text_likelihood(lm, Source(path=str(store)))


def test_a_task_with_an_end_is_scored_as_a_whole(lm, monkeypatch):
    monkeypatch.setitem(TASKS, "algebra", replace(TASKS["algebra"], count=3))
    assert text_likelihood(lm, Source(path="task:algebra", split=None), block_sizes=[1], draws=1).documents == 3


def test_bad_input_ends_in_one_line(lm, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(nb.UsageError, match="task:algebra has no end"):
        score(lm, "task:algebra")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(nb.UsageError, match="no field 'title'"):
        score(lm, tmp_path / "a.jsonl", "title")
    for sizes in ([4, 0], [10**20]):
        with pytest.raises(nb.UsageError, match=r"each must lie in \[1, row_length=1024\]"):
            text_likelihood(lm, Source(path=str(tmp_path / "a.txt")), block_sizes=sizes)
    with pytest.raises(nb.UsageError, match="has no block_diffusion settings"):
        text_likelihood(nb.load("tiny-ar"), Source(path=str(tmp_path / "a.txt")), block_sizes=[4])
