"""The two losses of the parallel pass, as sums and counts; logits exist only where there is a target."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nextblock.attention.rule import Rule
from nextblock.model.decoder import Decoder
from nextblock.recipe.corruption import UNSCORED, TwoView
from nextblock.recipe.cross_entropy import Scores, cross_entropy


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
