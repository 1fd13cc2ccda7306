"""A key-value cache whose slots are positions: slot j of a row holds the token at position j of that row.

So denoising can write into the slots behind the committed tokens and simply be overwritten by the next pass,
rejected drafts are dropped by counting less far, and rows of unequal length live side by side without padding
between them. Nothing is concatenated, copied at a step, or computed twice.

Letters: B rows, H key-value heads, C slots, Q new tokens, D head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache


class SlotCache(Cache):
    """Keys and values, [B, H, C, D] per layer, written at each row's own positions.

    C grows with what is written, a quarter at a time, up to `capacity`; rows that left take no part in it.
    `aim` says where the next forward pass writes; transformers then calls `update` once per layer.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__(layers=[])
        self.rows = rows
        self.capacity = capacity
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._start: int | None = 0
        self._slots: Tensor | None = None
        self._end = 0

    def __len__(self) -> int:
        """How many layers have been allocated."""
        return len(self.keys)

    def aim(self, starts: list[int], width: int, slots: Tensor | None = None) -> None:
        """Set where the next pass of `width` tokens per row writes.

        Args:
            starts: first slot of each row.
            width: Q.
            slots: int64 [B, Q], the slots to write, where they are not `starts[i] ... starts[i] + Q - 1`
                of equal starts; needed only if the starts differ.
        """
        aligned = all(start == starts[0] for start in starts)
        self._start = starts[0] if aligned else None
        self._slots = None if aligned or slots is None else slots[:, None, :, None]
        self._end = max(starts) + width

    @property
    def end(self) -> int:
        """Slots that the next pass sees: up to the last one written by any row."""
        return self._end

    def allocate(self, layer: int, part: str, states: Tensor) -> Tensor:
        """Zeros [B, H, C, D] for a layer's "keys" or "values" like `states` [B, H, _, D]; C is `end` or more."""
        rows, heads, _, size = states.shape
        return states.new_zeros(rows, heads, self._room(), size)

    def _room(self) -> int:
        return min(self.capacity, self._end + max(64, self._end // 4))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, H, Q, D] keys and values of one layer; return those of slots 0 .. `end` - 1."""
        while len(self.keys) <= layer_idx:
            self.keys.append(self.allocate(len(self.keys), "keys", key_states))
            self.values.append(self.allocate(len(self.values), "values", value_states))
        views = []
        for part, store, states in (("keys", self.keys, key_states), ("values", self.values, value_states)):
            slots = store[layer_idx]
            if slots.shape[2] < self._end:
                written, slots = slots, self.allocate(layer_idx, part, states)
                slots[:, :, : written.shape[2]] = written
                store[layer_idx] = slots
            if self._start is not None:
                slots.narrow(2, self._start, states.shape[2]).copy_(states)
            else:
                assert self._slots is not None
                slots.scatter_(2, self._slots.expand_as(states), states)
            views.append(slots.narrow(2, 0, self._end))
        return views[0], views[1]

    def move(self, row: int, source: int, target: int, count: int) -> None:
        """Put what a row has in `count` slots from `source` on into those from `target` on; they do not overlap."""
        for slots in (*self.keys, *self.values):
            slots[row, :, target : target + count] = slots[row, :, source : source + count]

    def drop(self, row: int) -> None:
        """Take a row out: the last row moves into its place, and the batch is one shorter."""
        last = self.rows - 1
        for store in (self.keys, self.values):
            for layer, slots in enumerate(store):
                if row != last:
                    slots[row, :, : self._end] = slots[last, :, : self._end]
                store[layer] = slots[:last]
        self.rows = last

    def join(self, other: SlotCache) -> None:
        """Take in the rows of another cache of this model, behind those that are here; `other` is not used again.

        C becomes what the rows need now, so that slots of long rows that left are given back.
        """
        self.capacity, self._end = max(self.capacity, other.capacity), max(self._end, other._end)
        for store, added in ((self.keys, other.keys), (self.values, other.values)):
            for layer, (old, new) in enumerate(zip(store, added, strict=True)):
                slots = new.new_zeros(self.rows + other.rows, new.shape[1], self._room(), new.shape[3])
                for part, rows in ((old, slots[: self.rows]), (new, slots[self.rows :])):
                    width = min(self._end, part.shape[2])
                    rows[:, :, :width] = part[:, :, :width]
                store[layer] = slots
        self.rows += other.rows

    def release(self) -> None:
        """Give memory that outlives the cache back: here there is none."""

    # What transformers asks when it builds a mask itself (`attention_mask=None`).

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots before the next write; rows of unequal length always bring their own mask."""
        return self._start or 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next pass's first token."""
        return self._start or 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(slots that the keys span, slot of the first)."""
        return self._end, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Slots that there can be."""
        return self.capacity
