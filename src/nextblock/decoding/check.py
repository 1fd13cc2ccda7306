"""The check of drafts by the AR head: which are kept, and which token follows them.

All of it happens in tensors on the model's device; the result then goes to the host, in one copy.

Letters: B rows, k drafted tokens, V vocabulary, P paths, N tokens of the check.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nextblock.decoding.batch import Batch
from nextblock.decoding.drafts import Draft, Tree
from nextblock.decoding.events import BlockFinished, Event, Rejected, Top
from nextblock.decoding.rows import Row
from nextblock.decoding.sampling import draw, on_device, residual, without


@dataclass
class Verdict:
    """What a check decides, on the model's device.

    kept: int64 [B], how many drafts.
    tokens: int64 [B, 1 + k]: the kept drafts and one more token; what lies behind means nothing.
    path: int64 [B], whose drafts are kept; None: the trunk's.
    used: int64 [B], how many of a row's uniform numbers; None when greedy.
    """

    kept: Tensor
    tokens: Tensor
    path: Tensor | None = None
    used: Tensor | None = None


@dataclass
class Gain:
    """What a row gains by a check, on the host: as in `Verdict`, and what was overruled as (draft's number, token).

    hit: index of the point of acceptance that came true among those that a draft was made for; -1: none.
    """

    kept: int
    path: int
    tokens: list[int]
    confidence: list[float]
    tops: list[Top]
    rejected: list[tuple[int, int]]
    hit: int


def verify(batch: Batch, logits: Tensor, draft: Draft, tree: Tree, points: Tensor | None = None) -> list[Gain]:
    """Check a draft by the pass over its `tree`: what each row gains.

    Args:
        logits: [B, N, V], the model's own.
        points: int64 [B, G], numbers of kept drafts that the next draft was made for; `Gain.hit` is of these.
    """
    flat = batch.head.processed(logits.flatten(0, 1), _prefixes(batch.rows, draft, tree))
    of_places = [row for row in batch.rows for _ in range(logits.shape[1])]
    target, logits = batch.head.distribution(flat, of_places), flat.view_as(logits)
    if target is None:
        verdict = check_greedy(logits, draft, tree)
    else:
        verdict = check_sampled(batch.rows, target.view_as(logits), draft, tree)
    return _gains(batch, draft, tree, verdict, logits, points)


def _prefixes(rows: list[Row], draft: Draft, tree: Tree) -> Iterator[tuple[Row, list[int] | None]]:
    """For each token of the check its row and the answer up to there, None where nobody looks; made only if a
    processor asks.
    """
    trees = zip(tree.tokens.tolist(), tree.slots.tolist(), strict=True)
    every = [[length] for length in draft.lengths] if draft.branches is None else draft.branches.ends
    for row, ends, (line, paths) in zip(rows, every, trees, strict=True):
        answers: list[list[int] | None] = [None] * len(line)
        for path, end in zip(paths, ends, strict=False):
            for count in range(end + 1):
                answers[path[count]] = row.answer + [line[slot] for slot in path[1 : count + 1]]
        for answer in answers:
            yield row, answer


def _of_path(parts: Tensor, path: Tensor | None) -> Tensor:
    """[B, P, ...] and each row's path int64 [B] -> [B, ...]."""
    return parts[:, 0] if path is None else parts[torch.arange(len(path), device=path.device), path]


def check_greedy(logits: Tensor, draft: Draft, tree: Tree) -> Verdict:
    """Keep the path that is the AR head's own choice furthest, that far. `logits`: [B, N, V]."""
    chosen, width = logits.argmax(-1), draft.tokens.shape[1]
    if tree.groups is not None:
        chosen = chosen.gather(1, tree.slots.flatten(1)).view_as(tree.slots)
    right = chosen.narrow(-1, 0, width) == (draft.tokens if tree.groups is None else tree.paths)
    if tree.ends is not None or min(draft.lengths) < width:
        ends = on_device(draft.lengths, logits.device) if tree.ends is None else tree.ends
        right = right & (torch.arange(width, device=logits.device) < ends[..., None])
    kept = right.cumprod(-1).sum(-1)
    if tree.groups is None:
        return Verdict(kept, chosen)
    kept, path = kept.max(1)
    return Verdict(kept, _of_path(chosen, path), path)


def check_sampled(rows: list[Row], target: Tensor, draft: Draft, tree: Tree) -> Verdict:
    """Rejection sampling: what is emitted has the AR distribution `target` [B, N, V], whatever the draft's."""
    width, device = draft.tokens.shape[1], target.device
    row, step = torch.arange(len(rows), device=device), torch.arange(width, device=device)
    length = on_device(draft.lengths, device)
    counts = step < length[:, None]
    # Behind a row's last draft nothing was proposed: q = 0 there, so that the head's own distribution remains.
    proposal = torch.zeros_like(target[:, : width + 1])
    if draft.distribution is not None:
        proposal[:, :-1] = draft.distribution.masked_fill(~counts[..., None], 0)
    p = target[row[:, None, None], tree.slots[:, :, :-1], tree.paths]
    q = proposal[row[:, None, None], step, tree.paths]
    uniform = _uniform(rows, draft, device)

    kept = accept_trunk(p[:, 0], q[:, 0], uniform[:, :width], counts)
    path, used = None, length
    last_p, last_q = target[row, kept], proposal[row, kept]
    if tree.depth is not None:
        rest = residual(last_p, last_q)
        others = without(last_q, draft.tokens[row, kept.clamp_max(width - 1)])
        second = rest / rest.sum(-1, keepdim=True), others / others.sum(-1, keepdim=True)
        tried, more = try_branch(p, q, second, tree, kept, uniform, length)
        used, kept = used + torch.where(tried > 0, length - kept, 0), kept + more
        path, failed = torch.where(more > 0, tried, 0), ((tried > 0) & (more == 0))[:, None]
        last_p = torch.where(failed, second[0], target[row, tree.slots[row, path, kept]])
        last_q = torch.where(failed, second[1], proposal[row, kept])
    # Given that a draft from q was rejected, max(p - q, 0) is what is left of p (Theorem 1); q = 0 gives p.
    last = draw(residual(last_p, last_q), uniform[row, used])[:, None]
    tokens = torch.cat([_of_path(tree.paths, path), last], dim=1).scatter(1, kept[:, None], last)
    return Verdict(kept, tokens, path, used + 1)


def _uniform(rows: list[Row], draft: Draft, device: torch.device) -> Tensor:
    """The numbers that a check may use, float64 [B, _]: for the trunk, for a branch, for the last token."""
    counts = [length * (1 if draft.branches is None else 2) + 1 for length in draft.lengths]
    longest = max(*counts, draft.tokens.shape[1] + 1)
    strips = [row.peek(n) + [0.0] * (longest - n) for row, n in zip(rows, counts, strict=True)]
    return on_device(strips, device, torch.float64)


def accept_trunk(p: Tensor, q: Tensor, uniform: Tensor, counts: Tensor) -> Tensor:
    """How many drafts are kept, int64 [B]: each with probability min(1, p / q), up to the first that is not.

    A token that was drawn from q, is kept with min(1, p / q), and else gives way to one from max(p - q, 0), has the
    distribution p (Leviathan et al., arXiv 2211.17192, Theorem 1).

    Args:
        p, q: of each drafted token, [B, k], by the AR head and by what it was drawn from.
        uniform: float64 [B, k], numbers in [0, 1).
        counts: bool [B, k], where there is a draft.
    """
    return ((uniform * q < p) & counts).cumprod(-1).sum(-1)


def try_branch(
    p: Tensor, q: Tensor, second: tuple[Tensor, Tensor], tree: Tree, kept: Tensor, uniform: Tensor, length: Tensor
) -> tuple[Tensor, Tensor]:
    """Where a branch leaves the trunk at the draft that was rejected, go on along it.

    Its token was drawn from q without the trunk's and is checked against max(p - q, 0): the theorem once more, with
    these two for q and p (as in SpecInfer, arXiv 2305.09781). Behind it the branch goes on like the trunk.

    Args:
        p, q: of the drafts of each path, [B, P, k].
        second: max(p - q, 0) and q without the trunk's token, where the trunk was left: each [B, V], normalised.
        uniform: float64 [B, _], the trunk's numbers first, int64 [B] `length` of them.
    Returns:
        The branch that was tried, 0: none, and how many more drafts are kept: each int64 [B].
    """
    assert tree.depth is not None
    row, step = torch.arange(len(kept), device=kept.device), torch.arange(p.shape[2], device=kept.device)
    path = (tree.depth == kept[:, None]).int().argmax(1)  # the trunk's depth is none that can be left
    tokens, here, before = tree.paths[row, path], step == kept[:, None], step < kept[:, None]
    p, q = (torch.where(here, s.gather(1, tokens), own[row, path]) for s, own in zip(second, (p, q), strict=True))
    p, q = p.masked_fill(before, 1), q.masked_fill(before, 0)  # the trunk's, which are kept
    numbers = uniform.gather(1, (length[:, None] + step - kept[:, None]).clamp(0, uniform.shape[1] - 1))
    more = accept_trunk(p, q, numbers, step < length[:, None]) - kept
    return path, torch.where(path > 0, more, 0)


def _gains(
    batch: Batch, draft: Draft, tree: Tree, verdict: Verdict, logits: Tensor, points: Tensor | None
) -> list[Gain]:
    """Bring a verdict to the host, in one copy, and use up the numbers that it took."""
    width, hit = draft.tokens.shape[1], None
    if points is not None:
        right = points == verdict.kept[:, None]
        hit = torch.where(right.any(1), right.int().argmax(1), -1)
    columns = {"kept": verdict.kept, "path": verdict.path, "used": verdict.used, "hit": hit}
    columns = {name: part[:, None] for name, part in columns.items() if part is not None}
    parts = [*columns.values(), verdict.tokens, draft.tokens]
    if draft.branches is not None:
        parts.append(draft.branches.first)
    confidence, tops = [[math.nan] * (width + 1)] * len(batch.rows), list[Top]()
    if batch.head.tells_confidence:
        at = torch.arange(len(logits), device=logits.device)[:, None]
        logits = logits[at, _of_path(tree.slots, verdict.path)]
        told = batch.head.confidence(logits, verdict.tokens)
        tops = batch.head.tops(logits.flatten(0, 1), [row for row in batch.rows for _ in range(width + 1)])
        numbers = torch.cat([told.double(), *parts], dim=1).tolist()
        confidence = [line[: width + 1] for line in numbers]
        numbers = [[int(number) for number in line[width + 1 :]] for line in numbers]
    else:
        numbers = torch.cat(parts, dim=1).tolist()
    found = []
    for index, (row, line, length) in enumerate(zip(batch.rows, numbers, draft.lengths, strict=True)):
        of, tokens = dict(zip(columns, line, strict=False)), line[len(columns) :]
        kept = of["kept"]
        row.draw(of.get("used", 0))
        length = length if draft.branches is None else draft.branches.ends[index][0]
        gained, drafted = tokens[: kept + 1], [*enumerate(tokens[width + 1 : width + 1 + length])]
        if draft.branches is not None:
            drafted += zip(draft.branches.depth[index], tokens[2 * width + 1 :], strict=False)
        rejected = [(n, token) for n, token in drafted if n >= kept or token != gained[n]]
        own = tops[index * (width + 1) :][: kept + 1]
        of_gained = confidence[index][: kept + 1]
        found.append(Gain(kept, of.get("path", 0), gained, of_gained, own, rejected, of.get("hit", -1)))
    return found


def append(batch: Batch, found: list[Gain]) -> Iterator[Event]:
    """Append what was gained to the answers."""
    for row, gain in zip(batch.rows, found, strict=True):
        first = len(row.answer)
        yield from row.extend(gain.tokens, gain.confidence, gain.tops)
        for number, token in gain.rejected:
            if row.finish is None or first + number < len(row.answer):
                yield Rejected(row.number, first + number, token, row.passes)
        yield BlockFinished(row.number, first, len(row.answer), gain.path)
