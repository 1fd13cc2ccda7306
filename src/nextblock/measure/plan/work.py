"""What a step computes: its tokens, the parameters at work on them, and the FLOPs of matrix products.

Letters: B rows, L clean tokens of a row, N noised ones, b block size, k views.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from nextblock.config.run import AdaptConfig
from nextblock.config.sections import Context
from nextblock.recipe import schedules
from nextblock.training.flops import Flops, kind_of_training
from nextblock.training.footprint import Counts


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
    """Expected masked tokens of all views: half of those that can be masked, and all of a block masked whole."""
    recipe = config.recipe
    maskable = block_size - (recipe.prediction == "shifted")
    share = 0.5 if recipe.complementary else 0.5 + recipe.full_mask_share / 2
    return round(recipe.views * row_length * maskable / block_size * share)


def step_flops(config: AdaptConfig, shape: PreTrainedConfig, counts: Counts, block_size: int) -> Flops:
    """Matrix products of one step at block size b, over the global batch.

    Attention counts the pairs that the mask allows in rows of one document, so an upper bound for packed ones.
    """
    length, rows, kind = config.data.row_length, config.training.batch_rows, kind_of_training(config)
    noised = noised_tokens(config, block_size, length)
    clean_pairs, noised_pairs = attention_pairs(noised, length, block_size, config.recipe.context)
    masked = scored_tokens(config, block_size, length)
    ar = 0 if kind in ("draft adapter", "correction head") or not scores_ar(config, block_size) else length - 1
    taught = masked if config.recipe.taught else 0
    tied = kind == "lora" and config.masks and getattr(shape, "tie_word_embeddings", False)
    tokens, pairs = (rows * length, rows * noised), (rows * clean_pairs, rows * noised_pairs)
    twice = config.training.gradient_checkpointing
    found = counts.products.flops(kind, tokens, pairs, rows * (masked + ar), rows * taught, twice)
    # The head, where its gradient is not computed along with the loss.
    again = (masked + taught if taught or tied else 0) + (ar if tied else 0)
    return replace(found, recomputed=found.recomputed + 2.0 * counts.products.head * rows * again)


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
