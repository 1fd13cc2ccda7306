"""Drafts: the pass that makes them, what it proposes, and where the pass that checks it has each token.

A draft of several paths is a tree: the trunk, and branches that leave it at one position each, with another token
there and the trunk's own tokens behind.

Letters: B rows, b block size, k drafted tokens, V vocabulary, D hidden size, M branches, P = 1 + M paths,
N tokens of a check, G points of acceptance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nextblock.attention.groups import Groups
from nextblock.decoding.batch import Batch
from nextblock.decoding.sampling import draw, on_device, probability_of, without


@dataclass
class Branches:
    """depth: for each row and branch, how many drafts it shares with the trunk. token: int64 [B, M], its next one."""

    depth: list[list[int]]
    token: Tensor


@dataclass
class Draft:
    """Drafted tokens int64 [B, k] on the model's device, of which each row has its first `lengths` checked.

    distribution: when sampling, what they were drawn from, [B, k, V].
    chances: float32 [B, k], how likely each is to be kept, given those before it, by the draft's own probabilities.
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

    def part(self, most: list[int]) -> Draft:
        """Of each row at most so many drafts."""
        assert self.branches is None
        lengths = [min(pair) for pair in zip(self.lengths, most, strict=True)]
        distribution = None if self.distribution is None else self.distribution[:, : max(lengths)]
        return Draft(self.tokens[:, : max(lengths)], lengths, distribution, chances=self.chances)


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


def draft_lengths(batch: Batch, free: int) -> list[int]:
    """Tokens to draft for each row behind its known token and `free` more, which will be there when they are checked.

    A block that begins with the known token has room for b - 1 tokens behind it.
    """
    lengths = []
    for row in batch.rows:
        length, wanted = max(0, batch.block_size - 1 - free), row.draft_length
        if isinstance(wanted, int):  # else the block, of which `pace.Pacer` takes as much as pays
            length = min(length, wanted)
        if row.random is None:  # drafts past the limit cannot matter; sampling keeps to the same draws
            length = min(length, row.limit - len(row.answer) - 1 - free)
        lengths.append(max(0, length))
    return lengths


def free_block(batch: Batch) -> Groups:
    """The pass of a draft, b + 1 wide: the known token as the AR head sees it, then the block that begins with it.

    The first is plainly causal: it gives the next token for nothing, and its keys stay. The block sees what lies
    before the known token, and itself, as in training; its own copy of that token is part of it.
    """
    block = batch.masks.span(batch.block_size)[None]
    position = torch.cat([block[:, :1], block], dim=1)
    before = torch.full_like(block, -1)
    group = torch.cat([before[:, :1], torch.zeros_like(block)], dim=1)
    return Groups(position, torch.cat([block[:, :1], before], dim=1), group, noised=True, kept=True)


def masked_block(batch: Batch, known: Tensor, free: int = 1) -> Tensor:
    """The tokens of `free_block`: the known one twice, and mask tokens behind it, int64 [B, 1 + b].

    With `free` = 0 the block alone, int64 [B, b].
    """
    tokens = known.new_full((len(known), free + batch.block_size), batch.mask_token_id)
    tokens[:, : free + 1] = known
    return tokens


def with_masks(batch: Batch, checked: Tensor, points: Tensor) -> tuple[Tensor, Groups]:
    """The tokens [B, 1 + k + G b] of: the known token and its drafts, causal; then a block for each of the points.

    Args:
        points: int64 [B, G], how many drafts would be kept. A block begins with a copy of the last of these.
    """
    block, (rows, width), count, span = batch.block_size, checked.shape, points.shape[1], batch.masks.span
    blocks = points.new_full((rows, count, block), batch.mask_token_id)
    blocks[:, :, 0] = checked.gather(1, points)
    of_blocks = points[:, :, None] + span(block)
    position = torch.cat([span(width).expand(rows, -1), of_blocks.flatten(1)], dim=1)
    context = torch.cat([position[:, :width], (of_blocks[:, :, :1] - 1).expand_as(of_blocks).flatten(1)], dim=1)
    group = torch.cat([torch.full_like(span(width), -1), span(count).repeat_interleave(block)]).expand(rows, -1)
    return torch.cat([checked, blocks.flatten(1)], dim=1), Groups(position, context, group, noised=True)


def likeliest_points(draft: Draft, count: int) -> Tensor:
    """Of each row the `count` likeliest numbers of drafts to be kept, the likeliest first: int64 [B, G].

    A row that has fewer numbers repeats its likeliest.
    """
    length = on_device(draft.lengths, draft.tokens.device)[:, None]
    number = torch.arange(max(draft.lengths) + 1, device=length.device)
    if draft.chances is None:  # there is no draft
        return number.expand(len(length), -1)
    chance = torch.nn.functional.pad(draft.chances[:, : max(draft.lengths)].double(), (1, 1))
    chance[:, 0] = 1
    reached = chance[:, :-1].cumprod(1)
    odds = torch.where(number < length, reached * (1 - chance[:, 1:]), reached).masked_fill(number > length, -1)
    ranked = odds.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.where(number[: ranked.shape[1]] <= length, ranked, ranked[:, :1])


def draft_alone(batch: Batch, lengths: list[int]) -> Draft:
    """A draft by a pass over the block alone, the first of its tokens included: b - 1 at most; nothing is gained yet.

    What the pass writes to the cache is overwritten by the check, which begins with the known token.
    """
    known, starts = batch.known()
    hidden = batch.forward(masked_block(batch, known, free=0), starts, [False] * len(starts))
    first = 0 if batch.shifted else 1
    places = hidden[:, first : first + max(lengths)]
    logits = batch.head.logits(places.flatten(0, 1)).unflatten(0, places.shape[:2])
    return choose_drafts(batch, logits, lengths)


def candidates(batch: Batch, hidden: Tensor, first: list[int], longest: int) -> Tensor:
    """The hidden states [B, k, D] that propose drafts, of blocks whose first index in `hidden` [B, _, D] is `first`.

    Of a block's b - 1 proposals the first is left out: the AR head itself has decided that token.
    """
    start = on_device(first, hidden.device)[:, None] + (1 if batch.shifted else 2)
    row = torch.arange(len(hidden), device=hidden.device)[:, None]
    return hidden[row, start + batch.masks.span(longest)]


def choose_drafts(batch: Batch, logits: Tensor, lengths: list[int]) -> Draft:
    """What the candidate places propose, `logits` [B, k, V], behind the last token of each row's answer.

    Of each row the first `lengths` places count. What is proposed is drawn from `Draft.distribution`, whatever that
    is, so that logits may be changed here by all that is known before the draw: that token, and drafts before.
    """
    shape, rows = logits.shape[:2], batch.rows
    prefixes = ((row, row.answer) for row in rows for _ in range(shape[1]))
    flat = batch.head.processed(logits.flatten(0, 1), prefixes)
    # A row draws for its own drafts only, so that it draws the same numbers alone.
    uniform = [u for row, n in zip(rows, lengths, strict=True) for u in row.draw(n) + [0.0] * (shape[1] - n)]
    of_places = [row for row in rows for _ in range(shape[1])]
    plain = logits = flat.view_as(logits)
    head, correction, tokens = batch.head, batch.decoder.correction, None
    if correction is not None:  # each draft changes what the next is drawn from
        last = on_device([row.answer[-1] for row in rows], flat.device)
        if any(row.sampling.temperature for row in rows):
            logits, tokens = correction.in_order(
                logits, last, lambda n, own: head.choose(own, uniform[n :: shape[1]], rows)
            )
        else:
            logits, tokens = correction.likeliest_in_order(logits, last)
    distribution = head.distribution(logits.flatten(0, 1), of_places)
    tokens = head.choose(flat, uniform, of_places, distribution).view(shape) if tokens is None else tokens
    draft = Draft(tokens, lengths, None if distribution is None else distribution.view_as(logits))
    if batch.config.draft_ahead or any(row.draft_length == "auto" for row in rows):
        draft.chances = probability_of(logits, logits.argmax(-1))
    if batch.config.draft_paths > 1:
        draft.branches = branch(batch, logits if distribution is None else plain, draft, correction is not None)
    return draft


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
    # No second token where a filter leaves only one. Chained, this depends on draws: such a branch stays and fails.
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


def lay_out(batch: Batch, draft: Draft, known: Tensor) -> Tree:
    """The pass that checks a draft behind the known token int64 [B, 1].

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
    return Tree(
        torch.cat([tokens, draft.branches.token], dim=1).gather(1, place),
        on_device(slots, batch.device),
        on_device(depths, batch.device),
        Groups(depth, shared, group, noised=False),
    )
