"""One training step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from nextblock.attention.rule import block_diffusion_rule
from nextblock.config.errors import TrainingStopped, UsageError
from nextblock.data.rows import Rows, check_tokens
from nextblock.recipe import schedules
from nextblock.recipe.corruption import corrupt
from nextblock.training.checkpoint import checkpoint_folder
from nextblock.training.devices import peak_memory_gib
from nextblock.training.log import LossProfile
from nextblock.training.ranks import gather, together
from nextblock.training.resume import save
from nextblock.training.run import Run, StepMetrics


def train_step(run: Run, step: int) -> StepMetrics:
    """One optimizer step on one global batch   (paper, Eq. 1-5).

    Each rank computes its own rows of the global batch; N counts the tokens of all, so neither
    micro-batches nor ranks enter the result.
    """
    config, recipe, start = run.config, run.config.recipe, time.perf_counter()
    block_size = schedules.block_size(step, config.growth)
    ar_weight = schedules.ar_weight(step, config)
    rule = block_diffusion_rule(recipe.context, schedules.target_share(step, config))
    rows, global_tokens = next_rows(run)
    # For adapters with dropout: it must not depend on what ran before, or a resumed run would differ.
    torch.manual_seed(config.training.seed + 1_000_003 * (run.first_step + step) + run.accelerator.process_index)

    profiled = (step + 1) % config.training.profile_every == 0
    run.profile = LossProfile(block_size, run.accelerator.device) if profiled else None
    sums, flops = torch.zeros(5, dtype=torch.float64), 0.0
    batches = list(micro_batches(run, rows))
    for number, micro in enumerate(batches):
        view = corrupt(
            micro,
            block_size,
            mask_token_id=run.mask_token_id or 0,  # None: at b = 1 nothing is masked
            end_token_id=run.span_ends,
            recipe=recipe,
            seed=config.training.seed,
            step=run.first_step + step,
        )
        flops += run.flops(view, ar_weight > 0)
        view = view.to(run.accelerator.device)
        with accumulation(run, last=number == len(batches) - 1) as backward:
            losses = run.loss(view, rule, score_ar=ar_weight > 0, soft=recipe.soft_weight > 0, profile=profiled)
            # Data parallelism averages gradients over ranks; the loss is a sum over them.
            total = losses.total(ar_weight, recipe.views, recipe.soft_weight)
            backward(total / global_tokens * run.accelerator.num_processes)
        if run.profile is not None and losses.nats is not None:
            run.profile.add(view, losses.nats, recipe.prediction == "shifted")
        parts = (losses.diffusion, losses.ar, losses.diffusion_tokens, losses.ar_tokens, losses.soft)
        sums += torch.stack([part.detach().double() for part in parts]).cpu()
    over_ranks: Any = run.accelerator.reduce(sums.float().to(run.accelerator.device))
    diffusion, ar, diffusion_tokens, ar_tokens, soft = over_ranks.tolist()
    loss = ((diffusion + recipe.soft_weight * soft) / recipe.views + ar_weight * ar) / global_tokens

    learning_rate = schedules.learning_rate(step, config.optimizer, config.training.steps)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    grad_norm = update(run, step, loss, rows)
    seconds, device = time.perf_counter() - start, run.accelerator.device
    return StepMetrics(
        step=run.first_step + step,
        block_size=block_size,
        diffusion_loss=diffusion / diffusion_tokens if diffusion_tokens else math.nan,
        ar_loss=ar / ar_tokens if ar_tokens else math.nan,
        loss=loss,
        ar_weight=ar_weight,
        learning_rate=learning_rate,
        grad_norm=grad_norm,
        tokens=global_tokens,
        step_seconds=seconds,
        soft_loss=soft / diffusion_tokens if recipe.soft_weight and diffusion_tokens else math.nan,
        device_tokens_per_second=global_tokens / seconds / run.accelerator.num_processes,
        peak_memory_gib=peak_memory_gib(device),
        mfu=None if run.peak_flops is None else flops / seconds / run.peak_flops,
        stage=run.stage,
        stage_number=run.stage_number,
    )


@contextmanager
def accumulation(run: Run, *, last: bool) -> Iterator[Callable[[torch.Tensor], None]]:
    """Forward and backward pass of one micro-batch; gives the latter. Ranks add up gradients with the last alone.

    But for FSDP2: to wait would be to hold all of the gradient, unshared, on each rank.
    """
    with nullcontext() if last or run.is_sharded else run.accelerator.no_sync(run.loss):
        yield run.accelerator.backward


def update(run: Run, step: int, loss: float, rows: Rows) -> float:
    """The optimizer's step on clipped gradients; their norm before that.

    Raises:
        TrainingStopped: loss or gradient is not finite; nothing was updated.
    """
    clipped: Any = run.accelerator.clip_grad_norm_(run.trained.parameters(), run.config.optimizer.grad_clip)
    norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        numbers = sorted(number for numbers in gather(rows.number.tolist()) for number in numbers)
        raise TrainingStopped(
            f"step {run.first_step + step}: loss {loss} and gradient norm {norm} are not finite (rows {numbers}); "
            "nothing was saved: lower optimizer.lr, or look at these rows"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norm


def next_rows(run: Run) -> tuple[Rows, int]:
    """This rank's rows of the next global batch, and N: tokens with offset >= 0 in the rows of all ranks.

    Raises:
        UsageError: on every rank, where the data of one fail; the feed still stands before these rows.
    """
    try:
        with together():
            rows = run.feed.peek()
            check_tokens(rows, run.decoder.vocabulary, run.mask_token_id)
    except UsageError as error:
        if run.step == 0:
            raise
        if run.checkpoint != checkpoint_folder(Path(run.config.output), run.step):
            save(run)
        raise UsageError(f"{error}; {run.checkpoint} holds the steps until here") from None
    run.feed.next()
    return rows, sum(gather(int((rows.offset >= 0).sum())))


def micro_batches(run: Run, rows: Rows) -> Iterator[Rows]:
    """This rank's rows in micro-batches."""
    size = run.config.training.micro_batch_rows or len(rows)
    for start in range(0, len(rows), size):
        yield rows.slice(start, min(start + size, len(rows)))
