"""How long one forward pass of 1, 2, 4, ... positions takes behind a filled cache; random models of real shapes.

A decoded block costs passes of many positions where AR costs many passes of one. What that gains depends on
the machine: a GPU that waits for memory runs 32 positions for nearly the price of one, a CPU does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nextblock.config.errors import UsageError
from nextblock.config.sections import BlockDiffusionSettings, validate
from nextblock.decoding.batch import Batch
from nextblock.decoding.events import Stats
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.decoding.options import DecodingConfig
from nextblock.decoding.rows import Row
from nextblock.measure.machine import synchronize
from nextblock.model.loading import choose_attention
from nextblock.model.shapes import shape_values

POSITIONS = (1, 2, 4, 8, 16, 32, 64, 160)
REPEATS = 5  # passes of one width in a row; their mean is one measurement


def random_model(
    shape: str,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    attention: str = "sdpa",
    compile: bool | None = None,
) -> BlockDiffusionLM:
    """A model with random weights, made on the device itself; no tokenizer, blocks of 32, the last id as mask.

    Args:
        shape: a name in `model.shapes.SHAPES`; UsageError for another.
        device: None: CUDA if there is one. "meta": shapes without weights.
        dtype: None: float32 on CPU, bfloat16 elsewhere.
        attention, compile: as of `decoding.lm.load`.
    """
    values = shape_values(shape)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if target.type == "cpu" else torch.bfloat16)
    attention = choose_attention(config, attention, target)
    with target:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    settings = BlockDiffusionSettings(block_size=32, mask_token_id=config.vocab_size - 1)
    return BlockDiffusionLM(model.eval(), None, settings, compile=compile)


def random_prompts(vocabulary: int, length: int, count: int) -> list[list[int]]:
    """`count` prompts of `length` random token ids."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary - 1, (count, length), generator=generator).tolist()


@dataclass(frozen=True)
class ForwardTime:
    """One forward pass of `positions` tokens per row behind `cache_length` cached ones, head and choice included.

    milliseconds: median over rounds. ratio: to one position, median over rounds of the ratio in a round.
    """

    batch: int
    cache_length: int
    positions: int
    milliseconds: float
    ratio: float


def time_forwards(
    lm: BlockDiffusionLM,
    *,
    cache_length: int = 256,
    positions: Sequence[int] = POSITIONS,
    batch: int = 1,
    rounds: int = 5,
    on_call: Callable[[], None] = lambda: None,
) -> list[ForwardTime]:
    """Time the passes that decoding makes: one position is an AR step, more are a block being denoised.

    Widths take turns in each round. Every pass ends with its tokens on the host, as a step of decoding does.

    Args:
        positions: widths; 1 is always measured, for the others are compared with it.
        on_call: called after each width of each round.
    Raises:
        UsageError: more positions than the model has.
    """
    widths, vocabulary = sorted({1, *positions}), lm.decoder.vocabulary
    widest = widths[-1]
    if min(batch, rounds) < 1:
        raise UsageError("batch and rounds must be at least 1")
    check_widths(lm, cache_length, positions)
    rows = [Row(i, p, widest) for i, p in enumerate(random_prompts(vocabulary, cache_length, batch))]
    config = validate(DecodingConfig, {"mode": "diffusion", "block_size": widest})
    milliseconds: dict[int, list[float]] = {width: [] for width in widths}
    with torch.inference_mode():
        runner = Batch(lm.decoder, lm.settings, config, rows, Stats(rows=batch), passes=lm.passes)
        runner.prefill()
        inputs = {w: torch.tensor(random_prompts(vocabulary, w, batch), device=runner.device) for w in widths}
        for number in range(rounds + 1):  # the first one warms up
            for width in widths:
                took = _pass_milliseconds(runner, inputs[width], cache_length)
                if number:
                    milliseconds[width].append(took)
                    on_call()
    found = []
    for width, took in milliseconds.items():
        ratio = median(own / one for own, one in zip(took, milliseconds[1], strict=True))
        found.append(ForwardTime(batch, cache_length, width, median(took), ratio))
    return found


def check_widths(lm: BlockDiffusionLM, cache_length: int, positions: Sequence[int]) -> None:
    """UsageError for passes behind a cache that the model's context has no room for, or that is empty."""
    if min(cache_length, *positions) < 1:
        raise UsageError(f"cache_length={cache_length} and all positions must be at least 1")
    widest, room = max(positions), lm.decoder.max_positions
    if room is not None and cache_length + widest > room:
        raise UsageError(
            f"cache_length={cache_length} and {widest} positions exceed the model's context of {room}; "
            f"use a cache_length of at most {room - widest}"
        )


def _pass_milliseconds(runner: Batch, tokens: torch.Tensor, start: int) -> float:
    """Mean of `REPEATS` passes over `tokens` int64 [B, Q] at the same place of the cache."""
    rows, width = tokens.shape
    synchronize(runner.device)
    began = time.perf_counter()
    for _ in range(REPEATS):
        hidden = runner.forward(tokens, [start] * rows, [width == 1] * rows)
        runner.head.choose(runner.head.logits(hidden.flatten(0, 1)), [])[0].tolist()
    synchronize(runner.device)
    return 1000 * (time.perf_counter() - began) / REPEATS
