"""The rule as dense and as block-sparse masks, and the mask of cached decoding.

Letters: B rows, T positions of [noised ; clean], Q queries, K keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from nextblock.attention.rule import Places, Rule


def to_dense(rule: Rule, query: Places, key: Places | None = None) -> Tensor:
    """The rule as a bool mask [B, 1, Q, K] for SDPA, Q * K bytes a row; `key`: by default the queries themselves."""
    return rule(query.along(2), (query if key is None else key).along(1)).unsqueeze(1)


def additive(allowed: Tensor, dtype: torch.dtype, elsewhere: float | None = None) -> Tensor:
    """bool of any shape, True where a query may look -> 0 there; else `elsewhere`, by default the lowest number."""
    # Eager attention takes its softmax in float32, where the lowest float64 would be -inf.
    lowest = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).min
    elsewhere = lowest if elsewhere is None else elsewhere
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, elsewhere)


def to_block_mask(rule: Rule, query: Places, key: Places | None = None, block: int = 128) -> BlockMask:
    """The rule as a FlexAttention BlockMask of (T / `block`)**2 tiles; the kernel reads entries from the places."""
    keys = query if key is None else key

    def mask_mod(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rule(query.at(row, q), keys.at(row, k))

    rows, length = query.position.shape
    device = query.position.device
    # Compiled, it never holds all T**2 entries. What changes from batch to batch is in tensors alone, so that nothing
    # is compiled again after two lengths.
    build = _compiled_create_block_mask() if device.type == "cuda" else create_block_mask
    return build(mask_mod, rows, None, length, keys.position.shape[1], device=device, BLOCK_SIZE=block)


@functools.cache
def _compiled_create_block_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask)


def decode_mask(position: Tensor, last_visible: Tensor, slots: int, window: int | None = None) -> Tensor:
    """The mask of a cached decoding step, where cache slot j holds the token at position j.

    Args:
        position: int64 [B, Q], positions of the queries.
        last_visible: int64 [B, Q], the last position that each may see: its own in a causal pass, the
            end of its block while denoising.
        slots: cache slots that the keys span.
        window: sliding window of the layer, if it has one.
    Returns:
        bool [B, 1, Q, slots].
    """
    slot = torch.arange(slots, device=position.device)
    mask = slot <= last_visible.unsqueeze(-1)
    if window is not None:
        mask = mask & (slot > position.unsqueeze(-1) - window)
    return mask.unsqueeze(1)
