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

from nextblock.attention_mask import Rule
from nextblock.corruption import UNSCORED, TwoView
from nextblock.model import Decoder

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


def cross_entropy_sum(
    decoder: Decoder, hidden: Tensor, target: Tensor, weight: Tensor | None = None, *, rows: int | None = None
) -> Tensor:
    """Sum of cross-entropies of `hidden` [S, D] against `target` int64 [S], in float32 or wider.

    Each counts `weight` float32 [S], if given. `rows`: how many go through the head at a time; None: `chunk_rows`.

    Chunks of scored positions go through head and loss one after another, so that no more than
    LOGIT_ELEMENTS logits (GPU_CHUNKS times as many on a GPU) exist at a time: by Liger's kernel on CUDA where it
    is installed, else by a loop of ours.
    """
    head = decoder.model.get_output_embeddings()
    if type(head) is nn.Linear:  # exactly: a wrapped head computes something of its own
        if weight is None and takes_liger(decoder, hidden):
            return _liger_cross_entropy(decoder.logit_cap)(head.weight, hidden, target, head.bias)
        inputs = (hidden, head.weight, head.bias, target, weight)
        return _LinearCrossEntropy.apply(*inputs, decoder, rows, torch.is_grad_enabled())  # type: ignore[return-value]

    def chunk_sum(chunk: Tensor, wanted: Tensor, *counts: Tensor) -> Tensor:
        nats = functional.cross_entropy(_widened(decoder.logits(chunk)), wanted, reduction="none")
        return _weighted_sum(nats, *counts)

    counts = () if weight is None else (weight,)
    return _in_chunks(chunk_sum, rows or chunk_rows(decoder), hidden, target, *counts)


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


def soft_cross_entropy_sums(
    decoder: Decoder,
    hidden: Tensor,
    target: Tensor,
    teacher: Tensor,
    taught: Tensor,
    weight: Tensor | None = None,
    *,
    rows: int | None = None,
) -> Tensor:
    """Cross-entropy and KL(p_teacher || p_student), both summed: [2], in float32 or wider.

    Chunks as in `cross_entropy_sum`; one pass of the student's hidden states through the head serves both sums.

    Args:
        hidden: [S, D], the student's hidden states.
        target: int64 [S].
        teacher: [S, D], hidden states whose prediction is the soft target; no gradient goes through them.
        taught: bool [S]; where False the token has no teacher and its KL counts as 0.
        weight: float32 [S], what each token counts in both sums; None: 1.
        rows: how many go through the head at a time; None: half of `chunk_rows`.
    """

    def chunk_sums(chunk: Tensor, wanted: Tensor, teaching: Tensor, has: Tensor, *counts: Tensor) -> Tensor:
        student = _widened(decoder.logits(chunk)).log_softmax(-1)
        with torch.no_grad():
            soft = _widened(decoder.logits(teaching)).log_softmax(-1)
        hard = functional.nll_loss(student, wanted, reduction="none")
        divergence = functional.kl_div(student, soft, reduction="none", log_target=True).sum(-1)
        return torch.stack([_weighted_sum(hard, *counts), _weighted_sum(divergence.masked_fill(~has, 0), *counts)])

    size = rows or chunk_rows(decoder) // 2  # student's and teacher's logits are alive together
    counts = () if weight is None else (weight,)
    return _in_chunks(chunk_sums, size, hidden, target, teacher.detach(), taught, *counts)


def _weighted_sum(nats: Tensor, weight: Tensor | None = None) -> Tensor:
    return nats.sum() if weight is None else torch.dot(nats, weight.to(nats.dtype))


def _widened(logits: Tensor) -> Tensor:
    return logits.to(_wide(logits.dtype))


def _in_chunks(chunk_sum: Callable[..., Tensor], size: int, *parts: Tensor) -> Tensor:
    """The sum of `chunk_sum` over chunks of `size` rows of the parts, each recomputed in the backward pass."""
    size = max(1, size)
    if len(parts[0]) <= size:
        return chunk_sum(*parts)
    chunks = zip(*(part.split(size) for part in parts), strict=True)
    options: Any = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random here
    sums = (cast(Tensor, checkpoint(chunk_sum, *chunk, **options)) for chunk in chunks)
    return functools.reduce(torch.add, sums)


class _LinearCrossEntropy(torch.autograd.Function):
    """`cross_entropy_sum` behind a plain linear head, whose gradients are computed along with the loss.

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
        rows: int | None,
        train: bool,
    ) -> Tensor:
        """The sum, 0-d. `counts`: what each token counts. `train`: whether autograd records."""
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
        head, total = weight.to(dtype), torch.zeros((), dtype=wide, device=hidden.device)
        size = rows or chunk_rows(decoder)
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
            count = None if counts is None else counts[start : start + size].to(wide)
            total += _weighted_sum((normalizer.log() - chosen)[:, 0], count)
            if not any(grad is not None for grad in grads):
                continue
            p /= normalizer
            p.scatter_add_(1, wanted, p.new_full(wanted.shape, -1.0))  # now the gradient of the logits
            if slope is not None:
                p *= slope
            if count is not None:
                p *= count[:, None]
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
        return total

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
            profile: also give each masked token's loss, for one more pass through the head.
        """
        decoder = Decoder(self.model)
        n, places = view.noised_length, view.places
        mask = decoder.two_view_masks(rule, places.part(0, n), places.part(n))
        hidden = decoder.hidden(view.tokens, places.position, mask)
        diffusion = masked_sums(decoder, hidden[:, :n], view, hidden[:, n:] if soft else None)
        ar = scored_sum(decoder, hidden[:, n:], view.target[:, n:] if score_ar else view.target[:, n:n])
        nats = token_nats(decoder, hidden[:, :n], view.target[:, :n]) if profile else None
        return LossSums(diffusion[0], ar[0], diffusion[1], ar[1], diffusion[2], nats)


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
        cache = DynamicCache()
        with torch.no_grad():
            parent = decoder.hidden(view.tokens[:, n:], clean.position, decoder.masks(rule, clean), cache)
        mask = decoder.two_view_masks(rule, noised, clean, cached=True)
        hidden = decoder.hidden(view.tokens[:, :n], noised.position, mask, cache, noised=True)
        diffusion, tokens, divergence = masked_sums(decoder, hidden, view, parent if soft else None)
        nats = token_nats(decoder, hidden, view.target[:, :n]) if profile else None
        return LossSums(diffusion, torch.zeros_like(diffusion), tokens, torch.zeros_like(tokens), divergence, nats)


def scored_sum(
    decoder: Decoder, hidden: Tensor, target: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies where there is a target, and how many there are.

    Args:
        hidden: [B, T, D].
        target: int64 [B, T].
        weight: float32 [B, T], what each counts in the sum; None: 1.
    """
    hidden = hidden[:, : target.shape[1]]
    scored = target != UNSCORED
    counts = None if weight is None else weight[scored]
    return cross_entropy_sum(decoder, hidden[scored], target[scored], counts), scored.sum()


def masked_sums(
    decoder: Decoder, hidden: Tensor, view: TwoView, clean: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the masked tokens, how many there are, and the KL from the clean half's predictions of them.

    Args:
        hidden: [B, N, D], of the noised half.
        view: the two-view batch.
        clean: [B, L, D], hidden states of the clean half; None: the KL is not wanted and is 0.
    """
    if clean is None:
        total, count = scored_sum(decoder, hidden, view.target[:, : view.noised_length], view.weight)
        return total, count, torch.zeros_like(total)
    scored = view.target[:, : view.noised_length] != UNSCORED
    row, slot = scored.nonzero(as_tuple=True)
    index = view.teacher[row, slot]
    teacher = clean[row, index.clamp_min(0)]
    counts = None if view.weight is None else view.weight[row, slot]
    target = view.target[row, slot]
    sums = soft_cross_entropy_sums(decoder, hidden[row, slot], target, teacher, index != UNSCORED, counts)
    return sums[0], scored.sum(), sums[1]


@torch.no_grad()
def token_nats(decoder: Decoder, hidden: Tensor, target: Tensor) -> Tensor:
    """-log p of every target there is, float32 [S] in row order, no gradient. `hidden` [B, T, D], `target` [B, T]."""
    scored = target != UNSCORED
    size = chunk_rows(decoder)
    pairs = zip(hidden[scored].split(size), target[scored].split(size), strict=True)
    parts = [functional.cross_entropy(decoder.logits(h).float(), wanted, reduction="none") for h, wanted in pairs]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
