"""The three ways to decode, as streams of events: token by token, a block at a time, a block with a check.

Letters: B rows, V vocabulary, b block size, k tokens drafted per check, N positions whose logits are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nextblock.batch import Batch, Row
from nextblock.events import BlockFinished, Committed, Event, Prefilled, Rejected, RowFinished
from nextblock.sampling import accepted, commit, draw, residual, scores


def decode(batch: Batch) -> Iterator[Event]:
    """Decode all rows in the mode that `batch.config` names; afterwards each row holds its answer."""
    modes = {"ar": autoregressive, "diffusion": diffusion, "speculative": speculative}
    return modes[batch.config.mode](batch)


def _prefill(batch: Batch, first_token: bool) -> Iterator[Event]:
    """Read the prompts; with `first_token`, the causal pass also gives the first token of each answer."""
    hidden = batch.prefill()
    for row in batch.rows:
        yield Prefilled(row.number, len(row.prompt))
    if first_token:
        logits = batch.next_logits(hidden, [(row, row.answer) for row in batch.rows])
        tokens, probabilities = batch.choose(logits, [u for row in batch.rows for u in row.draw(1)])
        for row, token, probability in zip(batch.rows, tokens.tolist(), probabilities.tolist(), strict=True):
            yield from _push(row, [token], [probability])


def _push(row: Row, tokens: list[int], probabilities: list[float]) -> Iterator[Event]:
    """Append decided tokens to a row's answer until it is finished."""
    for token, probability in zip(tokens, probabilities, strict=True):
        offset = len(row.answer)
        done = row.push(token)
        yield Committed(row.number, offset, token, probability, row.passes)
        if done:
            yield _finished(row)
            return


def _finished(row: Row) -> RowFinished:
    assert row.finish is not None
    return RowFinished(row.number, len(row.answer), row.finish)


def autoregressive(batch: Batch) -> Iterator[Event]:
    """One causal pass per token."""
    yield from _prefill(batch, first_token=True)
    batch.leave()
    while rows := batch.rows:
        last = torch.tensor([[row.answer[-1]] for row in rows], device=batch.device)
        starts = [len(row.prompt) + len(row.answer) - 1 for row in rows]
        hidden = batch.forward(last, starts, [True] * len(rows))
        batch.stats.count("decode", len(rows))
        logits = batch.next_logits(hidden[:, 0], [(row, row.answer) for row in rows])
        tokens, probabilities = batch.choose(logits, [u for row in rows for u in row.draw(1)])
        for row, token, probability in zip(rows, tokens.tolist(), probabilities.tolist(), strict=True):
            yield from _push(row, [token], [probability])
        batch.leave()


# ------------------------------------------------------------------------------------------- diffusion


@dataclass
class _Block:
    """The block that a row is denoising. `tokens` holds the mask token where undecided.

    start: answer index of its first token. steps: denoising passes spent on the current sub-block.
    """

    start: int
    tokens: list[int]
    decided: list[bool]
    sub_block: int = 0
    steps: int = 0

    def masked(self, width: int) -> list[int]:
        """Undecided positions of the current sub-block of `width`; goes on to the next one that has any."""
        for low in range(self.sub_block * width, len(self.tokens), width):
            if found := [i for i in range(low, low + width) if not self.decided[i]]:
                return found
            self.sub_block, self.steps = self.sub_block + 1, 0
        return []


def _new_block(batch: Batch, row: Row, start: int) -> _Block:
    """All masked but the first token if it is known; what lies past the model's positions counts as decided."""
    assert batch.mask_token_id is not None
    known = row.answer[start:]
    inside = batch.max_positions - len(row.prompt) - start
    tokens = known + [batch.mask_token_id] * (batch.block_size - len(known))
    decided = [i < len(known) or i >= inside for i in range(batch.block_size)]
    return _Block(start, tokens, decided)


def diffusion(batch: Batch) -> Iterator[Event]:
    """Denoise block after block   (paper, section 6.1 and the released sampler).

    The block's first token comes from the causal pass over what precedes it (shifted prediction). Then
    denoising passes over the whole block, the cached context in front; each commits some positions of the
    current sub-block. When nothing is masked, one causal pass writes the block to the cache and yields the
    next one's first token. Rows denoise and commit in the same passes.
    """
    yield from _prefill(batch, first_token=batch.shifted)
    batch.leave()
    blocks = [_new_block(batch, row, 0) for row in batch.rows]
    width = batch.block_size // batch.config.sub_blocks
    while rows := batch.rows:
        masked = [block.masked(width) for block in blocks]
        tokens = torch.tensor([block.tokens for block in blocks], device=batch.device)
        starts = [len(row.prompt) + block.start for row, block in zip(rows, blocks, strict=True)]
        causal = [not positions and not batch.block_causal for positions in masked]
        hidden = batch.forward(tokens, starts, causal)
        denoising = sum(bool(positions) for positions in masked)
        batch.stats.count("denoise", denoising)
        batch.stats.count("commit", len(rows) - denoising)
        proposals = _propose(batch, hidden, masked)
        for index, row in enumerate(rows):
            block, (token, probability, score) = blocks[index], proposals[index]
            if masked[index]:
                yield from _decide(batch, row, block, masked[index], token, probability, score)
            else:
                yield BlockFinished(row.number, block.start, block.start + batch.block_size)
                yield from _push(row, token, probability)
                blocks[index] = _new_block(batch, row, block.start + batch.block_size)
        blocks = [blocks[index] for index in batch.leave()]


Proposal = tuple[list[int], list[float], list[float]]


def _propose(batch: Batch, hidden: Tensor, masked: list[list[int]]) -> list[Proposal]:
    """For each row: tokens, their probabilities and scores at its masked positions, or the next block's first.

    Logits exist only at these positions. With shifted prediction position i - 1 decides position i, so that a
    block's last position gives the first token of the next; with aligned prediction nothing gives that.
    """
    shift = 1 if batch.shifted else 0
    sources = [[i - shift for i in positions] for positions in masked]
    if batch.shifted:
        sources = [positions or [hidden.shape[1] - 1] for positions in sources]
    flat = [index * hidden.shape[1] + i for index, positions in enumerate(sources) for i in positions]
    if not flat:
        return [([], [], [])] * len(sources)
    logits = batch.logits(hidden.flatten(0, 1)[torch.tensor(flat, device=batch.device)])
    uniform = [u for row, positions in zip(batch.rows, sources, strict=True) for u in row.draw(len(positions))]
    token, probability = batch.choose(logits, uniform)
    score = scores(logits, probability, batch.config.sampler)
    tokens, numbers = token.tolist(), torch.stack([probability, score]).tolist()
    proposals, low = [], 0
    for positions in sources:
        part = slice(low, low + len(positions))
        proposals.append((tokens[part], numbers[0][part], numbers[1][part]))
        low += len(positions)
    return proposals


def _decide(
    batch: Batch,
    row: Row,
    block: _Block,
    masked: list[int],
    tokens: list[int],
    probabilities: list[float],
    score: list[float],
) -> Iterator[Event]:
    """Commit what the rule chooses, and hand on to the answer what is decided without a gap."""
    config = batch.config
    steps_left = None if config.steps is None else config.steps // config.sub_blocks - block.steps
    block.steps += 1
    for choice in commit(
        score, probabilities, sampler=config.sampler, threshold=config.threshold, steps_left=steps_left
    ):
        position = masked[choice]
        block.tokens[position], block.decided[position] = tokens[choice], True
        offset = block.start + position
        if offset < row.limit:
            yield Committed(row.number, offset, tokens[choice], probabilities[choice], row.passes)
    while (position := len(row.answer) - block.start) < len(block.tokens) and block.decided[position]:
        if row.push(block.tokens[position]):
            yield BlockFinished(row.number, block.start, len(row.answer))
            yield _finished(row)
            return


# ----------------------------------------------------------------------------------------- speculative


@dataclass
class _Draft:
    """Drafted tokens int64 [B, k]; when sampling, the distributions they were drawn from, [B, k, V]."""

    tokens: Tensor
    distribution: Tensor | None


def speculative(batch: Batch) -> Iterator[Event]:
    """Draft a block by denoising, check it with the causal pass that commits it, keep what agrees.

    Each cycle starts from one token that the AR head chose. The check's logits give the AR head's own choice
    after every drafted token: greedy, drafts are kept as far as they equal it, and one more token comes from
    the head itself; when sampling, rejection sampling decides. What was not kept is dropped by counting less
    far in the cache. So the answer is that of `autoregressive`, greedy, and has its distribution, sampling.
    """
    yield from _prefill(batch, first_token=True)
    batch.leave()
    config = batch.config
    longest = min(config.draft_length or batch.block_size, batch.block_size - 1)
    while rows := batch.rows:
        length = longest
        if config.temperature == 0:  # drafts past every row's limit cannot matter
            length = min(longest, max(row.limit - len(row.answer) for row in rows) - 1)
        known = torch.tensor([[row.answer[-1]] for row in rows], device=batch.device)
        starts = [len(row.prompt) + len(row.answer) - 1 for row in rows]
        draft = _draft(batch, known, starts, length)
        hidden = batch.forward(torch.cat([known, draft.tokens], dim=1), starts, [True] * len(rows))
        batch.stats.count("check" if length else "decode", len(rows))
        logits = batch.next_logits(hidden.flatten(0, 1), _prefixes(rows, draft.tokens))
        verify = _verify_greedy if config.temperature == 0 else _verify_sampled
        kept, tokens, probabilities = verify(batch, logits.unflatten(0, (len(rows), length + 1)), draft)
        drafts = draft.tokens.tolist()
        for index, row in enumerate(rows):
            start = len(row.answer)
            yield from _push(row, tokens[index], probabilities[index])
            for offset in range(kept[index], length):
                yield Rejected(row.number, start + offset, drafts[index][offset], row.passes)
            yield BlockFinished(row.number, start, len(row.answer))
        batch.leave()


def _draft(batch: Batch, known: Tensor, starts: list[int], length: int) -> _Draft:
    """`length` tokens behind the known one, in `draft_steps` denoising passes from left to right.

    Left to right, because rejection sampling needs each draft's distribution given those before it.
    """
    rows, config = batch.rows, batch.config
    assert batch.mask_token_id is not None
    tokens = torch.full((len(rows), batch.block_size), batch.mask_token_id, device=batch.device)
    tokens[:, :1] = known
    shift = 1 if batch.shifted else 0
    distributions = []
    size = -(-length // config.draft_steps) if length else 1
    for low in range(1, length + 1, size):
        high = min(low + size, length + 1)
        hidden = batch.forward(tokens, starts, [False] * len(rows))
        batch.stats.count("denoise", len(rows))
        prefixes = ((row, row.answer) for row in rows for _ in range(low, high))
        logits = batch.next_logits(hidden[:, low - shift : high - shift].flatten(0, 1), prefixes)
        uniform = [u for row in rows for u in row.draw(high - low)]
        chosen = batch.choose(logits, uniform)[0]
        tokens[:, low:high] = chosen.unflatten(0, (len(rows), high - low))
        if config.temperature:
            distributions.append(logits.softmax(-1).unflatten(0, (len(rows), high - low)))
    return _Draft(tokens[:, 1 : length + 1], torch.cat(distributions, dim=1) if distributions else None)


def _prefixes(rows: list[Row], drafts: Tensor) -> Iterator[tuple[Row, list[int]]]:
    """For each position of the check its row and the answer up to there; made only if a processor asks."""
    for row, drafted in zip(rows, drafts.tolist(), strict=True):
        for count in range(len(drafted) + 1):
            yield row, row.answer + drafted[:count]


Verdict = tuple[list[int], list[list[int]], list[list[float]]]
"""For each row: how many drafts are kept, the tokens it gains, and their probabilities."""


def _verify_greedy(batch: Batch, logits: Tensor, draft: _Draft) -> Verdict:
    """Keep drafts as far as they are the AR head's own choice. `logits`: [B, k + 1, V]."""
    rows, width = logits.shape[:2]
    chosen, probability = batch.choose(logits.flatten(0, 1), [])
    chosen = chosen.view(rows, width)
    agreed = (chosen[:, :-1] == draft.tokens).long().cumprod(1).sum(1).tolist()
    tokens, probabilities = chosen.tolist(), probability.view(rows, width).tolist()
    return (
        agreed,
        [t[: n + 1] for t, n in zip(tokens, agreed, strict=True)],
        [p[: n + 1] for p, n in zip(probabilities, agreed, strict=True)],
    )


def _verify_sampled(batch: Batch, logits: Tensor, draft: _Draft) -> Verdict:
    """Rejection sampling: what is emitted has the AR distribution, whatever the draft's   (Leviathan et al., 2023).

    `logits`: [B, k + 1, V], filtered as the drafts' were.
    """
    target, drafted = logits.softmax(-1), draft.tokens
    rows, length = drafted.shape
    # Behind the last draft nothing was proposed: q = 0 there, so that the head's own distribution remains.
    proposal = torch.zeros_like(target)
    if draft.distribution is not None:
        proposal[:, :length] = draft.distribution
    chances = torch.stack([p[:, :length].gather(-1, drafted.unsqueeze(-1)) for p in (target, proposal)])
    p, q = chances.squeeze(-1).tolist()
    kept = [accepted(p[i], q[i], row.draw(length)) for i, row in enumerate(batch.rows)]
    uniform = torch.tensor([u for row in batch.rows for u in row.draw(1)], dtype=torch.float64)
    at = torch.arange(rows, device=batch.device), torch.tensor(kept, device=batch.device)
    last = draw(residual(target[at], proposal[at]), uniform.to(batch.device))
    emitted = torch.cat([drafted, drafted.new_zeros(rows, 1)], dim=1).index_put(at, last)
    probabilities = target.gather(-1, emitted.unsqueeze(-1)).squeeze(-1).tolist()
    return (
        kept,
        [tokens[: n + 1] for tokens, n in zip(emitted.tolist(), kept, strict=True)],
        [found[: n + 1] for found, n in zip(probabilities, kept, strict=True)],
    )
