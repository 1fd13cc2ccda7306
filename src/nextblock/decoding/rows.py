"""One prompt and its growing answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from nextblock.decoding.events import Committed, Event, Finish, RowFinished, Top
from nextblock.decoding.sampling import GREEDY, ONE_A_STEP, Denoising, Sampling, uniforms
from nextblock.model.costs import Pause, Share


@dataclass
class Row:
    """One prompt and its answer.

    number: index in the caller's batch.
    prompt: token ids, at least one.
    limit: most tokens in the answer.
    end_tokens: ids that end the answer.
    stop: called with the answer after each token; a reason ends it there.
    random: stream of uniform numbers, None when greedy. sampling: how it draws. denoising: diffusion mode.
    draft_length: as in `DecodingConfig`. free: what it draws may depend on other rows and on the machine.
    top: likeliest tokens that `Committed` tells of.
    padding: ids in front of the prompt that logits processors expect to see (left-padded input).
    share: speculative mode: what was kept lately of its drafts. pause: when sampling, from drafting.
    """

    number: int
    prompt: list[int]
    limit: int
    end_tokens: frozenset[int] = frozenset()
    stop: Callable[[list[int]], Finish | None] | None = None
    random: torch.Generator | None = None
    sampling: Sampling = GREEDY
    denoising: Denoising = ONE_A_STEP
    draft_length: int | Literal["auto"] | None = None
    free: bool = False
    top: int = 0
    padding: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    passes: int = 0
    finish: Finish | None = None
    share: Share = field(default_factory=Share)
    pause: Pause = field(default_factory=Pause)
    _numbers: list[float] = field(default_factory=list, repr=False)

    @property
    def paced(self) -> bool:
        """Whether the number of its drafts may depend on the machine and on the rows beside it."""
        return self.draft_length == "auto" and (self.random is None or self.free)

    def ends_at(self, tokens: list[int]) -> int:
        """The index of the first end token, else how many tokens there are."""
        return next((n for n, token in enumerate(tokens) if token in self.end_tokens), len(tokens))

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

    def extend(self, tokens: list[int], confidence: list[float], tops: Sequence[Top] = ()) -> Iterator[Event]:
        """Append decided tokens until the answer ends."""
        for token, sure, top in zip(tokens, confidence, tops or [()] * len(tokens), strict=True):
            offset = len(self.answer)
            done = self.push(token)
            yield Committed(self.number, offset, token, sure, self.passes, top)
            if done:
                yield self.finished()
                return

    def finished(self) -> RowFinished:
        """The event of a row that has a reason to end."""
        assert self.finish is not None
        return RowFinished(self.number, len(self.answer), self.finish)

    def peek(self, count: int) -> list[float]:
        """The next `count` uniform numbers of this row, which are still to come; zeros when greedy."""
        if self.random is None:
            return [0.0] * count
        if (missing := count - len(self._numbers)) > 0:
            self._numbers += uniforms(self.random, missing)
        return self._numbers[:count]

    def draw(self, count: int) -> list[float]:
        """As `peek`, but used up."""
        numbers = self.peek(count)
        del self._numbers[:count]
        return numbers
