"""The two losses of the parallel pass, as sums and counts; logits exist only where there is a target."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from nextblock.attention_mask import Rule
from nextblock.corruption import UNSCORED, TwoView
from nextblock.model import Decoder

LOGIT_ELEMENTS = 2**24
"""Logits alive at once in the chunk loop: 64 MiB in float32."""


class LossSums(NamedTuple):
    """Sums of cross-entropies in nats, and how many tokens each sums over. 0-d tensors.

    A tuple, because FSDP2 looks for the tensors to differentiate in nothing else.
    """

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

    Chunks of scored positions go through head and loss one after another and are recomputed in the
    backward pass, so that no more than LOGIT_ELEMENTS logits exist at a time.
    """

    def chunk_sum(chunk: Tensor, wanted: Tensor) -> Tensor:
        logits = decoder.logits(chunk)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return functional.cross_entropy(logits, wanted, reduction="sum")

    size = max(1, LOGIT_ELEMENTS // decoder.vocabulary)
    if len(target) <= size:
        return chunk_sum(hidden, target)
    total = hidden.new_zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    for chunk, wanted in zip(hidden.split(size), target.split(size), strict=True):
        total = total + checkpoint(chunk_sum, chunk, wanted, use_reentrant=False)  # type: ignore[operator]
    return total


class TwoViewLoss(nn.Module):
    """The forward pass of a training step: [noised ; clean] once through the model, then both losses.

    A module, because data-parallel wrappers act on modules.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.model = decoder.model
        self._no_split_modules = decoder.model._no_split_modules  # the layers that FSDP2 gathers one by one

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
            nothing = sum(p.sum() for p in self.adapter.parameters()) * 0  # all of them, or DDP would wait
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
