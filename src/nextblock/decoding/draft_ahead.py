"""Draft and check in one pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextblock.decoding.batch import Batch
from nextblock.decoding.check import _emit, _forward_groups, _verify
from nextblock.decoding.drafts import Draft, _draft_length, _known
from nextblock.decoding.events import Event
from nextblock.decoding.sampling import probability_of


@dataclass
class _Pending:
    """What a row will have checked in the next pass, possibly nothing.

    chances: how likely each draft is to be kept, given those before it.
    """

    tokens: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    distribution: Tensor | None = None

    def points(self, count: int, length: int) -> list[int]:
        """The `count` likeliest numbers of drafts to be kept out of the first `length`, the likeliest first."""
        reached, odds = 1.0, []
        for chance in self.chances[:length]:
            odds.append(reached * (1 - chance))
            reached *= chance
        odds.append(reached)
        return sorted(range(len(odds)), key=lambda n: (-odds[n], n))[:count]


def _drafting_ahead(batch: Batch, recent: dict[int, float]) -> Iterator[list[Event]]:
    """One pass a cycle: behind the tokens to be checked lie the next block's masks, for G points of acceptance.

    Each group of b tokens begins with a copy of the last token that would be kept and sees what would then
    be the context, and itself. The group of the point that comes true has drafted the next cycle: its first
    proposal is overruled by the check's own token, the others are the drafts. Where no group was right, the
    next pass checks nothing, gains one token, and drafts.
    """
    pending = [_Pending() for _ in batch.rows]
    while rows := batch.rows:
        draft = _collect(batch, pending, recent)
        points = [
            waiting.points(batch.config.draft_ahead, length)
            for waiting, length in zip(pending, draft.lengths, strict=True)
        ]
        groups = max(map(len, points))
        points = [own + own[:1] * (groups - len(own)) for own in points]
        hidden = _check_and_draft(batch, draft, points)
        batch.stats.count("check", len(rows))
        width = draft.tokens.shape[1] + 1
        verdict = _verify(batch, hidden[:, :width], draft)
        yield [*_emit(batch, draft, verdict, recent)]
        hits = [
            width + own.index(kept) * batch.block_size if kept in own and row.finish is None else None
            for row, own, kept in zip(rows, points, verdict.kept, strict=True)
        ]
        pending = _drafted_ahead(batch, hidden, hits)
        pending = [pending[index] for index in batch.leave()]


def _collect(batch: Batch, pending: list[_Pending], recent: dict[int, float]) -> Draft:
    """Pending drafts of all rows as one batch, as much of them as is to be checked; shorter ones are filled up."""
    lengths = [
        min(len(waiting.tokens), _draft_length(batch, row, recent[row.number]))
        for row, waiting in zip(batch.rows, pending, strict=True)
    ]
    longest = max(lengths)
    tokens = torch.tensor(
        [(waiting.tokens + [0] * longest)[:longest] for waiting in pending], dtype=torch.int64, device=batch.device
    ).view(len(pending), longest)
    distribution = None
    if batch.config.temperature and longest:
        distribution = torch.zeros(len(pending), longest, batch.decoder.vocabulary, device=batch.device)
        for index, waiting in enumerate(pending):
            if waiting.distribution is not None:
                distribution[index, : lengths[index]] = waiting.distribution[: lengths[index]]
    return Draft(tokens, lengths, distribution)


def _check_and_draft(batch: Batch, draft: Draft, points: list[list[int]]) -> Tensor:
    """Hidden states [B, 1 + k + G b, D] of: the known token and its drafts, causal; then the groups."""
    known, starts = _known(batch)
    device, block = batch.device, batch.block_size
    assert batch.mask_token_id is not None
    checked = torch.cat([known, draft.tokens], dim=1)
    rows, width = checked.shape
    point = torch.tensor(points, device=device)  # [B, G]
    groups = torch.full((rows, point.shape[1], block), batch.mask_token_id, device=device)
    groups[:, :, 0] = checked.gather(1, point)
    tokens = torch.cat([checked, groups.flatten(1)], dim=1)

    first = torch.tensor(starts, device=device)[:, None]
    step = batch.span(block)
    of_groups = (first + point)[:, :, None] + step
    position = torch.cat([first + batch.span(width), of_groups.flatten(1)], dim=1)
    context = torch.cat([position[:, :width], (of_groups[:, :, :1] - 1).expand_as(of_groups).flatten(1)], dim=1)
    group = torch.arange(point.shape[1], device=device).repeat_interleave(block)
    group = torch.cat([group.new_full((width,), -1), group]).expand(rows, -1)
    return _forward_groups(batch, tokens, starts, position, context, group, causal=False)


def _drafted_ahead(batch: Batch, hidden: Tensor, hits: list[int | None]) -> list[_Pending]:
    """What the group that came true (`hits`: its first index in `hidden`) has drafted, for each row."""
    config = batch.config
    length = batch.block_size - 2
    if isinstance(config.draft_length, int):
        length = min(length, config.draft_length)
    offset = 1 if batch.shifted else 2
    rows = [row for row, hit in zip(batch.rows, hits, strict=True) if hit is not None]
    pending = [_Pending() for _ in hits]
    if not rows:
        return pending
    chosen = [hidden[index, hit + offset : hit + offset + length] for index, hit in enumerate(hits) if hit is not None]
    prefixes = ((row, row.answer) for row in rows for _ in range(length))
    logits = batch.next_logits(torch.cat(chosen), prefixes)
    distribution = batch.distribution(logits)
    tokens = batch.choose(logits, [u for row in rows for u in row.draw(length)], distribution)
    chances = probability_of(logits, logits.argmax(-1))
    drawn, odds = tokens.view(-1, length).tolist(), chances.view(-1, length).tolist()
    found = iter(range(len(rows)))
    for index, hit in enumerate(hits):
        if hit is None:
            continue
        at = next(found)
        own = None if distribution is None else distribution[at * length : (at + 1) * length]
        pending[index] = _Pending(drawn[at], odds[at], own)
    return pending
