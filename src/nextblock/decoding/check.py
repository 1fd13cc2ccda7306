"""The check of drafts by the AR head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextblock.decoding.batch import Batch, Row, push
from nextblock.decoding.drafts import Draft
from nextblock.decoding.events import BlockFinished, Event, Rejected
from nextblock.decoding.sampling import accepted, draw, residual, without


@dataclass
class Verdict:
    """For each row: how many drafts are kept, the tokens it gains (one more), their probabilities, and the path."""

    kept: list[int] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    probabilities: list[list[float]] = field(default_factory=list)
    paths: list[int] = field(default_factory=list)


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
