"""The two losses of the parallel pass, as sums and counts; logits exist only where there is a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from nextblock.attention_mask import Rule
from nextblock.corruption import UNSCORED, TwoView
from nextblock.model import Decoder

LOGIT_ELEMENTS = 2**24
"""Logits alive at once in the chunk loop: 64 MiB in float32. Fewer are as fast on CPU; a GPU wants no fewer."""


@dataclass(frozen=True)
class LossSums:
    """Sums of cross-entropies in nats, and how many tokens each sums over. 0-d tensors."""

    diffusion: Tensor
    ar: Tensor
    diffusion_tokens: Tensor
    ar_tokens: Tensor

    def total(self, ar_weight: float, views: int = 1) -> Tensor:
        """L_MDM + lambda * L_AR, a sum   (Eq. 2), with L_MDM averaged over noised views; divide by the global N."""
        diffusion = self.diffusion / views
        return diffusion + ar_weight * self.ar if ar_weight else diffusion


def cross_entropy_sum(decoder: Decoder, hidden: Tensor, target: Tensor) -> Tensor:
    """Sum of cross-entropies of `hidden` [S, D] against `target` int64 [S], in float32 or wider.

    Chunks of scored positions go through head and loss one after another, so that no more than
    LOGIT_ELEMENTS logits exist at a time.
    """
    head = decoder.model.get_output_embeddings()
    if type(head) is nn.Linear:  # exactly: a wrapped head computes something of its own
        inputs = (hidden, head.weight, head.bias, target)
        return _LinearCrossEntropy.apply(*inputs, decoder, torch.is_grad_enabled())  # type: ignore[return-value]

    def chunk_sum(chunk: Tensor, wanted: Tensor) -> Tensor:
        logits = decoder.logits(chunk)
        return functional.cross_entropy(logits.to(_wide(logits.dtype)), wanted, reduction="sum")

    total = hidden.new_zeros((), dtype=_wide(hidden.dtype))
    size = max(1, LOGIT_ELEMENTS // decoder.vocabulary)
    for chunk, wanted in zip(hidden.split(size), target.split(size), strict=True):
        total = total + checkpoint(chunk_sum, chunk, wanted, use_reentrant=False)  # type: ignore[operator]
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    """`cross_entropy_sum` behind a plain linear head, whose gradients are computed along with the loss.

    A chunk's logits become their own gradient in place: head and softmax run once, nothing is recomputed, and
    what stays for the backward pass is the gradient of the hidden states and, if it is trained, of the head.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, decoder: Decoder, train: bool
    ) -> Tensor:
        """The sum, 0-d. `train`: whether autograd records."""
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
        size = max(1, LOGIT_ELEMENTS // len(weight))
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
            total -= p.gather(1, wanted).sum()
            p.exp_()
            normalizer = p.sum(dim=1, keepdim=True)
            total += normalizer.log().sum()
            if not any(grad is not None for grad in grads):
                continue
            p /= normalizer
            p.scatter_add_(1, wanted, p.new_full(wanted.shape, -1.0))  # now the gradient of the logits
            if slope is not None:
                p *= slope
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
        return *(None if grad is None else grad.mul_(upstream[0]).to(dtype) for grad, dtype in pairs), None, None, None


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

    def forward(self, view: TwoView, rule: Rule, score_ar: bool = True) -> LossSums:
        """L_MDM over masked tokens (Eq. 5) and L_AR over the clean half (Eq. 1).

        Args:
            view: from `corrupt`, on the model's device.
            rule: the attention rule.
            score_ar: False leaves the clean half unscored (lambda = 0), which saves its head time.
        """
        decoder = Decoder(self.model)
        hidden = decoder.hidden(view.tokens, view.places.position, decoder.masks(rule, view.places))
        n = view.noised_length
        diffusion = scored_sum(decoder, hidden[:, :n], view.target[:, :n])
        ar = scored_sum(decoder, hidden[:, n:], view.target[:, n:] if score_ar else view.target[:, n:n])
        return LossSums(diffusion[0], ar[0], diffusion[1], ar[1])


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

    def forward(self, view: TwoView, rule: Rule, score_ar: bool = False) -> LossSums:
        """L_MDM over masked tokens   (Eq. 5); the AR loss has no part, its sum is 0."""
        decoder = Decoder(self.model, self.adapter)
        n, places = view.noised_length, view.places
        if not n:  # nothing was masked: a loss of 0 with gradient 0
            nothing = self.adapter.mask_vector.sum() * 0
            return LossSums(nothing, nothing, nothing.long(), nothing.long())
        clean, noised = places.part(n), places.part(0, n)
        cache = DynamicCache()
        with torch.no_grad():
            decoder.hidden(view.tokens[:, n:], clean.position, decoder.masks(rule, clean), cache)
        mask = decoder.masks(rule, noised, clean.followed_by(noised))
        hidden = decoder.hidden(view.tokens[:, :n], noised.position, mask, cache, noised=True)
        diffusion, tokens = scored_sum(decoder, hidden, view.target[:, :n])
        nothing = torch.zeros_like(diffusion)
        return LossSums(diffusion, nothing, tokens, torch.zeros_like(tokens))


def scored_sum(decoder: Decoder, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of cross-entropies where there is a target, and how many there are. `hidden` [B, T, D], `target` [B, T]."""
    hidden = hidden[:, : target.shape[1]]
    scored = target != UNSCORED
    return cross_entropy_sum(decoder, hidden[scored], target[scored]), scored.sum()
