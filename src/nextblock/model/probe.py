"""Does the model obey a caller's mask and positions? Found by running it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from nextblock.attention.rule import Places
from nextblock.config.errors import UsageError, one_line
from nextblock.model.decoder import Decoder


class NotFiniteError(UsageError):
    """Logits are NaN or infinite: the model is of no use in any mode."""


_refusals: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()


def why_no_blocks(model: PreTrainedModel) -> str | None:
    """What keeps a model from decoding blocks and batches: that it ignores masks or positions. Found once for each.

    Raises:
        UsageError: weights with NaN or infinite values.
    """
    if model not in _refusals:
        try:
            probe(Decoder(model))
            _refusals[model] = None
        except NotFiniteError:
            raise
        except UsageError as error:
            _refusals[model] = str(error)
    return _refusals[model]


@contextmanager
def dense_masks(model: PreTrainedModel) -> Iterator[None]:
    """Run FlexAttention's models with SDPA inside: for passes of a few tokens, which it would compile one by one."""
    compiles = model.config._attn_implementation == "flex_attention"
    try:
        if compiles:
            model.set_attn_implementation("sdpa")
        yield
    finally:
        if compiles:
            model.set_attn_implementation("flex_attention")


@torch.no_grad()
def probe(decoder: Decoder) -> None:
    """Run the model on a few tokens and stop if it does not do what the method needs.

    Checked: two documents whose tokens lie mixed in one row, with their own positions and mask, give what
    each gives alone, also where one stands at the end of the context; a later token reaches an earlier one
    where the mask lets it; hidden states and head, run apart, give the model's own logits; a window that the
    config declares is applied. Mixed, because rotary positions are relative: a model that ignores them would
    pass with documents side by side.

    Raises:
        UsageError: naming what the model ignores.
    """
    with dense_masks(decoder.model):
        _probe(decoder)


def _probe(decoder: Decoder) -> None:
    model, device = decoder.model, decoder.device
    name = f"architecture '{model.config.model_type}'"
    generator = torch.Generator().manual_seed(0)
    alone = [torch.randint(0, decoder.vocabulary, (1, n), generator=generator).to(device) for n in (5, 4)]
    steps = [torch.arange(part.shape[1], device=device)[None] for part in alone]
    try:
        own = [model(input_ids=part).logits for part in alone]
    except Exception as error:
        raise UsageError(f"{name} cannot run on token ids alone; it is not supported ({_named(error)})") from None
    _check_finite(model, own)
    try:
        mixed, far, seen_both_ways = _mixed_documents(decoder, alone, steps)
        apart = [decoder.logits(decoder.hidden(*pair, None)) for pair in zip(alone, steps, strict=True)]
    except Exception as error:
        raise UsageError(
            f"{name} takes no mask of query and key (attention: {decoder.attention}), which blocks need; "
            f"use a decoder that takes one ({_named(error)})"
        ) from None
    if any(differs(a, b) for a, b in zip(apart, own, strict=True)):
        raise UsageError(f"{name}: hidden states and head apart do not give the model's logits; it is not supported")
    how = f"(attention: {decoder.attention}); it is not supported"
    if differs(mixed, torch.cat(own, dim=1)):
        raise UsageError(f"{name} ignores the attention mask or the position ids it is given {how}")
    if differs(far[:, : own[0].shape[1]], own[0]):
        raise UsageError(
            f"{name}: a document changes when another in its row stands at position {decoder.max_positions}; give the "
            "model rotary factors that do not depend on the length (model.override.rope_parameters)"
        )
    # Where the mask counts for nothing both are one computation, as two with the other document elsewhere are for this
    # one. A model may be trained so well that its clean tokens hardly heed later ones: any larger change will do.
    first, scale = own[0].shape[1], float(mixed.float().abs().max())
    reach, noise = ((part - mixed)[:, :first].float().abs().max() for part in (seen_both_ways, far))
    if reach <= 2 * noise + 1e-6 * scale:
        raise UsageError(f"{name} stays causal whatever mask it is given {how}")
    _check_window(decoder, alone[0], steps[0])


def _mixed_documents(decoder: Decoder, alone: list[Tensor], steps: list[Tensor]) -> list[Tensor]:
    """Logits [1, T, V] of two documents mixed in one row, put back in order.

    Returns:
        causal; causal with the second document at the end of the context; each document seeing all of itself.
    """
    device = decoder.device
    order = torch.tensor([6, 1, 4, 7, 0, 8, 3, 2, 5], device=device)  # slot -> token of [first ; second]
    tokens, position = torch.cat(alone, dim=1)[:, order], torch.cat(steps, dim=1)[:, order]
    document = torch.cat([torch.full_like(part, i) for i, part in enumerate(alone)], dim=1)[:, order]
    end = max((decoder.max_positions or 0) - alone[1].shape[1], 0)

    def causal(query: Places, key: Places) -> Tensor:
        return (query.document == key.document) & (key.position <= query.position)

    def both_ways(query: Places, key: Places) -> Tensor:
        return query.document == key.document

    found = []
    for rule, shift in ((causal, 0), (causal, end), (both_ways, 0)):
        at, zero = position + shift * document, torch.zeros_like(tokens)
        mask = decoder.masks(rule, Places(zero, document, at, at, seed=zero[:, :1]))
        logits = decoder.logits(decoder.hidden(tokens, at, mask))
        found.append(logits[:, order.argsort()])
    return found


def _check_finite(model: PreTrainedModel, logits: list[Tensor]) -> None:
    """NotFiniteError for logits with NaN or infinite values, naming the first weight that holds such."""
    if all(bool(part.isfinite().all()) for part in logits):
        return
    weights = ((n, p) for n, p in model.named_parameters() if p.is_floating_point())
    whole = ((n, p.full_tensor() if isinstance(p, DTensor) else p) for n, p in weights)
    bad = next((name for name, weight in whole if not weight.isfinite().all()), None)
    if bad:
        raise NotFiniteError(f"weight {bad} holds NaN or infinite values; restore the weights")
    raise NotFiniteError(f"logits are not finite in {str(model.dtype).removeprefix('torch.')}; use a wider dtype")


def _check_window(decoder: Decoder, tokens: Tensor, position: Tensor) -> None:
    """Refuse a sliding window that the config declares and the plain forward pass does not apply.

    A window of 2 for a moment shows it on a few tokens. Where it changes nothing, the model may have read its
    window when it was made: then a row past the window tells.
    """
    config = decoder.config
    window = next((window for window in decoder.windows.values() if window is not None), None)
    if window is None or window + 1 >= (decoder.max_positions or 2**31):
        return
    plain = decoder.hidden(tokens, position, None)
    config.sliding_window = 2
    try:
        narrow = decoder.hidden(tokens, position, None)
    finally:
        config.sliding_window = window
    if differs(narrow, plain):
        return
    position = torch.arange(min(window + 8, decoder.max_positions or 2**31), device=decoder.device)[None]
    tokens, zero = position % decoder.vocabulary, torch.zeros_like(position)
    mask = decoder.masks(lambda q, k: k.position <= q.position, Places(zero, zero, position, position, zero[:, :1]))
    if differs(decoder.hidden(tokens, position, mask), decoder.hidden(tokens, position, None)):
        raise UsageError(
            f"architecture '{decoder.model.config.model_type}' declares a sliding window of {window} that its own "
            f"forward pass does not apply; set max_position_embeddings (model.override, or config.json) to {window}"
        )


@torch.no_grad()
def probe_adapter(decoder: Decoder) -> None:
    """Run a draft adapter on a few tokens, one of them noised.

    Raises:
        UsageError: the model cannot run with it.
    """
    assert decoder.adapter is not None
    tokens = torch.tensor([[0, 1, decoder.adapter.mask_token_id]], device=decoder.device)
    try:
        with dense_masks(decoder.model):
            decoder.hidden(tokens, torch.arange(3, device=decoder.device)[None], None, noised=tokens > 1)
    except Exception as error:  # of whatever kind a model raises at what it does not know
        raise UsageError(
            f"architecture '{decoder.model.config.model_type}' cannot run with a draft adapter on these layers "
            f"({one_line(error)}); name others in draft_adapter.target_modules"
        ) from None


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def differs(a: Tensor, b: Tensor) -> bool:
    """Whether two computations of the same differ by more than rounding, of float32 or of a narrower dtype."""
    scale = float(b.float().abs().max()) + 1e-6
    return float((a.float() - b.float()).abs().max()) > scale * (1e-3 if a.dtype == torch.float32 else 5e-2)
