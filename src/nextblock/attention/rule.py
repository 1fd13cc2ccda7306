"""Who may look at whom: the rule of the two-view pass, stated once. `masks.py` and `split.py` bring it to layers.

Letters: B rows, T positions of [noised ; clean].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from nextblock.config.sections import Context


@dataclass(frozen=True)
class Places:
    """Where each token of the two-view sequence stands: all that the rule asks. int64 [B, T] unless broadcast.

    view: 0 for the clean view, 1 and up for each noised view.
    document: document in the row, -1 for padding.
    position: position in the document.
    block_start: position of the first token of its block; for context tokens their own position.
    seed: [B, 1], seed of the coins of the annealed mask, the only rule that reads it.
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
    """The mask of the parallel pass over [noised ; clean]   (arXiv 2512.06776, Eq. 4 and App. A)::

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
