"""Bits per byte of held-out text: exact for AR, an upper bound for diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nextblock.attention.rule import block_diffusion_rule
from nextblock.config.run import AdaptConfig
from nextblock.config.sections import BlockDiffusionSettings, Context, RecipeConfig
from nextblock.data.encode import span_ends
from nextblock.data.rows import Rows
from nextblock.model.decoder import Decoder
from nextblock.recipe.corruption import UNSCORED, MaskDraw, TwoView, corrupt
from nextblock.recipe.cross_entropy import cross_entropy


@dataclass(frozen=True)
class BitsPerByte:
    """Held-out compression. `value` is exact for the AR measure and an upper bound for diffusion."""

    measure: str
    block_size: int | None
    value: float
    bytes: int


def evaluation_rows(config: AdaptConfig) -> int:
    """Rows of one forward pass of the final evaluation: no more than a process takes while training."""
    return min(4, config.training.micro_batch_rows or 4)


def mask_by_count(generator: np.random.Generator, maskable: np.ndarray) -> list[np.ndarray]:
    """In each block m ~ Uniform{1..n} of its n maskable tokens, a random subset: the draw behind the bound."""
    count = maskable.sum(axis=1)
    masked = np.ceil(generator.random(len(maskable)) * count)
    order = np.where(maskable, generator.random(maskable.shape), 2.0).argsort(axis=1).argsort(axis=1)
    return [maskable & (order < masked[:, None])]


@torch.no_grad()
def bits_per_byte(
    decoder: Decoder,
    tokenizer: Any,
    rows: Rows,
    settings: BlockDiffusionSettings | None = None,
    *,
    draws: int = 8,
    batch_rows: int = 4,
    on_pass: Callable[[], None] = lambda: None,
) -> list[BitsPerByte]:
    """Bits per UTF-8 byte of the generated tokens in `rows`; the first token of a plain document is given.

    Only the diffusion bound of a model with aligned prediction pays for that token as well, and counts its bytes:
    such a model can predict it.

    AR: exact, from the clean half. Diffusion, where `settings` names a block size: the order-agnostic bound
    -log p(block) <= E_m[n / m * sum over m masked of -log p(x_i | rest)], m ~ Uniform{1..n}, with the first
    token of each block from the AR head as in decoding (when prediction is shifted).

    Args:
        decoder, tokenizer: the model.
        rows: held-out rows.
        settings: block size, mask token, context and prediction of the diffusion bound.
        draws: noise draws averaged over.
        batch_rows: rows in one forward pass.
        on_pass: called before each forward pass; what it raises ends the measuring.
    """
    shifted = settings is None or settings.prediction == "shifted"
    noise: Any = {
        "mask_token_id": settings.mask_token_id if settings else 0,
        "end_token_id": span_ends(tokenizer),
        "recipe": RecipeConfig(prediction="shifted" if shifted else "aligned"),
        "seed": 0,
    }
    ar_nats = bound_nats = 0.0
    for start in range(0, len(rows), batch_rows):
        batch = rows.slice(start, start + batch_rows)

        def view_of(block_size: int, masks: MaskDraw, step: int = 0, batch: Rows = batch) -> TwoView:
            on_pass()
            return corrupt(batch, block_size, draw=masks, step=step, **noise).to(decoder.device)

        clean = _nats(decoder, view_of(1, lambda generator, maskable: [np.zeros_like(maskable)]), "context_causal")
        ar_nats += float(clean.sum())
        if settings is not None:
            bound_nats += _bound_nats(decoder, settings, batch, view_of, clean, draws)
    scored_bytes = _scored_bytes(rows, tokenizer)
    results = [BitsPerByte("AR (exact)", None, ar_nats / (math.log(2) * scored_bytes), scored_bytes)]
    if settings is not None:
        paid = scored_bytes if shifted else _scored_bytes(rows, tokenizer, first=True)
        bound = bound_nats / (math.log(2) * paid)
        results.append(BitsPerByte("diffusion (bound)", settings.block_size, bound, paid))
    return results


def _bound_nats(
    decoder: Decoder,
    settings: BlockDiffusionSettings,
    batch: Rows,
    view_of: Callable[..., TwoView],
    clean: torch.Tensor,
    draws: int,
) -> float:
    """The bound of a batch. `clean`: -log p of each clean token under causal attention, float32 [B, L]."""
    size, context, shifted = settings.block_size, settings.context, settings.prediction == "shifted"
    total = 0.0
    if shifted:
        if context == "block_causal":
            clean = _nats(decoder, clean_blocks(view_of(size, mask_by_count)), context)
        begins = torch.zeros_like(batch.offset, dtype=torch.bool)
        begins[:, :-1] = (batch.offset[:, 1:] >= 0) & (batch.offset[:, 1:] % size == 0)
        total += float(clean[begins.to(clean.device)].sum())
    for draw in range(draws):
        view = view_of(size, mask_by_count, draw)
        nats = _nats(decoder, view, context)[:, : view.noised_length]
        total += float((nats * _bound_weights(view, shifted).to(nats.device)).sum()) / draws
    return total


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
    block = torch.stack([places.document[:, :n], places.block_start[:, :n]], dim=-1).cpu()
    weights = torch.zeros(block.shape[:2])
    scored = (view.target[:, :n] != UNSCORED).cpu()
    for row in range(len(block)):
        _, inverse, slots = torch.unique_consecutive(block[row], dim=0, return_inverse=True, return_counts=True)
        masked = torch.zeros_like(slots).index_add_(0, inverse, scored[row].long())
        weights[row] = ((slots - int(shifted)) / masked.clamp_min(1))[inverse]
    return weights


def _scored_bytes(rows: Rows, tokenizer: Any, first: bool = False) -> int:
    """UTF-8 bytes of all tokens that the AR loss scores, with `first` of all generated ones; of end tokens none."""
    total = 0
    for row in range(len(rows)):
        document, offset, tokens = rows.document[row], rows.offset[row], rows.tokens[row]
        for index in range(int(document.max()) + 1):
            scored = (document == index) & (offset >= 0)
            scored &= first | ~((offset == 0) & (rows.position[row] == 0))
            text = tokenizer.decode(tokens[scored].tolist(), skip_special_tokens=True)
            total += len(text.encode("utf-8"))
    return total
