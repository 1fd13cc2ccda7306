"""The check of drafts by the AR head: which are kept, and which token follows them.

All of it happens in tensors on the model's device; the result then goes to the host, in one copy.

Letters: B rows, k drafted tokens, V vocabulary, P paths, N tokens of the check.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nextblock.decoding.batch import Batch
from nextblock.decoding.drafts import Draft, Tree
from nextblock.decoding.events import BlockFinished, Event, Rejected
from nextblock.decoding.rows import Row
from nextblock.decoding.sampling import accepted, draw, residual, without


@dataclass
class Verdict:
    """What a check decides, on the model's device.

    kept: int64 [B], how many drafts.
    path: int64 [B], of which path.
    tokens: int64 [B, 1 + k]: the kept drafts and one more token; what lies behind means nothing.
    slots: int64 [B, 1 + k]: where the check decided each of them.
    used: int64 [B], how many of a row's uniform numbers; 0 when greedy.
    """

    kept: Tensor
    path: Tensor
    tokens: Tensor
    slots: Tensor
    used: Tensor


@dataclass
class Gain:
    """What a row gains by a check, on the host: as in `Verdict`, and what was overruled as (draft's number, token).

    hit: index of the point of acceptance that came true among those that a draft was made for; -1: none.
    """

    kept: int
    path: int
    tokens: list[int]
    confidence: list[float]
    rejected: list[tuple[int, int]]
    hit: int


def verify(batch: Batch, hidden: Tensor, draft: Draft, tree: Tree, points: Tensor | None = None) -> list[Gain]:
    """Check a draft by the pass over its `tree`: what each row gains.

    Args:
        hidden: [B, N, D].
        points: int64 [B, G], numbers of kept drafts that the next draft was made for; `Gain.hit` is of these.
    """
    flat = batch.head.next_logits(hidden.flatten(0, 1), _prefixes(batch.rows, draft, tree))
    target, logits = batch.head.distribution(flat), flat.unflatten(0, hidden.shape[:2])
    if target is None:
        verdict = check_greedy(logits, draft, tree)
    else:
        verdict = check_sampled(batch.rows, target.view_as(logits), draft, tree)
    return _gains(batch, draft, verdict, logits, points)


def _prefixes(rows: list[Row], draft: Draft, tree: Tree) -> Iterator[tuple[Row, list[int] | None]]:
    """For each token of the check its row and the answer up to there, None where nobody looks; made only if a
    processor asks.
    """
    trees = zip(tree.tokens.tolist(), tree.slots.tolist(), strict=True)
    for row, length, (line, paths) in zip(rows, draft.lengths, trees, strict=True):
        answers: list[list[int] | None] = [None] * len(line)
        for path in paths:
            for count in range(length + 1):
                answers[path[count]] = row.answer + [line[slot] for slot in path[1 : count + 1]]
        for answer in answers:
            yield row, answer


def _of_path(parts: Tensor, path: Tensor) -> Tensor:
    """[B, P, ...] and each row's path int64 [B] -> [B, ...]."""
    return parts[:, 0] if parts.shape[1] == 1 else parts[torch.arange(len(path), device=path.device), path]


def check_greedy(logits: Tensor, draft: Draft, tree: Tree) -> Verdict:
    """Keep the path that is the AR head's own choice furthest, that far. `logits`: [B, N, V]."""
    chosen = logits.argmax(-1).gather(1, tree.slots.flatten(1)).view_as(tree.slots)
    step = torch.arange(draft.tokens.shape[1], device=chosen.device)
    within = step < torch.tensor(draft.lengths, device=chosen.device)[:, None, None]
    agreed = ((chosen[:, :, :-1] == tree.paths) & within).cumprod(-1).sum(-1)
    kept, path = agreed.max(1)
    return Verdict(kept, path, _of_path(chosen, path), _of_path(tree.slots, path), torch.zeros_like(kept))


def check_sampled(rows: list[Row], target: Tensor, draft: Draft, tree: Tree) -> Verdict:
    """Rejection sampling: what is emitted has the AR distribution `target` [B, N, V], whatever the draft's."""
    row = torch.arange(len(target), device=target.device)
    length = torch.tensor(draft.lengths, device=target.device)
    # Behind a row's last draft nothing was proposed: q = 0 there, so that the head's own distribution remains.
    proposal = torch.zeros_like(target[:, : draft.tokens.shape[1] + 1])
    if draft.distribution is not None:
        behind = torch.arange(draft.tokens.shape[1], device=target.device) >= length[:, None]
        proposal[:, :-1] = draft.distribution.masked_fill(behind[..., None], 0)
    uniform = _uniform(rows, draft, target.device)

    kept = accept_trunk(target, proposal, draft.tokens, uniform, length)
    used, path = length, torch.zeros_like(kept)
    rest = proposed = failed = None
    if tree.groups is not None:
        rest, proposed = second_chance(target, proposal, draft.tokens, kept)
        more, tried, number = try_branch(target, proposal, rest, proposed, tree, kept, uniform, length)
        used = used + torch.where(tried, length - kept, 0)
        path, failed, kept = torch.where(more > 0, number, 0), tried & (more == 0), kept + more
    slots, tokens = _of_path(tree.slots, path), _of_path(tree.paths, path)
    weights = residual(target[row, slots[row, kept]], proposal[row, kept])
    if failed is not None:
        weights = torch.where(failed[:, None], residual(rest, proposed), weights)
    last = draw(weights, uniform[row, used])
    tokens = torch.cat([tokens, last[:, None]], dim=1).scatter(1, kept[:, None], last[:, None])
    return Verdict(kept, path, tokens, slots, used + 1)


def _uniform(rows: list[Row], draft: Draft, device: torch.device) -> Tensor:
    """The numbers that a check may use, float64 [B, _]: for the trunk, for a branch, for the last token."""
    counts = [length * (1 if draft.branches is None else 2) + 1 for length in draft.lengths]
    longest = max(counts)
    strips = [row.peek(n) + [0.0] * (longest - n) for row, n in zip(rows, counts, strict=True)]
    return torch.tensor(strips, dtype=torch.float64, device=device)


def accept_trunk(target: Tensor, proposal: Tensor, tokens: Tensor, uniform: Tensor, length: Tensor) -> Tensor:
    """How many drafts of the trunk are kept, int64 [B]: each with min(1, p / q), up to the first that is not.

    A token that was drawn from q, is kept with min(1, p / q), and else replaced by one from max(p - q, 0), has the
    distribution p (Leviathan et al., arXiv 2211.17192, Theorem 1).

    Args:
        target: p, [B, N, V]. proposal: q, [B, 1 + k, V]. tokens: int64 [B, k], of which the first `length` [B] count.
    """
    p, q = (part[:, : tokens.shape[1]].gather(2, tokens[..., None])[..., 0] for part in (target, proposal))
    within = torch.arange(tokens.shape[1], device=tokens.device) < length[:, None]
    return accepted(p, q, uniform[:, : tokens.shape[1]], within)


def second_chance(target: Tensor, proposal: Tensor, tokens: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Where the trunk was left, after `kept` drafts: what is now to be drawn from, and what a branch's token was.

    Returns:
        max(p - q, 0) and q without the trunk's token, both [B, V] and normalised; nan where nothing is left.
    """
    row = torch.arange(len(kept), device=kept.device)
    p, q = target[row, kept], proposal[row, kept]
    left = without(q, tokens[row, kept.clamp_max(tokens.shape[1] - 1)])
    rest = residual(p, q)
    return rest / rest.sum(-1, keepdim=True), left / left.sum(-1, keepdim=True)


def try_branch(
    target: Tensor,
    proposal: Tensor,
    rest: Tensor,
    proposed: Tensor,
    tree: Tree,
    kept: Tensor,
    uniform: Tensor,
    length: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where a branch leaves the trunk at the draft that was rejected, go on along it.

    Its token was drawn from q without the trunk's and is checked against max(p - q, 0): Theorem 1 once more, with
    these for q and p (as in SpecInfer, arXiv 2305.09781). Behind it the branch goes on like the trunk.

    Args:
        rest, proposed: from `second_chance`; the others as in `accept_trunk`.
    Returns:
        How many more drafts are kept, whether a branch was tried, and its number: each [B].
    """
    row, step = torch.arange(len(kept), device=kept.device), torch.arange(proposal.shape[1] - 1, device=kept.device)
    leaves = tree.depth == kept[:, None]
    tried, number = leaves.any(1), leaves.int().argmax(1)
    tokens, slots = _of_path(tree.paths, number), _of_path(tree.slots, number)
    p = target[row[:, None], slots[:, :-1], tokens]
    q = proposal[row[:, None], step, tokens]
    here, before = step == kept[:, None], step < kept[:, None]
    p, q = torch.where(here, rest.gather(1, tokens), p), torch.where(here, proposed.gather(1, tokens), q)
    numbers = uniform.gather(1, (length[:, None] + step - kept[:, None]).clamp(0, uniform.shape[1] - 1))
    p, q = p.masked_fill(before, 1), q.masked_fill(before, 0)  # the trunk's, which are kept
    more = accepted(p, q, numbers, (step < length[:, None]) & tried[:, None]) - kept
    return more.clamp_min(0), tried, number


def _gains(batch: Batch, draft: Draft, verdict: Verdict, logits: Tensor, points: Tensor | None) -> list[Gain]:
    """Bring a verdict to the host, in one copy, and use up the numbers that it took."""
    width = draft.tokens.shape[1]
    at = torch.arange(len(logits), device=logits.device)[:, None]
    read = logits[at, verdict.slots] if batch.head.tells_confidence else logits
    confidence = batch.head.confidence(read, verdict.tokens)
    hit = torch.full_like(verdict.kept, -1)
    if points is not None:
        right = points == verdict.kept[:, None]
        hit = torch.where(right.any(1), right.int().argmax(1), hit)
    parts = [torch.stack([verdict.kept, verdict.path, verdict.used, hit], dim=1), verdict.tokens, draft.tokens]
    if draft.branches is not None:
        parts.append(draft.branches.token)
    numbers = torch.cat([torch.cat(parts, dim=1).double(), confidence.double()], dim=1).tolist()
    found = []
    for index, (row, line, length) in enumerate(zip(batch.rows, numbers, draft.lengths, strict=True)):
        kept, path, used, own_hit, *tokens = map(int, line[: len(line) - width - 1])
        row.draw(used)
        gained, drafted = tokens[: kept + 1], [*enumerate(tokens[width + 1 : width + 1 + length])]
        if draft.branches is not None:
            drafted += zip(draft.branches.depth[index], tokens[2 * width + 1 :], strict=False)
        rejected = [(n, token) for n, token in drafted if n >= kept or token != gained[n]]
        sure = line[len(line) - width - 1 :][: kept + 1]
        found.append(Gain(kept, path, gained, sure, rejected, own_hit))
    return found


def append(batch: Batch, found: list[Gain]) -> Iterator[Event]:
    """Append what was gained to the answers."""
    for row, gain in zip(batch.rows, found, strict=True):
        row.recent = 0.7 * row.recent + 0.3 * gain.kept
        first = len(row.answer)
        yield from row.extend(gain.tokens, gain.confidence)
        for number, token in gain.rejected:
            yield Rejected(row.number, first + number, token, row.passes)
        yield BlockFinished(row.number, first, len(row.answer), gain.path)
