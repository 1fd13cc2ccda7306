"""From hidden states to tokens: the AR head's logits, what is drawn from, the choice and how sure the model is.

Letters: B rows, D hidden size, V vocabulary, N positions whose logits are read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from nextblock.config.sections import BlockDiffusionSettings
from nextblock.decoding.events import Event, Top
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
        rows: Sequence[Row],
        processor: Processor | None = None,
        tells_confidence: bool = True,
    ) -> None:
        self.decoder, self.device = decoder, decoder.device
        self.mask_token_id = None if settings is None else settings.mask_token_id
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

    def distribution(self, logits: Tensor, rows: Sequence[Row]) -> Tensor | None:
        """What is drawn from: probabilities [N, V] after temperature, top-k and top-p; None when all are greedy.

        A greedy row among others has all of it at its likeliest token, so that a draw, and a draft's check by
        rejection sampling, do what greedy decoding does.

        Args:
            rows: that of each of the N places.
        """
        kinds = {row.sampling for row in rows}
        if not any(kind.temperature for kind in kinds):
            return None
        if len(kinds) == 1:
            return filter_logits(logits, *kinds.pop()).softmax(-1)
        temperature, top_k, top_p = zip(*(row.sampling for row in rows), strict=True)
        found = filter_logits(logits, [t or 1.0 for t in temperature], top_k, top_p).softmax(-1)
        if all(temperature):
            return found
        certain = torch.zeros_like(found).scatter_(1, logits.argmax(-1, keepdim=True), 1)
        return torch.where(on_device(temperature, self.device)[:, None] > 0, found, certain)

    def choose(
        self, logits: Tensor, uniform: list[float], rows: Sequence[Row] = (), distribution: Tensor | None = None
    ) -> Tensor:
        """Pick a token at each place, greedily (the likeliest, the lowest id of equals) or by a draw: int64 [N].

        Args:
            logits: [N, V], unfiltered.
            uniform: N numbers in [0, 1); not read when all are greedy.
            rows: that of each of the N places; none: all are greedy.
            distribution: that of `logits`, if it is known already.
        """
        distribution = self.distribution(logits, rows) if distribution is None else distribution
        if distribution is None:
            return logits.argmax(-1)
        return draw(distribution, on_device(uniform, self.device, torch.float64))

    def tops(self, logits: Tensor, rows: Sequence[Row]) -> list[Top]:
        """For each place of unfiltered logits [N, V] the likeliest tokens, as many as its row asks for."""
        most = max((row.top for row in rows), default=0)
        if not most:
            return [()] * len(logits)
        found = logits.log_softmax(-1).topk(most)
        told = zip(rows, found.indices.tolist(), found.values.tolist(), strict=True)
        return [tuple(zip(tokens, values, strict=True))[: row.top] for row, tokens, values in told]

    def confidence(self, logits: Tensor, token: Tensor) -> Tensor:
        """The model's probabilities of tokens int64 [...] by unfiltered logits [..., V], before temperature, top-k and
        top-p, which say how to draw, not how sure the model is. nan where nobody reads them.
        """
        if self.tells_confidence:
            return probability_of(logits, token)
        return torch.full(token.shape, torch.nan, device=token.device)

    def next_tokens(self, hidden: Tensor, rows: Sequence[Row]) -> Iterator[Event]:
        """Decide the next token of each row by `hidden` [B, D]; token and confidence come to the host in one copy."""
        logits = self.processed(self.logits(hidden), [(row, row.answer) for row in rows])
        token = self.choose(logits, [u for row in rows for u in row.draw(1)], rows)
        if self.tells_confidence:
            tokens, confidence = torch.stack([token.double(), self.confidence(logits, token).double()]).tolist()
        else:
            tokens, confidence = token.tolist(), [math.nan] * len(token)
        for row, token, sure, top in zip(rows, tokens, confidence, self.tops(logits, rows), strict=True):
            yield from row.extend([int(token)], [sure], [top])
