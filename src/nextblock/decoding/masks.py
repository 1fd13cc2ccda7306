"""What the tokens of a cached pass see: positions, masks and the places where a draft adapter acts.

Letters: B rows, Q tokens of a pass, S slots up to the last one that the pass writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nextblock.attention.masks import additive, decode_mask
from nextblock.attention.split import can_run_split
from nextblock.decoding.sampling import on_device
from nextblock.model.decoder import AttentionMask, Decoder
from nextblock.model.draft_adapter import Gate


@dataclass(frozen=True)
class Groups:
    """Tokens of a pass in groups that share a context and do not see each other; tensors int64 [B, Q].

    position: of each token.
    context: last slot that it sees of what belongs to no group.
    group: its group; -1: none.
    noised: whether groups are blocks being denoised: a token then sees all of its group, else that up to itself.
    """

    position: Tensor
    context: Tensor
    group: Tensor
    noised: bool

    @property
    def gate(self) -> Gate:
        """Where a draft adapter acts."""
        return self.group >= 0 if self.noised else False

    def seen(self, slots: Tensor, end: int, windows: Iterable[int | None]) -> dict[int | None, Tensor]:
        """Window of a layer -> what each token sees, bool [B, Q, `end`]; `slots` int64 [B, Q]: where they are."""
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


class View(NamedTuple):
    """What a pass is told beside its tokens.

    position: int64 [B, Q].
    mask: as `Decoder.hidden` takes it; None: plain causal.
    noised: where a draft adapter acts.
    slots: int64 [B, Q], where the cache is written; None: at the positions of rows that stand together.
    """

    position: Tensor
    mask: AttentionMask | None
    noised: Gate
    slots: Tensor | None


class Masks:
    """The views of a batch's passes. Masks are additive: 0 where a query may look, the dtype's lowest elsewhere.

    Where all rows stand at the same position a mask is a slice of a template that is seldom made anew.

    windows: kind of layer -> its sliding window where that is smaller than the cache, else None.
    """

    def __init__(self, decoder: Decoder, capacity: int, max_positions: int | None = None) -> None:
        self.decoder = decoder
        self.capacity = capacity
        self.max_positions = capacity if max_positions is None else max_positions
        self.windows = {k: w if w is not None and w < capacity else None for k, w in decoder.windows.items()}
        self.dtype, self.device = decoder.model.dtype, decoder.device
        self._open = torch.zeros(1, 1, 1, 1, dtype=self.dtype, device=self.device)
        self._skips_masks = can_run_split(decoder.model)
        self._templates: dict[tuple[int, bool, int | None], Tensor] = {}
        self._span = torch.arange(0, device=self.device)

    def span(self, count: int) -> Tensor:
        """0 ... `count` - 1, int64."""
        if len(self._span) < count:
            self._span = torch.arange(2 * count, device=self.device)
        return self._span[:count]

    def slots(self, starts: list[int], width: int) -> Tensor:
        """int64 [B, Q]: each row's slots from its start on."""
        return on_device(starts, self.device)[:, None] + self.span(width)

    def view(self, starts: list[int], width: int, causal: list[bool], groups: Groups | None) -> View:
        """What a pass of `width` tokens a row is told; arguments as in `Batch.forward`."""
        end = max(starts) + width
        if groups is not None:
            slots = self.slots(starts, width)
            seen = groups.seen(slots, end, self.windows.values())
            mask = self._by_kind(lambda window: additive(seen[window].unsqueeze(1), self.dtype))
            return View(groups.position.clamp_max(self.max_positions - 1), mask, groups.gate, slots)
        start, together = starts[0], all(s == starts[0] for s in starts) and all(c == causal[0] for c in causal)
        if together and end <= self.max_positions:
            position = self.span(end)[start:].unsqueeze(0).expand(len(starts), -1)
            return View(position, self._together(start, width, causal[0]), not causal[0], None)
        slots = self.slots(starts, width)
        is_causal = on_device(causal, self.device)[:, None]
        # Slots beyond the model's positions are scratch: nobody looks there.
        last = torch.where(is_causal, slots, slots[:, -1:]).clamp_max(self.max_positions - 1)
        mask = self._by_kind(lambda window: additive(decode_mask(slots, last, end, window), self.dtype))
        noised = ~is_causal.expand(-1, width) if any(causal) else True
        return View(slots.clamp_max(self.max_positions - 1), mask, False if all(causal) else noised, slots)

    def _together(self, start: int, width: int, causal: bool) -> AttentionMask | None:
        """None where transformers makes plain causal attention of it by itself, without or with a cheap mask."""
        causal = causal and width > 1
        if start == 0 and causal:
            return None

        def build(window: int | None) -> Tensor:
            sees_all = not causal and (window is None or start + width <= window)
            return self._open if sees_all and self._skips_masks else self.aligned(start, width, causal, window)

        return self._by_kind(build)

    def aligned(self, start: int, width: int, causal: bool, window: int | None) -> Tensor:
        """Every row's queries at `start` ... `start + width - 1`: [1, 1, Q, S] with S = start + width.

        Args:
            causal: each query sees up to itself; else up to the last query (a block being denoised).
            window: sliding window of the layer.
        """
        key = (width, causal, window)
        template = self._templates.get(key)
        if template is None or template.shape[3] < start + width:
            room = min(self.capacity, start + max(64, start // 4))
            query = torch.arange(width, device=self.device)
            last = query if causal else torch.full_like(query, width - 1)
            # Shifted by the room in front, so that a slice exists for every start.
            allowed = decode_mask(query[None] + room, last[None] + room, room + width, window)
            template = self._templates[key] = additive(allowed, self.dtype)
        return template.narrow(3, template.shape[3] - width - start, start + width)

    def _by_kind(self, build: Callable[[int | None], Tensor]) -> AttentionMask:
        """One mask for each kind of layer, built once per window."""
        masks = {window: build(window) for window in set(self.windows.values())}
        return self.decoder.by_kind({kind: masks[window] for kind, window in self.windows.items()})
