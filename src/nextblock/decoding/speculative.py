"""Speculative decoding: draft by denoising, check with the causal pass that commits, keep what agrees.

A cycle has two passes. The first one is causal over the known token, so that the AR head decides the next one, and
beside it denoises the block that begins with the known token (`drafts.free_block`): what that proposes further on are
the drafts. The second pass is causal over the decided token and the drafts, and gives the AR head's own choice after
each of them. So a cycle gains two tokens or more, and one without drafts is two steps of `autoregressive`.

Where the first pass costs more by that than the free token brings, as with a draft adapter on a CPU, it is the block
alone (`drafts.draft_alone`), and the check begins with the known token: `pace.Pacer` decides.

With `draft_ahead` draft and check are one pass. Behind the tokens to be checked lie blocks for the G points of
acceptance that are likeliest to come true; each begins with a copy of the last token that would be kept and sees what
would then be the context. The block of the point that comes true has drafted the next cycle. Where none was right,
the next pass checks nothing, gains one token, and drafts.

Letters: B rows, b block size, k drafted tokens, G points of acceptance, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nextblock.decoding.batch import Batch
from nextblock.decoding.check import Gain, append, verify
from nextblock.decoding.drafts import (
    Draft,
    candidates,
    choose_drafts,
    draft_alone,
    draft_lengths,
    drafting_block,
    drafting_step,
    free_block,
    lay_out,
    masked_block,
    with_masks,
)
from nextblock.decoding.events import BlockFinished, Event, RowFinished
from nextblock.decoding.pace import Pacer
from nextblock.model.trees import likeliest_points


def speculative(batch: Batch) -> Iterator[list[Event]]:
    """Greedy: drafts are kept as far as they equal the AR head's choice, and one more token comes from the head.

    When sampling, rejection sampling decides. What was not kept is dropped by counting less far in the cache. So the
    answer is that of `autoregressive`, greedy, and has its distribution, sampling.
    """
    pacer = Pacer(batch.costs, batch.block_size, batch.config.draft_paths)
    ahead, alone = batch.config.draft_ahead, False  # alone: whether a cycle drafts without the free token
    draft: Draft | None = None  # a cycle begins
    while rows := batch.admit() if draft is None else batch.rows:  # rows join where a cycle begins
        known, starts = batch.known()
        checked, lengths, points = Draft(known[:, :0], [0] * len(rows)), [0] * len(rows), None
        if draft is None:
            lengths = draft_lengths(batch, free=1)
            if not ahead:
                pacer.step = drafting_step(batch)
                lengths, alone = pacer.lengths(rows, lengths)
            if alone and any(lengths):
                most = draft_lengths(batch, free=0)
                draft = draft_alone(batch, [min(1 + n, own) for n, own in zip(lengths, most, strict=True)])
                batch.stats.count("denoise", len(rows))
                draft = pacer.cut(draft, rows, alone)
                continue
        else:
            checked = draft.part(draft_lengths(batch, free=0)) if ahead else draft
        if not (ahead or any(lengths) or any(checked.lengths)):  # without drafts this is a step of ar mode
            events = batch.decide(batch.forward(known, starts, [True] * len(rows)))
            events += (BlockFinished(row.number, len(row.answer) - 1, len(row.answer)) for row in rows)
            yield sorted(events, key=is_last)
            order = batch.leave()
            draft = Draft(known[order, :0], [0] * len(order)) if order and draft is None else None
            continue
        tree = lay_out(batch, checked, known)
        width = tree.tokens.shape[1]
        tokens, groups = tree.tokens, tree.groups
        if any(lengths):
            block = drafting_block(batch, 1 + max(lengths))
            tokens, groups = masked_block(batch, known, block), free_block(batch, block)
        elif draft is not None and ahead:
            points = likeliest_points(checked.chances, checked.lengths, ahead, batch.device)
            tokens, groups = with_masks(batch, tokens, points)
        hidden = batch.forward(tokens, starts, [True] * len(rows), groups)
        count(batch, checked, lengths, points is not None)
        read = hidden[:, :width]
        if any(lengths):  # the head is read once for both
            read = torch.cat([read, candidates(batch, hidden, [1] * len(rows), max(lengths))], dim=1)
        logits = batch.head.logits(read.flatten(0, 1)).unflatten(0, read.shape[:2])
        gains = verify(batch, logits[:, :width], checked, tree, points)
        settle(batch, checked, gains, starts)
        yield grown(batch, pacer, checked, gains, alone)
        order = batch.leave()
        if not order:
            draft = None
        elif any(lengths):
            draft = choose_drafts(batch, of_rows(logits[:, width:], order), [lengths[index] for index in order])
            draft = draft if ahead else pacer.cut(draft, batch.rows, alone)
        elif points is not None:
            draft = drafted(batch, of_rows(hidden, order), [gains[index].hit for index in order], width)
        else:
            draft = Draft(known[order, :0], [0] * len(order)) if draft is None else None


def is_last(event: Event) -> bool:
    """Whether nothing of its row comes behind an event."""
    return isinstance(event, RowFinished)


def of_rows(part: Tensor, order: list[int]) -> Tensor:
    """[B, ...] of some rows, in a new order; no copy where that is the old one."""
    return part if order == [*range(len(part))] else part[order]


def count(batch: Batch, checked: Draft, lengths: list[int], ahead: bool) -> None:
    """Book a pass for each row by what it did for it; `ahead`: blocks for the points of acceptance were there."""
    for check, length in zip(checked.lengths, lengths, strict=True):
        batch.stats.count("check" if check else "denoise" if length or ahead else "decode", 1)


def settle(batch: Batch, draft: Draft, gains: list[Gain], starts: list[int]) -> None:
    """Put what a row kept of a branch, which stands behind the trunk, where the answer goes on."""
    for index, (start, gain) in enumerate(zip(starts, gains, strict=True)):
        if gain.path:
            slot, depth = draft.own_slots(index, gain.path)
            batch.cache.move(index, start + slot, start + depth + 1, gain.kept - depth)


def grown(batch: Batch, pacer: Pacer, draft: Draft, gains: list[Gain], alone: bool) -> list[Event]:
    """Append what was gained, book the check, and let the pacer learn how much of the draft the answers have taken.

    A draft behind an answer's end is neither kept nor rejected.
    """
    before = [len(row.answer) for row in batch.rows]
    events = sorted(append(batch, gains), key=is_last)
    grown_by = [len(row.answer) - n for row, n in zip(batch.rows, before, strict=True)]
    kept = [min(gain.kept, n) for gain, n in zip(gains, grown_by, strict=True)]
    batch.stats.kept += sum(kept)
    for row, length, n in zip(batch.rows, draft.lengths, grown_by, strict=True):
        batch.stats.drafts += length if row.finish is None else min(length, n)
    pacer.learn(batch.rows, draft, kept, alone)
    return events


def drafted(batch: Batch, hidden: Tensor, hits: list[int], width: int) -> Draft:
    """What the blocks that came true, number `hits` behind the first `width` of `hidden` [B, _, D], have drafted.

    None (-1): no draft.
    """
    length, most = batch.block_size - 2, batch.config.draft_length
    length = min(length, most) if isinstance(most, int) else length
    longest = length if max(hits) >= 0 else 0
    places = candidates(batch, hidden, [width + max(hit, 0) * batch.block_size for hit in hits], longest)
    logits = batch.head.logits(places.flatten(0, 1)).unflatten(0, places.shape[:2])
    return choose_drafts(batch, logits, [length if hit >= 0 else 0 for hit in hits])
