"""Passes whose shapes do not change: compiled, and on CUDA replayed as CUDA graphs.

A recorded graph reads and writes the same addresses in the same shapes each time. So here a pass is given more
slots than are filled, and a mask hides the rest; rows, tokens and slots are rounded up to a few sizes, each compiled
once; and the cache's memory outlives the batch. Prompts come in every length, and are read by ordinary passes; on a
CPU, where a compiled pass can serve any length, `StaticPasses.can_read` says which need none.

Letters: B rows, Q tokens of a pass, H key-value heads, C slots, D hidden or head size; B and Q rounded up.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from types import FunctionType
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

LIMITS = {"recompile_limit": 512, "accumulated_recompile_limit": 512}
"""Shapes that may be compiled; torch stops at 8."""

LONG = 512
"""Most tokens of a prompt that a compiled pass reads: its mask is dense, and arithmetic is soon all that counts."""

Compiler = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


def compiler_of(device: torch.device) -> Compiler:
    """torch.compile with the least work around a pass: on CUDA a graph is replayed, on a CPU the caller is C++ too.

    torch would look before each pass whether any module has changed: `StaticPasses` looks once for each batch.
    """
    least = {"triton.cudagraphs": True} if device.type == "cuda" else {"cpp_wrapper": True}
    options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe, **least}
    return lambda function: torch.compile(function, options=options, fullgraph=True, dynamic=False)


class StaticPasses:
    """Compiled passes of one model, and the memory of the cache that they are compiled for.

    compiler: None: that of the device.

    failed: a pass could not be compiled; from then on all are ordinary ones. Memory that ran out is no such failure.
    reads: likewise, False when a pass that reads prompts could not be compiled; from then on these are ordinary ones.
    """

    _lock = threading.Lock()  # of the class: there when a stream is closed by the end of Python

    def __init__(self, compiler: Compiler | None = None) -> None:
        self.failed, self.reads = False, True
        self._compiler = compiler
        self._passes: dict[tuple[Any, ...], tuple[int, Callable[..., Tensor]]] = {}  # by what the model is made of
        self._user: weakref.ref[StaticCache] | None = None
        self._memory: dict[tuple[int, str], Tensor] = {}
        self._slots: dict[tuple[int, str, int, int], Tensor] = {}
        self._compiled: set[tuple[Any, ...]] = set()
        self._like: list[tuple[Tensor, ...]] = []  # keys and values of each layer, without any slot

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model, or one from a pickle, has passes and memory of its own."""
        return StaticPasses, ()

    def cache(self, decoder: Decoder, rows: int, capacity: int, widest: int) -> SlotCache:
        """A cache of at least `capacity` slots for a new batch of `decoder`, with passes of at most `widest` tokens.

        An ordinary one, after a warning, while another batch has the memory, as when two streams are read in turns.
        """
        if self.failed:
            return SlotCache(rows, capacity)
        with self._lock:
            user = self._user and self._user()
            if user is None or not user.rows:
                cache = StaticCache(self, rows, rounded_capacity(capacity + rounded_width(widest)))
                cache.number, cache.run = self._of(decoder)
                self._user = weakref.ref(cache)
                return cache
        warnings.warn(
            "another call on this model is not at its end: this one goes without torch.compile; read streams to "
            "their end, or close them",
            stacklevel=2,
        )
        return SlotCache(rows, capacity)

    def _of(self, decoder: Decoder) -> tuple[int, Callable[..., Tensor]]:
        """The pass for what the model is made of now, and its number. Each has its own code, which torch compiles."""
        made = made_of(decoder)
        if made not in self._passes:
            own: Any = FunctionType(_pass.__code__.replace(), _pass.__globals__, _pass.__name__)
            compiler = self._compiler or compiler_of(decoder.device)
            self._passes[made] = len(self._passes), compiler(own)
        return self._passes[made]

    def release(self, cache: StaticCache) -> None:
        """Let the next batch have the memory of this cache, which is not used again."""
        cache.compiled = False
        with self._lock:
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

    def learn(self, cache: StaticCache) -> None:
        """Take in what each layer keeps, from a cache to which an ordinary pass has written."""
        pairs = zip(cache.keys, cache.values, strict=True)
        self._like = [tuple(part.new_empty(1, part.shape[1], 0, part.shape[3]) for part in pair) for pair in pairs]

    def can_read(self, tokens: Tensor, start: int, dtype: torch.dtype) -> bool:
        """Whether prompts int64 [B, Q] can be read by a compiled pass into slots `start` on; `dtype`: of the model.

        On a CPU alone, from slot 0 on, 2 to `LONG` tokens, and without rows for filling up. What the layers keep must
        be known, so the first prompts of a model, of another dtype or on another device are read by an ordinary pass.
        """
        (rows, width), device = tokens.shape, tokens.device
        fits = rounded_rows(rows) == rows and start == 0 and 1 < width <= LONG
        known = bool(self._like) and (self._like[0][0].dtype, self._like[0][0].device) == (dtype, device)
        return self.reads and fits and known and device.type == "cpu" and not torch.is_autocast_enabled("cpu")

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
        """One pass, as `Batch.forward` describes it.

        Args:
            prompt: the tokens are those of prompts that `can_read` allows.
        Returns:
            Final hidden states [B, Q, D], or None if the pass could not be compiled.
        """
        (rows, width), device = tokens.shape, tokens.device
        shape, end = (rounded_rows(rows), width if prompt else rounded_width(width)), max(starts) + width
        # The last slot that all tokens of a row see; -1: each sees up to itself.
        last = [-1 if alone else start + width - 1 for start, alone in zip(starts, causal, strict=True)]
        lines = on_device([*zip(starts, last, strict=True), *[(0, -1)] * (shape[0] - rows)], device)
        if prompt:
            cache.fill(self._like)
        # Elsewhere than on a CPU all slots, which makes fewer sizes to compile.
        seen = min(cache.capacity, rounded_capacity(end)) if device.type == "cpu" else cache.capacity
        cache.aim_static(shape[0], end, 0 if prompt else seen)
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
        seen_as = cache.number, shape[0], cache.seen and shape[1], cache.seen, cache.capacity
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
                hidden = cache.run(decoder, cache, filled, lines, position, seen, gate, windows, max_positions)
            self._compiled.add(key)
        except Exception as error:  # of many kinds; what is no fault of the compiler comes again in the ordinary pass
            self._fail(error, cache, decoder.model.config.model_type, prompt)
            return None
        return hidden[:rows, :width].clone()  # the next replay writes where `hidden` is

    def _fail(self, error: Exception, cache: StaticCache, kind: str, prompt: bool) -> None:
        """Let the batch of `cache` go on with ordinary passes, and all later ones unless memory ran out; warn.

        prompt: this is so for passes that read prompts alone.
        """
        cause = getattr(error, "inner_exception", error)  # what the compiler stumbled over
        lasts, cache.target = not isinstance(cause, torch.OutOfMemoryError), None
        if prompt:
            self.reads, what = not lasts, f"prompts of '{kind}' are read"
            cache.empty()
        else:
            self.failed, what = lasts, f"decoding of '{kind}' goes on"
            self._memory.clear()  # this batch keeps its own until it ends
            self._slots.clear()
            self._compiled.clear()
            self.release(cache)
        reason = str(error).strip().splitlines() or [type(error).__name__]
        until = "" if lasts else " in this call" if prompt else " to the end of this call"
        warnings.warn(f"{what} without torch.compile{until}: {reason[0]}", stacklevel=3)


class StaticCache(SlotCache):
    """A `SlotCache` in the memory of `StaticPasses`; a static pass writes to `target`.

    compiled: whether passes may still be static ones.
    number, run: of the pass as `StaticPasses` has it compiled.
    seen: slots that a static pass is given, the first ones; 0: as many as the pass has tokens.
    """

    def __init__(self, passes: StaticPasses, rows: int, capacity: int) -> None:
        super().__init__(rows, capacity)
        self.passes = passes
        self.compiled = True
        self.number, self.run = 0, _pass
        self.target: Tensor | None = None
        self.seen = self._rounded = 0
        self._layers: list[tuple[Tensor, ...]] = []

    def allocate(self, layer: int, part: str, states: Tensor) -> Tensor:
        """As in `SlotCache`."""
        return self.passes.allocate(layer, part, rounded_rows(self.rows), self.capacity, states)[: self.rows]

    def release(self) -> None:
        """Let the next batch have the memory."""
        self.passes.release(self)

    def fill(self, like: list[tuple[Tensor, ...]]) -> None:
        """Allocate all layers; `like`: for each, tensors like its keys and values."""
        for layer, (keys, values) in enumerate(like):
            self.keys.append(self.allocate(layer, "keys", keys))
            self.values.append(self.allocate(layer, "values", values))

    def empty(self) -> None:
        """Forget what is allocated: the pass that was to write to it did not come to its end."""
        self.keys.clear()
        self.values.clear()
        self._rounded = 0

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


def made_of(decoder: Decoder) -> tuple[Any, ...]:
    """What compiled code takes for granted of a model: kinds of modules and of weights, and what else they look at."""
    model, adapter = decoder.model, decoder.adapter
    drafts = adapter and (weakref.ref(adapter), bool(adapter.layers) and adapter.layers[0].merged is not None)
    modules = ((type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules())
    weights = ((w.dtype, w.device, w.shape, w.stride()) for w in chain(model.parameters(), model.buffers()))
    return decoder.attention, drafts, *modules, *weights


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
