"""The cache whose slots are positions."""

from __future__ import annotations

import pytest
import torch

from nextblock.attention.cache import SlotCache


def states(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, width, 4, generator=generator), torch.randn(rows, 2, width, 4, generator=generator)


@pytest.mark.parametrize("starts", [[2, 2, 2], [2, 0, 5]])
def test_each_row_is_written_at_its_own_positions_and_nothing_else_changes(starts):
    cache = SlotCache(3, 12)
    cache.aim([0, 0, 0], 8)
    first, _ = cache.update(*states(3, 8, 0), 0)
    before = first.clone()
    slots = torch.tensor(starts)[:, None] + torch.arange(3)
    cache.aim(starts, 3, slots)
    keys, values = states(3, 3, 1)
    seen_keys, seen_values = cache.update(keys, values, 0)
    assert seen_keys.shape[2] == max(starts) + 3 == cache.end
    for row, start in enumerate(starts):
        expected = before[row].clone()
        expected[:, start : start + 3] = keys[row]
        end = min(seen_keys.shape[2], 8)
        assert torch.equal(seen_keys[row, :, :end], expected[:, :end])
        assert torch.equal(seen_values[row, :, start : start + 3], values[row])


def test_slots_that_are_added_leave_what_was_written_where_it_was():
    cache, written = SlotCache(2, 1000), torch.zeros(2, 2, 0, 4)
    for seed in range(40):
        width = 1 + seed % 9
        cache.aim([written.shape[2]] * 2, width)
        keys, values = states(2, width, seed)
        written = torch.cat([written, keys], dim=2)
        assert torch.equal(cache.update(keys, values, 0)[0], written)
        assert cache.keys[0].shape[2] <= 1.25 * written.shape[2] + 64


def test_a_pass_reads_the_memory_that_it_wrote_not_a_copy():
    cache = SlotCache(2, 12)
    cache.aim([0, 0], 5)
    seen, _ = cache.update(*states(2, 5, 0), 0)
    again = cache.keys[0]
    assert seen.data_ptr() == again.data_ptr()
    cache.aim([5, 5], 1)
    seen, _ = cache.update(*states(2, 1, 1), 0)
    assert seen.data_ptr() == again.data_ptr()


def test_moved_slots_are_found_where_they_were_put_and_nothing_else_changes():
    cache = SlotCache(2, 9)
    cache.aim([0, 0], 8)
    keys, values = states(2, 8, 0)
    seen = cache.update(keys, values, 0)
    cache.move(1, 5, 2, 3)
    for found, given in zip(seen, (keys, values), strict=True):
        assert torch.equal(found[0], given[0])
        assert torch.equal(found[1], given[1][:, [0, 1, 5, 6, 7, 5, 6, 7]])


def test_a_row_that_leaves_makes_room_for_the_last_one():
    cache = SlotCache(3, 8)
    cache.aim([0, 0, 0], 4)
    keys, _ = states(3, 4, 0)
    cache.update(keys, keys, 0)
    cache.drop(0)
    assert torch.equal(cache.keys[0][:, :, :4], keys[[2, 1]])
    cache.drop(1)
    assert torch.equal(cache.keys[0][:, :, :4], keys[[2]])
