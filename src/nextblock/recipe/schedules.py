"""What changes with the step: block size, the weight of the AR loss, the learning rate."""

from __future__ import annotations

import math
from typing import NamedTuple

from nextblock.config.run import AdaptConfig
from nextblock.config.sections import GrowthConfig, OptimizerConfig


class Scheduled(NamedTuple):
    """What the schedules give for one step   (see the functions of these names)."""

    block_size: int
    ar_weight: float
    target_share: float | None
    learning_rate: float


def scheduled(step: int, config: AdaptConfig) -> Scheduled:
    """The values of all schedules at a step, counted from 0."""
    return Scheduled(
        block_size(step, config.growth),
        ar_weight(step, config),
        target_share(step, config),
        learning_rate(step, config.optimizer, config.training.steps),
    )


def block_size(step: int, growth: GrowthConfig) -> int:
    """b(s) = min(b_max, b_0 * r ** floor(max(0, s - s_0) / delta))   (paper, Eq. 3); steps count from 0."""
    growths = max(0, step - growth.s_0) // growth.delta
    size = growth.b_0
    while growths and size < growth.b_max:  # stops at b_max: the power itself would overflow on long runs
        size, growths = size * growth.r, growths - 1
    return min(growth.b_max, size)


def growth_steps(growth: GrowthConfig, steps: int) -> list[tuple[int, int]]:
    """The steps at which the block size changes: [(step, new block size)], starting with (0, b_0)."""
    changes, step = [(0, block_size(0, growth))], growth.s_0
    while step < steps and changes[-1][1] < growth.b_max:
        size = block_size(step, growth)
        if size != changes[-1][1]:
            changes.append((step, size))
        step += growth.delta
    return changes


def ar_weight(step: int, config: AdaptConfig) -> float:
    """lambda(s)   (Eq. 2): constant, or annealed linearly in log2 of the block size as blocks grow."""
    start, end = config.recipe.ar_weight, config.recipe.ar_weight_final
    growth = config.growth
    if end is None or growth.b_max == growth.b_0:
        return start if end is None else end
    grown = math.log2(block_size(step, growth) / growth.b_0) / math.log2(growth.b_max / growth.b_0)
    return start + (end - start) * grown


def target_share(step: int, config: AdaptConfig) -> float | None:
    """p of the annealed-mask baseline, rising linearly from 0 to 1; None without it or once it is over."""
    steps = config.recipe.annealed_mask_steps
    return step / steps if step < steps else None


def learning_rate(step: int, optimizer: OptimizerConfig, steps: int) -> float:
    """Learning rate of a step: linear warmup, then constant, cosine, or stable with a linear decay (wsd)."""
    if step < optimizer.warmup_steps:
        return optimizer.lr * (step + 1) / optimizer.warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.lr
    if optimizer.schedule == "cosine":
        done = (step - optimizer.warmup_steps) / max(1, steps - optimizer.warmup_steps)
        shape = 0.5 * (1 + math.cos(math.pi * done))
    else:
        decay = max(1.0, optimizer.decay_share * steps)
        shape = min(1.0, (steps - step) / decay)
    return optimizer.lr * (optimizer.min_lr_ratio + (1 - optimizer.min_lr_ratio) * shape)
