"""The two losses of the parallel pass, as sums and counts; logits exist only where there is a target."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.utils.import_utils import is_liger_kernel_available

from nextblock.attention.rule import Rule
from nextblock.model.decoder import Decoder
from nextblock.recipe.corruption import UNSCORED, TwoView

LOGIT_ELEMENTS = 2**24
"""Logits alive at once in the chunk loop on CPU: 64 MiB in float32. Fewer are as fast there."""
GPU_CHUNKS = 4
"""As many times larger are chunks elsewhere: each reads all of the head, and adds to all of its gradient."""


class LossSums(NamedTuple):
    """Sums of cross-entropies in nats, and how many tokens each sums over. 0-d tensors.

    A tuple, because FSDP2 looks for the tensors to differentiate in nothing else.

    soft: sum of KL(p_AR || p_MDM) in nats over the masked tokens that have a teacher; 0 where not asked for.
    nats: float32 [S], the cross-entropy of each masked token, without gradient; None where not asked for.
    """

    diffusion: Tensor
    ar: Tensor
    diffusion_tokens: Tensor
    ar_tokens: Tensor
    soft: Tensor
    nats: Tensor | None = None

    def total(self, ar_weight: float, views: int = 1, soft_weight: float = 0.0) -> Tensor:
        """L_MDM + w_soft * L_soft + lambda * L_AR, a sum; divide by the global N   (Eq. 2; L_soft is ours).

        L_MDM and L_soft are means over the noised views. With N the global batch's tokens with offset >= 0,
        the soft targets' part of the loss is  w_soft * sum_i KL(p(x_i | x_<i) || p(x_i | x_t, x)) / (N * views).
        """
        diffusion = self.diffusion + soft_weight * self.soft if soft_weight else self.diffusion
        diffusion = diffusion / views
        return diffusion + ar_weight * self.ar if ar_weight else diffusion


class Scores(NamedTuple):
    """What `cross_entropy` finds for S targets, in nats, in float32 or wider.

    total: 0-d, the sum of their cross-entropies, each times its weight.
    soft: 0-d, the same of KL(p_teacher || p); 0 without a teacher.
    nats: [S], the cross-entropy of each, without gradient or weight; empty where not asked for and not at hand.
    """

    total: Tensor
    soft: Tensor
    nats: Tensor


def cross_entropy(
    decoder: Decoder,
    hidden: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    teacher: tuple[Tensor, Tensor] | None = None,
    each: bool = False,
    rows: int | None = None,
) -> Scores:
    """Head and cross-entropy of scored positions, for training and for all that is measured.

    Positions go through the head in chunks, so that no more than LOGIT_ELEMENTS logits (GPU_CHUNKS times as many on
    a GPU), a teacher's among them, exist at a time: by Liger's kernel on CUDA where it is installed, by a loop that
    computes loss and gradient together, or, under a teacher or a head that is no plain linear layer, by one that
    computes each chunk again in the backward pass.

    Args:
        hidden: [S, D].
        target: int64 [S].
        weight: float32 [S], what each counts in the sums; None: 1.
        teacher: hidden states [S, D] whose prediction is the soft target, and bool [S], whether it counts. No gradient
            goes through them.
        each: also give the cross-entropy of each target.
        rows: how many go through the head at a time; None: as many as the limit allows.
    """
    head = decoder.model.get_output_embeddings()
    size = rows or max(1, chunk_rows(decoder) // (1 if teacher is None else 2))
    if teacher is None and type(head) is nn.Linear:  # exactly: a wrapped head computes something of its own
        if weight is None and not each and takes_liger(decoder, hidden):
            total = _liger_cross_entropy(decoder.logit_cap)(head.weight, hidden, target, head.bias)
            return Scores(total, torch.zeros_like(total), total.new_zeros(0))
        inputs = (hidden, head.weight, head.bias, target, weight)
        total, nats = cast(Any, _LinearCrossEntropy.apply(*inputs, decoder, size, torch.is_grad_enabled()))
        return Scores(total, torch.zeros_like(total), nats)

    def chunk_nats(chunk: Tensor, wanted: Tensor, *soft: Tensor) -> Tensor:
        """[1 or 2, S]: cross-entropies, and divergences from a teacher."""
        log_p = _log_probabilities(decoder, chunk)
        hard = functional.nll_loss(log_p, wanted, reduction="none")
        if not soft:
            return hard[None]
        with torch.no_grad():
            wish = _log_probabilities(decoder, soft[0])
        divergence = functional.kl_div(log_p, wish, reduction="none", log_target=True).sum(-1)
        return torch.stack([hard, divergence.masked_fill(~soft[1], 0)])

    soft = () if teacher is None else (teacher[0].detach(), teacher[1])
    nats = _in_chunks(chunk_nats, size, hidden, target, *soft)
    sums = nats.sum(1) if weight is None else nats @ weight.to(nats.dtype)
    return Scores(sums[0], sums[1] if soft else torch.zeros_like(sums[0]), nats[0].detach())


def chunk_rows(decoder: Decoder, device: str | None = None) -> int:
    """How many positions go through head and loss at a time, on a kind of device; None: the model's."""
    elements = LOGIT_ELEMENTS * (1 if (device or decoder.device.type) == "cpu" else GPU_CHUNKS)
    return max(1, elements // decoder.vocabulary)


def takes_liger(decoder: Decoder, hidden: Tensor) -> bool:
    """Whether Liger's fused head and cross-entropy takes these states: on CUDA, where liger-kernel is installed."""
    if not hidden.is_cuda or not len(hidden) or hidden.dtype == torch.float64 or decoder.logit_scale != 1:
        return False
    return is_liger_kernel_available()


@functools.cache
def _liger_cross_entropy(cap: float | None) -> Callable[..., Tensor]:
    from liger_kernel.transformers.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyLoss,
    )

    # The head's gradient is a sum over many chunks: in float32, as in our own loop.
    return LigerFusedLinearCrossEntropyLoss(reduction="sum", softcap=cap, accum_dtype=torch.float32)


def _log_probabilities(decoder: Decoder, hidden: Tensor) -> Tensor:
    logits = decoder.logits(hidden)
    return logits.to(_wide(logits.dtype)).log_softmax(-1)


def _in_chunks(function: Callable[..., Tensor], size: int, *parts: Tensor) -> Tensor:
    """What `function` gives for chunks of `size` rows of the parts, each recomputed in the backward pass, joined."""
    if len(parts[0]) <= size:
        return function(*parts)
    chunks = zip(*(part.split(size) for part in parts), strict=True)
    options: Any = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random here
    return torch.cat([cast(Tensor, checkpoint(function, *chunk, **options)) for chunk in chunks], dim=-1)


class _LinearCrossEntropy(torch.autograd.Function):
    """`cross_entropy` behind a plain linear head, whose gradients are computed along with the loss.

    A chunk's logits become their own gradient in place: head and softmax run once, nothing is recomputed, and
    what stays for the backward pass is the gradient of the hidden states and, if it is trained, of the head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        counts: Tensor | None,
        decoder: Decoder,
        size: int,
        train: bool,
    ) -> tuple[Tensor, Tensor]:
        """The sum, 0-d, and the cross-entropy of each. `counts`: its weight. `train`: whether autograd records."""
        kind, scale, cap = hidden.device.type, decoder.logit_scale, decoder.logit_cap
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        wide = _wide(dtype)
        needs = ctx.needs_input_grad[:3] if train else (False,) * 3
        # Of chunks added up: in `wide`, so that bfloat16 loses nothing over many of them.
        grads = [
            torch.zeros_like(x, dtype=wide) if x is not None and need else None
            for x, need in zip((hidden, weight, bias), needs, strict=True)
        ]
        grad_hidden, grad_weight, grad_bias = grads
        head, nats = weight.to(dtype), torch.empty(len(target), dtype=wide, device=hidden.device)
        buffer = head.new_empty(min(size, len(target)), len(weight))
        for start in range(0, len(target), size):
            chunk, wanted = hidden[start : start + size].to(dtype), target[start : start + size, None]
            p = torch.mm(chunk, head.T, out=buffer[: len(chunk)]).to(wide)
            if bias is not None:
                p += bias
            if scale != 1:
                p *= scale
            slope = None
            if cap is not None:
                slope = 1 - p.div_(cap).tanh_().square()
                p *= cap
            p -= p.amax(dim=1, keepdim=True)
            chosen = p.gather(1, wanted)
            p.exp_()
            normalizer = p.sum(dim=1, keepdim=True)
            torch.sub(normalizer.log()[:, 0], chosen[:, 0], out=nats[start : start + size])
            if not any(grad is not None for grad in grads):
                continue
            p /= normalizer
            p.scatter_add_(1, wanted, p.new_full(wanted.shape, -1.0))  # now the gradient of the logits
            if slope is not None:
                p *= slope
            if counts is not None:
                p *= counts[start : start + size, None]
            if scale != 1:
                p *= scale
            low = p.to(dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + size] = low @ head
            if grad_weight is not None:
                grad_weight = grad_weight.addmm_(low.T, chunk) if dtype == wide else grad_weight.add_(low.T @ chunk)
            if grad_bias is not None:
                grad_bias += p.sum(dim=0)
        ctx.grads = grad_hidden, grad_weight, grad_bias
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(nats)
        return nats.sum() if counts is None else torch.dot(nats, counts.to(wide)), nats

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The chain rule's one factor: the loss enters everything after it as a plain number."""
        pairs = zip(ctx.grads, ctx.dtypes, strict=True)
        del ctx.grads  # scaled in place, so good for one backward pass
        grads = (None if grad is None else grad.mul_(upstream[0]).to(dtype) for grad, dtype in pairs)
        return *grads, *(None,) * 5


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Where losses are summed: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class TwoViewLoss(nn.Module):
    """The forward pass of a training step: [noised ; clean] once through the model, then both losses.

    A module, because data-parallel wrappers act on modules.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.model = decoder.model
        self._no_split_modules = decoder.model._no_split_modules  # the layers that FSDP2 gathers one by one

    def forward(
        self, view: TwoView, rule: Rule, score_ar: bool = True, soft: bool = False, profile: bool = False
    ) -> LossSums:
        """L_MDM over masked tokens (Eq. 5) and L_AR over the clean half (Eq. 1).

        Args:
            view: from `corrupt`, on the model's device.
            rule: the attention rule.
            score_ar: False leaves the clean half unscored (lambda = 0), which saves its head time.
            soft: also score masked tokens against the clean half's own predictions (w_soft > 0).
            profile: also give each masked token's loss.
        """
        decoder = Decoder(self.model)
        n, places = view.noised_length, view.places
        mask = decoder.two_view_masks(rule, places.part(0, n), places.part(n))
        hidden = decoder.hidden(view.tokens, places.position, mask)
        masked = masked_scores(decoder, hidden[:, :n], view, hidden[:, n:] if soft else None, profile)
        target = view.target[:, n:] if score_ar else view.target[:, n:n]
        row, slot = (target != UNSCORED).nonzero(as_tuple=True)
        ar = cross_entropy(decoder, hidden[:, n:][row, slot], target[row, slot])
        tokens, ar_tokens, nats = masked_tokens(view), (target != UNSCORED).sum(), masked.nats if profile else None
        return LossSums(masked.total, ar.total, tokens, ar_tokens, masked.soft, nats)


class CleanCache(DynamicCache):
    """Keys and values of the clean half: written in its own pass, then read alone, as often as layers are computed."""

    written = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **more: Any) -> Any:
        """Keys and values [B, H, T, D] of a layer, cached ones in front."""
        if not self.written:
            return super().update(key_states, value_states, layer_idx, *rest, **more)
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)


class DraftLoss(nn.Module):
    """The forward pass of a draft adapter's training step: only noised positions are differentiated.

    The clean half is the frozen parent, so it runs once without gradient and leaves its keys and values;
    every noised view then attends to them.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        assert decoder.adapter is not None
        self.model = decoder.model
        self.adapter = decoder.adapter

    def forward(
        self, view: TwoView, rule: Rule, score_ar: bool = False, soft: bool = False, profile: bool = False
    ) -> LossSums:
        """L_MDM over masked tokens   (Eq. 5); the AR loss has no part, its sum is 0.

        With `soft` also the KL from the frozen parent's own predictions, which judge the drafts in decoding.
        """
        decoder = Decoder(self.model, self.adapter)
        n, places = view.noised_length, view.places
        if not n:  # nothing was masked: a loss of 0 with gradient 0
            sums = [p.sum() for p in self.adapter.parameters()]
            nothing = torch.stack(sums).sum() * 0  # all of them, or DDP would wait
            return LossSums(nothing, nothing, nothing.long(), nothing.long(), nothing)
        clean, noised = places.part(n), places.part(0, n)
        cache = CleanCache()
        with torch.no_grad():
            parent = decoder.hidden(view.tokens[:, n:], clean.position, decoder.masks(rule, clean), cache)
        cache.written = True
        mask = decoder.two_view_masks(rule, noised, clean, cached=True)
        hidden = decoder.hidden(view.tokens[:, :n], noised.position, mask, cache, noised=True)
        masked = masked_scores(decoder, hidden, view, parent if soft else None, profile)
        tokens, no_ar = masked_tokens(view), torch.zeros_like(masked.total)
        nats = masked.nats if profile else None
        return LossSums(masked.total, no_ar, tokens, torch.zeros_like(tokens), masked.soft, nats)


def masked_tokens(view: TwoView) -> Tensor:
    """How many masked tokens have a target, 0-d."""
    return (view.target[:, : view.noised_length] != UNSCORED).sum()


def masked_scores(
    decoder: Decoder, hidden: Tensor, view: TwoView, clean: Tensor | None = None, each: bool = False
) -> Scores:
    """Cross-entropy of the masked tokens, and the KL from the clean half's predictions of them.

    Args:
        hidden: [B, N, D], of the noised half.
        view: the two-view batch.
        clean: [B, L, D], hidden states of the clean half; None: the KL is not wanted and is 0.
        each: also that of each, in row order.
    """
    row, slot = (view.target[:, : view.noised_length] != UNSCORED).nonzero(as_tuple=True)
    weight = None if view.weight is None else view.weight[row, slot]
    teacher = None
    if clean is not None:
        index = view.teacher[row, slot]
        teacher = clean[row, index.clamp_min(0)], index != UNSCORED
    target = view.target[row, slot]
    return cross_entropy(decoder, hidden[row, slot], target, weight, teacher=teacher, each=each)
