"""Passes whose shapes do not change: compiled, and on CUDA replayed as CUDA graphs.

A recorded graph reads and writes the same addresses in the same shapes each time. So here a pass sees slots that
nothing is in, under a mask; rows, tokens and slots are rounded up to a few sizes, each compiled once; and the
cache's memory outlives the batch. Prompts come in every length: on a CPU, where one compiled pass can serve all, short
ones are read by it, elsewhere and behind `LONG` by ordinary passes.

Letters: B rows, Q tokens of a pass, H key-value heads, C slots, D hidden or head size; B and Q rounded up.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nextblock.attention.cache import SlotCache
from nextblock.attention.groups import Groups
from nextblock.attention.masks import decode_mask
from nextblock.decoding.masks import Masks
from nextblock.decoding.sampling import on_device
from nextblock.model.costs import rounded_capacity, rounded_rows, rounded_width
from nextblock.model.decoder import Decoder
from nextblock.model.draft_adapter import Gate

LIMITS = {"recompile_limit": 256, "accumulated_recompile_limit": 256}
"""Shapes that may be compiled; torch stops at 8."""

LONG = 512
"""Most tokens of a prompt that a compiled pass reads: its mask is dense, and arithmetic is soon all that counts."""
LEAST_SEEN = {"cpu": 256}
"""Fewest slots that a compiled pass sees, by kind of device. More elsewhere, where each size costs a long compilation
and keys that a mask hides cost less than weights."""

_lock = threading.Lock()
cuda_graphs = partial(torch.compile, mode="reduce-overhead", fullgraph=True, dynamic=False)


class StaticPasses:
    """Compiled passes of one model, and the memory of the cache that they are compiled for.

    failed: a pass could not be compiled; from then on all are ordinary ones. Memory that ran out is no such failure.
    """

    def __init__(self, compiler: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = cuda_graphs) -> None:
        self.failed = False
        self._reads = True
        self._pass = compiler(_pass)
        self._user: weakref.ref[StaticCache] | None = None
        self._memory: dict[tuple[int, str], Tensor] = {}
        self._slots: dict[tuple[int, str, int, int], Tensor] = {}
        self._compiled: set[tuple[Any, ...]] = set()

    def cache(self, rows: int, capacity: int, widest: int) -> SlotCache:
        """A cache of at least `capacity` slots for a new batch whose passes have at most `widest` tokens.

        An ordinary one, after a warning, while another batch has the memory, as when two streams are read in turns.
        """
        if self.failed:
            return SlotCache(rows, capacity)
        with _lock:
            user = self._user and self._user()
            if user is None or not user.rows:
                cache = StaticCache(self, rows, rounded_capacity(capacity + rounded_width(widest)))
                self._user = weakref.ref(cache)
                return cache
        warnings.warn(
            "another call on this model is not at its end: this one goes without torch.compile; read streams to "
            "their end, or close them",
            stacklevel=2,
        )
        return SlotCache(rows, capacity)

    def release(self, cache: StaticCache) -> None:
        """Let the next batch have the memory of this cache, which is not used again."""
        cache.compiled = False
        with _lock:
            if self._user is not None and self._user() is cache:
                self._user = None

    def allocate(self, layer: int, part: str, rows: int, capacity: int, states: Tensor) -> Tensor:
        """Zeros [rows, H, capacity, D] for what is like `states` [..., H, _, D], in memory that is used again."""
        key, (_, heads, _, size) = (layer, part), states.shape
        count, memory = rows * heads * capacity * size, self._memory.get(key)
        if memory is None or len(memory) < count or (memory.dtype, memory.device) != (states.dtype, states.device):
            self._slots = {k: slots for k, slots in self._slots.items() if k[:2] != key}
            self._memory.pop(key, None)
            self._compiled.clear()
            with torch.inference_mode(False):  # so that it can be written in any mode
                self._memory[key] = torch.empty(count, dtype=states.dtype, device=states.device)
        return self.slots(layer, part, rows, (heads, capacity, size)).zero_()

    def slots(self, layer: int, part: str, rows: int, shape: Sequence[int]) -> Tensor:
        """The memory as `[rows, *shape]`: for equal arguments the same tensor, which compiled passes know again.

        Fewer rows are the first ones of more, so a batch that shrinks finds its rows where they were.
        """
        heads, capacity, size = shape
        key = (layer, part, rows, capacity)
        if key not in self._slots:
            with torch.inference_mode(False):
                slots = self._memory[layer, part][: rows * heads * capacity * size].view(rows, *shape)
            torch._dynamo.mark_static_address(slots)  # else CUDA graphs would copy it, or not be made at all
            self._slots[key] = slots
        return self._slots[key]

    def can_read(self, cache: StaticCache, width: int, start: int) -> bool:
        """Whether prompts of `width` tokens can be read by a compiled pass into slots `start` on.

        What a layer keeps is known from an earlier batch.
        """
        rows, like = cache.rows, {key[:2]: slots for key, slots in self._slots.items()}
        alike = rounded_rows(rows) == rows and start == 0 and 1 < width <= LONG and not len(cache)
        if not (alike and self._reads and like and next(iter(like.values())).device.type == "cpu"):
            return False
        for (layer, part), slots in sorted(like.items()):
            (cache.keys if part == "keys" else cache.values).append(cache.allocate(layer, part, slots))
        return True

    def run(
        self,
        decoder: Decoder,
        cache: StaticCache,
        masks: Masks,
        tokens: Tensor,
        starts: list[int],
        causal: list[bool],
        groups: Groups | None = None,
        prompt: bool = False,
    ) -> Tensor | None:
        """One pass, as `Batch.forward` describes it; `prompt`: as `can_read` allows it.

        Returns:
            Final hidden states [B, Q, D], or None if the pass could not be compiled.
        """
        (rows, width), device = tokens.shape, tokens.device
        shape, end = (rounded_rows(rows), width if prompt else rounded_width(width)), max(starts) + width
        # The last slot that all tokens of a row see; -1: each sees up to itself.
        last = [-1 if alone else start + width - 1 for start, alone in zip(starts, causal, strict=True)]
        lines = [*zip(starts, last, strict=True), *[(0, -1)] * (shape[0] - rows)]
        lines = on_device(lines, device)
        cache.aim_static(shape[0], end, 0 if prompt else self._seen(cache, end, device))
        noised: Gate | None = None if any(causal) and not all(causal) else not all(causal)
        position = seen = None
        if groups is not None:
            slots = masks.slots(starts, width)
            groups = groups.placed(slots[:, :1])
            noised, position = groups.gate, _filled_up(groups.position, shape)
            found = groups.seen(slots, end, masks.windows.values())
            seen = {window: _filled_up(part, (*shape, cache.seen)) for window, part in found.items()}
        opens_at = None
        if decoder.adapter is None:
            noised = False
        elif isinstance(noised, Tensor):
            opens_at, noised = decoder.adapter.first_open(noised), _filled_up(noised, shape)
        windows, max_positions = dict(masks.windows), masks.max_positions
        acts = "by token" if isinstance(noised, Tensor) else noised
        seen_as = shape[0], cache.seen and shape[1], cache.seen, cache.capacity
        key = (*seen_as, *windows.values(), max_positions, acts, opens_at, seen is None)
        try:
            if device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            # Where nothing is to be compiled, the limits need not be looked at: setting them takes 0.1 ms.
            with nullcontext() if key in self._compiled else torch._dynamo.config.patch(LIMITS):
                filled = _filled_up(tokens, shape)
                if prompt:
                    torch._dynamo.mark_dynamic(filled, 1)
                gate = (noised, opens_at)
                hidden = self._pass(decoder, cache, filled, lines, position, seen, gate, windows, max_positions)
            self._compiled.add(key)
        except Exception as error:  # of many kinds; what is no fault of the compiler comes again in the ordinary pass
            cache.target, self._reads = None, self._reads and not prompt
            if not prompt:
                self._fail(error, cache, decoder.model.config.model_type)
            return None
        return hidden[:rows, :width].clone()  # the next replay writes where `hidden` is

    def _seen(self, cache: StaticCache, end: int, device: torch.device) -> int:
        return min(cache.capacity, rounded_capacity(max(end, LEAST_SEEN.get(device.type, 1024))))

    def _fail(self, error: Exception, cache: StaticCache, kind: str) -> None:
        """Let the batch of `cache` go on with ordinary passes, and all later ones unless memory ran out; warn."""
        cause = getattr(error, "inner_exception", error)  # what the compiler stumbled over
        self.failed = not isinstance(cause, torch.OutOfMemoryError)
        self.release(cache)
        self._memory.clear()  # this batch keeps its own until it ends
        self._slots.clear()
        self._compiled.clear()
        reason = str(error).strip().splitlines() or [type(error).__name__]
        until = "" if self.failed else " to the end of this call"
        warnings.warn(f"decoding of '{kind}' goes on without torch.compile{until}: {reason[0]}", stacklevel=3)


class StaticCache(SlotCache):
    """A `SlotCache` in the memory of `StaticPasses`; a static pass writes to `target` and sees the first slots.

    compiled: whether passes may still be static ones. seen: how many slots; 0: as many as it has tokens.
    """

    def __init__(self, passes: StaticPasses, rows: int, capacity: int) -> None:
        super().__init__(rows, capacity)
        self.passes = passes
        self.compiled = True
        self.target: Tensor | None = None
        self.seen = self._rounded = 0
        self._layers: list[tuple[Tensor, ...]] = []

    def allocate(self, layer: int, part: str, states: Tensor) -> Tensor:
        """As in `SlotCache`."""
        return self.passes.allocate(layer, part, rounded_rows(self.rows), self.capacity, states)[: self.rows]

    def aim_static(self, rows: int, end: int, seen: int) -> None:
        """Set the rounded number of rows of the next static pass, the end of what it writes, and what it sees."""
        self._end, self.seen = end, seen
        if rows != self._rounded:
            self._rounded, parts = rows, {"keys": self.keys, "values": self.values}
            found = [
                [self.passes.slots(n, part, rows, s.shape[1:]) for n, s in enumerate(of)] for part, of in parts.items()
            ]
            self._layers = list(zip(*found, strict=True))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, H, Q, D] keys and values of one layer; return those of the slots that a static pass sees."""
        if self.target is None:
            return super().update(key_states, value_states, layer_idx)
        keys, values = self._layers[layer_idx]
        row = torch.arange(keys.shape[0], device=keys.device)[:, None]
        keys[row, :, self.target] = key_states.transpose(1, 2)
        values[row, :, self.target] = value_states.transpose(1, 2)
        seen = self.seen or key_states.shape[2]
        return keys.narrow(2, 0, seen), values.narrow(2, 0, seen)


def _pass(
    decoder: Decoder,
    cache: StaticCache,
    tokens: Tensor,
    lines: Tensor,
    position: Tensor | None,
    seen: dict[int | None, Tensor] | None,
    gate: tuple[Gate | None, int | None],
    windows: dict[str, int | None],
    max_positions: int,
) -> Tensor:
    """What is compiled: hidden states [B, Q, D]; `lines` int64 [B, 2] holds each row's `start` and `last`.

    gate: where a draft adapter acts (None: in the rows that `last` gives), and from which position on if known.
    """
    noised, opens_at = gate
    start, last = lines[:, :1], lines[:, 1:]
    slots = start + torch.arange(tokens.shape[1], device=tokens.device)
    if seen is None or position is None:
        position = slots
        # Slots beyond the model's positions are scratch: nobody looks there.
        visible = torch.where(last < 0, slots, last).clamp_max(max_positions - 1)
        masks = {w: decode_mask(slots, visible, cache.seen or tokens.shape[1], w) for w in windows.values()}
    else:
        masks = {w: part.unsqueeze(1) for w, part in seen.items()}
    if noised is None:
        noised = (last >= 0).expand_as(tokens)
    masks = {w: decoder.prepare_dense(mask) for w, mask in masks.items()}
    mask = decoder.by_kind({kind: masks[w] for kind, w in windows.items()})
    cache.target = slots
    hidden = decoder.hidden(tokens, position.clamp_max(max_positions - 1), mask, cache, noised, opens_at)
    cache.target = None  # what a compiled function leaves behind is one more output
    return hidden


def _filled_up(part: Tensor, shape: Sequence[int]) -> Tensor:
    """A copy with zeros behind the end of each dimension, always of the same strides."""
    whole = part.new_zeros(shape)
    whole[tuple(slice(size) for size in part.shape)] = part
    return whole
