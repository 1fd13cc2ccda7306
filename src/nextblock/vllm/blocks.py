"""The block that a request in diffusion mode denoises, and what of it the engine has still to emit.

Letters: N undecided positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nextblock.decoding.options import DecodingConfig
from nextblock.decoding.sampling import commit, draw, filter_logits, probability_of, scores, uniforms


@dataclass
class Request:
    """A request in diffusion mode.

    options: its mode, block and sampler, temperature, top-k and top-p.
    ends: ids that end its answer.
    random: what it draws from; None when greedy.
    planned: decided tokens that follow the first `start` tokens of prompt and answer.
    """

    options: DecodingConfig
    ends: Collection[int]
    random: torch.Generator | None = None
    planned: list[int] = field(default_factory=list)
    start: int = 0

    def pending(self, length: int) -> list[int]:
        """What is to follow a prompt and answer of so many tokens."""
        return self.planned[max(0, length - self.start) :]


class Block:
    """A block that is denoised   (arXiv 2512.06776, section 6.1, and the released sampler).

    tokens: the known one, then those decided, the mask token where there is none yet.
    """

    def __init__(self, request: Request, known: int, mask: int, width: int) -> None:
        self.request, self.tokens = request, [known] + [mask] * (width - 1)
        self._decided = [True] + [False] * (width - 1)
        self._end, self._low, self._steps = width, 0, 0

    def masked(self) -> list[int]:
        """Undecided positions of the sub-block that is denoised now; none: the block is done."""
        options = self.request.options
        width = (options.block_size or len(self.tokens)) // options.sub_blocks
        while self._low < self._end:
            inside = range(self._low, min(self._low + width, self._end))
            if found := [place for place in inside if not self._decided[place]]:
                return found
            self._low, self._steps = self._low + width, 0
        return []

    def decide(self, logits: Tensor) -> None:
        """Decide some of the `masked` positions by what a pass says of them: logits [N, V], without the mask token."""
        options, random = self.request.options, self.request.random
        if random is None:
            token = logits.argmax(-1)
        else:
            kept = filter_logits(logits, options.temperature, options.top_k, options.top_p).softmax(-1)
            token = draw(kept, torch.tensor(uniforms(random, len(logits)), dtype=torch.float64, device=logits.device))
        sure = probability_of(logits, token)
        score = scores(logits, sure, options.sampler).tolist()
        left = None if options.steps is None else options.steps // options.sub_blocks - self._steps
        masked, tokens = self.masked(), token.tolist()
        self._steps += 1
        for choice in commit(
            score, sure.tolist(), sampler=options.sampler, threshold=options.threshold, steps_left=left
        ):
            place = masked[choice]
            self.tokens[place], self._decided[place] = tokens[choice], True
            if tokens[choice] in self.request.ends:
                self._end = min(self._end, place)

    @property
    def decided(self) -> list[int]:
        """The decided tokens behind the known one, up to the first end token."""
        return self.tokens[1 : self._end + 1]
