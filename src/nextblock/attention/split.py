"""Our own attention: the two-view pass in parts, which a CPU computes where a GPU runs FlexAttention, and cached
passes that do not copy keys and values for each query head.

SDPA with one dense mask pays for every pair of [noised ; clean]. Here the queries are taken in pieces, and each piece
attends only to the span of clean keys that some query of it may see; noised queries also attend to their own block.
The partial softmaxes are joined by their log-sum-exps, and the backward pass of each part gets the joint output and
log-sum-exp, which makes its gradients exact (as in ring attention, arXiv 2310.01889).

Letters: B rows, N noised slots, L clean tokens, T queries (N + L, or N), H heads, D head size, W tiles of S slots.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nextblock.attention.masks import additive, to_dense
from nextblock.attention.rule import Places, Rule

SPLIT = "nextblock_sdpa_split"
"""Name of the implementation in transformers; with masks other than a `SplitMask` it gives what `sdpa` gives."""

PIECE = 256
"""Most queries of a piece; below 192 the kernel takes narrower steps, which cost more than is saved."""
TILE = 16
"""Fewest slots of a tile: blocks smaller than this share one."""
GROUPED = ("cpu",)
"""Devices whose kernels take a mask with fewer key than query heads."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Piece(NamedTuple):
    """Some queries of all rows, and the clean keys from the first to the last that any of them sees.

    mask: additive [B, 1, queries, keys]; None: query i sees the keys up to i, for which the kernel skips the others.
    """

    queries: slice
    keys: slice
    mask: Tensor | None

    @property
    def options(self) -> dict[str, Any]:
        """The mask as arguments of the kernel."""
        return {"dropout_p": 0.0, "is_causal": self.mask is None, "attn_mask": self.mask}


class Tiles(NamedTuple):
    """Noised blocks, each padded to the longest, side by side in tiles.

    slot: int64 [B * W * S], the noised slot (counted through all rows) in each place of the tiles; 0 where void.
        None: blocks are of one length, and each slot is in its own place.
    place: int64 [B * N], the place of each noised slot; 0 for padding.
    present: bool [B, 1, N], False for padding, which is in no tile (or, each slot in its own place, sees nothing).
    mask: additive [B * W, 1, S, S].
    """

    slot: Tensor | None
    place: Tensor
    present: Tensor
    mask: Tensor

    def cut(self, x: Tensor) -> Tensor:
        """[B, H, N, ...] of noised slots -> [B * W, H, S, ...]."""
        flat = x.transpose(1, 2).flatten(0, 1)
        flat = flat if self.slot is None else flat.index_select(0, self.slot)
        return flat.unflatten(0, (-1, self.mask.shape[-1])).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        """[B * W, H, S, ...] of tiles -> [B, H, N, ...]; arbitrary at padding."""
        flat = x.transpose(1, 2).flatten(0, 1)
        flat = flat if self.slot is None else flat.index_select(0, self.place)
        return flat.unflatten(0, (len(self.present), -1)).transpose(1, 2)

    def present_only(self, x: Tensor, elsewhere: float) -> Tensor:
        """[B, H, N] or [B, H, N, D] as `join` gives it, with `elsewhere` at padding.

        Nothing is done where each slot is in its own place: there padding is finite, and its gradients are 0.
        """
        if self.slot is None:
            return x
        present = self.present if x.ndim == 3 else self.present.unsqueeze(-1)
        return x.masked_fill(~present, elsewhere)


class SplitMask(Tensor):
    """The rule of a two-view pass in parts. A tensor, bool [1, 1, 1, 1], so that models hand it on as it is.

    clean: L.
    """

    pieces: list[Piece]
    tiles: Tiles
    clean: int

    @staticmethod
    def __new__(cls: type[SplitMask], pieces: list[Piece], tiles: Tiles, clean: int) -> SplitMask:  # noqa: D102
        mask = torch.Tensor._make_wrapper_subclass(cls, (1, 1, 1, 1), dtype=torch.bool)
        mask.pieces, mask.tiles, mask.clean = pieces, tiles, clean
        return mask

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refused: no operation on it means anything."""
        raise TypeError(f"{func} on a SplitMask: only split_attention reads it")


def split_mask(rule: Rule, noised: Places, clean: Places, dtype: torch.dtype, cached: bool = False) -> SplitMask:
    """The rule in parts, for queries [noised ; clean].

    Args:
        noised: [B, N] with N > 0; the slots of a block lie side by side.
        clean: [B, L].
        dtype: of the scores.
        cached: for noised queries alone, behind cached clean keys.
    """
    length, count = noised.view.shape[1], clean.view.shape[1]
    pieces = []
    if not cached:
        causal = torch.ones(count, count, dtype=torch.bool).tril()
        if torch.equal(to_dense(rule, clean), causal.expand(len(clean.view), 1, -1, -1)):
            pieces.append(Piece(slice(length, None), slice(None), None))
        else:
            pieces += _pieces(rule, clean, clean, dtype, length)
    pieces += _pieces(rule, noised, clean, dtype)
    return SplitMask(pieces, _tiles(rule, noised, dtype), count)


def _pieces(rule: Rule, query: Places, key: Places, dtype: torch.dtype, shift: int = 0) -> Iterator[Piece]:
    """The pieces of `query`, whose first is query `shift` of the pass; without those whose queries see no key."""
    for start in range(0, query.view.shape[1], PIECE):
        allowed = to_dense(rule, query.part(start, start + PIECE), key)
        seen = allowed.any(dim=(0, 1, 2)).nonzero()
        if len(seen):
            keys = slice(int(seen[0]), int(seen[-1]) + 1)
            queries = slice(shift + start, shift + start + allowed.shape[2])
            yield Piece(queries, keys, additive(allowed[..., keys], dtype, lowest_score(dtype)))


def lowest_score(dtype: torch.dtype) -> float:
    """What a masked pair scores: no weight after a softmax. Half of the lowest number, so that no narrower dtype
    rounds it to -inf."""
    return torch.finfo(dtype).min / 2


def _tiles(rule: Rule, noised: Places, dtype: torch.dtype) -> Tiles:
    """The noised blocks [B, N] in tiles, with the rule inside each."""
    rows, length = noised.view.shape
    slots = torch.arange(length).expand(rows, -1)
    present = noised.document >= 0
    fields = torch.stack([noised.view, noised.document, noised.block_start])
    begins = torch.ones_like(present)
    begins[:, 1:] = (fields[:, :, 1:] != fields[:, :, :-1]).any(0)
    offset = slots - torch.where(begins, slots, 0).cummax(1).values
    number = begins.cumsum(1) - 1
    longest, blocks = (int(x.masked_fill(~present, 0).max()) + 1 for x in (offset, number))
    size = longest * max(1, TILE // longest)
    width = -(-blocks * longest // size) * size
    row = torch.arange(rows)[:, None]
    place = row * width + number * longest + offset
    slot = torch.zeros(rows, width // size, size, dtype=torch.int64)
    valid = torch.zeros_like(slot, dtype=torch.bool)
    slot.view(-1)[place[present]] = slots[present]
    valid.view(-1)[place[present]] = True
    inside = noised.at(row[:, :, None], slot)
    # A void place holds a copy of the row's first slot; as a query it must not act on that one's keys.
    mask = rule(inside.along(3), inside.along(2)) & valid[:, :, None] & valid[:, :, :, None]
    own_place = width == length and torch.equal(slot.view(rows, -1)[present], slots[present])
    slot = (slot + row[:, :, None] * length).flatten()
    place = place.masked_fill(~present, 0).flatten()
    numbers = additive(mask.flatten(0, 1).unsqueeze(1), dtype, lowest_score(dtype))
    return Tiles(None if own_place else slot, place, present.unsqueeze(1), numbers)


class _TwoViewAttention(torch.autograd.Function):
    """One softmax over clean keys and, for noised queries, over their own block."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        clean_key: Tensor,
        clean_value: Tensor,
        key: Tensor,
        value: Tensor,
        mask: SplitMask,
        scale: float,
    ) -> Tensor:
        """[B, H, T, D] of queries [B, H, T, D], clean keys and values [B, H, L, D], noised ones [B, H, N, D]."""
        noised, tiles, dtype = key.shape[2], mask.tiles, query.dtype
        rows, heads, length, size = query.shape
        wide = torch.promote_types(dtype, torch.float32)
        # With the heads innermost, as the kernel has it.
        out = query.new_zeros(rows, length, heads, size).transpose(1, 2)
        total = query.new_full((rows, length, heads), lowest_score(wide), dtype=wide).transpose(1, 2)
        for piece in mask.pieces:
            queries, keys = piece.queries, piece.keys
            inputs = query[:, :, queries], clean_key[:, :, keys], clean_value[:, :, keys]
            out[:, :, queries], total[:, :, queries] = _flash(*inputs, **piece.options, scale=scale)
        cut = [tiles.cut(x) for x in (query[:, :, :noised], key, value)]
        own, own_total = (tiles.join(x) for x in _flash(*cut, attn_mask=tiles.mask, scale=scale))
        own_total = tiles.present_only(own_total, lowest_score(wide))
        seen, seen_total = out[:, :, :noised], total[:, :, :noised]
        joint = torch.logaddexp(seen_total, own_total)
        share_seen, share_own = ((x - joint).exp_().unsqueeze(-1) for x in (seen_total, own_total))
        seen.mul_(share_seen).add_(own.mul_(share_own))
        seen_total.copy_(joint)
        ctx.save_for_backward(query, clean_key, clean_value, *cut, out, total)
        ctx.mask, ctx.scale, ctx.noised = mask, scale, noised
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Each part's own backward pass, with the joint output and log-sum-exp."""
        query, clean_key, clean_value, *cut, out, total = ctx.saved_tensors
        mask, scale, (grad,) = ctx.mask, ctx.scale, upstream
        tiles, wide, noised = mask.tiles, total.dtype, ctx.noised
        grad_query = torch.zeros_like(query, dtype=wide)
        grad_clean: list[Tensor] = []
        for piece in mask.pieces:
            queries, keys = piece.queries, piece.keys
            own = [x[:, :, queries] for x in (grad, query)]
            seen = [x[:, :, keys] for x in (clean_key, clean_value)]
            joint = [x[:, :, queries] for x in (out, total)]
            parts = _flash_backward(*own, *seen, *joint, **piece.options, scale=scale)
            grad_query[:, :, queries] = parts[0]
            if not grad_clean and parts[1].shape == clean_key.shape:
                grad_clean = [part.to(wide) for part in parts[1:]]
                continue
            grad_clean = grad_clean or [torch.zeros_like(x, dtype=wide) for x in (clean_key, clean_value)]
            for whole, part in zip(grad_clean, parts[1:], strict=True):
                whole[:, :, keys] += part
        own = [tiles.cut(x[:, :, :noised]) for x in (grad, out, total)]
        parts = _flash_backward(own[0], *cut, *own[1:], 0.0, False, attn_mask=tiles.mask, scale=scale)
        own_query, grad_key, grad_value = (tiles.present_only(tiles.join(x), 0.0) for x in parts)
        grad_query[:, :, :noised] += own_query
        grad_clean = grad_clean or [torch.zeros_like(x) for x in (clean_key, clean_value)]
        grads = (x.to(query.dtype) for x in (grad_query, *grad_clean))
        return *grads, grad_key, grad_value, None, None


def split_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [B, T, H, D] of queries [B, H, T, D].

    Keys and values [B, H', N + L, D]: in the order of the queries or, where only noised queries pass, clean before
    noised.

    Raises:
        ValueError: what the parts cannot do: dropout, a soft cap, sinks, biases of positions.
    """
    if not isinstance(attention_mask, SplitMask):
        return _grouped_attention(module, query, key, value, attention_mask, dropout, scaling, **options)
    if dropout or any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError("attention in parts takes no dropout, soft cap, sinks or position bias")
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    dtype = query.dtype
    # The CPU's kernel takes three times as long to go back through bfloat16.
    query, key, value = (x.to(torch.promote_types(dtype, torch.float32)) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    clean = attention_mask.clean
    noised = key.shape[2] - clean
    if query.shape[2] == noised:
        clean_key, key = key.split([clean, noised], dim=2)
        clean_value, value = value.split([clean, noised], dim=2)
    else:
        key, clean_key = key.split([noised, clean], dim=2)
        value, clean_value = value.split([noised, clean], dim=2)
    out: Any = _TwoViewAttention.apply(query, clean_key, clean_value, key, value, attention_mask, scale)
    return out.transpose(1, 2).to(dtype).contiguous(), None


def _grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers' `sdpa`, which copies keys and values for each query head wherever there is a mask."""
    if attention_mask is not None and attention_mask.shape[-2:] == (1, 1):
        # One number for all keys of a query changes nothing.
        return sdpa_attention_forward(
            module, query, key, value, None, dropout, scaling, **{**options, "is_causal": False}
        )
    groups = query.shape[1] // key.shape[1]
    other = any(options.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    if attention_mask is None or groups == 1 or attention_mask.shape[1] > 1 or other:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    width, native = query.shape[2], query.device.type in GROUPED
    if not native:  # the heads of a group become queries of one head
        query = query.unflatten(1, (-1, groups)).flatten(2, 3)
        attention_mask = attention_mask.expand(-1, -1, width, -1).repeat(1, 1, groups, 1)
    out = scaled_dot_product_attention(
        query, key, value, attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=native
    )
    return out.unflatten(2, (-1, width)).flatten(1, 2).transpose(1, 2).contiguous(), None


class _Switch:
    """The configs that name a model's attention, and how many of its passes run by ours."""

    def __init__(self, model: PreTrainedModel) -> None:
        found = [getattr(module, "config", None) for module in model.modules()]
        self.configs = list({id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values())
        self.before: list[str | None] = []
        self.passes = 0


_switches: WeakKeyDictionary[PreTrainedModel, _Switch] = WeakKeyDictionary()
_lock = threading.Lock()


def can_run_split(model: PreTrainedModel) -> bool:
    """Whether `running_split` has an effect: attention that takes, or for a while can take, dense masks by SDPA."""
    return model.config._attn_implementation in (SPLIT, "sdpa", "flex_attention") and (
        model._can_set_attn_implementation()
    )


@contextmanager
def running_split(model: PreTrainedModel) -> Iterator[None]:
    """Let a cached pass attend by `split_attention`: SDPA that copies less, and FlexAttention takes no dense masks.

    For the pass alone, and counted: other streams and threads that decode the model, and whoever trains it between
    two passes, find what they need.
    """
    with _lock:
        if model not in _switches:
            _switches[model] = _Switch(model)
        switch = _switches[model]
        if not switch.passes:
            switch.before = [config._attn_implementation for config in switch.configs]
            if can_run_split(model):
                for config, before in zip(switch.configs, switch.before, strict=True):
                    if before in ("sdpa", "flex_attention"):
                        config._attn_implementation_internal = SPLIT
        switch.passes += 1
    try:
        yield
    finally:
        with _lock:
            switch.passes -= 1
            if not switch.passes:
                for config, before in zip(switch.configs, switch.before, strict=True):
                    config._attn_implementation_internal = before


AttentionInterface.register(SPLIT, split_attention)
AttentionMaskInterface.register(SPLIT, sdpa_mask)
