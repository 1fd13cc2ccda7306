"""Laws of cutting, packing and rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nextblock.config.errors import UsageError
from nextblock.data.encode import encode
from nextblock.data.rows import Document, best_subset, check_tokens, collate, cut, pack
from samples import (
    TOKENIZER,
    span_texts,
)


def numbered(lengths: list[int]) -> list[Document]:
    """Documents whose tokens tell document and place."""
    return [Document(np.arange(n) + 1000 * i, np.arange(n)) for i, n in enumerate(lengths)]


LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=40)


@given(LENGTHS, st.integers(2, 40))
def test_packing_keeps_every_token_in_order(lengths: list[int], row_length: int) -> None:
    documents = numbered(lengths)
    pieces = sorted((p for row in pack(documents, row_length) for p in row), key=lambda p: int(p.tokens[0]))
    assert np.concatenate([p.tokens for p in pieces]).tolist() == [t for d in documents for t in d.tokens.tolist()]


@given(LENGTHS, st.integers(2, 40))
def test_row_fields_obey_their_laws(lengths: list[int], row_length: int) -> None:
    rows = collate(pack(numbered(lengths), row_length), row_length, pad=-7, epoch=3, number=5)
    assert rows.number.tolist() == list(range(5, 5 + len(rows)))
    assert set(rows.epoch.tolist()) == {3}
    for tokens, document, position, offset in zip(rows.tokens, rows.document, rows.position, rows.offset, strict=True):
        padding = document == -1
        assert set(tokens[padding].tolist()) <= {-7}
        assert set(offset[padding].tolist()) <= {-1}
        assert set(position[padding].tolist()) <= {0}
        real = document[~padding]
        assert torch.equal(real, real.sort().values)  # padding last, documents one after the other
        assert sorted(set(real.tolist())) == list(range(int(real.max()) + 1))
        for d in range(int(real.max()) + 1):
            inside = document == d
            assert position[inside].tolist() == list(range(int(inside.sum())))
            assert len(set((tokens[inside] // 1000).tolist())) == 1
            assert torch.equal(offset[inside], position[inside])  # plain text


@given(LENGTHS, st.integers(2, 40))
def test_only_documents_longer_than_a_row_are_cut(lengths: list[int], row_length: int) -> None:
    for document in numbered(lengths):
        assert len(cut(document, row_length)) == -(-len(document.tokens) // row_length)


def test_a_completion_longer_than_the_row_is_truncated_and_a_prompt_that_fills_it_dropped() -> None:
    document = encode({"prompt": "abc", "completion": "defgh"}, TOKENIZER)
    (head,) = cut(document, 6)
    assert span_texts(head) == ["def"]
    assert cut(document, 3) == []


@given(st.lists(st.integers(1, 12), max_size=9), st.integers(0, 40))
def test_best_subset_reaches_the_largest_sum_that_fits(sizes: list[int], room: int) -> None:
    sizes = sorted(sizes, reverse=True)
    sums = {0}
    for size in sizes:
        sums |= {total + size for total in sums if total + size <= room}
    chosen = best_subset(sizes, room)
    assert len(set(chosen)) == len(chosen)
    assert sum(sizes[i] for i in chosen) == max(sums)


def test_a_token_outside_the_vocabulary_or_a_mask_token_in_the_data_is_refused() -> None:
    rows = collate([[Document(np.array([5, 9]), np.arange(2))]], 4, pad=3, epoch=0, number=0)
    check_tokens(rows, 10, 3)  # padding may be anything
    with pytest.raises(UsageError, match="token id 9"):
        check_tokens(rows, 9, None)
    with pytest.raises(UsageError, match="mask token id 5"):
        check_tokens(rows, 10, 5)
    check_tokens(replace(rows, tokens=rows.tokens.clamp(max=8)), 9, None)
