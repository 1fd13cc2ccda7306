"""Drafts as long as they pay, never longer: how many, and whether any, by what passes cost on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, pairwise

import torch
from rich.console import Console

from nextblock.config.sections import BlockDiffusionSettings
from nextblock.decoding.batch import Batch
from nextblock.decoding.compiled import StaticPasses
from nextblock.decoding.drafts import Draft, candidates, choose_drafts, draft_alone, free_block, masked_block
from nextblock.decoding.events import Stats
from nextblock.decoding.options import DecodingConfig
from nextblock.decoding.rows import Row
from nextblock.model.costs import (
    NOMINAL,
    Costs,
    Pause,
    best_length,
    busy,
    fingerprint,
    first_pause,
    kept_by,
    least_times,
    outcome,
    read_costs,
    rounded_rows,
    write_costs,
)
from nextblock.model.decoder import Decoder
from nextblock.model.trees import trunk_chances

CONTEXT = 64
"""Tokens in front of passes that are timed."""

_known: dict[str, Costs] = {}
"""Of this process, by the whole fingerprint."""
_untimed: dict[str, Costs] = {}
"""Nominal ones, where the machine was too busy to measure: said once, and they learn how many drafts are kept."""


@dataclass
class Pacer:
    """Decides on the drafts of rows whose `draft_length` is "auto".

    Greedy and `free` rows decide together, by what passes over all rows cost; another sampled row as if it were alone
    on a nominal machine.

    step: widths of blocks in which drafts are made are multiples of it.
    """

    costs: Costs
    block_size: int
    paths: int = 1
    step: int = 1

    def __post_init__(self) -> None:
        of_rows, size = {True: NOMINAL.of_rows, False: self.costs.of_rows}, self.block_size
        # Looked up once for each number of rows: a cycle asks twice.
        self._passes = cache(lambda nominal, rows, step: of_rows[nominal](rows, size, size * self.paths, step))

    def lengths(self, rows: list[Row], most: list[int]) -> tuple[list[int], bool]:
        """Drafts of the next cycle, for each row `most` behind the free token at most: before they are made.

        Returns:
            The lengths, and whether to draft without the free token: then one more of each row.
        """
        lengths, paced, alone = list(most), list(most), False
        for index, (row, n) in enumerate(zip(rows, most, strict=True)):
            if not row.paced:
                paced[index] = 0
                own = n and row.draft_length == "auto"
                lengths[index] = self._best(NOMINAL, [row], [n], row.pause)[0] if own else n
        # Where others draft anyway, the pass is as wide as it gets.
        if any(paced) and not any(n for n, own in zip(lengths, paced, strict=True) if not own):
            best, alone = self._best(self.costs, rows, paced, self.costs.pause)
            lengths = [min(n, best) for n in paced]
        return lengths, alone

    def _best(self, costs: Costs, rows: list[Row], most: list[int], pause: Pause) -> tuple[int, bool]:
        longest = max(most)
        if longest < 1:
            return 0, False
        nominal = costs is NOMINAL
        if nominal:
            chances = [[row.share.chance(costs.share.prior)] * n for row, n in zip(rows, most, strict=True)]
        else:
            line = costs.share.chances(longest)
            chances = [line[:n] for n in most]
        check, draft, alone = self._passes(nominal, len(rows), self.block_size if nominal else self.step)
        speed, best = best_length([*map(kept_by, chances)], check, draft)
        first = costs.first.chance(0.0, weight=0.0)
        without = [kept_by([first, *line]) for line in chances]
        other, by_itself = best_length(without, check, alone, sure=1)
        greedy = all(row.random is None and row.draft_length == "auto" for row in rows)
        if greedy and other > speed:
            return pause.decide(max(1, by_itself - 1), longest, 1), True
        return pause.decide(best, longest, first_pause(check, draft[longest])), False

    def cut(self, draft: Draft, rows: list[Row], alone: bool) -> Draft:
        """As much of a draft of greedy rows as is worth checking, by its own probabilities; of a tree the likeliest.

        What was drawn is never cut: later proposals may depend on the draws before them, and the length would too.
        Beside such drafts nothing is cut, as the check is as wide as its widest row.
        """
        fixed = [n for row, n in zip(rows, draft.lengths, strict=True) if row.random or row.draft_length != "auto"]
        if any(fixed) or (draft.tree is None and (draft.branches or draft.chances is None)):
            return draft
        if draft.chances is not None:
            told = zip(rows, draft.tokens.tolist(), draft.chances.tolist(), draft.lengths, strict=True)
            own = [line[:n][: row.ends_at(tokens[:n]) + 1] for row, tokens, line, n in told]
            kept = [*map(kept_by, own)]
        else:
            own = [*map(trunk_chances, draft.tree or [])]
            kept = [[0.0, *accumulate(found.chance for found in line)] for line in draft.tree or []]
        check, *passes = self._passes(False, len(rows), self.step)
        made = passes[alone][max(draft.lengths, default=0)]
        _, n = best_length(kept, check, made, sure=1 if alone else 2)
        part = draft.part([n] * len(rows))
        part.beyond = [line[length:] for line, length in zip(own, part.lengths, strict=True)]
        if not n:  # a check would say no more
            self.learn(rows, part, part.lengths, alone)
        return part

    def learn(self, rows: list[Row], draft: Draft, kept: list[int], alone: bool) -> None:
        """Take in what a check has kept of a draft and the answer has taken; `alone`: made without the free token."""
        beyond = draft.beyond or [[]] * len(rows)
        for row, number, checked, more in zip(rows, kept, draft.lengths, beyond, strict=True):
            if row.finish:  # what lies behind an answer's end was neither right nor wrong
                checked, more = number, []
            if found := outcome(number, checked, more if row.paced else ()):
                row.share.learn(sum(part for part, _ in found), sum(part for _, part in found))
                if self.costs is not NOMINAL and alone:
                    self.costs.first.learn(*found[0])
                if self.costs is not NOMINAL and found[alone:]:
                    self.costs.share.learn(found[alone:])


def costs_of(
    decoder: Decoder,
    settings: BlockDiffusionSettings | None,
    config: DecodingConfig,
    rows: int,
    passes: StaticPasses | None = None,
) -> Costs:
    """What passes over so many rows cost, where that decides: known here, kept on the disk, or measured now.

    On a busy machine nominal costs, which are not kept.
    """
    if config.mode != "speculative" or config.draft_length != "auto" or config.draft_ahead:
        return NOMINAL
    kind = (a := decoder.adapter) and (a.config.rank, *a.names, a.layers[0].merged is not None)
    head = decoder.correction and decoder.correction.config  # both change the pass that drafts
    more = config.draft_paths, head
    of = fingerprint(decoder.model, config.block_size, decoder.attention, kind, passes is not None, *more)
    costs = _known[str(of)] = _known.get(str(of)) or read_costs(of)
    costs.block = config.block_size
    missing = [n for n in sorted({1, rounded_rows(rows)}) if n not in costs.check]
    if missing and busy(decoder.device):
        if str(of) not in _untimed:
            Console(stderr=True).print("the machine is busy, so passes are not timed: drafts go by nominal costs")
        return _untimed.setdefault(str(of), NOMINAL.model_copy(deep=True))
    context = min(CONTEXT, (decoder.max_positions or 2**62) - 2 * (config.block_size or 1) - 1)
    for size in missing:
        prompts = [Row(number, [0] * max(1, context), CONTEXT, answer=[0]) for number in range(size)]
        batch = Batch(decoder, settings, config, prompts, Stats(), passes=passes)
        try:
            measure(batch, costs)
        finally:
            batch.close()
    if missing:
        write_costs(costs)
    return costs


def measure(batch: Batch, costs: Costs) -> None:
    """Time the passes of a batch whose rows have one token of an answer: the least of some times each, in turns."""
    batch.prefill()
    rows, block = len(batch.rows), batch.block_size
    (known, starts), free = batch.known(), free_block(batch, block)

    def check(width: int) -> None:
        hidden = batch.forward(known.expand(-1, width), starts, [True] * rows)
        batch.head.logits(hidden.flatten(0, 1)).argmax(-1).tolist()

    def draft() -> None:
        lengths = [max(0, block - 2)] * rows
        hidden = batch.forward(masked_block(batch, known, block), starts, [True] * rows, free)
        hidden = torch.cat([hidden[:, :1], candidates(batch, hidden, [1] * rows, lengths[0])], dim=1)
        logits = batch.head.logits(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        logits[:, 0].argmax(-1).tolist()
        choose_drafts(batch, logits[:, 1:], lengths)

    widest = block * batch.config.draft_paths
    widths = [*(1 << n for n in range((widest - 1).bit_length())), widest]
    kinds: list[Callable[[], object]] = [partial(check, width) for width in widths]
    least = least_times([*kinds, draft, partial(draft_alone, batch, [max(0, block - 1)] * rows)])
    line = dict(zip(widths, least, strict=False))
    for wider, width in pairwise(reversed(widths)):  # no pass costs more than a wider one
        line[width] = min(line[width], line[wider])
    costs.check[rows], (costs.draft[rows], costs.alone[rows]) = line, least[-2:]
