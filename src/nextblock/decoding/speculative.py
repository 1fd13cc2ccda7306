"""Speculative decoding: draft by denoising, check with the causal pass that commits, keep what agrees."""

from __future__ import annotations

from collections.abc import Iterator

from nextblock.decoding.batch import Batch
from nextblock.decoding.check import append, verify
from nextblock.decoding.drafts import Draft, choose_drafts, draft_length, lay_out, masked_block
from nextblock.decoding.events import Event


def speculative(batch: Batch) -> Iterator[list[Event]]:
    """Each cycle starts from one token that the AR head chose and drafts what may follow by denoising.

    One causal pass over token and drafts then gives the AR head's own choice after each of them. Greedy:
    drafts are kept as far as they equal it, and one more token comes from the head itself; when sampling,
    rejection sampling decides. What was not kept is dropped by counting less far in the cache. So the answer
    is that of `autoregressive`, greedy, and has its distribution, sampling.
    """
    while rows := batch.admit():
        known, starts = batch.known()
        lengths = [draft_length(batch, row) for row in rows]
        if any(lengths):
            hidden = batch.forward(masked_block(batch, known), starts, [False] * len(rows))
            batch.stats.count("denoise", len(rows))
            draft = choose_drafts(batch, hidden, lengths)
        else:
            draft = Draft(known[:, :0], lengths)
        tree = lay_out(batch, draft, known, starts)
        hidden = batch.forward(tree.tokens, starts, [True] * len(rows), tree.groups)
        batch.stats.count("check" if any(lengths) else "decode", len(rows))
        gains = verify(batch, hidden, draft, tree)
        for index, (start, gain) in enumerate(zip(starts, gains, strict=True)):
            if gain.path:  # what it kept of its own stands behind the trunk: put it where the answer goes on
                slot, depth = draft.own_slots(index, gain.path)
                batch.cache.move(index, start + slot, start + depth + 1, gain.kept - depth)
        yield [*append(batch, gains)]
        batch.leave()
