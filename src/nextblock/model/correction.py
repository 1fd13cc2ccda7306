"""A correction head: what the token before a draft tells about it.

Drafts are predicted side by side, so each is blind to its neighbour's choice. The head adds to the logits of the
likeliest candidates of a place a low-rank bias that depends on the token chosen before it.

Letters: B rows, k drafts of each, N places, V vocabulary, c candidates, r rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nextblock.config.sections import CorrectionConfig


class Correction(nn.Module):
    """logits'(v) = logits(v) + <P[previous], F[v]> for the c likeliest v, others as they are; nothing before training.

    previous, following: P and F, [V, r].
    """

    def __init__(self, vocabulary: int, config: CorrectionConfig, device: torch.device | None = None) -> None:
        super().__init__()
        self.config = config
        self.previous = nn.Parameter(torch.randn(vocabulary, config.rank, device=device))
        self.following = nn.Parameter(torch.zeros(vocabulary, config.rank, device=device))

    def forward(self, logits: Tensor, previous: Tensor) -> Tensor:
        """Corrected logits [N, V] of places behind the tokens int64 [N] `previous`."""
        likeliest = logits.detach().topk(min(self.config.candidates, logits.shape[-1])).indices
        bias = torch.einsum("nr,ncr->nc", self.previous[previous], self.following[likeliest])
        return logits.scatter_add(-1, likeliest, bias.to(logits.dtype))

    def in_order(
        self, logits: Tensor, previous: Tensor, choose: Callable[[int, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Each row's places from the first to the last: corrected logits [B, k, V] and tokens int64 [B, k].

        Args:
            logits: [B, k, V].
            previous: int64 [B], the token before the first place.
            choose: (number of the place, its corrected logits [B, V]) -> the tokens chosen there, int64 [B], which
                correct the next place.
        """
        corrected, tokens = torch.empty_like(logits), previous.new_empty(logits.shape[:2])
        for number, own in enumerate(logits.unbind(1)):
            corrected[:, number] = own = self(own, previous)
            tokens[:, number] = previous = choose(number, own)
        return corrected, tokens
