"""Speculative decoding with draft and check in one pass.

Behind the tokens to be checked lie the next block's masks, for G points of acceptance. Each group of b tokens begins
with a copy of the last token that would be kept and sees what would then be the context, and itself. The group of
the point that comes true has drafted the next cycle: its first proposal is overruled by the check's own token, the
others are the drafts. Where no group was right, the next pass checks nothing, gains one token, and drafts.

Letters: B rows, b block size, k drafted tokens, G points of acceptance, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nextblock.decoding.batch import Batch
from nextblock.decoding.check import append, verify
from nextblock.decoding.drafts import Draft, draft_length, lay_out, propose
from nextblock.decoding.events import Event
from nextblock.decoding.masks import Groups
from nextblock.decoding.sampling import on_device, probability_of


def _part(ahead: Draft, batch: Batch) -> Draft:
    """As much of a draft as is to be checked now."""
    lengths = [min(own, draft_length(batch, row)) for row, own in zip(batch.rows, ahead.lengths, strict=True)]
    distribution = None if ahead.distribution is None else ahead.distribution[:, : max(lengths)]
    return Draft(ahead.tokens[:, : max(lengths)], lengths, distribution, chances=ahead.chances)


def _of_rows(ahead: Draft, rows: list[int]) -> Draft:
    """The draft of some rows, in a new order."""
    if rows == [*range(len(ahead.lengths))]:
        return ahead
    at = on_device(rows, ahead.tokens.device, torch.int64)
    distribution, chances = (None if x is None else x[at] for x in (ahead.distribution, ahead.chances))
    return Draft(ahead.tokens[at], [ahead.lengths[row] for row in rows], distribution, chances=chances)


def likeliest_points(draft: Draft, count: int) -> Tensor:
    """Of each row the `count` likeliest numbers of drafts to be kept, the likeliest first: int64 [B, G].

    A row that has fewer numbers repeats its likeliest.
    """
    assert draft.chances is not None
    length = on_device(draft.lengths, draft.tokens.device)[:, None]
    number = torch.arange(max(draft.lengths) + 1, device=length.device)
    chance = torch.nn.functional.pad(draft.chances[:, : max(draft.lengths)].double(), (1, 1))
    chance[:, 0] = 1
    reached = chance[:, :-1].cumprod(1)
    odds = torch.where(number < length, reached * (1 - chance[:, 1:]), reached).masked_fill(number > length, -1)
    ranked = odds.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.where(number[: ranked.shape[1]] <= length, ranked, ranked[:, :1])


def draft_ahead(batch: Batch) -> Iterator[list[Event]]:
    """One pass a cycle: check, and draft for the points of acceptance that are likeliest to come true."""
    yield batch.begin(first_token=True)
    for row in batch.rows:
        row.recent = float(batch.block_size)
    ahead = drafted(batch, torch.empty(0), [None] * len(batch.rows))
    while rows := batch.rows:
        known, starts = batch.known()
        draft = _part(ahead, batch)
        tree = lay_out(batch, draft, known, starts)
        points = likeliest_points(draft, batch.config.draft_ahead)
        tokens, groups = with_masks(batch, tree.tokens, points, starts)
        hidden = batch.forward(tokens, starts, [True] * len(rows), groups)
        batch.stats.count("check", len(rows))
        width = tree.tokens.shape[1]
        gains = verify(batch, hidden[:, :width], draft, tree, points)
        yield [*append(batch, gains)]
        hits = [
            width + gain.hit * batch.block_size if gain.hit >= 0 and row.finish is None else None
            for row, gain in zip(rows, gains, strict=True)
        ]
        ahead = drafted(batch, hidden, hits)
        ahead = _of_rows(ahead, batch.leave())


def with_masks(batch: Batch, checked: Tensor, points: Tensor, starts: list[int]) -> tuple[Tensor, Groups]:
    """The tokens [B, 1 + k + G b] of: the known token and its drafts, causal; then a block for each of the points."""
    block, (rows, width), count = batch.block_size, checked.shape, points.shape[1]
    blocks = points.new_full((rows, count, block), batch.mask_token_id)
    blocks[:, :, 0] = checked.gather(1, points)
    first, span = on_device(starts, batch.device)[:, None], batch.masks.span
    of_blocks = (first + points)[:, :, None] + span(block)
    position = torch.cat([first + span(width), of_blocks.flatten(1)], dim=1)
    context = torch.cat([position[:, :width], (of_blocks[:, :, :1] - 1).expand_as(of_blocks).flatten(1)], dim=1)
    group = span(count).repeat_interleave(block)
    group = torch.cat([group.new_full((width,), -1), group]).expand(rows, -1)
    return torch.cat([checked, blocks.flatten(1)], dim=1), Groups(position, context, group, noised=True)


def drafted(batch: Batch, hidden: Tensor, hits: list[int | None]) -> Draft:
    """What the block that came true (`hits`: its first index in `hidden` [B, _, D]) has drafted, for each row."""
    config, length = batch.config, batch.block_size - 2
    if isinstance(config.draft_length, int):
        length = min(length, config.draft_length)
    offset = 1 if batch.shifted else 2
    found = [(index, hit + offset) for index, hit in enumerate(hits) if hit is not None]
    tokens = torch.zeros(len(hits), length, dtype=torch.int64, device=batch.device)
    chances = tokens.float()
    ahead = Draft(tokens, [0 if hit is None else length for hit in hits], chances=chances)
    if not found:
        return ahead
    rows, at = [batch.rows[index] for index, _ in found], on_device([index for index, _ in found], batch.device)
    prefixes = ((row, row.answer) for row in rows for _ in range(length))
    chosen = torch.cat([hidden[index, first : first + length] for index, first in found])
    logits = batch.head.next_logits(chosen, prefixes)
    uniform = [u for row in rows for u in row.draw(length)]
    tokens[at], corrected, distribution = propose(batch, logits.unflatten(0, (-1, length)), uniform, rows)
    chances[at] = probability_of(corrected, corrected.argmax(-1))
    if distribution is not None:
        ahead.distribution = distribution.new_zeros(len(hits), *distribution.shape[1:])
        ahead.distribution[at] = distribution
    return ahead
