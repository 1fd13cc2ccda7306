"""Drafts as long as they pay, never longer: how many, and whether any, by what passes cost on this machine."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import pairwise

import torch
from rich.console import Console
from torch import Tensor

from nextblock.attention.groups import Groups
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.decoding.batch import Batch
from nextblock.decoding.compiled import StaticPasses, rounded_rows
from nextblock.decoding.drafts import Draft, candidates, free_block, masked_block
from nextblock.decoding.events import Stats
from nextblock.decoding.options import DecodingConfig
from nextblock.decoding.rows import Row
from nextblock.model.costs import (
    NOMINAL,
    Costs,
    Pause,
    best_length,
    fingerprint,
    first_pause,
    kept_by,
    read_costs,
    write_costs,
)
from nextblock.model.decoder import Decoder

REPEATS, CONTEXT, SAID = 3, 64, 2.0
"""Passes of each width after one that warms up; tokens in front of them; seconds from which on that is announced."""

_known: dict[str, Costs] = {}
"""Of this process, by the whole fingerprint."""


@dataclass
class Pacer:
    """Decides on the drafts of rows whose `draft_length` is "auto".

    Greedy and `free` rows decide together, by what passes over all rows cost; another sampled row as if it were alone
    on a nominal machine.
    """

    costs: Costs

    def lengths(self, rows: list[Row], most: list[int]) -> list[int]:
        """Drafts of the next cycle, for each row `most` at most: before they are made."""
        lengths, paced = list(most), list(most)
        for index, (row, n) in enumerate(zip(rows, most, strict=True)):
            if row.draft_length != "auto" or not _by_load(row):
                paced[index] = 0
                lengths[index] = self._best(NOMINAL, [row], [n], row.pause) if n and row.draft_length == "auto" else n
        # Where others draft anyway, the pass is as wide as it gets.
        if any(paced) and not any(n for n, own in zip(lengths, paced, strict=True) if not own):
            best = self._best(self.costs, rows, paced, self.costs.pause)
            for index, (row, n) in enumerate(zip(rows, paced, strict=True)):
                lengths[index] = 0 if not best else n if row.random is None else min(n, best)  # `cut` is for greedy
        return lengths

    def _best(self, costs: Costs, rows: list[Row], most: list[int], pause: Pause) -> int:
        longest, prior = max(most), costs.share.chance(0.0, weight=0.0)
        kept = [kept_by([row.share.chance(prior)] * n) for row, n in zip(rows, most, strict=True)]
        check, draft = costs.of_rows(len(rows), longest)
        return pause.decide(best_length(kept, check, draft), longest, first_pause(check, draft))

    def cut(self, draft: Draft, rows: list[Row]) -> Draft:
        """As much of a draft of greedy rows as is worth checking, by its own probabilities.

        What was drawn is never cut: later proposals may depend on the draws before them, and the length would too.
        Beside such drafts nothing is cut, as the check is as wide as its widest row.
        """
        fixed = [n for row, n in zip(rows, draft.lengths, strict=True) if row.random or row.draft_length != "auto"]
        if any(fixed) or draft.branches or draft.chances is None:
            return draft
        chances = [line[:n] for line, n in zip(draft.chances.tolist(), draft.lengths, strict=True)]
        n = best_length([*map(kept_by, chances)], *self.costs.of_rows(len(rows), max(draft.lengths)), drafted=True)
        if not n:  # a check would say no more
            for row, line in zip(rows, chances, strict=True):
                self._take_in(row, *(line[0], 1.0) if line else (0.0, 0.0))
        return draft.part([n] * len(rows))

    def learn(self, rows: list[Row], draft: Draft, kept: list[int]) -> None:
        """Take in what a check has kept of a draft."""
        for row, length, number in zip(rows, draft.lengths, kept, strict=True):
            self._take_in(row, number, min(number + 1, length))

    def _take_in(self, row: Row, kept: float, tried: float) -> None:
        if tried:
            row.share.learn(kept, tried)
            if self.costs is not NOMINAL:
                self.costs.share.learn(kept, tried)


def _by_load(row: Row) -> bool:
    return row.random is None or row.free


def costs_of(
    decoder: Decoder,
    settings: BlockDiffusionSettings | None,
    config: DecodingConfig,
    rows: int,
    passes: StaticPasses | None = None,
) -> Costs:
    """What passes over so many rows cost, where that decides: known here, kept on the disk, or measured now."""
    if config.mode != "speculative" or config.draft_length != "auto" or config.draft_ahead or config.temperature:
        return NOMINAL
    kind = (a := decoder.adapter) and (a.config.rank, *a.names, a.layers[0].merged is not None)
    of = fingerprint(decoder.model, config.block_size, decoder.attention, kind, passes is not None)
    costs = _known[str(of)] = _known.get(str(of)) or read_costs(of)
    missing = sorted({1, rounded_rows(rows)} - costs.check.keys())
    context = min(CONTEXT, (decoder.max_positions or 2**62) - 2 * (config.block_size or 1) - 1)
    for size in missing:
        prompts = [Row(number, [0] * max(1, context), CONTEXT) for number in range(size)]
        batch = Batch(decoder, settings, config, prompts, Stats(), passes=passes)
        measure(batch, costs)
        batch.close()
    if missing:
        write_costs(costs)
    return costs


def measure(batch: Batch, costs: Costs) -> None:
    """Time the passes of a batch whose rows have no answer yet: the least of a few times each, in turns."""
    batch.prefill()
    rows, start, block = len(batch.rows), len(batch.rows[0].prompt), batch.block_size
    tokens, free = torch.zeros(rows, 1, dtype=torch.int64, device=batch.device), free_block(batch)

    def seconds(tokens: Tensor, groups: Groups | None = None) -> float:
        began = time.perf_counter()
        hidden = batch.forward(tokens, [start] * rows, [True] * rows, groups)
        if groups is not None:
            hidden = torch.cat([hidden[:, :1], candidates(batch, hidden, [1] * rows, max(0, block - 2))], dim=1)
        batch.head.logits(hidden.flatten(0, 1)).argmax(-1).tolist()
        return time.perf_counter() - began

    widths = [width for width in (1, 2, 4, 8, 16, 32, 64, 128) if width < block] + [block]
    check, draft = dict.fromkeys(widths, math.inf), math.inf
    for number in range(1 + REPEATS):
        began = time.perf_counter()
        for width in widths:
            check[width] = min(check[width], seconds(tokens.expand(-1, width)))
        draft = min(draft, seconds(masked_block(batch, tokens), free))
        if not number and (left := REPEATS * (time.perf_counter() - began)) > SAID:
            Console(stderr=True).print(f"passes are timed, once for this model and machine: up to {left:.0f} s")
    for wider, width in pairwise(reversed(widths)):  # no pass costs more than a wider one
        check[width] = min(check[width], check[wider])
    costs.check[rows], costs.draft[rows] = check, draft
