"""Who sees whom in a pass of cached decoding that holds several continuations of one context.

Letters: B rows, Q tokens of a pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Groups:
    """Tokens of a pass in groups that share a context and do not see each other.

    Tensors int64 [B, Q], or [1, Q] where all rows have the same.

    position: of each token, counted from the row's first slot.
    context: last slot that it sees of what belongs to no group, counted likewise.
    group: its group; -1: none.
    noised: whether groups are blocks being denoised: a token then sees all of its group, else that up to itself.
    kept: whether many passes have these very groups, [1, Q], so that their masks are kept.
    """

    position: Tensor
    context: Tensor
    group: Tensor
    noised: bool
    kept: bool = False

    def placed(self, first: Tensor) -> Groups:
        """The same for rows whose first slots are `first` int64 [B, 1], counted from slot 0."""
        position = first + self.position
        return Groups(position, first + self.context, self.group.expand_as(position), self.noised)

    @property
    def gate(self) -> bool | Tensor:
        """Where a draft adapter acts."""
        return self.group >= 0 if self.noised else False

    def seen(self, slots: Tensor, end: int, windows: Iterable[int | None]) -> dict[int | None, Tensor]:
        """Window of a layer -> what each token of `placed` groups sees, bool [B, Q, `end`]; they are in `slots`."""
        slot = torch.arange(end, device=slots.device).expand(len(slots), -1)
        position = slot.scatter(1, slots, self.position)
        group = torch.full_like(slot, -1).scatter(1, slots, self.group)
        own = (group[:, None] == self.group[:, :, None]) & (self.group >= 0)[:, :, None]
        if not self.noised:
            own = own & (position[:, None] <= self.position[:, :, None])
        seen = own | ((slot[:, None] <= self.context[:, :, None]) & (group < 0)[:, None])
        return {
            w: seen if w is None else seen & (position[:, None] > self.position[:, :, None] - w) for w in set(windows)
        }
