"""Who may look at whom: the rule of the two-view pass, stated once, in the three forms that run it.

Letters: B rows, T positions of [noised ; clean], Q queries, K keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from nextblock.config.sections import Context


@dataclass(frozen=True)
class Places:
    """Where each token of the two-view sequence stands. All int64, [B, T] unless broadcast.

    view: 0 for the clean view, 1 and up for each noised view.
    document: document in the row, -1 for padding.
    position: position in the document.
    block_start: position of the first token of the own block; the own position for context tokens.
    seed: [B, 1], seed of the annealed mask's coins; read by that baseline alone.
    """

    view: Tensor
    document: Tensor
    position: Tensor
    block_start: Tensor
    seed: Tensor

    def at(self, row: Tensor, index: Tensor) -> Self:
        """The places of single tokens: `row` and `index` are broadcastable int64 indices."""
        own = {f.name: getattr(self, f.name)[row, index] for f in fields(self) if f.name != "seed"}
        return type(self)(**own, seed=self.seed[row, torch.zeros_like(index)])

    def part(self, start: int, stop: int | None = None) -> Self:
        """The places of positions start ... stop - 1."""
        own = {f.name: getattr(self, f.name)[:, start:stop] for f in fields(self) if f.name != "seed"}
        return type(self)(**own, seed=self.seed)

    def followed_by(self, other: Self) -> Self:
        """These places and then `other`'s."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name != "seed")
        return type(self)(**{name: torch.cat(pair, dim=1) for name, *pair in pairs}, seed=self.seed)

    def along(self, dim: int) -> Self:
        """The same places with a new axis of size 1 at `dim`, to be broadcast against others."""
        return type(self)(*(getattr(self, f.name).unsqueeze(dim) for f in fields(self)))


Rule = Callable[[Places, Places], Tensor]
"""rule(query, key): broadcastable places -> bool, True = the query may look at the key."""


def block_diffusion_rule(context: Context = "context_causal", target_share: float | None = None) -> Rule:
    """The mask of the parallel pass over [noised ; clean]   (arXiv 2512.06776, Eq. 4 and App. A).

    noised -> noised   same view and block, both directions            M_BD
    noised -> clean    strictly earlier blocks                         M_OBC
    clean  -> clean    itself and earlier tokens                       M_CC
                       ("block_causal": and the whole own block)
    clean  -> noised   never

    Nothing crosses documents. Padding sees padding, so that no query is left without a key.

    Args:
        context: the clean half's rule.
        target_share: baseline "annealed mask": probability p that a pair (i, j) of one block follows
            the target mask rather than the b = 1 mask. One coin decides whether i sees the noised j
            or the clean j (for j before i), and whether it sees the noised j at all (for j after i).
            None: the target mask.
    """

    def rule(query: Places, key: Places) -> Tensor:
        same_block = query.block_start == key.block_start
        query_clean, key_clean = query.view == 0, key.view == 0

        block_diffusion = same_block & (query.view == key.view)
        # One comparison for both halves: of clean keys, a noised query sees those before its block, a clean one
        # those up to itself.
        clean_keys = key.position < torch.where(query_clean, query.position + 1, query.block_start)
        if context == "block_causal":
            clean_keys = clean_keys | (query_clean & same_block)
        if target_share is not None:
            target = _coin(query, key) < target_share
            block_diffusion = block_diffusion & (target | (query.position == key.position))
            clean_keys = clean_keys | (same_block & (key.position < query.position) & ~target)
        return (query.document == key.document) & torch.where(key_clean, clean_keys, block_diffusion)

    return rule


def _coin(query: Places, key: Places) -> Tensor:
    """Uniform [0, 1) number of a pair of positions: a hash, so every form of the mask flips the same coin.

    The finaliser of 32 bits (C. Wellons, "Prospecting for hash functions") follows each part, so that coins of
    neighbouring keys and queries are independent. All products stay within int64.
    """
    value = query.seed
    for part in (query.document, query.position, key.position, 0):
        value = value & 0xFFFF_FFFF
        value = ((value >> 15) ^ value) * 0x2C1B_3C6D & 0xFFFF_FFFF
        value = ((value >> 12) ^ value) * 0x297A_2D39 & 0xFFFF_FFFF
        value = ((value >> 15) ^ value) + part
    return (value & 0xFF_FFFF).to(torch.float32) / 2**24


def within_window(rule: Rule, window: int | None) -> Rule:
    """The same rule for a layer that sees only the last `window` positions (sliding-window families)."""
    if window is None:
        return rule
    return lambda query, key: rule(query, key) & (key.position > query.position - window)


def to_dense(rule: Rule, query: Places, key: Places | None = None) -> Tensor:
    """The rule as a bool mask [B, 1, Q, K] for SDPA, Q * K bytes a row; `key` default: the queries themselves."""
    return rule(query.along(2), (query if key is None else key).along(1)).unsqueeze(1)


def additive(allowed: Tensor, dtype: torch.dtype, elsewhere: float | None = None) -> Tensor:
    """bool of any shape, True where a query may look -> 0 there; else `elsewhere`, by default the lowest number."""
    elsewhere = torch.finfo(dtype).min if elsewhere is None else elsewhere
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, elsewhere)


def to_block_mask(rule: Rule, query: Places, key: Places | None = None, block: int = 128) -> BlockMask:
    """The rule as a FlexAttention BlockMask: memory (T / `block`)**2, entries read from the places."""
    keys = query if key is None else key

    def mask_mod(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rule(query.at(row, q), keys.at(row, k))

    rows, length = query.position.shape
    device = query.position.device
    # Compiled it never holds the (2L)**2 entries. All that changes from batch to batch is in the places' tensors,
    # so that nothing is compiled again once it has seen two lengths.
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
