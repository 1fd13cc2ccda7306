"""Speculative decoding: draft by denoising, check with the causal pass that commits, keep what agrees.

Letters: B rows, V vocabulary, b block size, k drafted tokens, G points of acceptance drafted ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextblock.batch import Batch, Row, begin, push
from nextblock.events import BlockFinished, Event, Rejected
from nextblock.sampling import accepted, draw, residual


@dataclass
class Draft:
    """Drafted tokens int64 [B, k], of which each row has its first `lengths` checked.

    distribution: when sampling, what they were drawn from, [B, k, V].
    """

    tokens: Tensor
    lengths: list[int]
    distribution: Tensor | None = None


@dataclass
class Verdict:
    """For each row: how many drafts are kept, the tokens it gains (one more), and their probabilities."""

    kept: list[int]
    tokens: list[list[int]]
    probabilities: list[list[float]]


def speculative(batch: Batch) -> Iterator[Event]:
    """Each cycle starts from one token that the AR head chose and drafts what may follow by denoising.

    One causal pass over token and drafts then gives the AR head's own choice after each of them. Greedy:
    drafts are kept as far as they equal it, and one more token comes from the head itself; when sampling,
    rejection sampling decides. What was not kept is dropped by counting less far in the cache. So the answer
    is that of `autoregressive`, greedy, and has its distribution, sampling.
    """
    yield from begin(batch, first_token=True)
    batch.leave()
    yield from _drafting_ahead(batch) if batch.config.draft_ahead else _drafting_apart(batch)


def _drafting_apart(batch: Batch) -> Iterator[Event]:
    """Two passes a cycle: draft, check."""
    recent = {row.number: float(batch.block_size) for row in batch.rows}
    while rows := batch.rows:
        known, starts = _known(batch)
        draft = _denoise(batch, known, starts, [_draft_length(batch, row, recent[row.number]) for row in rows])
        hidden = batch.forward(torch.cat([known, draft.tokens], dim=1), starts, [True] * len(rows))
        batch.stats.count("check" if draft.tokens.shape[1] else "decode", len(rows))
        verdict = _verify(batch, hidden, draft)
        for row, kept in zip(rows, verdict.kept, strict=True):
            recent[row.number] = 0.7 * recent[row.number] + 0.3 * kept
        yield from _emit(batch, draft, verdict)
        batch.leave()


def _known(batch: Batch) -> tuple[Tensor, list[int]]:
    """The last token of each answer, int64 [B, 1], which is not in the cache yet, and its position."""
    tokens = torch.tensor([[row.answer[-1]] for row in batch.rows], device=batch.device)
    return tokens, [len(row.prompt) + len(row.answer) - 1 for row in batch.rows]


def _draft_length(batch: Batch, row: Row, recent: float) -> int:
    """Tokens to draft for a row; `recent`: moving average of how many were kept."""
    length = batch.block_size - 1
    wanted = batch.config.draft_length
    if wanted == "auto":
        length = min(length, int(1.5 * recent) + 2)
    elif wanted is not None:
        length = min(length, wanted)
    if row.random is None:  # drafts past the limit cannot matter; sampling keeps to the same draws
        length = min(length, row.limit - len(row.answer) - 1)
    return length


def _denoise(batch: Batch, known: Tensor, starts: list[int], lengths: list[int]) -> Draft:
    """Tokens behind the known one, in `draft_steps` denoising passes from left to right.

    Left to right, because rejection sampling needs each draft's distribution given those before it.
    """
    rows, config = batch.rows, batch.config
    assert batch.mask_token_id is not None
    longest = max(lengths)
    tokens = torch.full((len(rows), batch.block_size), batch.mask_token_id, device=batch.device)
    tokens[:, :1] = known
    shift = 1 if batch.shifted else 0
    distributions = []
    size = -(-longest // config.draft_steps) if longest else 1
    for low in range(1, longest + 1, size):
        high = min(low + size, longest + 1)
        hidden = batch.forward(tokens, starts, [False] * len(rows))
        batch.stats.count("denoise", len(rows))
        prefixes = ((row, row.answer) for row in rows for _ in range(low, high))
        logits = batch.next_logits(hidden[:, low - shift : high - shift].flatten(0, 1), prefixes)
        # A row draws for its own drafts only, so that it draws the same numbers alone.
        uniform = []
        for row, length in zip(rows, lengths, strict=True):
            own = row.draw(max(0, min(high, length + 1) - low))
            uniform += own + [0.0] * (high - low - len(own)) if row.random is not None else []
        chosen = batch.choose(logits, uniform)[0]
        tokens[:, low:high] = chosen.unflatten(0, (len(rows), high - low))
        if config.temperature:
            distributions.append(logits.softmax(-1).unflatten(0, (len(rows), high - low)))
    return Draft(tokens[:, 1 : longest + 1], lengths, torch.cat(distributions, dim=1) if distributions else None)


def _verify(batch: Batch, hidden: Tensor, draft: Draft) -> Verdict:
    """Check drafts against the causal pass over the known token and them: `hidden` [B, k + 1, D]."""
    logits = batch.next_logits(hidden.flatten(0, 1), _prefixes(batch.rows, draft.tokens))
    logits = logits.unflatten(0, hidden.shape[:2])
    return _verify_sampled(batch, logits, draft) if batch.config.temperature else _verify_greedy(batch, logits, draft)


def _prefixes(rows: list[Row], drafts: Tensor) -> Iterator[tuple[Row, list[int]]]:
    """For each position of the check its row and the answer up to there; made only if a processor asks."""
    for row, drafted in zip(rows, drafts.tolist(), strict=True):
        for count in range(len(drafted) + 1):
            yield row, row.answer + drafted[:count]


def _verify_greedy(batch: Batch, logits: Tensor, draft: Draft) -> Verdict:
    """Keep drafts as far as they are the AR head's own choice. `logits`: [B, k + 1, V]."""
    rows, width = logits.shape[:2]
    chosen, probability = batch.choose(logits.flatten(0, 1), [])
    chosen = chosen.view(rows, width)
    agreed = (chosen[:, :-1] == draft.tokens).long().cumprod(1).sum(1).tolist()
    kept = [min(n, length) for n, length in zip(agreed, draft.lengths, strict=True)]
    return _verdict(kept, chosen, probability.view(rows, width))


def _verify_sampled(batch: Batch, logits: Tensor, draft: Draft) -> Verdict:
    """Rejection sampling: what is emitted has the AR distribution, whatever the draft's.

    (Leviathan et al., arXiv 2211.17192, Theorem 1.) `logits`: [B, k + 1, V], filtered as the drafts' were.
    """
    target, drafted = logits.softmax(-1), draft.tokens
    rows, length = drafted.shape
    # Behind a row's last draft nothing was proposed: q = 0 there, so that the head's own distribution remains.
    proposal = torch.zeros_like(target)
    if draft.distribution is not None:
        proposal[:, :length] = draft.distribution
        for index, own in enumerate(draft.lengths):
            proposal[index, own:] = 0
    chances = torch.stack([p[:, :length].gather(-1, drafted.unsqueeze(-1)) for p in (target, proposal)])
    p, q = chances.squeeze(-1).tolist()
    kept = [
        accepted(p[i][:own], q[i][:own], row.draw(own))
        for i, (row, own) in enumerate(zip(batch.rows, draft.lengths, strict=True))
    ]
    uniform = torch.tensor([u for row in batch.rows for u in row.draw(1)], dtype=torch.float64)
    at = torch.arange(rows, device=batch.device), torch.tensor(kept, device=batch.device)
    last = draw(residual(target[at], proposal[at]), uniform.to(batch.device))
    emitted = torch.cat([drafted, drafted.new_zeros(rows, 1)], dim=1).index_put(at, last)
    return _verdict(kept, emitted, target.gather(-1, emitted.unsqueeze(-1)).squeeze(-1))


def _verdict(kept: list[int], tokens: Tensor, probabilities: Tensor) -> Verdict:
    """Cut [B, k + 1] tokens and probabilities behind each row's first token that was not drafted."""
    gained, found = tokens.tolist(), probabilities.tolist()
    return Verdict(
        kept,
        [line[: n + 1] for line, n in zip(gained, kept, strict=True)],
        [line[: n + 1] for line, n in zip(found, kept, strict=True)],
    )


def _emit(batch: Batch, draft: Draft, verdict: Verdict) -> Iterator[Event]:
    """Append what was gained to the answers."""
    drafts = draft.tokens.tolist()
    for index, row in enumerate(batch.rows):
        first = len(row.answer)
        kept = verdict.kept[index]
        yield from push(row, verdict.tokens[index], verdict.probabilities[index])
        for offset in range(kept, draft.lengths[index]):
            yield Rejected(row.number, first + offset, drafts[index][offset], row.passes)
        yield BlockFinished(row.number, first, len(row.answer))


# ------------------------------------------------------------------------- draft and check in one pass


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


def _drafting_ahead(batch: Batch) -> Iterator[Event]:
    """One pass a cycle: behind the tokens to be checked lie the next block's masks, for G points of acceptance.

    Each group of b tokens begins with a copy of the last token that would be kept and sees what would then
    be the context, and itself. The group of the point that comes true has drafted the next cycle: its first
    proposal is overruled by the check's own token, the others are the drafts. Where no group was right, the
    next pass checks nothing, gains one token, and drafts.
    """
    pending = [_Pending() for _ in batch.rows]
    while rows := batch.rows:
        draft = _collect(batch, pending)
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
        yield from _emit(batch, draft, verdict)
        hits = [
            width + own.index(kept) * batch.block_size if kept in own and row.finish is None else None
            for row, own, kept in zip(rows, points, verdict.kept, strict=True)
        ]
        pending = _drafted_ahead(batch, hidden, hits)
        pending = [pending[index] for index in batch.leave()]


def _collect(batch: Batch, pending: list[_Pending]) -> Draft:
    """Pending drafts of all rows as one batch; shorter ones are filled up."""
    lengths = [len(waiting.tokens) for waiting in pending]
    for index, row in enumerate(batch.rows):
        if row.random is None:
            lengths[index] = min(lengths[index], row.limit - len(row.answer) - 1)
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
    step = batch.span[:block]
    of_groups = (first + point)[:, :, None] + step
    position = torch.cat([first + batch.span[:width], of_groups.flatten(1)], dim=1)
    # What each token sees: slots up to `context`, and its own group.
    context = torch.cat([position[:, :width], (of_groups[:, :, :1] - 1).expand_as(of_groups).flatten(1)], dim=1)
    group = torch.arange(point.shape[1], device=device).repeat_interleave(block)
    group = torch.cat([group.new_full((width,), -1), group]).expand(rows, -1)
    end = max(starts) + tokens.shape[1]
    slots = first + batch.span[: tokens.shape[1]]
    slot = batch.span[:end].expand(rows, -1)
    slot_position = slot.scatter(1, slots, position)
    slot_group = torch.full_like(slot, -1).scatter(1, slots, group)
    own = (slot_group[:, None] == group[:, :, None]) & (group >= 0)[:, :, None]
    seen = own | ((slot[:, None] <= context[:, :, None]) & (slot_group < 0)[:, None])

    def visible(window: int | None) -> Tensor:
        return seen if window is None else seen & (slot_position[:, None] > position[:, :, None] - window)

    return batch.forward_places(tokens, starts, position, visible, group >= 0)


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
    tokens, probability = batch.choose(logits, [u for row in rows for u in row.draw(length)])
    distribution = logits.softmax(-1) if config.temperature else None
    chances = probability if distribution is None else distribution.amax(-1)
    drawn, odds = tokens.view(-1, length).tolist(), chances.view(-1, length).tolist()
    found = iter(range(len(rows)))
    for index, hit in enumerate(hits):
        if hit is None:
            continue
        at = next(found)
        own = None if distribution is None else distribution[at * length : (at + 1) * length]
        pending[index] = _Pending(drawn[at], odds[at], own)
    return pending
