"""Speculative decoding: draft by denoising, check with the causal pass that commits, keep what agrees.

Letters: B rows, V vocabulary, D hidden size, b block size, k drafted tokens, N tokens of a check with all its paths,
G points of acceptance drafted ahead.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from nextblock.decoding.batch import Batch, begin
from nextblock.decoding.check import _check_tree, _emit, _verify
from nextblock.decoding.draft_ahead import _drafting_ahead
from nextblock.decoding.drafts import _denoise, _draft_length, _known
from nextblock.decoding.events import Event


def speculative(batch: Batch) -> Iterator[list[Event]]:
    """Each cycle starts from one token that the AR head chose and drafts what may follow by denoising.

    One causal pass over token and drafts then gives the AR head's own choice after each of them. Greedy:
    drafts are kept as far as they equal it, and one more token comes from the head itself; when sampling,
    rejection sampling decides. What was not kept is dropped by counting less far in the cache. So the answer
    is that of `autoregressive`, greedy, and has its distribution, sampling.
    """
    yield [*begin(batch, first_token=True)]
    batch.leave()
    recent = {row.number: float(batch.block_size) for row in batch.rows}
    yield from (_drafting_ahead if batch.config.draft_ahead else _drafting_apart)(batch, recent)


def _drafting_apart(batch: Batch, recent: dict[int, float]) -> Iterator[list[Event]]:
    """Two passes a cycle: draft, check. `recent`: for each row a moving average of how many drafts were kept."""
    while rows := batch.rows:
        known, starts = _known(batch)
        draft = _denoise(batch, known, starts, [_draft_length(batch, row, recent[row.number]) for row in rows])
        if any(draft.branches):
            hidden = _check_tree(batch, known, starts, draft)
        else:
            hidden = batch.forward(torch.cat([known, draft.tokens], dim=1), starts, [True] * len(rows))
        batch.stats.count("check" if draft.tokens.shape[1] else "decode", len(rows))
        verdict = _verify(batch, hidden, draft)
        for index, (start, kept, number) in enumerate(zip(starts, verdict.kept, verdict.paths, strict=True)):
            if number:  # what it kept of its own stands behind the first path: put it where the answer goes on
                path = draft.paths[index][number]
                own = path.nodes[path.shared + 1]
                batch.cache.move(index, start + own, start + path.shared + 1, kept - path.shared)
        yield [*_emit(batch, draft, verdict, recent)]
        batch.leave()


# ------------------------------------------------------------------------- draft and check in one pass
