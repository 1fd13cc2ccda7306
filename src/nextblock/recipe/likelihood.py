"""What a text costs: -log p of each token under causal attention, and draws of the diffusion bound   (after Eq. 5).

Letters: B rows, L tokens in a row, T positions of [noised ; clean].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from nextblock.attention.rule import block_diffusion_rule
from nextblock.config.sections import BlockDiffusionSettings, Context, RecipeConfig
from nextblock.data.rows import Rows
from nextblock.model.decoder import Decoder
from nextblock.recipe.corruption import UNSCORED, TwoView, corrupt
from nextblock.recipe.cross_entropy import cross_entropy


def mask_nothing(generator: np.random.Generator, maskable: np.ndarray) -> list[np.ndarray]:
    """No token at all: the pass is the clean half alone."""
    return [np.zeros_like(maskable)]


def mask_by_count(generator: np.random.Generator, maskable: np.ndarray) -> list[np.ndarray]:
    """In each block m ~ Uniform{1..n} of its n maskable tokens, a random subset: the draw behind the bound."""
    count = maskable.sum(axis=1)
    masked = np.ceil(generator.random(len(maskable)) * count)
    order = np.where(maskable, generator.random(maskable.shape), 2.0).argsort(axis=1).argsort(axis=1)
    return [maskable & (order < masked[:, None])]


@torch.no_grad()
def ar_nats(decoder: Decoder, batch: Rows, on_pass: Callable[[], None] = lambda: None) -> torch.Tensor:
    """-log p of each position's next token under causal attention, 0 where that is not generated: float32 [B, L]."""
    on_pass()
    noise: Any = {"mask_token_id": 0, "end_token_id": None, "recipe": RecipeConfig(), "seed": 0, "step": 0}
    view = corrupt(batch, 1, draw=mask_nothing, **noise)
    return _nats(decoder, view.to(decoder.device), "context_causal")


@torch.no_grad()
def bound_nats(
    decoder: Decoder,
    settings: BlockDiffusionSettings,
    batch: Rows,
    draws: int,
    *,
    clean: torch.Tensor | None = None,
    ends: Sequence[int] = (),
    views: int = 1,
    on_pass: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Draws of the order-agnostic bound on -log p of each row's generated tokens, in nats: float64 [draws, B].

    -log p(block) <= E_m[n / m * sum over m masked of -log p(x_i | rest)], m ~ Uniform{1..n}, with the first token of
    each block from the AR head as in decoding (when prediction is shifted). Their mean is unbiased for the bound. A
    row's draws depend on its epoch and number, and on nothing else in the batch.

    Args:
        clean: of `ar_nats`, where it is known.
        ends: tokens that end a span; a last block behind one is filled up, as in training.
        views: noised views that share a pass and its clean half.
    """
    size, context, shifted = settings.block_size, settings.context, settings.prediction == "shifted"

    def view_of(step: int, views: int) -> TwoView:
        on_pass()
        recipe = RecipeConfig(prediction=settings.prediction, views=views)
        noise: Any = {"mask_token_id": settings.mask_token_id, "end_token_id": ends, "recipe": recipe, "seed": 0}
        return corrupt(batch, size, draw=mask_by_count, step=step, **noise).to(decoder.device)

    found = torch.zeros(draws, len(batch), dtype=torch.float64)
    if shifted:
        if context == "block_causal":
            clean = _nats(decoder, clean_blocks(view_of(0, 1)), context)
        elif clean is None:
            clean = ar_nats(decoder, batch, on_pass)
        begins = torch.zeros_like(batch.offset, dtype=torch.bool)
        begins[:, :-1] = (batch.offset[:, 1:] >= 0) & (batch.offset[:, 1:] % size == 0)
        found += torch.where(begins.to(clean.device), clean, 0).sum(1).double().cpu()
    if shifted and size == 1:
        return found  # nothing is masked
    for step, first in enumerate(range(0, draws, views)):
        count = min(views, draws - first)
        view = view_of(step, count)
        n = view.noised_length
        weighted = (_nats(decoder, view, context)[:, :n].cpu() * _bound_weights(view, shifted)).double()
        for row in range(count):
            own = view.places.view[:, :n].cpu() == row + 1
            found[first + row] += torch.where(own, weighted, 0).sum(1)
    return found


def clean_blocks(view: TwoView) -> TwoView:
    """The clean half alone."""
    n = view.noised_length
    return TwoView(view.tokens[:, n:], view.places.part(n), 0, view.masked.none(), view.following)


def _nats(decoder: Decoder, view: TwoView, context: Context) -> torch.Tensor:
    """-log p of each position's target, 0 where there is none: float32 [B, T]."""
    mask = decoder.masks(block_diffusion_rule(context), view.places)
    noised = view.places.view > 0 if decoder.adapter is not None else False
    hidden = decoder.hidden(view.tokens, view.places.position, mask, noised=noised)
    scored = view.target != UNSCORED
    nats = torch.zeros(view.target.shape, device=hidden.device)
    nats[scored] = cross_entropy(decoder, hidden[scored], view.target[scored], each=True).nats.float()
    return nats


def _bound_weights(view: TwoView, shifted: bool) -> torch.Tensor:
    """n / m of each noised slot's block: maskable over masked tokens, [B, N]."""
    n = view.noised_length
    places = view.places
    block = torch.stack([places.view[:, :n], places.document[:, :n], places.block_start[:, :n]], dim=-1).cpu()
    weights = torch.zeros(block.shape[:2])
    scored = (view.target[:, :n] != UNSCORED).cpu()
    for row in range(len(block)):
        _, inverse, slots = torch.unique_consecutive(block[row], dim=0, return_inverse=True, return_counts=True)
        masked = torch.zeros_like(slots).index_add_(0, inverse, scored[row].long())
        weights[row] = ((slots - int(shifted)) / masked.clamp_min(1))[inverse]
    return weights
