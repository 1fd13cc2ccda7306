"""One optimizer step: the rows of a global batch, their gradient, the update, and what is told of it."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from nextblock.attention.rule import block_diffusion_rule
from nextblock.config.errors import TrainingStopped, UsageError
from nextblock.data.rows import Rows, check_tokens
from nextblock.recipe.objective import LossSums
from nextblock.recipe.schedules import Scheduled, scheduled
from nextblock.training.checkpoint import checkpoint_folder
from nextblock.training.devices import peak_memory_gib
from nextblock.training.log import LossProfile
from nextblock.training.ranks import errors_on_all_ranks, gather
from nextblock.training.resume import save
from nextblock.training.run import Run, StepMetrics


def train_step(run: Run, step: int) -> StepMetrics:
    """One optimizer step on one global batch   (paper, Eq. 1-5). `step` counts from 0 in each stage.

    Each rank computes its own rows of the global batch; N counts the tokens of all, so neither
    micro-batches nor ranks enter the result.
    """
    config, began = run.config, time.perf_counter()
    now, recipe = scheduled(step, config), config.recipe
    rows, global_tokens = next_rows(run)
    # For adapters with dropout: it must not depend on what ran before, or a resumed run would differ.
    torch.manual_seed(config.training.seed + 1_000_003 * (run.first_step + step) + run.accelerator.process_index)
    profiled = (step + 1) % config.training.profile_every == 0
    run.profile = LossProfile(now.block_size, run.accelerator.device) if profiled else None

    sums, flops = accumulate(run, step, now, rows, global_tokens)
    loss = float(sums.total(now.ar_weight, recipe.views, recipe.soft_weight, recipe.accept_weight)) / global_tokens
    norm = update(run, step, now, loss, rows)
    return metrics(run, step, now, sums, loss, norm, global_tokens, time.perf_counter() - began, flops)


def accumulate(run: Run, step: int, now: Scheduled, rows: Rows, global_tokens: int) -> tuple[LossSums, float]:
    """Add up the gradient of the loss over this rank's rows, one micro-batch after the other.

    Args:
        rows: this rank's.
        global_tokens: N, what the sum of the losses is divided by.
    Returns:
        The sums over the global batch, in float64 on the CPU, read from the device once; and this rank's useful
        floating-point operations.
    """
    recipe, accelerator, score_ar = run.config.recipe, run.accelerator, now.ar_weight > 0
    rule = block_diffusion_rule(recipe.context, now.target_share)
    size = run.config.training.micro_batch_rows or len(rows)
    losses, counts, flops = [], torch.zeros(2), 0.0
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        view = run.noised(rows.slice(start, stop), now.block_size, run.first_step + step)
        flops += run.flops(view, score_ar)
        view = view.to(accelerator.device)
        with adding_up(run, last=stop == len(rows)):
            sums = run.loss(view, rule, score_ar, soft=recipe.taught, profile=run.profile is not None)
            total = sums.total(now.ar_weight, recipe.views, recipe.soft_weight, recipe.accept_weight)
            # Data parallelism averages gradients over ranks; the loss is a sum over them.
            accelerator.backward(total / global_tokens * accelerator.num_processes)
        if run.profile is not None:
            run.profile.add(view.masked, sums.nats)
        lost = torch.zeros_like(sums.ar) if sums.lost is None else sums.lost
        losses.append(torch.stack([sums.diffusion, sums.ar, sums.soft, lost]).detach())
        counts += torch.tensor([sums.diffusion_tokens, sums.ar_tokens])
    own = sum(torch.stack(losses).cpu().double(), torch.zeros(4, dtype=torch.float64))
    over_ranks: Any = accelerator.reduce(torch.cat([own, counts]).float().to(accelerator.device))
    diffusion, ar, soft, lost, diffusion_tokens, ar_tokens = over_ranks.cpu().double()
    return LossSums(diffusion, ar, diffusion_tokens, ar_tokens, soft, lost=lost), flops


def adding_up(run: Run, last: bool) -> AbstractContextManager[None]:
    """The context of a micro-batch: ranks add up gradients with the last one of a step alone.

    But for FSDP2: to wait would be to hold all of the gradient, unshared, on each rank, unless the run says so. Copies
    of a shard can always wait.
    """
    if not run.is_sharded:
        return nullcontext() if last else run.accelerator.no_sync(run.loss)
    shards: Any = run.loss
    shards.set_requires_gradient_sync(last or not run.config.machine.hold_gradients)
    shards.set_requires_all_reduce(last)
    return nullcontext()


def update(run: Run, step: int, now: Scheduled, loss: float, rows: Rows) -> float:
    """The optimizer's step on clipped gradients; their norm before that.

    Raises:
        TrainingStopped: loss or gradient is not finite; nothing was updated.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = now.learning_rate
    clipped: Any = run.accelerator.clip_grad_norm_(run.trained.parameters(), run.config.optimizer.grad_clip)
    norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        found = rows_at_fault(run, step, now, rows)
        skip = sorted({*run.config.training.skip_rows, *found})
        raise TrainingStopped(
            f"step {run.first_step + step}: loss {loss} and gradient norm {norm} are not finite (rows {found}); "
            "nothing was updated or saved: lower optimizer.lr, or leave these rows out, with "
            f"training.skip_rows={skip}, and go on with --resume auto"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    return norm


def rows_at_fault(run: Run, step: int, now: Scheduled, rows: Rows) -> list[int]:
    """The numbers of the rows of all ranks whose own loss is not finite; of all rows where each loss is finite.

    Args:
        rows: this rank's. All ranks have as many, and run the model as often.
    """
    recipe, finite = run.config.recipe, []
    rule = block_diffusion_rule(recipe.context, now.target_share)
    for k in range(len(rows)):
        view = run.noised(rows.slice(k, k + 1), now.block_size, run.first_step + step).to(run.accelerator.device)
        with torch.no_grad():
            sums = run.loss(view, rule, now.ar_weight > 0, soft=recipe.taught)
        total = sums.total(now.ar_weight, recipe.views, recipe.soft_weight, recipe.accept_weight)
        finite.append(math.isfinite(float(total)))
    parts = gather(list(zip(rows.number.tolist(), finite, strict=True)))
    every = sorted(row for part in parts for row in part)
    return [number for number, is_finite in every if not is_finite] or [number for number, _ in every]


def metrics(
    run: Run,
    step: int,
    now: Scheduled,
    sums: LossSums,
    loss: float,
    norm: float,
    global_tokens: int,
    seconds: float,
    flops: float,
) -> StepMetrics:
    """What a step reports. `sums`: over the global batch. `flops`: useful ones, of this rank in these `seconds`."""

    def mean(total: torch.Tensor, tokens: int | torch.Tensor) -> float:
        return float(total) / float(tokens) if tokens else math.nan

    recipe = run.config.recipe
    return StepMetrics(
        step=run.first_step + step,
        block_size=now.block_size,
        diffusion_loss=mean(sums.diffusion, sums.diffusion_tokens),
        ar_loss=mean(sums.ar, sums.ar_tokens),
        loss=loss,
        ar_weight=now.ar_weight,
        learning_rate=now.learning_rate,
        grad_norm=norm,
        tokens=global_tokens,
        step_seconds=seconds,
        soft_loss=mean(sums.soft, sums.diffusion_tokens) if recipe.soft_weight else math.nan,
        lost_drafts=math.nan
        if not recipe.accept_weight or sums.lost is None
        else mean(sums.lost, sums.diffusion_tokens),
        device_tokens_per_second=global_tokens / seconds / run.accelerator.num_processes,
        peak_memory_gib=peak_memory_gib(run.accelerator.device),
        mfu=None if run.peak_flops is None else flops / seconds / run.peak_flops,
        stage=run.stage,
        stage_number=run.stage_number,
    )


def next_rows(run: Run) -> tuple[Rows, int]:
    """This rank's rows of the next global batch, and N: tokens with offset >= 0 in the rows of all ranks.

    Raises:
        UsageError: on every rank, where the data of one fail; the feed still stands before these rows.
    """
    try:
        with errors_on_all_ranks():
            rows = run.feed.peek().without(run.config.training.skip_rows)
            check_tokens(rows, run.decoder.vocabulary, run.mask_token_id)
    except UsageError as error:
        if run.step == 0:
            raise
        if run.checkpoint != checkpoint_folder(Path(run.config.output), run.step):
            save(run)
        run.writer.finish()
        raise UsageError(f"{error}; {run.checkpoint} holds the steps until here") from None
    run.feed.next()
    return rows, max(1, sum(gather(int((rows.offset >= 0).sum()))))  # 0 where all rows are skipped
