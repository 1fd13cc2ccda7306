"""What the tokens of a cached pass see: positions, masks and the places where a draft adapter acts.

Letters: B rows, Q tokens of a pass, S slots up to the last one that the pass writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextblock.attention.groups import Groups
from nextblock.attention.masks import additive, decode_mask
from nextblock.attention.split import can_run_split
from nextblock.decoding.sampling import on_device
from nextblock.model.decoder import AttentionMask, Decoder
from nextblock.model.draft_adapter import Gate


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
    drafting: width -> the groups of `drafts.free_block`, one for all passes, so that they share their templates.
    """

    def __init__(self, decoder: Decoder, capacity: int, max_positions: int | None = None) -> None:
        self.decoder = decoder
        self.capacity = capacity
        self.max_positions = capacity if max_positions is None else max_positions
        self.windows = {k: w if w is not None and w < capacity else None for k, w in decoder.windows.items()}
        self.dtype, self.device = decoder.model.dtype, decoder.device
        self._open = torch.zeros(1, 1, 1, 1, dtype=self.dtype, device=self.device)
        self._skips_masks = can_run_split(decoder.model)
        self._templates: dict[tuple[Any, ...], Tensor] = {}
        self._span = torch.arange(0, device=self.device)
        self.drafting: dict[int, Groups] = {}

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
        end, start = max(starts) + width, starts[0]
        together = all(s == start for s in starts) and all(c == causal[0] for c in causal)
        if groups is not None:
            slots = self.slots(starts, width)
            placed = groups.placed(slots[:, :1])
            if together and groups.kept:
                mask = self._by_kind(lambda window: self._of_groups(groups, start, width, window))
            else:
                seen = placed.seen(slots, end, self.windows.values())
                mask = self._by_kind(lambda window: additive(seen[window].unsqueeze(1), self.dtype))
            return View(placed.position.clamp_max(self.max_positions - 1), mask, placed.gate, slots)
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

        def build(room: int) -> Tensor:
            query = torch.arange(width, device=self.device)
            last = query if causal else torch.full_like(query, width - 1)
            return decode_mask(query[None] + room, last[None] + room, room + width, window)

        return self._slice((width, causal, window), start, width, build)

    def _of_groups(self, groups: Groups, start: int, width: int, window: int | None) -> Tensor:
        """As `aligned`, for groups."""

        def build(room: int) -> Tensor:
            slots = room + torch.arange(width, device=self.device)[None]
            return groups.placed(slots[:, :1]).seen(slots, room + width, [window])[window].unsqueeze(1)

        return self._slice((groups, window), start, width, build)

    def _slice(self, key: tuple[Any, ...], start: int, width: int, build: Callable[[int], Tensor]) -> Tensor:
        """Of a template its part for `start`; `build` gives the mask bool [1, 1, Q, room + Q] behind `room` slots."""
        template = self._templates.get(key)
        if template is None or template.shape[3] < start + width:
            room = min(self.capacity, start + max(64, start // 4))
            # Shifted by the room in front, so that a slice exists for every start.
            template = self._templates[key] = additive(build(room), self.dtype)
        return template.narrow(3, template.shape[3] - width - start, start + width)

    def _by_kind(self, build: Callable[[int | None], Tensor]) -> AttentionMask:
        """One mask for each kind of layer, built once per window."""
        masks = {window: build(window) for window in set(self.windows.values())}
        return self.decoder.by_kind({kind: masks[window] for kind, window in self.windows.items()})
