"""Head and cross-entropy without the whole of the logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.utils.import_utils import is_liger_kernel_available

from nextblock.model.correction import Correction
from nextblock.model.decoder import Decoder

LOGIT_ELEMENTS = 2**24
"""Logits alive at once in the chunk loop on CPU: 64 MiB in float32. Fewer are as fast there."""
GPU_CHUNKS = 4
"""As many times larger are chunks elsewhere: each reads all of the head, and adds to all of its gradient."""


class Scores(NamedTuple):
    """What `cross_entropy` finds for S targets, in nats, in float32 or wider.

    total: 0-d, the sum of their cross-entropies, each times its weight.
    soft: 0-d, the same of KL(p_teacher || p), the distillation loss; 0 without a teacher.
    nats: [S], the cross-entropy of each, without gradient or weight; empty where not asked for and not at hand.
    agreement: [S], sum over v of min(p_teacher(v), p(v)): how likely a token drawn from p is kept; None without a
        teacher.
    """

    total: Tensor
    soft: Tensor
    nats: Tensor
    agreement: Tensor | None = None


def cross_entropy(
    decoder: Decoder,
    hidden: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    teacher: tuple[Tensor, Tensor] | None = None,
    previous: Tensor | None = None,
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
        teacher: hidden states [S, D] whose prediction is distilled, and bool [S], whether it counts. No gradient
            goes through them.
        previous: int64 [S], tokens by which the decoder's correction head corrects the logits; None: it does not.
        each: also give the cross-entropy of each target.
        rows: how many go through the head at a time; None: as many as the limit allows.
    """
    head = decoder.model.get_output_embeddings()
    size = rows or max(1, chunk_rows(decoder) // (1 if teacher is None else 2))
    correction = None if previous is None else decoder.correction
    if (
        teacher is None and correction is None and type(head) is nn.Linear
    ):  # exactly: a wrapped head computes something of its own
        if weight is None and not each and takes_liger(decoder, hidden):
            total = _liger_cross_entropy(decoder.logit_cap)(head.weight, hidden, target, head.bias)
            return Scores(total, torch.zeros_like(total), total.new_zeros(0))
        inputs = (hidden, head.weight, head.bias, target, weight)
        total, nats = cast(Any, _LinearCrossEntropy.apply(*inputs, decoder, size, torch.is_grad_enabled()))
        return Scores(total, torch.zeros_like(total), nats)

    def chunk_nats(chunk: Tensor, wanted: Tensor, before: Tensor, *soft: Tensor) -> Tensor:
        """[1 or 3, S]: cross-entropies, and divergences from a teacher and agreement with it."""
        log_p = _log_probabilities(decoder, chunk, correction, before)
        hard = functional.nll_loss(log_p, wanted, reduction="none")
        if not soft:
            return hard[None]
        with torch.no_grad():
            wish = _log_probabilities(decoder, soft[0])
        divergence = functional.kl_div(log_p, wish, reduction="none", log_target=True).sum(-1)
        agreement = torch.minimum(log_p, wish).exp().sum(-1)
        return torch.stack([hard, divergence.masked_fill(~soft[1], 0), agreement])

    soft = () if teacher is None else (teacher[0].detach(), teacher[1])
    nats = _in_chunks(chunk_nats, size, hidden, target, target if previous is None else previous, *soft)
    sums = nats[:2].sum(1) if weight is None else nats[:2] @ weight.to(nats.dtype)
    total, each_nats = sums[0], nats[0].detach()
    return Scores(total, sums[1], each_nats, nats[2]) if soft else Scores(total, torch.zeros_like(total), each_nats)


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


def _log_probabilities(
    decoder: Decoder, hidden: Tensor, correction: Correction | None = None, previous: Tensor | None = None
) -> Tensor:
    logits = decoder.logits(hidden)
    logits = logits.to(_wide(logits.dtype))
    return (logits if correction is None else correction(logits, previous)).log_softmax(-1)


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
            nats[start : start + size], normalizer, slope = _exponentials(p, wanted, scale, cap)
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


def _exponentials(p: Tensor, wanted: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Turn what the head gives, [S, V], into multiples of probabilities, in place.

    Returns:
        The cross-entropies [S] of `wanted` [S, 1], the sums [S, 1] that make them probabilities, and the slope [S, V]
        of the soft cap, None without one.
    """
    if scale != 1:
        p *= scale
    slope = None
    if cap is not None:
        slope = 1 - p.div_(cap).tanh_().square()
        p *= cap
    p -= p.amax(dim=1, keepdim=True)
    chosen = p.gather(1, wanted)
    normalizer = p.exp_().sum(dim=1, keepdim=True)
    return normalizer.log()[:, 0] - chosen[:, 0], normalizer, slope


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Where losses are summed: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
