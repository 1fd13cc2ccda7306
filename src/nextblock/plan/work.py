"""What a step computes: its tokens, the parameters at work on them, and the FLOPs of matrix products.

Letters: B rows, L clean tokens of a row, N noised ones, b block size, k views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    PreTrainedConfig,
)
from transformers.pytorch_utils import Conv1D

from nextblock import schedules
from nextblock.config import AdaptConfig, Context
from nextblock.model import text_config
from nextblock.plan.fakes import bare_model, low_rank_updates


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one optimizer step over the global batch, matrix products alone.

    clean, noised, head: what the method needs, forward and backward. recomputed: what gradient checkpointing adds.
    """

    clean: float
    noised: float
    head: float
    recomputed: float

    @property
    def useful(self) -> float:
        """All but what is computed twice; MFU counts these."""
        return self.clean + self.noised + self.head


def kind_of_training(config: AdaptConfig) -> str:
    """ "full", "lora" or "draft adapter"."""
    if config.draft_adapter is not None:
        return "draft adapter"
    return "full" if config.lora is None else "lora"


def micro_rows(config: AdaptConfig, devices: int) -> int:
    """Rows in one forward pass on one device."""
    share = config.training.batch_rows // devices
    return min(config.training.micro_batch_rows or share, share)


def noised_tokens(config: AdaptConfig, block_size: int, row_length: int) -> int:
    """Expected slots of the noised half: of each view the blocks in which something is masked.

    With t ~ Uniform[0, 1] none of m maskable tokens is masked with probability 1 / (m + 1).
    """
    recipe = config.recipe
    maskable = block_size - (recipe.prediction == "shifted")
    share = maskable / (maskable + 1)
    if maskable:  # of a block that is masked whole, a complementary view masks nothing
        whole = 0.5 if recipe.complementary else 1.0
        share += recipe.full_mask_share * (whole - share)
    return round(recipe.views * row_length * share)


def scored_tokens(config: AdaptConfig, block_size: int, row_length: int) -> int:
    """Expected masked tokens, all views together: half of those that can be, but for blocks that are masked whole."""
    recipe = config.recipe
    maskable = block_size - (recipe.prediction == "shifted")
    share = 0.5 if recipe.complementary else 0.5 + recipe.full_mask_share / 2
    return round(recipe.views * row_length * maskable / block_size * share)


@dataclass
class Counts:
    """Numbers of parameters, and multiply-adds of one token in all linear layers but the head."""

    parent: int = 0
    trained: int = 0
    linear: int = 0
    low_rank: int = 0
    layers: int = 0
    heads_times_size: int = 0


def count_parameters(config: AdaptConfig, shape: PreTrainedConfig) -> Counts:
    """Read off the model's modules, on the meta device."""
    with torch.device("meta"):
        model = bare_model(shape, torch.float32)
        counts = Counts(parent=sum(p.numel() for p in model.parameters()))
        head = model.get_output_embeddings()
        linear = [m for m in model.get_decoder().modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
        counts.linear = sum(m.weight.numel() for m in linear)
        counts.trained = counts.parent
        adapter = low_rank_updates(config, model)
        if adapter is not None:
            counts.trained = sum(p.numel() for p in adapter.parameters())
            counts.low_rank = counts.trained - adapter.mask_vector.numel()
    text: Any = text_config(shape)
    counts.layers = text.num_hidden_layers
    heads = text.num_attention_heads
    counts.heads_times_size = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    return counts


def step_flops(config: AdaptConfig, shape: PreTrainedConfig, counts: Counts, block_size: int) -> Flops:
    """Matrix products of one step at block size b: 2 per multiply-add; backward twice forward, or once if frozen.

    Attention counts the pairs that the mask allows in rows of one document, so an upper bound for packed ones.
    """
    length, rows = config.data.row_length, config.training.batch_rows
    noised = noised_tokens(config, block_size, length)
    pair = 4 * counts.heads_times_size * counts.layers
    kind = kind_of_training(config)
    passes = 3 if kind == "full" else 2  # of frozen weights no gradient is computed
    updates = 6 * counts.low_rank

    def half(tokens: int, pairs: float, weight_passes: int, attention_passes: int, extra: int) -> float:
        return rows * (tokens * (2 * counts.linear * weight_passes + extra) + pairs * pair * attention_passes)

    clean_pairs, noised_pairs = attention_pairs(noised, length, block_size, config.recipe.context)
    drafting = kind == "draft adapter"
    clean = half(length, clean_pairs, 1 if drafting else passes, 1 if drafting else 3, 0 if drafting else updates)
    noisy = half(noised, noised_pairs, passes, 3, updates)
    text: Any = text_config(shape)
    logits = rows * 2 * text.vocab_size * text.hidden_size
    scored = scored_tokens(config, block_size, length) * logits
    ar = 0 if drafting or not scores_ar(config, block_size) else (length - 1) * logits
    taught = scored if config.recipe.soft_weight else 0  # the teacher's logits
    head = (scored + ar) * passes + taught
    tied = kind == "lora" and config.masks and getattr(shape, "tie_word_embeddings", False)
    # The head, where its gradient is not computed along with the loss.
    recomputed = float((scored + taught if taught or tied else 0) + (ar if tied else 0))
    if config.training.gradient_checkpointing:
        recomputed += half(noised, noised_pairs, 1, 1, updates // 3) + half(length, clean_pairs, 1, 1, updates // 3)
    return Flops(clean, noisy, head, recomputed)


def scores_ar(config: AdaptConfig, block_size: int) -> bool:
    """Whether the AR loss counts at a block size of the run: lambda may begin or end at 0."""
    changes = schedules.growth_steps(config.growth, config.training.steps)
    return schedules.ar_weight(next(step for step, size in changes if size == block_size), config) > 0


def attention_pairs(
    noised: int, length: int, block_size: int, context: Context = "context_causal"
) -> tuple[float, float]:
    """Pairs (query, key) that the mask of one row allows: of clean queries, and of noised ones on average."""
    seen = block_size if context == "block_causal" else 1
    return length * (length + seen) / 2, noised * ((length - block_size) / 2 + block_size)


def run_flops(config: AdaptConfig, shape: PreTrainedConfig, counts: Counts) -> float:
    """Useful FLOPs of the whole run, block growth included."""
    changes = schedules.growth_steps(config.growth, config.training.steps)
    ends = [step for step, _ in changes[1:]] + [config.training.steps]
    return sum(
        (end - start) * step_flops(config, shape, counts, size).useful
        for (start, size), end in zip(changes, ends, strict=True)
    )
