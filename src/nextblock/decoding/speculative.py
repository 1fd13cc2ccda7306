"""Speculative decoding: draft by denoising, check with the causal pass that commits, keep what agrees.

Letters: B rows, V vocabulary, D hidden size, b block size, k drafted tokens, N tokens of a check with all its paths,
G points of acceptance drafted ahead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nextblock.decoding.batch import Batch, Row, begin, push
from nextblock.decoding.events import BlockFinished, Event, Rejected
from nextblock.decoding.sampling import accepted, draw, probability_of, residual, without


@dataclass(frozen=True)
class Path:
    """One line of drafts through a row's tree.

    tokens: its drafts.
    nodes: where the check's pass has the known token and then each of the drafts.
    shared: how many drafts it has in common with the first path before it leaves that one.
    """

    tokens: list[int]
    nodes: list[int]
    shared: int = 0


@dataclass
class Draft:
    """Drafted tokens int64 [B, k], of which each row has its first `lengths` checked: its first path.

    distribution: when sampling, what they were drawn from, [B, k, V].
    branches: for each row (position among its drafts, token) of every further path: it has this token there
        instead, and the same ones before and after.
    """

    tokens: Tensor
    lengths: list[int]
    distribution: Tensor | None = None
    branches: list[list[tuple[int, int]]] = field(default_factory=list)

    @cached_property
    def paths(self) -> list[list[Path]]:
        """The paths of each row, the first one first."""
        width = self.tokens.shape[1] + 1
        found = []
        for index, (line, length) in enumerate(zip(self.tokens.tolist(), self.lengths, strict=True)):
            paths, free = [Path(line[:length], list(range(length + 1)))], width
            for position, token in self.branches[index] if self.branches else ():
                own = [token, *line[position + 1 : length]]
                nodes = [*range(position + 1), *range(free, free + len(own))]
                paths.append(Path(line[:position] + own, nodes, position))
                free += len(own)
            found.append(paths)
        return found


@dataclass
class Verdict:
    """For each row: how many drafts are kept, the tokens it gains (one more), their probabilities, and the path."""

    kept: list[int] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    probabilities: list[list[float]] = field(default_factory=list)
    paths: list[int] = field(default_factory=list)


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
    """Tokens behind the known one, from one denoising pass over the block."""
    rows, config = batch.rows, batch.config
    assert batch.mask_token_id is not None
    if (longest := max(lengths)) == 0:
        return Draft(known[:, :0], lengths)
    tokens = torch.full((len(rows), batch.block_size), batch.mask_token_id, device=batch.device)
    tokens[:, :1] = known
    hidden = batch.forward(tokens, starts, [False] * len(rows))
    batch.stats.count("denoise", len(rows))
    first = 0 if batch.shifted else 1
    prefixes = ((row, row.answer) for row in rows for _ in range(longest))
    logits = batch.next_logits(hidden[:, first : first + longest].flatten(0, 1), prefixes)
    # A row draws for its own drafts only, so that it draws the same numbers alone.
    uniform = [
        u
        for row, length in zip(rows, lengths, strict=True)
        if row.random is not None
        for u in row.draw(length) + [0.0] * (longest - length)
    ]
    distribution, shape = batch.distribution(logits), (len(rows), longest)
    drafts = batch.choose(logits, uniform, distribution).view(shape)
    logits = logits.unflatten(0, shape)
    distribution = None if distribution is None else distribution.unflatten(0, shape)
    branches = _branches(batch, logits, distribution, drafts, lengths) if config.draft_paths > 1 else []
    return Draft(drafts, lengths, distribution, branches)


def _branches(
    batch: Batch, logits: Tensor, distribution: Tensor | None, drafts: Tensor, lengths: list[int]
) -> list[list[tuple[int, int]]]:
    """Where further paths leave the first one, and with which token: the second best, or a draw without the first.

    At the positions where that is likeliest to be of use: all drafts before are kept, and the second-likeliest
    token is the right one. This looks at `logits` [B, k, V] alone, never at what was drawn from them: chosen by
    the `drafts`, the tokens behind a branch would no longer have the distribution that the check takes them to have.
    """
    top = logits.softmax(-1).topk(2)
    likeliest, second = top.values.double().log().unbind(-1)
    odds = likeliest.cumsum(1) - likeliest + second
    if distribution is not None:  # no second token where a filter leaves only one
        odds = odds.masked_fill((distribution > 0).sum(-1) < 2, -math.inf)
    found = []
    for line, length in zip(odds.tolist(), lengths, strict=True):
        ranked = sorted((n for n in range(length) if line[n] > -math.inf), key=lambda n: -line[n])
        found.append(ranked[: batch.config.draft_paths - 1])
    flat = [(index, position) for index, positions in enumerate(found) for position in positions]
    at = torch.tensor(flat, dtype=torch.int64, device=batch.device).view(-1, 2).unbind(1)
    if distribution is not None:
        uniform = [u for row, positions in zip(batch.rows, found, strict=True) for u in row.draw(len(positions))]
        weights = without(distribution[at], drafts[at])
        tokens = draw(weights, torch.tensor(uniform, dtype=torch.float64, device=batch.device))
    else:
        tokens = top.indices[..., 1][at]
    token = iter(tokens.tolist())
    return [[(position, next(token)) for position in positions] for positions in found]


def _check_tree(batch: Batch, known: Tensor, starts: list[int], draft: Draft) -> Tensor:
    """Hidden states [B, N, D] of: the known token and the first path; then what is each other path's own.

    Each token stands at the position of its depth and sees the context, and its own path up to itself.
    """
    lines = []  # of (token, depth, group, depth of the last shared token) for each node of each row
    for (token,), (first, *others) in zip(known.tolist(), draft.paths, strict=True):
        line = [(token, 0, -1, 0)] + [(t, depth, -1, depth) for depth, t in enumerate(first.tokens, 1)]
        line += [(0, 0, -1, 0)] * (draft.tokens.shape[1] - len(first.tokens))  # filled up: nobody looks there
        for group, path in enumerate(others):
            own = enumerate(path.tokens[path.shared :], path.shared + 1)
            line += [(t, depth, group, path.shared) for depth, t in own]
        lines.append(line)
    width = max(map(len, lines))
    lines = [line + [(0, 0, -1, 0)] * (width - len(line)) for line in lines]
    tokens, depth, group, shared = torch.tensor(lines, device=batch.device).unbind(-1)
    first = torch.tensor(starts, device=batch.device)[:, None]
    return _forward_groups(batch, tokens, starts, first + depth, first + shared, group, causal=True)


def _forward_groups(
    batch: Batch, tokens: Tensor, starts: list[int], position: Tensor, context: Tensor, group: Tensor, causal: bool
) -> Tensor:
    """One pass in which groups of tokens share a context and do not see each other; all arguments int64 [B, N].

    Args:
        position: of each token.
        context: last slot that it sees of what belongs to no group.
        group: its group; -1: none.
        causal: it sees its group up to itself; else all of it, as a block that is being denoised.
    """
    end = max(starts) + tokens.shape[1]
    slots = torch.tensor(starts, device=batch.device)[:, None] + batch.span(tokens.shape[1])
    slot = batch.span(end).expand(len(starts), -1)
    slot_position = slot.scatter(1, slots, position)
    slot_group = torch.full_like(slot, -1).scatter(1, slots, group)
    own = (slot_group[:, None] == group[:, :, None]) & (group >= 0)[:, :, None]
    if causal:
        own = own & (slot_position[:, None] <= position[:, :, None])
    seen = own | ((slot[:, None] <= context[:, :, None]) & (slot_group < 0)[:, None])

    def visible(window: int | None) -> Tensor:
        return seen if window is None else seen & (slot_position[:, None] > position[:, :, None] - window)

    return batch.forward_places(tokens, starts, position, visible, False if causal else group >= 0)


def _verify(batch: Batch, hidden: Tensor, draft: Draft) -> Verdict:
    """Check drafts against the causal pass over the known token and them: `hidden` [B, N, D]."""
    logits = batch.next_logits(hidden.flatten(0, 1), _prefixes(batch.rows, draft, hidden.shape[1]))
    target, logits = batch.distribution(logits), logits.unflatten(0, hidden.shape[:2])
    if target is None:
        return _verify_greedy(batch, logits, draft)
    return _verify_sampled(batch, logits, target.view_as(logits), draft)


def _prefixes(rows: list[Row], draft: Draft, width: int) -> Iterator[tuple[Row, list[int] | None]]:
    """For each place of the check its row and the answer up to there, None where nobody looks; made only if a
    processor asks.
    """
    for row, paths in zip(rows, draft.paths, strict=True):
        answers: list[list[int] | None] = [None] * width
        for path in paths:
            for count, node in enumerate(path.nodes):
                answers[node] = row.answer + path.tokens[:count]
        for answer in answers:
            yield row, answer


def _verify_greedy(batch: Batch, logits: Tensor, draft: Draft) -> Verdict:
    """Keep the path that is the AR head's own choice furthest, that far. `logits`: [B, N, V]."""
    flat, width = logits.flatten(0, 1), logits.shape[1]
    tokens, confidence = batch.tell(flat, batch.choose(flat, []))
    verdict = Verdict()
    for index, paths in enumerate(draft.paths):
        own = slice(index * width, (index + 1) * width)
        chosen, probability = tokens[own], confidence[own]
        agreed = [_agreed([chosen[node] for node in path.nodes], path.tokens) for path in paths]
        number = agreed.index(max(agreed))
        nodes = paths[number].nodes[: agreed[number] + 1]
        verdict.kept.append(agreed[number])
        verdict.tokens.append([chosen[node] for node in nodes])
        verdict.probabilities.append([probability[node] for node in nodes])
        verdict.paths.append(number)
    return verdict


def _agreed(chosen: list[int], drafts: list[int]) -> int:
    """How many drafts, from the first on, are what was chosen."""
    return next((n for n, token in enumerate(drafts) if token != chosen[n]), len(drafts))


def _verify_sampled(batch: Batch, logits: Tensor, target: Tensor, draft: Draft) -> Verdict:
    """Rejection sampling: what is emitted has the AR distribution, whatever the draft's.

    (Leviathan et al., arXiv 2211.17192, Theorem 1.) Where another path leaves a draft that is rejected, its token
    is tried next: it was drawn from q without the first one, and is checked against what then is to be drawn from,
    max(p - q, 0); the same once more, so that the theorem holds for it (as in SpecInfer, arXiv 2305.09781).
    Behind it that path goes on like the first one.

    Args:
        logits: [B, N, V], the AR head's own; what the probabilities that are told come from.
        target: [B, N, V], what is drawn from, filtered as the drafts' distribution was.
    """
    device = batch.device
    # Behind a row's last draft nothing was proposed: q = 0 there, so that the head's own distribution remains.
    proposal = torch.zeros_like(target[:, : draft.tokens.shape[1] + 1])
    if draft.distribution is not None:
        proposal[:, :-1] = draft.distribution
        for index, own in enumerate(draft.lengths):
            proposal[index, own:] = 0
    # What a second token is checked against, and what it was drawn from, [branches, V].
    branches = [(index, path.shared) for index, paths in enumerate(draft.paths) for path in paths[1:]]
    left = torch.tensor(branches, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
    rest = residual(target[left], proposal[left])
    others = without(proposal[left], draft.tokens[left])
    rest, others = (weights / weights.sum(-1, keepdim=True) for weights in (rest, others))
    chances = _chances(batch, draft, logits, target, proposal, rest, others)

    verdict, ends, failed = Verdict(), [], []
    uniform: list[float] = []
    passed = 0  # branches of the rows before
    for index, (row, paths) in enumerate(zip(batch.rows, draft.paths, strict=True)):
        (p, q, confidence), *seconds = [next(chances) for _ in paths]
        kept, number = accepted(p, q, row.draw(len(p))), 0
        confidence = confidence[:kept]
        other = next((n for n, path in enumerate(paths) if n and path.shared == kept), 0)
        if other:
            p, q, found = seconds[other - 1]
            if more := accepted(p, q, row.draw(len(p))):
                kept, number = kept + more, other
                confidence += found[:more]
            else:
                failed.append((index, passed + other - 1))
        passed += len(seconds)
        uniform += row.draw(1)
        ends.append((index, paths[number].nodes[kept], kept))
        verdict.kept.append(kept)
        verdict.tokens.append(paths[number].tokens[:kept])
        verdict.probabilities.append(confidence)
        verdict.paths.append(number)

    at, node, position = torch.tensor(ends, device=device).unbind(1)
    weights = residual(target[at, node], proposal[at, position])
    if failed:
        at_failed, branch = torch.tensor(failed, device=device).unbind(1)
        weights[at_failed] = residual(rest[branch], others[branch])
    last = draw(weights, torch.tensor(uniform, dtype=torch.float64, device=device))
    for index, (token, chance) in enumerate(zip(*batch.tell(logits[at, node], last), strict=True)):
        verdict.tokens[index].append(token)
        verdict.probabilities[index].append(chance)
    return verdict


def _chances(
    batch: Batch, draft: Draft, logits: Tensor, target: Tensor, proposal: Tensor, rest: Tensor, others: Tensor
) -> Iterator[tuple[list[float], list[float], list[float]]]:
    """For each path, from where it leaves the first one: p and q of its drafts, and the AR head's probabilities.

    p is of `target`, but for the second token, where a path begins: its p is of `rest` and its q of `others`.
    """
    places = [
        (index, path.nodes[count], count, path.tokens[count], number > 0 and count == path.shared)
        for index, paths in enumerate(draft.paths)
        for number, path in enumerate(paths)
        for count in range(path.shared, len(path.tokens))
    ]
    columns = torch.tensor(places, dtype=torch.int64, device=target.device).view(-1, 5).unbind(1)
    row, node, position, token, second = *columns[:4], columns[4].bool()
    told = batch.confidence(logits[row, node], token)
    p = target[row, node, token].masked_scatter(second, rest.gather(1, token[second, None]))
    q = proposal[row, position, token].masked_scatter(second, others.gather(1, token[second, None]))
    numbers, low = torch.stack([p, q, told]).tolist(), 0
    for path in (path for paths in draft.paths for path in paths):
        part = slice(low, low + len(path.tokens) - path.shared)
        yield numbers[0][part], numbers[1][part], numbers[2][part]
        low = part.stop


def _emit(batch: Batch, draft: Draft, verdict: Verdict, recent: dict[int, float]) -> Iterator[Event]:
    """Append what was gained to the answers."""
    for index, (row, (main, *others)) in enumerate(zip(batch.rows, draft.paths, strict=True)):
        recent[row.number] = 0.7 * recent[row.number] + 0.3 * verdict.kept[index]
        first, gained = len(row.answer), verdict.tokens[index]
        yield from push(row, gained, verdict.probabilities[index])
        drafted = [*enumerate(main.tokens), *((path.shared, path.tokens[path.shared]) for path in others)]
        for offset, token in drafted:
            if offset >= verdict.kept[index] or token != gained[offset]:
                yield Rejected(row.number, first + offset, token, row.passes)
        yield BlockFinished(row.number, first, len(row.answer), verdict.paths[index])


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
