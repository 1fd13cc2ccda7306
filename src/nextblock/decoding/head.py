"""From hidden states to tokens: the AR head's logits, what is drawn from, the choice and how sure the model is.

Letters: B rows, D hidden size, V vocabulary, N positions whose logits are read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from nextblock.config.sections import BlockDiffusionSettings
from nextblock.decoding.options import DecodingConfig
from nextblock.decoding.rows import Row
from nextblock.decoding.sampling import draw, filter_logits, on_device, probability_of
from nextblock.model.decoder import Decoder

Processor = Callable[[Tensor, Tensor], Tensor]
"""processor(prefixes int64 [B, T], logits [B, V]) -> logits [B, V], as transformers' logits processors."""


class Head:
    """The head of a batch whose caller gave `rows`. Without `tells_confidence` that of events is nan."""

    def __init__(
        self,
        decoder: Decoder,
        settings: BlockDiffusionSettings | None,
        config: DecodingConfig,
        rows: Sequence[Row],
        processor: Processor | None = None,
        tells_confidence: bool = True,
    ) -> None:
        self.decoder, self.device = decoder, decoder.device
        self.mask_token_id = None if settings is None else settings.mask_token_id
        self.config = config
        self.rows = tuple(rows)
        self.processor = processor
        self.tells_confidence = tells_confidence

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's own float32 logits [N, V] of hidden states [N, D], without the mask token."""
        return self._without_mask(self.decoder.logits(hidden).float())

    def _without_mask(self, logits: Tensor) -> Tensor:
        if self.mask_token_id is not None:  # a draft adapter's lies outside the vocabulary: an empty slice
            logits[:, self.mask_token_id : self.mask_token_id + 1] = -torch.inf
        return logits

    def processed(self, logits: Tensor, prefixes: Iterable[tuple[Row, list[int] | None]]) -> Tensor:
        """Logits [N, V] of next tokens, through the processors, which see each position's own prefix.

        Args:
            prefixes: for each position its row and that row's answer up to there; None where nobody looks. Read
                only if there is a processor.
        """
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
            for row in self.rows:
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
        return draw(distribution, on_device(uniform, self.device, torch.float64))

    def confidence(self, logits: Tensor, token: Tensor) -> Tensor:
        """The model's probabilities of tokens int64 [...] by unfiltered logits [..., V], before temperature, top-k and
        top-p, which say how to draw, not how sure the model is. nan where nobody reads them.
        """
        if self.tells_confidence:
            return probability_of(logits, token)
        return torch.full(token.shape, torch.nan, device=token.device)

    def next_tokens(self, hidden: Tensor, rows: Sequence[Row]) -> tuple[list[int], list[float]]:
        """The next token of each row and its confidence, on the host in one copy; `hidden` [B, D]."""
        logits = self.processed(self.logits(hidden), [(row, row.answer) for row in rows])
        token = self.choose(logits, [u for row in rows for u in row.draw(1)])
        if not self.tells_confidence:
            return token.tolist(), [math.nan] * len(token)
        tokens, confidence = torch.stack([token.double(), self.confidence(logits, token).double()]).tolist()
        return [int(number) for number in tokens], confidence
