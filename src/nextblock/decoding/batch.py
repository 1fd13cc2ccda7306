"""Rows of unequal length that are decoded together, and the one forward pass they share.

Every pass is one call of `Batch.forward`: the same number Q of tokens for each row, at the row's own position,
either causal (it reads and extends the context) or with the whole block visible (denoising: what it writes to
the cache is overwritten by the next pass). Rows of one batch may be in different phases, and those of another batch
may `join` between two steps. A batch that is given `StaticPasses` runs compiled passes, at times for the prompts, too;
no row can join it.

Letters: B rows, Q tokens of a pass, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nextblock.attention.cache import SlotCache
from nextblock.attention.groups import Groups
from nextblock.attention.split import running_split
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.decoding.compiled import StaticCache, StaticPasses
from nextblock.decoding.events import Event, Prefilled, Stats
from nextblock.decoding.head import Head, Processor
from nextblock.decoding.masks import Masks
from nextblock.decoding.options import DecodingConfig
from nextblock.decoding.rows import Row
from nextblock.decoding.sampling import on_device
from nextblock.model.costs import NOMINAL, Costs
from nextblock.model.decoder import Decoder


class Batch:
    """Rows decoded together, in the order of their cache: `rows` holds those that are not finished.

    head: from hidden states to tokens. masks: what a pass sees. cache: its keys and values. costs: of its passes.
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
        costs: Costs = NOMINAL,
    ) -> None:
        self.decoder, self.device = decoder, decoder.device
        self.mask_token_id = -1 if settings is None else settings.mask_token_id  # ar mode alone goes without
        self.shifted = settings is None or settings.prediction == "shifted"
        self.block_causal = settings is not None and settings.context == "block_causal"
        self.config = config
        self.block_size = config.block_size or (1 if settings is None else settings.block_size)
        self.rows = list(rows)
        self.stats, self.costs = stats, costs
        self.head = Head(decoder, settings, rows, processor, confidence)
        scratch = 1 if config.mode == "ar" else self.block_size * (config.draft_paths + config.draft_ahead)
        capacity = max(len(row.prompt) + row.limit for row in rows) + scratch
        sizes = len(rows), capacity
        self.cache = SlotCache(*sizes) if passes is None else passes.cache(decoder, *sizes, scratch)
        self.context = decoder.context(min(len(row.prompt) for row in rows))
        self.masks = Masks(decoder, self.cache.capacity, self.context)
        self.max_positions = self.masks.max_positions
        self._joining: list[Batch] = []

    def forward(
        self,
        tokens: Tensor,
        starts: list[int],
        causal: list[bool],
        groups: Groups | None = None,
        prompt: bool = False,
    ) -> Tensor:
        """One pass over Q tokens of every row.

        Args:
            tokens: int64 [B, Q] on the model's device.
            starts: first slot of each row's tokens, and the position of the first one.
            causal: for each row, whether its tokens see up to themselves or the whole Q.
            groups: other positions, and who sees whom, in place of `causal`.
            prompt: whether the tokens are those of prompts; `StaticPasses.can_read` says which a compiled pass reads.
        Returns:
            Final hidden states [B, Q, D].
        """
        self.stats.forwards += 1
        for row in self.rows:
            row.passes += 1
        with running_split(self.decoder.model):
            cache, width = self.cache, tokens.shape[1]
            static = cache if isinstance(cache, StaticCache) and cache.compiled else None
            if static is not None:
                passes, dtype = static.passes, self.decoder.model.dtype
                if not prompt or passes.can_read(tokens, starts[0], dtype):
                    hidden = passes.run(self.decoder, static, self.masks, tokens, starts, causal, groups, prompt)
                    if hidden is not None:
                        return hidden
            view = self.masks.view(starts, width, causal, groups)
            cache.aim(starts, width, view.slots)
            hidden = self.decoder.hidden(tokens, view.position, view.mask, cache, view.noised)
            if prompt and static is not None:
                static.passes.learn(static)
            return hidden

    def read(self, start: int, end: int) -> Tensor:
        """Read the tokens `start` ... `end` - 1 of every prompt in one causal pass: hidden states [B, Q, D]."""
        count = len(self.rows)
        # Padding stands behind the prompt, where no token of it looks, and is overwritten by the answer.
        tokens = torch.tensor([(row.prompt + [0] * (end - len(row.prompt)))[start:end] for row in self.rows])
        hidden = self.forward(tokens.to(self.device), [start] * count, [True] * count, prompt=True)
        self.stats.count("prefill", count)
        return hidden

    def prefill(self, start: int = 0) -> Tensor:
        """Read every prompt in one pass, behind `start` tokens that were read: hidden state of the last ones, [B, D].

        `start` is shorter than each prompt.
        """
        lengths = [len(row.prompt) for row in self.rows]
        hidden = self.read(start, max(lengths))
        return hidden[torch.arange(len(lengths), device=self.device), on_device(lengths, self.device) - 1 - start]

    def begin(self, start: int = 0) -> list[Event]:
        """Read the prompts, as `prefill`. Where the AR head gives the first token of each answer, that is decided."""
        hidden = self.prefill(start)
        events: list[Event] = [Prefilled(row.number, len(row.prompt)) for row in self.rows]
        if self.shifted or self.config.mode != "diffusion":
            events += self.head.next_tokens(hidden, self.rows)
        self.leave()
        return events

    def decide(self, hidden: Tensor) -> list[Event]:
        """Let the AR head decide the next token of each row, by a pass over the last ones: [B, 1, D]."""
        self.stats.count("decode", len(self.rows))
        return [*self.head.next_tokens(hidden[:, 0], self.rows)]

    def known(self) -> tuple[Tensor, list[int]]:
        """The last token of each answer, int64 [B, 1], which is not in the cache yet, and its position."""
        tokens = on_device([[row.answer[-1]] for row in self.rows], self.device)
        return tokens, [len(row.prompt) + len(row.answer) - 1 for row in self.rows]

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

    def join(self, other: Batch) -> None:
        """Let the rows of a batch that has begun go on in this one, from its next step on.

        `other` has the same options and `context`, and is not used again. Each row decides what it would decide
        there, token for token.
        """
        assert not isinstance(self.cache, StaticCache)
        assert self.head.processor is None
        self._joining.append(other)

    @property
    def joining(self) -> list[Row]:
        """Rows that wait for the next step."""
        return [row for other in self._joining for row in other.rows]

    def admit(self) -> list[Row]:
        """Take in the rows that wait. A mode calls this where it has nothing that it must finish first.

        Returns:
            The rows of the next pass, new ones last.
        """
        for other in self._joining:
            self.cache.join(other.cache)
            self.rows += other.rows
        self._joining.clear()
        if self.cache.capacity > self.masks.capacity:
            self.masks = Masks(self.decoder, self.cache.capacity, self.context)
            self.max_positions = self.masks.max_positions
        return self.rows

    def close(self) -> None:
        """Give memory that outlives the batch back, for the next one."""
        self.cache.release()
