"""Bits per byte of held-out text: exact for AR, an upper bound for diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
from nextblock.recipe.corruption import UNSCORED, TwoView, corrupt
from nextblock.recipe.cross_entropy import cross_entropy


@dataclass(frozen=True)
class BitsPerByte:
    """Held-out compression. `value` is exact for the AR measure and an upper bound for diffusion.

    bytes, tokens: what is paid for; `perplexity` is per token.
    standard_error: of `value`, by the draws of the noise; 0 where nothing is drawn, None from a single draw.
    """

    measure: str
    block_size: int | None
    value: float
    bytes: int
    tokens: int
    perplexity: float
    standard_error: float | None = 0.0


def evaluation_rows(config: AdaptConfig) -> int:
    """Rows of one forward pass of the final evaluation: no more than a process takes while training."""
    return min(4, config.training.micro_batch_rows or 4)


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
def bits_per_byte(
    decoder: Decoder,
    tokenizer: Any,
    rows: Rows | Iterable[Rows],
    settings: BlockDiffusionSettings | None = None,
    *,
    block_sizes: Sequence[int] = (),
    draws: int = 8,
    batch_rows: int = 4,
    on_pass: Callable[[], None] = lambda: None,
) -> list[BitsPerByte]:
    """Bits per UTF-8 byte of the generated tokens in `rows`; the first token of a plain document is given.

    Only the diffusion bound of a model with aligned prediction pays for that token as well, and counts its bytes:
    such a model can predict it.

    AR: exact, from the clean half. Diffusion, where there are `settings`: `bound_nats`.

    Args:
        decoder, tokenizer: the model.
        rows: held-out rows, or batches of them, of which one is held at a time.
        settings: mask token, context and prediction of the diffusion bound.
        block_sizes: those of the bound; default: that of the settings.
        draws: noise draws averaged over.
        batch_rows: rows in one forward pass.
        on_pass: called before each forward pass; what it raises ends the measuring.
    """
    if isinstance(rows, Rows):
        whole = rows
        rows = (whole.slice(start, start + batch_rows) for start in range(0, len(whole), batch_rows))
    sizes = block_sizes or ([settings.block_size] if settings else [])
    bounds = [settings.model_copy(update={"block_size": size}) for size in sizes] if settings else []
    ends = span_ends(tokenizer)
    nats, variances = [0.0] * (1 + len(bounds)), [0.0] * len(bounds)
    paid, paid_with_first = [0, 0], [0, 0]
    for batch in rows:
        clean = ar_nats(decoder, batch, on_pass)
        nats[0] += float(clean.sum())
        for i, own in enumerate(bounds):
            drawn = bound_nats(decoder, own, batch, draws, clean=clean, ends=ends, on_pass=on_pass)
            nats[1 + i] += float(drawn.mean(0).sum())
            variances[i] += float(drawn.var(0).sum()) / draws if draws > 1 else math.nan
        for total, first in ((paid, False), (paid_with_first, True)):
            size, tokens = _scored(batch, tokenizer, first)
            total[0], total[1] = total[0] + size, total[1] + tokens

    def result(measure: str, size: int | None, nats: float, paid: list[int], variance: float) -> BitsPerByte:
        scale = math.log(2) * paid[0]
        error = None if math.isnan(variance) else math.sqrt(variance) / scale
        return BitsPerByte(measure, size, nats / scale, *paid, math.exp(min(nats / paid[1], 700)), error)

    results = [result("AR (exact)", None, nats[0], paid, 0.0)]
    for own, total, variance in zip(bounds, nats[1:], variances, strict=True):
        own_paid = paid if own.prediction == "shifted" else paid_with_first
        results.append(result("diffusion (bound)", own.block_size, total, own_paid, variance))
    return results


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


def _scored(rows: Rows, tokenizer: Any, first: bool = False) -> tuple[int, int]:
    """UTF-8 bytes and number of all tokens that the AR loss scores, with `first` of all generated ones.

    An end token has no bytes.
    """
    size = count = 0
    for row in range(len(rows)):
        document, offset, tokens = rows.document[row], rows.offset[row], rows.tokens[row]
        for index in range(int(document.max()) + 1):
            scored = (document == index) & (offset >= 0)
            scored &= first | ~((offset == 0) & (rows.position[row] == 0))
            text = tokenizer.decode(tokens[scored].tolist(), skip_special_tokens=True)
            size, count = size + len(text.encode("utf-8")), count + int(scored.sum())
    return size, count
