"""Laws of drawing from several sources: weights, the held-out border, positions."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextblock.config.errors import UsageError
from samples import (
    documents_of,
    jsonl,
    refusal,
    stream,
    texts,
)


@pytest.mark.parametrize("times", [1, 40])
def test_weights_are_shares_of_the_text_however_long_the_documents_are(times: int, tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", [{"text": f"a{i:03d}" * times} for i in range(300)])
    b = jsonl(tmp_path / "b.jsonl", [{"text": f"b{i:03d}"} for i in range(300)])
    rows = stream({"path": a, "weight": 3}, {"path": b, "weight": 1}, row_length=512).next(512)
    text = "".join(documents_of(rows))
    assert text.count("a") / (text.count("a") + text.count("b")) == pytest.approx(0.75, abs=0.03)


def test_held_out_and_training_documents_share_out_the_data(tmp_path: Path) -> None:
    rows = texts(300, longest=60)
    source = jsonl(tmp_path / "a.jsonl", rows)
    train, held = (set(documents_of(stream(source, share=0.2, held_out=side).next(1024))) for side in (False, True))
    assert not train & held
    assert train | held == {row["text"] + "<|end|>" for row in rows}
    assert 0.1 < len(held) / len(rows) < 0.3


def test_nothing_held_out_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    assert "data.held_out" in refusal(source, share=0.0, held_out=True)


def test_a_position_of_other_sources_is_refused() -> None:
    state = stream("task:algebra", "task:word_problems").state()
    with pytest.raises(UsageError, match=r"data\.sources"):
        stream("task:algebra").load_state(state)


def test_held_out_text_is_drawn_from_the_sources_that_have_some(tmp_path: Path) -> None:
    many = jsonl(tmp_path / "many.jsonl", texts(300, longest=60))
    one = jsonl(tmp_path / "one.jsonl", [{"text": "never held out"}])
    both, alone = (stream(*given, share=0.1, held_out=True) for given in ((one, many), (many,)))
    assert set(documents_of(both.next(64))) == set(documents_of(alone.next(64)))
    assert (both.without, alone.without) == ([one], [])
