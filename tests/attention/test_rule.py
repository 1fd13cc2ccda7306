"""Identity 4: dense mask, FlexAttention mask and a brute-force reading of Eq. 4 agree, entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from layouts import LAYOUTS, Slot, make_rows, may_look, places_of, slots_of_row
from nextblock.attention.masks import to_block_mask, to_dense
from nextblock.attention.rule import block_diffusion_rule, within_window

LENGTH = 28  # every layout leaves some padding
BLOCK_SIZES = (1, 2, 4, 28)
FLEX_BLOCK = 8  # small, so that full, partial and empty tiles all occur


def entries_of(mask: BlockMask, length: int) -> Tensor:
    """What a kernel computes from a BlockMask: tiles listed as full whole, partial ones entry by entry."""
    allowed = torch.zeros(length, length, dtype=torch.bool)
    tile_q, tile_k = mask.BLOCK_SIZE
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    for tile in range(mask.kv_num_blocks.shape[-1]):
        rows = torch.arange(tile * tile_q, min((tile + 1) * tile_q, length))
        partial = mask.kv_indices[0, 0, tile, : int(mask.kv_num_blocks[0, 0, tile])].tolist()
        full = mask.full_kv_indices[0, 0, tile, : int(mask.full_kv_num_blocks[0, 0, tile])].tolist()
        for other in partial + full:
            columns = torch.arange(other * tile_k, min((other + 1) * tile_k, length))
            if other in full:
                allowed[rows[:, None], columns] = True
                continue
            for q in rows:
                zero = torch.zeros((), dtype=torch.int64)
                allowed[q, columns] = torch.stack([mask.mask_mod(zero, zero, q, k) for k in columns])
    return allowed


def brute_force(slots: list[Slot], context: str) -> Tensor:
    return torch.tensor([[may_look(query, key, context) for key in slots] for query in slots])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("context", ["context_causal", "block_causal"])
@pytest.mark.parametrize("views", [(1,), (1, 2)])
def test_dense_and_block_masks_equal_equation_4_entry_by_entry(layout, block_size, context, views):
    rows = make_rows([LAYOUTS[layout]], LENGTH)
    slots = slots_of_row(rows, 0, block_size, noised=views)
    places, rule = places_of(slots), block_diffusion_rule(context)
    dense = to_dense(rule, places)[0, 0]
    real = torch.tensor([slot.document >= 0 for slot in slots])
    both = real[:, None] & real
    assert torch.equal(dense[both], brute_force(slots, context)[both])
    assert torch.equal(entries_of(to_block_mask(rule, places, block=FLEX_BLOCK), len(slots)), dense)


def test_padding_and_documents_do_not_see_each_other_and_no_query_is_left_without_a_key():
    slots = slots_of_row(make_rows([LAYOUTS["two-turn chat"]], LENGTH + 6), 0, 4, noised=(1,))
    dense = to_dense(block_diffusion_rule(), places_of(slots))[0, 0]
    real = torch.tensor([slot.document >= 0 for slot in slots])
    assert not dense[real][:, ~real].any()
    assert not dense[~real][:, real].any()
    assert dense.any(dim=1).all()


@pytest.mark.parametrize("window", [1, 3, 7])
def test_a_sliding_window_cuts_the_rule_to_the_last_positions(window):
    slots = slots_of_row(make_rows([LAYOUTS["two-turn chat"]], LENGTH), 0, 4, noised=(1,))
    dense = to_dense(within_window(block_diffusion_rule(), window), places_of(slots))[0, 0]
    for i, query in enumerate(slots):
        for j, key in enumerate(slots):
            if query.document >= 0 and key.document >= 0:
                near = query.position - key.position < window
                assert bool(dense[i, j]) == (may_look(query, key) and near)


# ------------------------------------------------------------------------- baseline: annealed mask


def annealed(slots: list[Slot], share: float, seed: int = 5) -> Tensor:
    return to_dense(block_diffusion_rule(target_share=share), places_of(slots, seed))[0, 0]


@pytest.fixture(params=list(LAYOUTS))
def target_slots(request) -> list[Slot]:
    """Real slots of the two-view sequence at the target block size 4."""
    rows = make_rows([LAYOUTS[request.param]], LENGTH)
    return [slot for slot in slots_of_row(rows, 0, 4, noised=(1,)) if slot.document >= 0]


def as_block_size_one(slots: list[Slot]) -> list[Slot]:
    """The same tokens, each a block of its own."""
    own = [((slot.document, slot.position),) if slot.block else None for slot in slots]
    return [Slot(s.view, s.document, s.position, block) for s, block in zip(slots, own, strict=True)]


def test_the_annealed_mask_goes_from_block_size_one_to_the_target(target_slots):
    start = brute_force(as_block_size_one(target_slots), "context_causal")
    assert torch.equal(annealed(target_slots, 0.0), start)
    assert torch.equal(annealed(target_slots, 1.0), brute_force(target_slots, "context_causal"))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_an_annealed_query_sees_each_earlier_token_of_its_block_noised_or_clean_never_both(target_slots, share):
    mask, target = annealed(target_slots, share), brute_force(target_slots, "context_causal")
    index = {(s.view, s.document, s.position): i for i, s in enumerate(target_slots)}
    for i, query in enumerate(target_slots):
        if not query.view:
            assert torch.equal(mask[i], target[i])
            continue
        assert query.block is not None
        for j, key in enumerate(target_slots):
            if (key.document, key.position) not in query.block:
                assert mask[i, j] == target[i, j]
        for document, position in query.block:
            noised = bool(mask[i, index[1, document, position]])
            clean = bool(mask[i, index[0, document, position]])
            if position < query.position:
                assert noised != clean
            else:
                assert not clean
                assert noised or position > query.position  # it always sees itself


def test_dense_and_block_masks_flip_the_same_coins(target_slots):
    rule, places = block_diffusion_rule(target_share=0.5), places_of(target_slots)
    dense = to_dense(rule, places)[0, 0]
    assert torch.equal(entries_of(to_block_mask(rule, places, block=FLEX_BLOCK), len(target_slots)), dense)


def test_a_pair_that_has_reached_the_target_mask_stays_there_as_the_share_grows(target_slots):
    masks = [annealed(target_slots, share) for share in (0.0, 0.3, 0.6, 1.0)]
    for k, one in enumerate(masks[:-1]):
        moved = one != masks[0]
        assert torch.equal(masks[k + 1][moved], one[moved])


def test_the_share_of_target_pairs_is_p():
    """256 coins for each pair of one block: the mean leaves 5 standard errors with probability 6e-7."""
    slots = [s for s in slots_of_row(make_rows([[[32]]], 32), 0, 32, noised=(1,)) if s.document >= 0]
    noised = torch.tensor([slot.view == 1 for slot in slots])
    for share in (0.1, 0.5, 0.8):
        seen = torch.stack([annealed(slots, share, seed)[noised][:, noised] for seed in range(256)]).float()
        pairs = seen[:, ~torch.eye(32, dtype=torch.bool)]
        error = (share * (1 - share) / pairs.numel()) ** 0.5
        assert abs(float(pairs.mean()) - share) < 5 * error
        assert (pairs.mean(dim=0) - share).abs().max() < 6 * (share * (1 - share) / 256) ** 0.5


def test_coins_of_neighbouring_keys_and_queries_are_independent():
    """The correlation of any two places: over 5 of its standard errors with probability 6e-7."""
    slots = [s for s in slots_of_row(make_rows([[[40]]], 40), 0, 40, noised=(1,)) if s.document >= 0]
    noised = torch.tensor([slot.view == 1 for slot in slots])
    for share in (0.1, 0.5, 0.8):
        seen = torch.stack([annealed(slots, share, seed)[noised][:, noised] for seed in range(256)]).float()
        coins = (seen - share) / (share * (1 - share)) ** 0.5  # mean 0, variance 1
        for distance in range(1, 17):
            queries, keys = torch.arange(8), torch.arange(8, 40 - distance)  # no query stands at a key
            here = coins[:, queries[:, None], keys]
            for other in (coins[:, queries[:, None], keys + distance], coins[:, (queries[:, None] + 1) % 8, keys]):
                assert abs(float((here * other).mean())) < 5 / here.numel() ** 0.5
