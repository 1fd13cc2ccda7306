"""Drafts: what a denoising pass proposes, and where the pass that checks it has each token.

A draft of several paths is a tree: the trunk, and branches that leave it at one position each, with another token
there and the trunk's own tokens behind.

Letters: B rows, b block size, k drafted tokens, V vocabulary, M branches, P = 1 + M paths, N tokens of a check.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nextblock.decoding.batch import Batch
from nextblock.decoding.masks import Groups
from nextblock.decoding.rows import Row
from nextblock.decoding.sampling import draw, on_device, without


@dataclass
class Branches:
    """depth: for each row and branch, how many drafts it shares with the trunk. token: int64 [B, M], its next one."""

    depth: list[list[int]]
    token: Tensor


@dataclass
class Draft:
    """Drafted tokens int64 [B, k] on the model's device, of which each row has its first `lengths` checked.

    distribution: when sampling, what they were drawn from, [B, k, V].
    chances: float32 [B, k], of drafts that are made ahead: how likely each is to be kept, given those before it.
    """

    tokens: Tensor
    lengths: list[int]
    distribution: Tensor | None = None
    branches: Branches | None = None
    chances: Tensor | None = None

    def own_slots(self, row: int, path: int) -> tuple[int, int]:
        """Where the check has the first token that a row's path does not share with the trunk, and its depth."""
        assert self.branches is not None
        before, length = self.branches.depth[row][: path - 1], self.lengths[row]
        return 1 + self.tokens.shape[1] + sum(length - d for d in before), self.branches.depth[row][path - 1]


@dataclass(frozen=True)
class Tree:
    """The pass that checks a draft: the known token and the trunk, then what is each branch's own.

    tokens: int64 [B, N].
    slots: int64 [B, P, 1 + k]: where the pass has the known token and each draft of a path. Path 0 is the trunk.
    depth: int64 [B, P]: how many drafts a path shares with the trunk; -1 for the trunk and where there is no path.
    groups: which tokens see each other. Both None: there is only the trunk, and the pass is a plain causal one.
    """

    tokens: Tensor
    slots: Tensor
    depth: Tensor | None = None
    groups: Groups | None = None

    @property
    def paths(self) -> Tensor:
        """The drafts of each path, int64 [B, P, k]."""
        slots = self.slots[:, :, 1:]
        return self.tokens.gather(1, slots.flatten(1)).view_as(slots)


def draft_length(batch: Batch, row: Row) -> int:
    """Tokens to draft for a row."""
    length = batch.block_size - 1
    wanted = batch.config.draft_length
    if wanted == "auto":
        length = min(length, int(1.5 * row.recent) + 2)
    elif wanted is not None:
        length = min(length, wanted)
    if row.random is None:  # drafts past the limit cannot matter; sampling keeps to the same draws
        length = min(length, row.limit - len(row.answer) - 1)
    return length


def masked_block(batch: Batch, known: Tensor) -> Tensor:
    """The known token and mask tokens behind it, int64 [B, b]."""
    tokens = known.new_full((len(known), batch.block_size), batch.mask_token_id)
    tokens[:, :1] = known
    return tokens


def choose_drafts(batch: Batch, hidden: Tensor, lengths: list[int]) -> Draft:
    """What a denoising pass over `masked_block` proposes behind the known token; `hidden` [B, b, D]."""
    rows, longest = batch.rows, max(lengths)
    first = 0 if batch.shifted else 1
    prefixes = ((row, row.answer) for row in rows for _ in range(longest))
    logits = batch.head.next_logits(hidden[:, first : first + longest].flatten(0, 1), prefixes)
    # A row draws for its own drafts only, so that it draws the same numbers alone.
    uniform = [
        u
        for row, length in zip(rows, lengths, strict=True)
        if row.random is not None
        for u in row.draw(length) + [0.0] * (longest - length)
    ]
    plain = logits.unflatten(0, (len(rows), longest))
    tokens, logits, distribution = propose(batch, plain, uniform, rows)
    draft = Draft(tokens, lengths, distribution)
    if batch.config.draft_paths > 1:
        chained = batch.decoder.correction is not None
        draft.branches = branch(batch, logits if distribution is None else plain, draft, chained)
    return draft


def propose(
    batch: Batch, logits: Tensor, uniform: list[float], rows: list[Row]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens int64 [B, k] for places with these `logits` [B, k, V], behind the last tokens of the rows' answers.

    A correction head, if there is one, corrects each place by the token proposed before it.

    Returns:
        The tokens, the corrected logits [B, k, V], and what the tokens were drawn from, [B, k, V]; None when greedy.
    """
    head, correction, longest = batch.head, batch.decoder.correction, logits.shape[1]
    if correction is not None:
        last = on_device([row.answer[-1] for row in rows], logits.device)
        logits, tokens = correction.in_order(
            logits, last, lambda number, own: head.choose(own, uniform[number::longest])
        )
    distribution = head.distribution(logits.flatten(0, 1))
    if correction is None:
        tokens = head.choose(logits.flatten(0, 1), uniform, distribution).view(logits.shape[:2])
    return tokens, logits, None if distribution is None else distribution.view_as(logits)


def branch(batch: Batch, logits: Tensor, draft: Draft, chained: bool = False) -> Branches | None:
    """Where further paths leave the trunk, and with which token: the second best, or a draw without the trunk's.

    At the positions where that is likeliest to be of use: all drafts before are kept, and the second-likeliest
    token is the right one. This looks at `logits` [B, k, V] alone, never at what was drawn from them: chosen by
    the drafts, the tokens behind a branch would no longer have the distribution that the check takes them to have.
    So where each draft changed what the next is drawn from (`chained`), `logits` are those before.
    The positions are copied to the host, as the width of the check depends on them. None: no row has a branch.
    """
    top = logits.softmax(-1).topk(2)
    likeliest, second = top.values.double().log().unbind(-1)
    odds = likeliest.cumsum(1) - likeliest + second
    # No second token where a filter leaves only one. Of chained drafts this depends on what was drawn: there such a
    # branch stays, and the check rejects whatever token it has.
    if draft.distribution is not None and not chained:
        odds = odds.masked_fill((draft.distribution > 0).sum(-1) < 2, -math.inf)
    depth = []
    for line, length in zip(odds.tolist(), draft.lengths, strict=True):
        ranked = sorted((n for n in range(length) if line[n] > -math.inf), key=lambda n: -line[n])
        depth.append(ranked[: batch.config.draft_paths - 1])
    found = [(row, n, position) for row, positions in enumerate(depth) for n, position in enumerate(positions)]
    if not found:
        return None
    row, number, position = on_device(found, logits.device).unbind(1)
    if draft.distribution is None:
        token = top.indices[row, position, 1]
    else:
        uniform = [u for row, positions in zip(batch.rows, depth, strict=True) for u in row.draw(len(positions))]
        weights = without(draft.distribution[row, position], draft.tokens[row, position])
        token = draw(weights, on_device(uniform, logits.device, torch.float64))
    tokens = token.new_zeros(len(depth), max(map(len, depth)))
    tokens[row, number] = token
    return Branches(depth, tokens)


def lay_out(batch: Batch, draft: Draft, known: Tensor, starts: list[int]) -> Tree:
    """The pass that checks a draft behind the known token int64 [B, 1], which stands at `starts`.

    Each token has the position of its depth and sees the context, and its own path up to itself.
    """
    tokens = torch.cat([known, draft.tokens], dim=1)
    count, width = tokens.shape
    if draft.branches is None:
        return Tree(tokens, batch.masks.span(width).expand(count, 1, -1))
    paths = 1 + draft.branches.token.shape[1]
    lines, slots, depths = [], [], []
    for length, leaves in zip(draft.lengths, draft.branches.depth, strict=True):
        # Of each token: its place in [known, trunk, branches' tokens], depth, group and last shared depth.
        line = [(n, n, -1, n) if n <= length else (0, 0, -1, 0) for n in range(width)]
        trunk = [*range(width)]
        slots.append([trunk] * paths)
        for number, depth in enumerate(leaves):
            own = range(depth + 1, length + 1)
            slots[-1][number + 1] = trunk[: depth + 1] + [len(line) + n for n in range(len(own))] + trunk[length + 1 :]
            line += [(width + number if n == own[0] else n, n, number, depth) for n in own]
        depths.append([-1, *leaves, *[-1] * (paths - 1 - len(leaves))])
        lines.append(line)
    longest = max(map(len, lines))
    lines = on_device([line + [(0, 0, -1, 0)] * (longest - len(line)) for line in lines], batch.device)
    place, depth, group, shared = lines.unbind(-1)
    first = on_device(starts, batch.device)[:, None]
    return Tree(
        torch.cat([tokens, draft.branches.token], dim=1).gather(1, place),
        on_device(slots, batch.device),
        on_device(depths, batch.device),
        Groups(first + depth, first + shared, group, noised=False),
    )
