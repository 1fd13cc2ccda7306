"""Masks as kernels read them: what FlexAttention computes, when it is compiled, and the mask of cached decoding."""

from __future__ import annotations

import warnings
from itertools import product

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from layouts import LAYOUTS, make_rows, places_of, slots_of_row
from nextblock.attention import masks as masks_module
from nextblock.attention.masks import additive, decode_mask, to_block_mask, to_dense
from nextblock.attention.rule import block_diffusion_rule

LENGTH = 28  # every layout leaves some padding
FLEX_BLOCK = 8  # small, so that full, partial and empty tiles all occur


def test_flex_attention_with_the_block_mask_equals_plain_attention_with_the_dense_one():
    rows = make_rows([LAYOUTS["two-turn chat"]], LENGTH)
    places, rule = places_of(slots_of_row(rows, 0, 4, noised=(1,))), block_diffusion_rule()
    query, key, value = torch.randn(3, 1, 2, places.position.shape[1], 16).unbind(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises to compile it
        flex = flex_attention(query, key, value, block_mask=to_block_mask(rule, places, block=FLEX_BLOCK))
    scores = (query @ key.transpose(-1, -2) / 16**0.5).masked_fill(~to_dense(rule, places), -torch.inf)
    torch.testing.assert_close(flex, scores.softmax(-1) @ value, rtol=1e-5, atol=1e-5)


def test_neither_growth_nor_packing_nor_a_new_batch_compiles_mask_or_attention_again(monkeypatch: pytest.MonkeyPatch):
    compiler = CompileCounterWithBackend("eager")
    attend = torch.compile(flex_attention, backend=compiler)
    monkeypatch.setattr(masks_module, "create_block_mask", torch.compile(create_block_mask, backend=compiler))
    lengths, graphs = [], []
    for number, (block_size, layout) in enumerate(product((2, 1, 4, 28), LAYOUTS.values())):
        rows = make_rows([layout], LENGTH)
        places = places_of(slots_of_row(rows, 0, block_size, noised=(1, 2) if number % 3 else (1,)))
        query, key, value = torch.randn(3, 1, 2, places.position.shape[1], 16).unbind(0)
        mask = to_block_mask(block_diffusion_rule(), places, block=FLEX_BLOCK)
        attend(query, key, value, block_mask=mask)
        lengths.append(query.shape[2])
        graphs.append(compiler.frame_count)
    two_lengths = next(i for i, length in enumerate(lengths) if length != lengths[0])
    assert len(set(lengths)) > 2
    assert 0 < graphs[two_lengths] == graphs[-1]


def test_the_decode_mask_lets_a_query_see_the_slots_up_to_its_last_visible_position():
    position, last = torch.tensor([[4, 5, 6], [1, 2, 3]]), torch.tensor([[6, 6, 6], [1, 2, 3]])
    for window in (None, 3):
        mask = decode_mask(position, last, 8, window)
        for row in range(2):
            for q in range(3):
                for slot in range(8):
                    near = window is None or int(position[row, q]) - slot < window
                    assert bool(mask[row, 0, q, slot]) == (slot <= int(last[row, q]) and near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_additive_mask_is_0_where_a_query_may_look_and_lowest_elsewhere(dtype):
    allowed = torch.tensor([[True, False], [False, True]])
    for elsewhere, expected in ((None, torch.finfo(dtype).min), (-torch.inf, -torch.inf)):
        mask = additive(allowed, dtype, elsewhere)
        assert mask.dtype == dtype
        assert mask.tolist() == [[0, expected], [expected, 0]]
