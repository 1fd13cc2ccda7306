"""Decode a block at a time, by denoising."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nextblock.decoding.batch import Batch
from nextblock.decoding.events import BlockFinished, Committed, Event
from nextblock.decoding.rows import Row
from nextblock.decoding.sampling import commit, on_device, probability_of, scores


@dataclass
class _Block:
    """The block that a row is denoising. `tokens` holds the mask token where undecided.

    start: answer index of its first token. width: of its sub-blocks. steps: passes spent on the current one of these.
    end: position of the first decided end token, else the block's length; what lies behind is left masked.
    """

    start: int
    tokens: list[int]
    decided: list[bool]
    end: int
    width: int
    sub_block: int = 0
    steps: int = 0

    def masked(self) -> list[int]:
        """Undecided positions of the current sub-block; goes on to the next one that has any."""
        for low in range(self.sub_block * self.width, self.end, self.width):
            if found := [i for i in range(low, min(low + self.width, self.end)) if not self.decided[i]]:
                return found
            self.sub_block, self.steps = self.sub_block + 1, 0
        return []


def _new_block(batch: Batch, row: Row, start: int) -> _Block:
    """All masked but the first token if it is known; what lies past the model's positions counts as decided."""
    known = row.answer[start:]
    inside = batch.max_positions - len(row.prompt) - start
    tokens = known + [batch.mask_token_id] * (batch.block_size - len(known))
    decided = [i < len(known) or i >= inside for i in range(batch.block_size)]
    return _Block(start, tokens, decided, batch.block_size, batch.block_size // row.denoising.sub_blocks)


def diffusion(batch: Batch) -> Iterator[list[Event]]:
    """Denoise block after block   (arXiv 2512.06776, section 6.1, and the released sampler).

    The block's first token comes from the causal pass over what precedes it (shifted prediction). Then
    denoising passes over the whole block, the cached context in front; each commits some positions of the
    current sub-block. When nothing is masked, one causal pass writes the block to the cache and yields the
    next one's first token. Rows denoise and commit in the same passes.
    """
    blocks = list[_Block]()
    while rows := batch.admit():
        blocks += [_new_block(batch, row, 0) for row in rows[len(blocks) :]]
        masked = [block.masked() for block in blocks]
        tokens = on_device([block.tokens for block in blocks], batch.device)
        starts = [len(row.prompt) + block.start for row, block in zip(rows, blocks, strict=True)]
        hidden = batch.forward(tokens, starts, [not positions and not batch.block_causal for positions in masked])
        denoising = sum(map(bool, masked))
        batch.stats.count("denoise", denoising)
        batch.stats.count("commit", len(rows) - denoising)
        proposals, events = _propose(batch, hidden, masked), list[Event]()
        for index, (row, block, positions) in enumerate(zip(rows, blocks, masked, strict=True)):
            if positions:
                events += _decide(row, block, positions, proposals[index])
            else:
                end = block.start + batch.block_size
                token, probability, _ = proposals[index]
                events += [BlockFinished(row.number, block.start, end), *row.extend(token, probability)]
                blocks[index] = _new_block(batch, row, end)
        yield events
        blocks = [blocks[index] for index in batch.leave()]


Proposal = tuple[list[int], list[float], list[float]]
"""Tokens, their probabilities and their scores."""


def _propose(batch: Batch, hidden: Tensor, masked: list[list[int]]) -> list[Proposal]:
    """What each row proposes at its masked positions; where none is masked, as the next block's first token.

    Logits exist only at these positions. With shifted prediction position i - 1 decides position i, so that a
    block's last position gives the first token of the next; with aligned prediction nothing gives that.
    """
    shift, width = (1 if batch.shifted else 0), hidden.shape[1]
    sources = [[i - shift for i in positions or ([width] if batch.shifted else [])] for positions in masked]
    flat = [index * width + i for index, positions in enumerate(sources) for i in positions]
    if not flat:
        return [([], [], [])] * len(sources)
    logits = batch.head.logits(hidden.flatten(0, 1)[on_device(flat, batch.device)])
    uniform = [u for row, positions in zip(batch.rows, sources, strict=True) for u in row.draw(len(positions))]
    of_places = [row for row, positions in zip(batch.rows, sources, strict=True) for _ in positions]
    token = batch.head.choose(logits, uniform, of_places)
    probability = probability_of(logits, token)
    score = scores(logits, probability, [row.denoising.sampler for row in of_places])
    numbers = torch.stack([token.double(), probability.double(), score.double()]).tolist()  # one copy to the host
    tokens, proposals, low = [int(number) for number in numbers[0]], list[Proposal](), 0
    for positions in sources:
        part = slice(low, low := low + len(positions))
        proposals.append((tokens[part], numbers[1][part], numbers[2][part]))
    return proposals


def _decide(row: Row, block: _Block, masked: list[int], proposal: Proposal) -> list[Event]:
    """Commit what the rule chooses, and hand on to the answer what is decided without a gap."""
    how, events = row.denoising, list[Event]()
    tokens, probabilities, score = proposal
    left = None if how.steps is None else how.steps // how.sub_blocks - block.steps
    block.steps += 1
    for choice in commit(score, probabilities, sampler=how.sampler, threshold=how.threshold, steps_left=left):
        position, token = masked[choice], tokens[choice]
        block.tokens[position], block.decided[position] = token, True
        if token in row.end_tokens:
            block.end = min(block.end, position)
        if (offset := block.start + position) < row.limit:
            events.append(Committed(row.number, offset, token, probabilities[choice], row.passes))
    while (position := len(row.answer) - block.start) < len(block.tokens) and block.decided[position]:
        if row.push(block.tokens[position]):
            events += [BlockFinished(row.number, block.start, len(row.answer)), row.finished()]
            break
    return events
