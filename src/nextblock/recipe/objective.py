"""The two losses of the parallel pass, as sums and counts; logits exist only where there is a target."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nextblock.attention.rule import Rule
from nextblock.model.decoder import Decoder
from nextblock.recipe.corruption import TwoView
from nextblock.recipe.cross_entropy import cross_entropy


class LossSums(NamedTuple):
    """Sums of cross-entropies in nats, 0-d tensors, and how many tokens each sums over.

    A tuple, because FSDP2 looks for the tensors to differentiate in nothing else.

    soft: the distillation loss, sum of KL(p_AR || p_MDM) in nats over the masked tokens that have a teacher; 0 where
        not asked for.
    nats: float32 [S], the cross-entropy of each masked token, without gradient; None where not asked for.
    """

    diffusion: Tensor
    ar: Tensor
    diffusion_tokens: int | Tensor
    ar_tokens: int | Tensor
    soft: Tensor
    nats: Tensor | None = None

    def total(self, ar_weight: float, views: int = 1, soft_weight: float = 0.0) -> Tensor:
        """L_MDM + w_soft * L_soft + lambda * L_AR, a sum; divide by the global N   (Eq. 2; L_soft is ours).

        L_MDM and L_soft are means over the noised views. With N the global batch's tokens with offset >= 0,
        distillation's part of the loss is  w_soft * sum_i KL(p(x_i | x_<i) || p(x_i | x_t, x)) / (N * views).
        """
        diffusion = self.diffusion + soft_weight * self.soft if soft_weight else self.diffusion
        diffusion = diffusion / views
        return diffusion + ar_weight * self.ar if ar_weight else diffusion


class TwoViewLoss(nn.Module):
    """The forward pass of a training step: hidden states of [noised ; clean], then the losses of what they predict.

    A module, because data-parallel wrappers act on modules.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.model, self.adapter = decoder.model, decoder.adapter
        self._no_split_modules = decoder.model._no_split_modules  # the layers that FSDP2 gathers one by one

    def forward(
        self, view: TwoView, rule: Rule, score_ar: bool = True, soft: bool = False, profile: bool = False
    ) -> LossSums:
        """L_MDM over masked tokens (Eq. 5) and L_AR over the clean half (Eq. 1).

        Args:
            view: from `corrupt`, on the model's device.
            rule: the attention rule.
            score_ar: False leaves the clean half unscored (lambda = 0), which saves its head time. So does a draft
                adapter, under which the clean half is the frozen parent's.
            soft: also score masked tokens against the clean half's own predictions (w_soft > 0).
            profile: also give each masked token's loss.
        """
        decoder, masked, following = Decoder(self.model, self.adapter), view.masked, view.following
        if self.adapter is not None and not view.noised_length:  # nothing was masked: a loss of 0 with gradient 0
            sums = [p.sum() for p in self.adapter.parameters()]  # all of them, or DDP would wait
            nothing = torch.stack(sums).sum() * 0
            return LossSums(nothing, nothing, 0, 0, nothing)
        noised, clean = (two_view_states if self.adapter is None else draft_states)(decoder, view, rule)
        teacher = (clean[masked.row, masked.teacher], masked.has_teacher) if soft else None
        scores = cross_entropy(
            decoder, noised[masked.row, masked.slot], masked.token, masked.weight, teacher=teacher, each=profile
        )
        ar, ar_tokens = torch.zeros_like(scores.total), 0
        if score_ar and self.adapter is None:
            ar = cross_entropy(decoder, clean[following.row, following.slot], following.token).total
            ar_tokens = len(following)
        return LossSums(scores.total, ar, len(masked), ar_tokens, scores.soft, scores.nats if profile else None)


def two_view_states(decoder: Decoder, view: TwoView, rule: Rule) -> tuple[Tensor, Tensor]:
    """Hidden states [B, N, D] of the noised half and [B, L, D] of the clean one, from one pass over both."""
    n, places = view.noised_length, view.places
    mask = decoder.two_view_masks(rule, places.part(0, n), places.part(n))
    hidden = decoder.hidden(view.tokens, places.position, mask)
    return hidden[:, :n], hidden[:, n:]


def draft_states(decoder: Decoder, view: TwoView, rule: Rule) -> tuple[Tensor, Tensor]:
    """The same under a draft adapter, whose gate is open at noised positions: only these are differentiated.

    The clean half is the frozen parent, so it runs once without gradient and leaves its keys and values;
    every noised view then attends to them.
    """
    n = view.noised_length
    noised, clean = view.places.part(0, n), view.places.part(n)
    cache = CleanCache()
    with torch.no_grad():
        mask = decoder.masks(rule, clean, longest=clean.view.shape[1])
        parent = decoder.hidden(view.tokens[:, n:], clean.position, mask, cache)
    cache.written = True
    mask = decoder.two_view_masks(rule, noised, clean, cached=True)
    return decoder.hidden(view.tokens[:, :n], noised.position, mask, cache, noised=True), parent


class CleanCache(DynamicCache):
    """Keys and values of the clean half: written in its own pass, then read alone, as often as layers are computed."""

    written = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *rest: Any, **more: Any) -> Any:
        """Keys and values [B, H, T, D] of a layer, cached ones in front."""
        if not self.written:
            return super().update(key_states, value_states, layer_idx, *rest, **more)
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)
