"""Which drafts, of all that are proposed, and which numbers of them are likeliest to be kept.

Letters: B rows, k drafts, P paths, V vocabulary, w candidates of a place, r of these that are tried, G points of
acceptance.
"""

from __future__ import annotations

import math
from collections.abc import Container
from heapq import heappop, heappush
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, logaddexp

from nextblock.model.correction import Correction

TRIED = 8
"""Likeliest tokens with which a path may leave the trunk at each place (r)."""


class Found(NamedTuple):
    """A draft: its path (0: the trunk), place and token, and the chance that it and all before it are kept."""

    path: int
    place: int
    token: int
    chance: float


def best_continuations(
    logits: Tensor, previous: Tensor, correction: Correction | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest tokens of each place, by the candidate chosen at the place before.

    Args:
        logits: [B, k, V], before correction.
        previous: int64 [B], the token before the first place.
    Returns:
        Tokens of the candidates, int64 [B, k, w]; log-probabilities of the likeliest behind each candidate of the
        place before, [B, k, w, r], the likeliest first; and which candidates these are, int64 of the same shape.
        Without a correction head all behind one: [B, k, 1, r].
    """
    if correction is None:
        scores, token = logits.log_softmax(-1).topk(min(TRIED, logits.shape[-1]))
        scores = scores.unsqueeze(2)
    else:
        _, token, scores = correction.pairs(logits, previous)
        others = logits.scatter(-1, token, -math.inf).logsumexp(-1)[..., None]
        scores = scores - logaddexp(others, scores.logsumexp(-1))[..., None]
    best = scores.topk(min(TRIED, scores.shape[-1]))
    return token, best.values, best.indices


def likeliest_tree(
    names: list[list[int]],
    value: list[list[list[float]]],
    choice: list[list[list[int]]],
    length: int,
    budget: int,
    ends: Container[int] = (),
) -> list[Found]:
    """The `budget` drafts that are likeliest to be kept, of all that leave the likeliest path at most once.

    The likeliest comes first, so that the first n are the likeliest tree of n. On real and on toy text a tree that
    branches again keeps hardly more (docs/log.md).

    Args:
        names, value, choice: of a row, from `best_continuations`.
        length: places.
        ends: tokens behind which nothing is drafted.
    """
    found, paths = list[Found](), 1
    # -log P, place, path (0: the trunk, -1: a new one), rank, candidate before. A draft is kept only if all before it
    # are, so it never comes out before these.
    waiting: list[tuple[float, int, int, int, int]] = []

    def add(place: int, before: int, path: int, cost: float) -> None:
        before = before if len(value[place]) > 1 else 0
        for rank, own in enumerate(value[place][before][: 1 if path else None]):
            if own > -math.inf:  # the mask token, or what a processor forbids
                heappush(waiting, (cost - own, place, -1 if rank else path, rank, before))

    if length:
        add(0, 0, 0, 0.0)
    while waiting and len(found) < budget:
        cost, place, path, rank, before = heappop(waiting)
        if path < 0:
            path, paths = paths, paths + 1
        chosen = choice[place][before][rank]
        found.append(Found(path, place, names[place][chosen], math.exp(-cost)))
        if place + 1 < length and found[-1].token not in ends:
            add(place + 1, chosen, path, cost)
    return found


def trunk_chances(tree: list[Found]) -> list[float]:
    """Of each draft of the trunk to be kept, if all before it are."""
    reached = [1.0, *(draft.chance for draft in tree if not draft.path)]
    return [after / before if before else 0.0 for before, after in pairwise(reached)]


def paths_of(trees: list[list[Found]]) -> tuple[list[list[list[int]]], list[list[int]], list[list[int]]]:
    """Of the trees of B rows: the tokens of each path in their places, [B, P, k], the trunk first and 0 elsewhere; how
    many drafts each branch shares with the trunk; and how many each path has with those, the trunk first.
    """
    width = max((draft.place + 1 for line in trees for draft in line), default=0)
    most = max((draft.path + 1 for line in trees for draft in line), default=1)
    tokens = [[[0] * width for _ in range(most)] for _ in trees]
    depth, ends = [list[int]() for _ in trees], [[0] for _ in trees]
    for index, line in enumerate(trees):
        for path, place, token, _ in line:
            if path == len(ends[index]):  # a branch begins
                depth[index].append(place)
                ends[index].append(0)
            tokens[index][path][place], ends[index][path] = token, place + 1
    return tokens, depth, ends


def likeliest_points(chances: Tensor | None, lengths: list[int], count: int, device: torch.device) -> Tensor:
    """Of each row the `count` likeliest numbers of drafts to be kept, the likeliest first: int64 [B, G].

    A row that has fewer numbers repeats its likeliest.

    Args:
        chances: float32 [B, k], how likely each draft is to be kept, given those before it; None: there is no draft.
        lengths: drafts of each row.
    """
    length = torch.tensor(lengths).to(device, non_blocking=True)[:, None]
    number = torch.arange(max(lengths) + 1, device=device)
    if chances is None:
        return number.expand(len(length), -1)
    chance = torch.nn.functional.pad(chances[:, : max(lengths)].double(), (1, 1))
    chance[:, 0] = 1
    reached = chance[:, :-1].cumprod(1)
    odds = torch.where(number < length, reached * (1 - chance[:, 1:]), reached).masked_fill(number > length, -1)
    ranked = odds.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.where(number[: ranked.shape[1]] <= length, ranked, ranked[:, :1])
