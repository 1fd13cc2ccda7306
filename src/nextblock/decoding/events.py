"""What happens while text is made: the one interface under `generate`, live views, streamers and servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["prefill", "decode", "denoise", "check", "commit"]
Top = tuple[tuple[int, float], ...]
Finish = Literal["end_token", "stop_string", "length", "criteria", "cancelled"]


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prompt of `row` is in the cache; `tokens` is its length."""

    row: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Committed:
    """A token was decided, for good.

    offset: its index in the answer; in diffusion mode tokens of a block come in any order.
    confidence: the probability that the model gave it at this pass, before temperature, top-k and top-p.
    step: forward passes that the row has taken part in, this one included.
    top: in ar and speculative mode, as many as the row asks for of the likeliest tokens there, with the logarithms of
        their probabilities, of which the same holds.
    """

    row: int
    offset: int
    token: int
    confidence: float
    step: int
    top: Top = ()


@dataclass(frozen=True, slots=True)
class Rejected:
    """Speculative mode: a drafted token that the check did not keep. It was never part of the answer."""

    row: int
    offset: int
    token: int
    step: int


@dataclass(frozen=True, slots=True)
class BlockFinished:
    """A block is decided (diffusion), or a draft checked (speculative): answer tokens `start` ... `end` - 1.

    path: of several drafted paths the one that was kept; 0: the first, which all others leave.
    """

    row: int
    start: int
    end: int
    path: int = 0


@dataclass(frozen=True, slots=True)
class RowFinished:
    """The row is done and leaves the batch; `tokens` is the length of its answer."""

    row: int
    tokens: int
    reason: Finish


Event = Prefilled | Committed | Rejected | BlockFinished | RowFinished


@dataclass
class Stats:
    """What a call of `generate` cost. Every forward pass counts: prefill, decode (ar), denoise, check, commit.

    rows: prompts in the batch.
    new_tokens: tokens in all answers, end tokens included.
    forwards: calls of the model; rows of a batch share them.
    row_forwards: for each kind, passes times the rows that took part in them.
    drafts, kept: speculative mode: drafted tokens that were checked, and how many of them agreed; of several paths
        those of the longest, and none behind an answer's end.
    seconds: whole call, so far. first_token_seconds: until a token was decided.
    """

    rows: int = 0
    new_tokens: int = 0
    forwards: int = 0
    row_forwards: dict[Kind, int] = field(default_factory=dict)
    drafts: int = 0
    kept: int = 0
    seconds: float = 0.0
    first_token_seconds: float = 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Answer tokens per forward pass that their row took part in, prefill included; at batch 1 per forward."""
        passes = sum(self.row_forwards.values())
        return self.new_tokens / passes if passes else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens per second of the whole call, prefill included."""
        return self.new_tokens / self.seconds if self.seconds else 0.0

    def count(self, kind: Kind, rows: int) -> None:
        """Book `rows` row-passes of one kind."""
        if rows:
            self.row_forwards[kind] = self.row_forwards.get(kind, 0) + rows
