"""Drafts: what the denoising pass proposes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from nextblock.decoding.batch import Batch, Row
from nextblock.decoding.sampling import draw, without


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
