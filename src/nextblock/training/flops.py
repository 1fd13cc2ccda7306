"""Floating-point operations of a training step: of a view that was trained on, or planned from sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nextblock.config.run import AdaptConfig
from nextblock.model.correction import Correction
from nextblock.model.positions import text_config
from nextblock.recipe.corruption import TwoView
from nextblock.training.devices import device_named


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products alone.

    clean, noised, head: what the method needs, forward and backward. recomputed: what gradient checkpointing adds.
    """

    clean: float
    noised: float
    head: float
    recomputed: float = 0.0

    @property
    def useful(self) -> float:
        """All but what is computed twice; MFU counts these."""
        return self.clean + self.noised + self.head


@dataclass(frozen=True)
class Products:
    """Multiply-adds of a forward pass.

    linear: of a token in all linear layers but the head. low_rank: of a token in their updates.
    head: of a scored token. pair: of a query and a key that it may see, scores and values together.
    """

    linear: int
    low_rank: int
    head: int
    pair: int

    @classmethod
    def of(cls, model: PreTrainedModel, updates: Iterable[nn.Parameter] = ()) -> Products:
        """Read off a model's modules. `updates`: what an adapter or LoRA trains; a vector of it is an embedding."""
        config: Any = text_config(model.config)
        head, updates = cast(Any, model.get_output_embeddings()), list(updates)
        apart = {id(head.weight), *map(id, updates)}
        linear = 0
        for layer in model.get_decoder().modules():  # by their sizes: weights in 4 bit have fewer elements
            if isinstance(layer, nn.Linear) and id(layer.weight) not in apart:
                linear += layer.in_features * layer.out_features
            elif isinstance(layer, Conv1D):
                linear += layer.nx * layer.nf
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        embedding = cast(nn.Embedding, model.get_input_embeddings())
        return cls(
            linear=linear,
            low_rank=sum(p.numel() for p in updates if p.ndim == 2),
            head=config.hidden_size * embedding.num_embeddings,
            pair=2 * width * config.num_hidden_layers,
        )

    def flops(
        self,
        kind: str,
        tokens: tuple[float, float],
        pairs: tuple[float, float],
        scored: float,
        distilled: float = 0,
        again: bool = False,
    ) -> Flops:
        """Of training: 2 for a multiply-add; a backward pass is twice a forward one, or as much if weights are frozen.

        Args:
            kind: of `kind_of_training`. A draft adapter's clean half has no gradient.
            tokens, pairs: of the clean half, and of the noised one.
            scored: targets. distilled: those for which the logits of a teacher are computed, too.
            again: with gradient checkpointing.
        """
        passes = {"full": 3, "correction head": 1}.get(kind, 2)
        learning, drafting = (1, 1) if passes == 1 else (3, 3), kind == "draft adapter"

        def half(which: int, weights: int, attention: int, updates: int) -> float:
            own = self.linear * weights + self.low_rank * updates
            return 2.0 * (tokens[which] * own + pairs[which] * self.pair * attention)

        clean = half(0, 1, 1, 0) if drafting else half(0, passes, *learning)
        recomputed = (half(1, 1, 1, 1) + (0 if drafting else half(0, 1, 1, 1))) if again else 0.0
        return Flops(clean, half(1, passes, *learning), 2.0 * self.head * (scored * passes + distilled), recomputed)

    def of_view(self, kind: str, view: TwoView, score_ar: bool, soft: bool = False) -> Flops:
        """What training on this view needs, best on the CPU; padding does not count. Arguments as of `TwoViewLoss`."""
        places, n = view.places, view.noised_length
        real = places.document >= 0
        block = int((places.position - places.block_start)[:, :n][real[:, :n]].max()) + 1 if n else 1
        pairs = torch.where(places.view == 0, places.position + 1, places.block_start + block) * real
        tokens, seen = ((int(x[:, n:].sum()), int(x[:, :n].sum())) for x in (real, pairs))
        masked, ar = len(view.masked), len(view.following) if score_ar and kind in ("full", "lora") else 0
        return self.flops(kind, tokens, seen, ar + masked, masked if soft else 0)


def updates(trained: nn.Module) -> list[nn.Parameter]:
    """The parameters of low-rank updates: without those of a correction head, which are looked up."""
    looked_up = {id(p) for m in trained.modules() if isinstance(m, Correction) for p in m.parameters()}
    return [p for p in trained.parameters() if id(p) not in looked_up]


def kind_of_training(config: AdaptConfig) -> str:
    """ "full", "lora", "draft adapter" or, alone, "correction head"."""
    if config.draft_adapter is not None:
        return "draft adapter"
    if config.correction is not None:
        return "correction head"
    return "full" if config.lora is None else "lora"


def peak_flops(device: torch.device) -> float | None:
    """The device's bfloat16 peak, where it is known."""
    if device.type != "cuda":
        return None
    found = device_named(torch.cuda.get_device_name(device))
    return None if found is None or found.tflops is None else found.tflops * 1e12
