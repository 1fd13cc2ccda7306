"""Rows of unequal length that are decoded together: their cache and the one forward pass they share.

Every pass is one call of `Batch.forward`: the same number Q of tokens for each row, at the row's own position,
either causal (it reads and extends the context) or with the whole block visible (denoising: what it writes to
the cache is overwritten by the next pass). Rows of one batch may be in different phases. A batch that is given
`StaticPasses` runs compiled passes, all but the one that reads the prompts.

Letters: B rows, Q tokens of a pass, D hidden size, V vocabulary, N positions whose logits are read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nextblock.attention.split import can_run_split, running_split
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.decoding.cache import Masks, SlotCache
from nextblock.decoding.compiled import StaticCache, StaticPasses
from nextblock.decoding.events import Committed, Event, Finish, Prefilled, RowFinished, Stats
from nextblock.decoding.options import DecodingConfig
from nextblock.decoding.sampling import draw, filter_logits, probability_of, uniforms
from nextblock.model.decoder import AttentionMask, Decoder
from nextblock.model.draft_adapter import Gate

Processor = Callable[[Tensor, Tensor], Tensor]
"""processor(prefixes int64 [B, T], logits [B, V]) -> logits [B, V], as transformers' logits processors."""


@dataclass
class Row:
    """One prompt and its answer.

    number: index in the caller's batch.
    prompt: token ids, at least one.
    limit: most tokens in the answer.
    end_tokens: ids that end the answer.
    stop: called with the answer after each token; a reason ends it there.
    random: stream of uniform numbers, None when greedy.
    padding: ids in front of the prompt that logits processors expect to see (left-padded input).
    """

    number: int
    prompt: list[int]
    limit: int
    end_tokens: frozenset[int] = frozenset()
    stop: Callable[[list[int]], Finish | None] | None = None
    random: torch.Generator | None = None
    padding: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    passes: int = 0
    finish: Finish | None = None

    def push(self, token: int) -> bool:
        """Append the next decided token; True if the answer ends with it."""
        self.answer.append(token)
        if token in self.end_tokens:
            self.finish = "end_token"
        elif self.stop is not None and (reason := self.stop(self.answer)) is not None:
            self.finish = reason
        elif len(self.answer) >= self.limit:
            self.finish = "length"
        return self.finish is not None

    def draw(self, count: int) -> list[float]:
        """The next `count` uniform numbers of this row, none when greedy."""
        return uniforms(self.random, count) if self.random is not None else []


class Batch:
    """Rows decoded together: their cache, and the forward pass they share.

    `rows` holds those still being decoded, in the order of the cache; `all_rows` all, in the caller's order. Without
    `confidence` that of events is nan.
    """

    def __init__(
        self,
        decoder: Decoder,
        settings: BlockDiffusionSettings | None,
        config: DecodingConfig,
        rows: Sequence[Row],
        stats: Stats,
        processor: Processor | None = None,
        passes: StaticPasses | None = None,
        confidence: bool = True,
    ) -> None:
        self.decoder = decoder
        self.tells_confidence = confidence
        self.mask_token_id = None if settings is None else settings.mask_token_id
        self.shifted = settings is None or settings.prediction == "shifted"
        self.block_causal = settings is not None and settings.context == "block_causal"
        self.config = config
        self.block_size = config.block_size or (1 if settings is None else settings.block_size)
        self.rows, self.all_rows = list(rows), tuple(rows)
        self.stats = stats
        self.processor = processor
        self.device = decoder.device
        scratch = 1 if config.mode == "ar" else self.block_size * (config.draft_paths + config.draft_ahead)
        capacity = max(len(row.prompt) + row.limit for row in rows) + scratch
        self.cache = SlotCache(len(rows), capacity) if passes is None else passes.cache(len(rows), capacity, scratch)
        capacity = self.cache.capacity
        self.max_positions = decoder.context(min(len(row.prompt) for row in rows)) or capacity
        self.windows = {k: w if w is not None and w < capacity else None for k, w in decoder.windows.items()}
        self.masks = Masks(capacity, decoder.model.dtype, self.device)
        self.open = torch.zeros(1, 1, 1, 1, dtype=decoder.model.dtype, device=self.device)
        self.skips_masks = can_run_split(decoder.model)
        self._span = torch.arange(0, device=self.device)

    def forward(self, tokens: Tensor, starts: list[int], causal: list[bool]) -> Tensor:
        """One pass over Q tokens of every row.

        Args:
            tokens: int64 [B, Q] on the model's device.
            starts: position of each row's first token.
            causal: for each row, whether its tokens see up to themselves or the whole Q.
        Returns:
            Final hidden states [B, Q, D].
        """
        whole = tokens.shape[1] - 1
        last = [-1 if c else start + whole for start, c in zip(starts, causal, strict=True)]
        noised = None if any(causal) and not all(causal) else not all(causal)
        with self._pass():
            hidden = self._static(tokens, starts, last, noised)
            return self._forward(tokens, starts, causal) if hidden is None else hidden

    def _static(
        self, tokens: Tensor, starts: list[int], last: list[int], noised: Gate | None, **places: Any
    ) -> Tensor | None:
        """The same pass in fixed shapes, if this batch has them; arguments as in `StaticPasses.run`."""
        if not isinstance(self.cache, StaticCache) or not self.cache.compiled:
            return None
        known = {"windows": self.windows, "max_positions": self.max_positions, "noised": noised}
        return self.cache.passes.run(self.decoder, self.cache, tokens, starts, last, **known, **places)

    def _forward(self, tokens: Tensor, starts: list[int], causal: list[bool]) -> Tensor:
        """`forward` in the shapes that the pass has."""
        width = tokens.shape[1]
        start, end = starts[0], max(starts) + width
        inside = end <= self.max_positions
        if inside and all(s == start for s in starts) and all(c == causal[0] for c in causal):
            self.cache.aim(starts, width)
            position = self.span(end)[start:].unsqueeze(0).expand(len(starts), -1)
            mask = self._aligned_mask(start, width, causal[0])
            return self.decoder.hidden(tokens, position, mask, self.cache, noised=not causal[0])
        slots = torch.tensor(starts, device=self.device)[:, None] + self.span(width)
        position = slots if inside else slots.clamp_max(self.max_positions - 1)
        whole = torch.tensor([[s + width - 1] for s in starts], device=self.device)
        is_causal = torch.tensor(causal, device=self.device)[:, None]
        # Slots beyond the model's positions are scratch: nobody looks there.
        last = torch.where(is_causal, slots, whole).clamp_max(self.max_positions - 1)
        self.cache.aim(starts, width, slots)
        mask = self._by_kind(lambda window: self.masks.each(slots, last, end, window))
        noised = ~is_causal.expand(-1, width) if any(causal) else True
        return self.decoder.hidden(tokens, position, mask, self.cache, False if all(causal) else noised)

    def forward_places(
        self,
        tokens: Tensor,
        starts: list[int],
        position: Tensor,
        visible: Callable[[int | None], Tensor],
        noised: Gate,
    ) -> Tensor:
        """One pass whose tokens stand at positions of their own choice; each row's go to slots from its start on.

        Args:
            position: int64 [B, Q].
            visible: window of a layer -> bool [B, Q, S], S up to the last slot written.
            noised: where a draft adapter acts: bool [B, Q], or nowhere.
        Returns:
            Final hidden states [B, Q, D].
        """
        width = tokens.shape[1]
        seen = {window: visible(window) for window in set(self.windows.values())}
        with self._pass():
            hidden = self._static(tokens, starts, [-1] * len(starts), noised, position=position, seen=seen)
            if hidden is not None:
                return hidden
            self.cache.aim(starts, width, torch.tensor(starts, device=self.device)[:, None] + self.span(width))
            mask = self._by_kind(lambda window: self.masks.additive(seen[window].unsqueeze(1)))
            return self.decoder.hidden(tokens, position.clamp_max(self.max_positions - 1), mask, self.cache, noised)

    @contextmanager
    def _pass(self) -> Iterator[None]:
        """One forward pass, counted, with attention that takes the masks that it is given."""
        self.stats.forwards += 1
        for row in self.rows:
            row.passes += 1
        with running_split(self.decoder.model):
            yield

    def _aligned_mask(self, start: int, width: int, causal: bool) -> AttentionMask | None:
        """None where transformers makes plain causal attention of it by itself, without or with a cheap mask."""
        causal = causal and width > 1
        if start == 0 and causal:
            return None

        def build(window: int | None) -> Tensor:
            sees_all = not causal and (window is None or start + width <= window)
            if sees_all and self.skips_masks:
                return self.open
            return self.masks.aligned(start, width, causal, window)

        return self._by_kind(build)

    def _by_kind(self, build: Callable[[int | None], Tensor]) -> AttentionMask:
        """One mask for each kind of layer, built once per window."""
        masks = {window: build(window) for window in set(self.windows.values())}
        return self.decoder.by_kind({kind: masks[window] for kind, window in self.windows.items()})

    def span(self, count: int) -> Tensor:
        """0 ... `count` - 1, int64."""
        if len(self._span) < count:
            self._span = torch.arange(2 * count, device=self.device)
        return self._span[:count]

    def prefill(self) -> Tensor:
        """Read every prompt in one causal pass; hidden state of each one's last token, [B, D]."""
        lengths = [len(row.prompt) for row in self.rows]
        longest = max(lengths)
        tokens = torch.tensor([row.prompt + [0] * (longest - len(row.prompt)) for row in self.rows])
        # Padding stands behind the prompt, where no token of it looks, and is overwritten by the answer.
        with self._pass():
            hidden = self._forward(tokens.to(self.device), [0] * len(self.rows), [True] * len(self.rows))
        self.stats.count("prefill", len(self.rows))
        last = torch.tensor(lengths, device=self.device) - 1
        return hidden[torch.arange(len(lengths), device=self.device), last]

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own float32 logits [N, V] of hidden states [N, D], without the mask token."""
        return self._without_mask(self.decoder.logits(hidden).float())

    def _without_mask(self, logits: Tensor) -> Tensor:
        if self.mask_token_id is not None:  # a draft adapter's lies outside the vocabulary: an empty slice
            logits[:, self.mask_token_id : self.mask_token_id + 1] = -torch.inf
        return logits

    def next_logits(self, hidden: Tensor, prefixes: Iterable[tuple[Row, list[int] | None]]) -> Tensor:
        """As `logits`, for next tokens: through the processors, which see each position's own prefix.

        Args:
            hidden: [N, D].
            prefixes: for each position its row and that row's answer up to there; None where nobody looks.
        """
        logits = self.logits(hidden)
        return logits if self.processor is None else self._processed(self.processor, logits, list(prefixes))

    def _processed(self, processor: Processor, logits: Tensor, prefixes: list[tuple[Row, list[int] | None]]) -> Tensor:
        """One call for each length that prefixes have: as often as plain `generate` where a pass gives one token.

        Processors may keep something for each row of the caller's batch, so that a call has all of these rows, each
        in its place, and where nothing is to be known of a row, what it has or had at that length.
        """
        calls: dict[tuple[int, int], dict[int, int]] = {}  # (length, how many before of that row) -> row -> place
        met: Counter[tuple[int, int]] = Counter()
        for place, (row, answer) in enumerate(prefixes):
            if answer is None:
                continue
            length = len(row.padding) + len(row.prompt) + len(answer)
            calls.setdefault((length, met[row.number, length]), {})[row.number] = place
            met[row.number, length] += 1
        for (length, _), places in sorted(calls.items()):
            lines = []
            for row in self.all_rows:
                answer = (prefixes[places[row.number]][1] if row.number in places else None) or row.answer
                line = [*row.padding, *row.prompt, *answer][:length]
                lines.append(line + [min(row.end_tokens, default=0)] * (length - len(line)))
            number, place = (torch.tensor([*part], device=self.device) for part in (places, places.values()))
            scores = logits.new_zeros(len(lines), logits.shape[1])
            scores[number] = logits[place]
            logits[place] = processor(torch.tensor(lines, device=self.device), scores)[number].to(logits.dtype)
        return self._without_mask(logits)

    def distribution(self, logits: Tensor) -> Tensor | None:
        """What is drawn from: probabilities [N, V] after temperature, top-k and top-p; None when greedy."""
        config = self.config
        if not config.temperature:
            return None
        return filter_logits(logits, config.temperature, config.top_k, config.top_p).softmax(-1)

    def choose(self, logits: Tensor, uniform: list[float], distribution: Tensor | None = None) -> Tensor:
        """Pick a token at each place, greedily (the likeliest, the lowest id of equals) or by a draw: int64 [N].

        Args:
            logits: [N, V], unfiltered.
            uniform: N numbers in [0, 1); none when greedy.
            distribution: that of `logits`, if it is known already.
        """
        if not self.config.temperature:
            return logits.argmax(-1)
        distribution = self.distribution(logits) if distribution is None else distribution
        assert distribution is not None
        return draw(distribution, torch.tensor(uniform, dtype=torch.float64, device=self.device))

    def confidence(self, logits: Tensor, token: Tensor) -> Tensor:
        """The model's probabilities of tokens int64 [N] by unfiltered logits [N, V]: before temperature, top-k and
        top-p, which say how to draw, not how sure the model is. nan where nobody reads them.
        """
        if self.tells_confidence:
            return probability_of(logits, token)
        return torch.full(token.shape, torch.nan, device=token.device)

    def tell(self, logits: Tensor, token: Tensor) -> tuple[list[int], list[float]]:
        """Tokens int64 [N] and their `confidence`, in one copy to the host."""
        if not self.tells_confidence:
            return token.tolist(), [math.nan] * len(token)
        tokens, confidence = torch.stack([token.double(), self.confidence(logits, token).double()]).tolist()
        return [int(number) for number in tokens], confidence

    def close(self) -> None:
        """Give memory that outlives the batch back, for the next one."""
        if isinstance(self.cache, StaticCache):
            self.cache.passes.release(self.cache)

    def leave(self) -> list[int]:
        """Take finished rows out of the batch and the cache.

        Returns:
            For each row that stays, in the new order, its index in the old one; also what `rows` now holds.
        """
        order = list(range(len(self.rows)))
        for index in range(len(order) - 1, -1, -1):
            if self.rows[index].finish is None:
                continue
            # The last row takes the place of the one that left.
            self.cache.drop(index)
            last_row, last_index = self.rows.pop(), order.pop()
            if index < len(self.rows):
                self.rows[index], order[index] = last_row, last_index
        return order


def begin(batch: Batch, first_token: bool) -> Iterator[Event]:
    """Read the prompts; with `first_token`, the causal pass also gives the first token of each answer."""
    hidden = batch.prefill()
    for row in batch.rows:
        yield Prefilled(row.number, len(row.prompt))
    if first_token:
        logits = batch.next_logits(hidden, [(row, row.answer) for row in batch.rows])
        tokens = batch.choose(logits, [u for row in batch.rows for u in row.draw(1)])
        for row, token, probability in zip(batch.rows, *batch.tell(logits, tokens), strict=True):
            yield from push(row, [token], [probability])


def push(row: Row, tokens: list[int], probabilities: list[float]) -> Iterator[Event]:
    """Append decided tokens to a row's answer until it is finished."""
    for token, probability in zip(tokens, probabilities, strict=True):
        offset = len(row.answer)
        done = row.push(token)
        yield Committed(row.number, offset, token, probability, row.passes)
        if done:
            yield finished(row)
            return


def finished(row: Row) -> RowFinished:
    """The event of a row that has a reason to end."""
    assert row.finish is not None
    return RowFinished(row.number, len(row.answer), row.finish)
