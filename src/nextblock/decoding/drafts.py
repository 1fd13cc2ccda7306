"""Drafts: the pass that makes them, what it proposes, and where the pass that checks it has each token.

A draft of several paths is a tree: the trunk, and branches that leave it at one position each, with another token
there. Greedy, the tree is what is likeliest to be kept of all that the draft proposes (`grow`); what is drawn has the
trunk's own tokens behind the branch's (`branch`).

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
from nextblock.decoding.compiled import StaticCache
from nextblock.decoding.sampling import draw, on_device, probability_of, without
from nextblock.model.trees import Found, best_continuations, likeliest_tree, paths_of


@dataclass
class Branches:
    """What paths beside the trunk propose.

    depth: for each row and branch, how many drafts it shares with the trunk.
    ends: for each row, how many drafts the trunk has, then each branch, with the shared ones.
    tokens: int64 [B, M, k], of each branch its own drafts, in their places; what lies before them means nothing.
    """

    depth: list[list[int]]
    ends: list[list[int]]
    tokens: Tensor

    @property
    def first(self) -> Tensor:
        """The token with which each branch leaves the trunk, int64 [B, M]."""
        depth = [line + [0] * (self.tokens.shape[1] - len(line)) for line in self.depth]
        return self.tokens.gather(2, on_device(depth, self.tokens.device)[:, :, None])[:, :, 0]


@dataclass
class Draft:
    """The trunk's tokens int64 [B, k] on the model's device, and the `lengths` of each row's longest path.

    distribution: when sampling, what they were drawn from, [B, k, V].
    chances: float32 [B, k], how likely each is to be kept, given those before it, by the draft's own probabilities.
    tree: of each row the drafts that the paths consist of, the likeliest first.
    beyond: chances, as above, of what was proposed behind each row's drafts and is not checked.
    """

    tokens: Tensor
    lengths: list[int]
    distribution: Tensor | None = None
    branches: Branches | None = None
    chances: Tensor | None = None
    tree: list[list[Found]] | None = None
    beyond: list[list[float]] | None = None

    def own_slots(self, row: int, path: int) -> tuple[int, int]:
        """Where the check has the first token that a row's path does not share with the trunk, and its depth."""
        assert self.branches is not None
        depth, (trunk, *ends) = self.branches.depth[row], self.branches.ends[row]
        before = zip(ends[: path - 1], depth, strict=False)
        return 1 + trunk + sum(end - d for end, d in before), depth[path - 1]

    def part(self, most: list[int]) -> Draft:
        """Of each row at most so many drafts: the first, or the likeliest of a tree."""
        if self.tree is not None:
            return planted([line[:n] for line, n in zip(self.tree, most, strict=True)], self.tokens.device)
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
    ends: int64 [B, P]: how many drafts a path has.
    groups: which tokens see each other. All None: there is only the trunk, and the pass is a plain causal one.
    """

    tokens: Tensor
    slots: Tensor
    depth: Tensor | None = None
    ends: Tensor | None = None
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


def drafting_step(batch: Batch) -> int:
    """Blocks in which drafts are made have a multiple of it in tokens, where their width is up to the machine.

    Else the block, as what is drawn depends on its width.
    """
    if batch.config.draft_ahead or not all(row.paced for row in batch.rows):
        return batch.block_size
    # Each width is compiled separately, so only two are used: half a block and the whole one.
    return -(-batch.block_size // 2) if isinstance(batch.cache, StaticCache) and batch.cache.compiled else 1


def drafting_block(batch: Batch, longest: int) -> int:
    """Tokens of the block in which drafts are made, up to `longest` behind its first one."""
    step = drafting_step(batch)
    return min(-(-(longest + 1) // step) * step, batch.block_size)


def free_block(batch: Batch, width: int) -> Groups:
    """The pass of a draft: the known token as the AR head sees it, then a block of `width` that begins with it.

    The first is plainly causal: it gives the next token for nothing, and its keys stay. The block sees what lies
    before the known token, and itself, as in training; its own copy of that token is part of it.
    """
    if width not in batch.masks.drafting:
        block = batch.masks.span(width)[None]
        position = torch.cat([block[:, :1], block], dim=1)
        before = torch.full_like(block, -1)
        group = torch.cat([before[:, :1], torch.zeros_like(block)], dim=1)
        context = torch.cat([block[:, :1], before], dim=1)
        batch.masks.drafting[width] = Groups(position, context, group, noised=True, kept=True)
    return batch.masks.drafting[width]


def masked_block(batch: Batch, known: Tensor, width: int, free: int = 1) -> Tensor:
    """The tokens of `free_block`: the known one twice, and mask tokens behind it, int64 [B, 1 + `width`].

    With `free` = 0 the block alone.
    """
    tokens = known.new_full((len(known), free + width), batch.mask_token_id)
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


def draft_alone(batch: Batch, lengths: list[int]) -> Draft:
    """A draft by a pass over the block alone, the first of its tokens included: b - 1 at most; nothing is gained yet.

    What the pass writes to the cache is overwritten by the check, which begins with the known token.
    """
    known, starts = batch.known()
    block = masked_block(batch, known, drafting_block(batch, max(lengths)), free=0)
    hidden = batch.forward(block, starts, [False] * len(starts))
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
    drawn = any(row.sampling.temperature for row in rows)
    if batch.config.draft_paths > 1 and not drawn:
        return grow(batch, flat.view_as(logits), lengths)
    # A row draws for its own drafts only, so that it draws the same numbers alone.
    uniform = [u for row, n in zip(rows, lengths, strict=True) for u in row.draw(n) + [0.0] * (shape[1] - n)]
    of_places = [row for row in rows for _ in range(shape[1])]
    plain = logits = flat.view_as(logits)
    head, correction, tokens = batch.head, batch.decoder.correction, None
    if correction is not None:  # each draft changes what the next is drawn from
        last = on_device([row.answer[-1] for row in rows], flat.device)
        if drawn:
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
        draft.branches = branch(batch, plain, draft, correction is not None)
    return draft


def grow(batch: Batch, logits: Tensor, lengths: list[int]) -> Draft:
    """The greedy drafts that are likeliest to be kept, as many as `draft_paths` paths of `lengths` would have."""
    last = on_device([row.answer[-1] for row in batch.rows], logits.device)
    best, room = best_continuations(logits, last, batch.decoder.correction), batch.config.draft_paths
    names, value, choice = (part.tolist() for part in best)
    lines = zip(names, value, choice, lengths, (row.end_tokens for row in batch.rows), strict=True)
    return planted([likeliest_tree(t, v, c, n, n * room, ends) for t, v, c, n, ends in lines], logits.device)


def planted(tree: list[list[Found]], device: torch.device) -> Draft:
    """The draft that consists of each row's part of a `Draft.tree`."""
    tokens, depth, ends = paths_of(tree)
    found = on_device(tokens, device, torch.int64)
    branches = Branches(depth, ends, found[:, 1:]) if len(tokens[0]) > 1 else None
    return Draft(found[:, 0], [*map(max, ends)], branches=branches, tree=tree)


def branch(batch: Batch, logits: Tensor, draft: Draft, chained: bool = False) -> Branches | None:
    """Where further paths leave what was drawn, each with another draw, without the trunk's token.

    At the positions where that is likeliest to be of use: all drafts before are kept, and the second-likeliest
    token is the right one. This looks at `logits` [B, k, V] alone, never at what was drawn from them: chosen by
    the drafts, the tokens behind a branch would no longer have the distribution that the check takes them to have.
    So where each draft changed what the next is drawn from (`chained`), `logits` are those before.
    The positions are copied to the host, as the width of the check depends on them. None: no row has a branch.
    """
    assert draft.distribution is not None
    likeliest, second = logits.softmax(-1).topk(2).values.double().log().unbind(-1)
    odds = likeliest.cumsum(1) - likeliest + second
    # No second token where a filter leaves only one. Chained, this depends on draws: such a branch stays and fails.
    if not chained:
        odds = odds.masked_fill((draft.distribution > 0).sum(-1) < 2, -math.inf)
    depth = []
    for line, length in zip(odds.tolist(), draft.lengths, strict=True):
        ranked = sorted((n for n in range(length) if line[n] > -math.inf), key=lambda n: -line[n])
        depth.append(ranked[: batch.config.draft_paths - 1])
    found = [(row, n, position) for row, positions in enumerate(depth) for n, position in enumerate(positions)]
    if not found:
        return None
    row, number, position = on_device(found, logits.device).unbind(1)
    uniform = [u for row, positions in zip(batch.rows, depth, strict=True) for u in row.draw(len(positions))]
    weights = without(draft.distribution[row, position], draft.tokens[row, position])
    tokens = draft.tokens[:, None].repeat(1, max(map(len, depth)), 1)
    tokens[row, number, position] = draw(weights, on_device(uniform, logits.device, torch.float64))
    ends = [[length] * (1 + len(positions)) for length, positions in zip(draft.lengths, depth, strict=True)]
    return Branches(depth, ends, tokens)


def lay_out(batch: Batch, draft: Draft, known: Tensor) -> Tree:
    """The pass that checks a draft behind the known token int64 [B, 1].

    Each token has the position of its depth and sees the context, and its own path up to itself.
    """
    tokens = torch.cat([known, draft.tokens], dim=1)
    count, width = tokens.shape
    if draft.branches is None:
        return Tree(tokens, batch.masks.span(width).expand(count, 1, -1))
    branches = draft.branches
    paths, lines, slots, depths, ends = 1 + branches.tokens.shape[1], [], [], [], []
    for leaves, (trunk, *own_ends) in zip(branches.depth, branches.ends, strict=True):
        # Of each token: its place in [known, trunk, branches' tokens], depth, group and last shared depth.
        line = [(n, n, -1, n) for n in range(1 + trunk)]
        own_slots = [[*range(1 + trunk)]]
        for number, (depth, end) in enumerate(zip(leaves, own_ends, strict=True)):
            own_slots.append([*range(depth + 1), *range(len(line), len(line) + end - depth)])
            line += [(width + number * (width - 1) + n - 1, n, number, depth) for n in range(depth + 1, end + 1)]
        missing = paths - len(own_slots)
        slots.append([path + [0] * (width - len(path)) for path in own_slots + [[]] * missing])
        depths.append([-1, *leaves, *[-1] * missing])
        ends.append([trunk, *own_ends, *[0] * missing])
        lines.append(line)
    longest = max(map(len, lines))
    lines = on_device([line + [(0, 0, -1, 0)] * (longest - len(line)) for line in lines], batch.device)
    place, depth, group, shared = lines.unbind(-1)
    tokens = torch.cat([tokens, branches.tokens.flatten(1)], dim=1).gather(1, place)
    told = (on_device(part, batch.device) for part in (slots, depths, ends))
    return Tree(tokens, *told, groups=Groups(depth, shared, group, noised=False))
