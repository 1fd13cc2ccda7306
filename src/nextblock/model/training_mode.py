"""What training changes on a model: no dropout, activations computed again, attention in parts."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from nextblock.attention.rule import Places, block_diffusion_rule
from nextblock.attention.split import SPLIT
from nextblock.config.errors import UsageError
from nextblock.model.decoder import Decoder
from nextblock.model.draft_adapter import attached_adapter, recomputation
from nextblock.model.probe import differs


def recompute_activations(model: PreTrainedModel, **options: Any) -> None:
    """Compute the layers' activations again in the backward pass, in train mode; `options` of torch's checkpoint."""
    model.train()
    options["use_reentrant"] = False
    if attached_adapter(model) is None:
        # Its old name, which transformers 5.23 deprecates, is all that 5.22 and older have.
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options)
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:  # of a model's own code
        raise UsageError(
            f"training.gradient_checkpointing=true: architecture '{model.config.model_type}' has no layers that can "
            "be computed again under a draft adapter; lower training.micro_batch_rows instead"
        )
    for layer in layers:
        # Not by transformers, which takes the cache away: that of `CleanCache` is only read when layers run again.
        again = functools.partial(checkpoint, layer.forward, context_fn=recomputation, **options)
        plain = layer.forward
        layer.forward = lambda *x, a=again, p=plain, **y: (a if torch.is_grad_enabled() else p)(*x, **y)


def without_dropout(model: nn.Module) -> None:
    """Set every dropout to zero: clean-half logits must be the causal model's own (identity 1)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


@torch.no_grad()
def run_in_parts(decoder: Decoder) -> None:
    """On CPU, let two-view passes run `split_attention` instead of SDPA with one dense mask, where a trial agrees.

    Layers with an attention of their own, sinks or soft caps stay as they are.
    """
    model = decoder.model
    if decoder.attention != "sdpa" or decoder.device.type != "cpu" or not model._can_set_attn_implementation():
        return
    position = torch.arange(4)[None]
    zero, block_start = torch.zeros_like(position), position // 2 * 2
    noised, clean = (Places(zero + view, zero, position, block_start, seed=zero[:, :1]) for view in (1, 0))
    tokens = torch.arange(8)[None] % decoder.vocabulary

    def hidden() -> Tensor:
        mask = decoder.two_view_masks(block_diffusion_rule(), noised, clean)
        return decoder.hidden(tokens, torch.cat([position, position], dim=1), mask)

    dense = hidden()
    try:
        model.set_attn_implementation(SPLIT)
        agrees = not differs(hidden(), dense)
    except Exception:  # of whatever kind a model raises at what it does not know
        agrees = False
    if not agrees:
        model.set_attn_implementation("sdpa")
