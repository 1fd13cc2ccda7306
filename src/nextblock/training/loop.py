"""The training loop. One step reads like the paper; state lives at the edges."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_bnb_available
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedModel

from nextblock.attention.rule import block_diffusion_rule
from nextblock.config.errors import TrainingStopped, UsageError, require
from nextblock.config.files import LOCK, locked, make_folder, unwritten, whole_folder, write_whole
from nextblock.config.run import AdaptConfig, stage_configs
from nextblock.config.sections import BlockDiffusionSettings, DataConfig, ModelConfig, OptimizerConfig
from nextblock.data.encode import span_ends
from nextblock.data.feed import Feed, merged
from nextblock.data.rows import Rows, check_tokens
from nextblock.data.stream import NoDocument, RowStream
from nextblock.model.decoder import Decoder
from nextblock.model.draft_adapter import DraftAdapter, save_adapter
from nextblock.model.loading import weight_shapes, weights_folder
from nextblock.model.lora import LoraAdapter
from nextblock.model.mask_token import check_round_trip, choose_mask_token
from nextblock.model.parent import load_parent, parent_config, parent_tokenizer
from nextblock.model.positions import check_row_length
from nextblock.model.probe import probe, probe_adapter, recompute_activations, run_in_parts, without_dropout
from nextblock.recipe import schedules
from nextblock.recipe.corruption import TwoView, corrupt
from nextblock.recipe.objective import DraftLoss, TwoViewLoss
from nextblock.training.checkpoint import (
    checkpoint_folder,
    export,
    export_settings,
    list_checkpoints,
    load_checkpoint,
    load_optimizer,
    load_weights,
    newest_whole_checkpoint,
    remove_partial,
    save_checkpoint,
    whole_weights,
)
from nextblock.training.launcher import check_batch, make_accelerator
from nextblock.training.log import (
    TRACKERS,
    LossProfile,
    Products,
    kind_of_training,
    peak_flops,
    peak_memory_gib,
    run_log,
)
from nextblock.training.ranks import gather, is_main, together

LOG = "log.jsonl"
RESOLVED_CONFIG = "nextblock.yaml"
MAY_CHANGE_ON_RESUME = (
    "training.micro_batch_rows",
    "training.checkpoint_every",
    "training.keep_last",
    "training.keep_every",
    "training.checkpoint",
    "training.fsdp",
    "training.evaluate_rows",
    "training.evaluate_every",
    "training.profile_every",
    "training.trackers",
    "training.compile",
    "training.gradient_checkpointing",
    "model.export_dtype",
    "model.attention",
    "machine.gpu",
    "machine.gpus",
)


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did. Losses in nats per scored token; NaN where nothing was scored."""

    step: int
    block_size: int
    diffusion_loss: float
    ar_loss: float
    loss: float
    ar_weight: float
    learning_rate: float
    grad_norm: float
    tokens: int
    step_seconds: float
    soft_loss: float = math.nan
    """Mean KL from the clean half's predictions over the masked tokens; NaN without soft targets."""
    device_tokens_per_second: float = math.nan
    peak_memory_gib: float = math.nan
    """Of the main process since it began: allocated on CUDA, resident elsewhere."""
    mfu: float | None = None
    """Useful floating-point operations per second over the device's bfloat16 peak, where that is known."""
    stage: str | None = None
    stage_number: int | None = None
    """From 1; None in a run without stages."""

    @property
    def tokens_per_second(self) -> float:
        """Clean tokens with offset >= 0 that the step trained on, per second."""
        return self.tokens / self.step_seconds


@dataclass
class Run:
    """Everything that a step needs and that outlives it."""

    config: AdaptConfig
    accelerator: Accelerator
    tokenizer: Any
    decoder: Decoder
    loss: torch.nn.Module
    optimizer: torch.optim.Optimizer
    feed: Feed
    mask_token_id: int | None
    output: Path
    lora: LoraAdapter | None = None
    step: int = 0
    profile: LossProfile | None = None
    held_out: Rows | None = None  # of rank 0: the first held-out rows, where the data leave any
    first_step: int = 0  # steps of the stages before this one
    stage: str | None = None
    stage_number: int | None = None
    checkpoint: Path | None = None  # the last one that was written or gone on from
    seconds: float = 0.0  # of training until now, with checkpoints, evaluations and what was done before a resume
    finished: bool = False

    @cached_property
    def span_ends(self) -> list[int]:
        """Tokens that end a generated span: the end token and what ends a turn of chat."""
        return span_ends(self.tokenizer)

    @property
    def trained(self) -> torch.nn.Module:
        """What has been learned, so what a checkpoint holds: LoRA's or the draft adapter's weights, or all."""
        if self.lora is not None:
            return self.lora.weights
        return self.decoder.adapter or self.decoder.model

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the model only (FSDP2)."""
        return self.accelerator.distributed_type == DistributedType.FSDP

    @property
    def peak_flops(self) -> float | None:
        """The bfloat16 peak that MFU is measured against; None where it is not known or another dtype computes."""
        low = self.config.training.mixed_precision == "bf16" or self.config.model.dtype == "bfloat16"
        return peak_flops(self.accelerator.device) if low else None

    def flops(self, view: TwoView, score_ar: bool) -> float:
        """Useful floating-point operations of a micro-batch; 0 where nothing is measured against them."""
        if self.peak_flops is None:
            return 0.0
        model, trained, kind = self.decoder.model, self.trained, kind_of_training(self.config)
        products = Products.of(model, () if kind == "full" else trained.parameters())
        return products.of_view(kind, view, score_ar, self.config.recipe.soft_weight > 0).useful

    @property
    def settings(self) -> BlockDiffusionSettings | None:
        """What the checkpoint tells a sampler; None after plain AR training (b = 1 to the end)."""
        if self.mask_token_id is None or not self.config.masks:
            return None
        return BlockDiffusionSettings(
            block_size=self.config.growth.b_max,
            mask_token_id=self.mask_token_id,
            context=self.config.recipe.context,
            prediction=self.config.recipe.prediction,
        )


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


def train(
    config: AdaptConfig,
    *,
    resume: bool = False,
    on_step: Callable[[StepMetrics], None] | None = None,
    evaluate: Callable[[Run], Mapping[str, Any] | None] | None = None,
    received: list[int] | None = None,
) -> Run:
    """Adapt the parent and leave a Hugging Face folder in `config.output`.

    Stages run one after another, each in a folder of its own in `config.output`; the last one's export is the run's.

    Args:
        config: checked configuration.
        resume: go on from the newest whole checkpoint in the output folder, if there is one.
        on_step: called on the main process after each step.
        evaluate: called on every process each `training.evaluate_every` steps; what it returns is logged.
        received: of the caller's `stop_on_sigterm`, where that outlasts the training.
    Returns:
        The run (of the last stage reached), with the trained model in memory. `run.finished` is False when a
        SIGTERM ended it early (a checkpoint was saved).
    Raises:
        UsageError: bad input, before anything is written.
    """
    output, main = Path(config.output), is_main()
    stages = stage_configs(config)
    masks = any(stage.masks for stage in stages)
    with together():
        check_ranks(config, resume)
        if main:
            check_output(output, stages, resume)
        for named, stage in zip(config.stages[1:], stages[1:], strict=False):  # must not stop the run days later
            try:
                check_stage(stage, stages[0])
            except UsageError as error:
                raise UsageError(f"stage {named.name}: {error}") from None
    catching = stop_on_sigterm() if received is None else nullcontext(received)
    with ExitStack() as held:
        signals = held.enter_context(catching)
        held.enter_context(writing(output))
        with together():
            if main:
                held.enter_context(locked(output))
                held.enter_context(nothing_left(output, stages))
        return run_stages(config, stages, masks, resume, signals, on_step, evaluate)


def run_stages(
    config: AdaptConfig,
    stages: list[AdaptConfig],
    masks: bool,
    resume: bool,
    received: list[int],
    on_step: Callable[[StepMetrics], None] | None,
    evaluate: Callable[[Run], Mapping[str, Any] | None] | None,
) -> Run:
    """`train`, with the configuration of each stage.

    Args:
        masks: whether any of them needs the mask token.
        received: from `stop_on_sigterm`.
    """
    output, main = Path(config.output), is_main()
    first, newest, damaged = 0, None, []
    with together():  # or the other ranks would wait for ever
        if main and resume:
            first, newest, damaged = stage_to_resume(stages)
            check_finished_stages(stages[:first])
    first, newest = gather((first, newest))[0]
    for line in damaged:
        print(line)
    run: Any = None
    write: Any = None
    with ExitStack() as until_the_end:
        for number in range(first, len(stages)):
            before = None if number == 0 else Path(stages[number - 1].output)
            ended, seconds = (None, 0.0) if run is None else (run.checkpoint, run.seconds)  # of the stage before
            run = prepare(stages[number], before, ended, masks=masks)
            run.seconds = seconds
            run.output, run.first_step = output, sum(stage.training.steps for stage in stages[:number])
            if config.stages:
                run.stage, run.stage_number = config.stages[number].name, number + 1
            if ended is not None:
                carry_over(run, ended, fresh=config.stages[number].fresh_optimizer, data=stages[number - 1].data)
            if newest is not None:
                restore(run, newest)
                newest = None
            elif number == 0:
                check_space(run, stages)
            rehearse_export(run)
            if main:
                for folder, resolved in ((output, config), (Path(stages[number].output), stages[number])):
                    make_folder(folder)
                    (folder / RESOLVED_CONFIG).write_text(
                        yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
                    )
                remove_partial(Path(stages[number].output))
            if write is None:  # one log and one run of the trackers for all stages
                if main and (damaged := trim_log(output / LOG, run.first_step + run.step)):
                    run.accelerator.print(f"{output / LOG}: {damaged} damaged lines were dropped")
                flat_config = _flat(config.model_dump(mode="json"))
                write = until_the_end.enter_context(run_log(run.accelerator, output / LOG, flat_config))
            run_stage(run, write, received, on_step, evaluate)
            if any(gather(bool(received))):
                return run
            run.finished = number == len(stages) - 1
            export_run(run, output if run.finished else Path(stages[number].output))
            run.accelerator.free_memory()
    return run


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """One line for a disk that is full or cannot be written, wherever the run meets it."""
    try:
        yield
    except Exception as error:  # an OSError for Python, and something else for each library that writes
        if isinstance(error, UsageError) or (why := unwritten(error)) is None:
            raise
        reason, cure = why
        where = getattr(error, "filename", None) or output
        raise TrainingStopped(f"cannot write {where}: {reason}; {cure}, then go on with --resume auto") from None


@contextmanager
def nothing_left(output: Path, stages: list[AdaptConfig]) -> Iterator[None]:
    """Where a new run ends before its first step is done, take away what it has put into the output folder.

    Of one that has made a step everything stays: the log shows how it came to its end.
    """
    used = not is_empty(output)
    try:
        yield
    except BaseException:
        log = output / LOG
        if not (used or (log.is_file() and log.stat().st_size)):
            for folder in (
                output / TRACKERS,
                *(Path(stage.output) for stage in stages if stage.output != str(output)),
            ):
                shutil.rmtree(folder, ignore_errors=True)
            for name in (RESOLVED_CONFIG, LOG):
                (output / name).unlink(missing_ok=True)
        raise


def run_stage(
    run: Run,
    write: Callable[[Mapping[str, Any]], None],
    received: list[int],
    on_step: Callable[[StepMetrics], None] | None,
    evaluate: Callable[[Run], Mapping[str, Any] | None] | None,
) -> None:
    """All steps of a run without stages, or of one stage, with their log (`write`, of `run_log`) and checkpoints."""
    config, due = run.config, run.config.training.evaluate_every
    with closing(run.feed):
        stop = any(gather(bool(received)))
        began = time.perf_counter() - run.seconds
        while run.step < config.training.steps and not stop:
            metrics = train_step(run, run.step)
            run.step += 1
            stop = any(gather(bool(received)))  # a signal to one rank stops all, after the same step
            write(asdict(metrics))
            if on_step and is_main():
                on_step(metrics)
            if run.profile and (profile := run.profile.record(run.accelerator, metrics.step)):
                write(profile)
            if evaluate and due and run.step % due == 0 and (found := evaluate(run)):
                write({"kind": "evaluation", "step": metrics.step, **found})
            run.seconds = time.perf_counter() - began
            if run.step % config.training.checkpoint_every == 0 or run.step == config.training.steps or stop:
                save(run)
                run.seconds = time.perf_counter() - began


def stage_to_resume(stages: list[AdaptConfig]) -> tuple[int, Path | None, list[str]]:
    """The last stage with a checkpoint, and that of `newest_whole_checkpoint`. Without any, the first and None.

    Raises:
        UsageError: of that stage, no checkpoint is whole: to start over must be asked for.
    """
    for number in range(len(stages) - 1, -1, -1):
        folder, damaged = newest_whole_checkpoint(Path(stages[number].output))
        if folder is not None:
            return number, folder, damaged
        if damaged:
            raise UsageError(
                f"{'; '.join(damaged)}; no other is left: delete what is damaged to start over, or choose another "
                "--output"
            )
    return 0, None, []


def check_stage(config: AdaptConfig, first: AdaptConfig) -> None:
    """UsageError for what is wrong with a later stage's data, row length, batch or model."""
    check_batch(config)
    RowStream(config.data, parent_tokenizer(config.model), seed=config.training.seed)
    check_row_length(config.data.row_length, parent_config(config.model))
    check_override(config.model, first.model)


def check_override(model: ModelConfig, before: ModelConfig) -> None:
    """UsageError where the values that `model.override` replaces make other weights than there were before."""
    wanted, there = (weight_shapes(parent_config(m), m.trust_remote_code) for m in (model, before))
    for name in sorted(wanted.keys() | there.keys()):
        if wanted.get(name) != there.get(name):
            sizes = (" x ".join(map(str, shapes.get(name, ()))) or "none" for shapes in (wanted, there))
            raise UsageError(
                f"model.override={dict(model.override)}: {name} would be {next(sizes)} and is {next(sizes)}; replace "
                "only values that leave the weights as they are"
            )


def carry_over(run: Run, folder: Path, *, fresh: bool, data: DataConfig) -> None:
    """Take the optimizer's moments (unless `fresh`) and the position in equal `data` from a last checkpoint."""
    if not fresh:
        own = [{key: value for key, value in group.items() if key != "params"} for group in run.optimizer.param_groups]
        load_optimizer(folder, run.trained, run.optimizer)
        for group, options in zip(run.optimizer.param_groups, own, strict=True):
            group.update(options)
    if run.config.data == data:
        run.feed.load_state(json.loads((folder / "state.json").read_text(encoding="utf-8"))["stream"])


def check_ranks(config: AdaptConfig, resume: bool) -> None:
    """UsageError if another rank was started with another configuration, or one is to resume and another is not."""
    ours, *others = gather({"resume": resume, **_flat(config.model_dump(mode="json"))})
    for rank, theirs in enumerate(others, 1):
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise UsageError(
                    f"{key} is {ours.get(key)!r} on rank 0 and {theirs.get(key)!r} on rank {rank}; "
                    "start all processes with the same configuration"
                )


def export_run(run: Run, output: Path) -> None:
    """Write what the run ends with: a Hugging Face folder, or the draft adapter's. All ranks call it together.

    Raises:
        UsageError: it cannot be written; what was in the folder stays as it was.
    """
    weights = whole_weights(run.decoder.model) if run.is_sharded else None
    with together(), writing(output), whole_folder(output) if is_main() else nullcontext() as folder:
        if folder is None:
            return
        write_adapters(run, folder)
        if run.decoder.adapter is None:
            model, dtype = run.decoder.model if run.lora is None else merged_model(run, run.lora), export_dtype(run)
            export(folder, model, run.tokenizer, run.settings, dtype, weights)


def rehearse_export(run: Run) -> None:
    """Write what a run ends with, but for the model's weights, to a folder that goes again. All ranks together.

    Raises:
        UsageError: the parent's configuration or tokenizer is such that it cannot be written, or read again.
    """
    with together(), writing(run.output), TemporaryDirectory() as name:
        if not is_main():
            return
        try:
            write_adapters(run, Path(name))
            if run.decoder.adapter is None:
                export_settings(Path(name), run.decoder.model, run.tokenizer, run.settings)
                AutoTokenizer.from_pretrained(name, trust_remote_code=run.config.model.trust_remote_code)
        except Exception as error:  # of whatever kind a config or a tokenizer raises
            if isinstance(error, UsageError) or unwritten(error):
                raise
            why = str(error).strip().split("\n")[0]
            raise UsageError(f"the result of this parent could not be written: {why}; mend the files of it") from None


def write_adapters(run: Run, folder: Path) -> None:
    """Write the draft adapter, or that of LoRA, if the run trains one."""
    model, settings = run.config.model, run.settings
    if run.lora is not None:
        run.lora.save(folder / "adapter")
    elif run.decoder.adapter is not None:
        assert settings is not None
        parent, dtype = weights_folder(model.path, model.revision), export_dtype(run) or torch.float32
        save_adapter(folder, run.decoder.adapter, settings, model.path, parent, dtype)


def export_dtype(run: Run) -> torch.dtype | None:
    """That of the exported weights; None: as trained."""
    name = run.config.model.export_dtype
    return None if name is None else getattr(torch, name)


def check_space(run: Run, stages: list[AdaptConfig]) -> None:
    """UsageError where the disk has less room than a new run certainly takes: checkpoints kept, and models."""
    trained = sum(p.numel() * p.element_size() for p in run.trained.parameters())
    checkpoint = trained * (3 if run.config.optimizer.name == "adamw" else 1)  # weights and two moments
    model = 0
    if run.decoder.adapter is None:
        size = (export_dtype(run) or run.decoder.model.dtype).itemsize
        model = sum(p.numel() for p in run.decoder.model.parameters()) * size
    needed = 0
    for options in (stage.training for stage in stages):
        needed += min(options.keep_last, math.ceil(options.steps / options.checkpoint_every)) * checkpoint + model
    with together():
        free = shutil.disk_usage(run.output).free if is_main() else needed
        if free < needed:
            raise UsageError(
                f"output folder {run.output} has {free / 2**30:.2f} GiB of free space, and the run would leave "
                f"{needed / 2**30:.2f} GiB in it ({checkpoint / 2**30:.2f} GiB a checkpoint); free space, lower "
                "training.keep_last, or choose another --output"
            )


def merged_model(run: Run, lora: LoraAdapter) -> PreTrainedModel:
    """The parent with the updates added: the run's own model, or where that is quantized one loaded again, whole."""
    config = run.config
    if config.model.quantization is None:
        return lora.merge()
    assert config.lora is not None
    whole = load_parent(config.model.model_copy(update={"quantization": None}), "cpu")
    if run.mask_token_id is not None:
        choose_mask_token(whole, parent_tokenizer(config.model), config.model.mask_token)
    again = LoraAdapter(whole.model, config.lora, run.mask_token_id, config.model.path)
    again.weights.load_state_dict(lora.weights.state_dict())
    return again.merge()


def prepare(
    config: AdaptConfig, before: Path | None = None, checkpoint: Path | None = None, *, masks: bool | None = None
) -> Run:
    """Read data, load and check the parent (or what the stage in the folder `before` has made of it), and hand
    both to accelerate. Writes nothing.

    Args:
        checkpoint: with the weights that the stage before ended with; None: those of its model, which may be rounded.
        masks: give the model a mask token, as this or a later stage needs it; None: as this one does.
    """
    accelerator = make_accelerator(config)
    with together():
        loaded = load(config, accelerator, before, checkpoint, masks=config.masks if masks is None else masks)
    tokenizer, feed, decoder, mask_token_id, lora, held_out = loaded
    trained = lora.weights if lora is not None else decoder.adapter or decoder.model
    trained.requires_grad_(True)
    if config.training.gradient_checkpointing:
        recompute_activations(decoder.model)
    if config.training.compile:
        decoder.model.base_model.compile()
    optimizer = make_optimizer(config.optimizer, trained)
    objective = TwoViewLoss(decoder) if decoder.adapter is None else DraftLoss(decoder)
    loss, optimizer = accelerator.prepare(objective, optimizer)
    output = Path(config.output)
    return Run(
        config, accelerator, tokenizer, decoder, loss, optimizer, feed, mask_token_id, output, lora, held_out=held_out
    )


def load(
    config: AdaptConfig, accelerator: Accelerator, before: Path | None, checkpoint: Path | None, *, masks: bool
) -> tuple[Any, Feed, Decoder, int | None, LoraAdapter | None, Rows | None]:
    """Tokenizer, data, parent (with its draft adapter), mask token id, LoRA and held-out rows, all checked.

    No communication.
    """
    if config.lora is not None:
        require("peft", "lora", "lora")
    if config.optimizer.name == "adamw_8bit" and not is_bnb_available():
        raise UsageError("optimizer.name=adamw_8bit needs bitsandbytes; pip install bitsandbytes, or use adamw")
    torch.manual_seed(config.training.seed)  # for a parent that starts from random weights
    model = config.model
    if before is not None:
        begin = {"path": str(before), "revision": None, "tokenizer": None, "scratch": None}
        model = model.model_copy(update=begin)
    parent_config(model)  # what can be known without reading data or weights comes first
    if model.override and model.scratch is None:
        check_override(model, model.model_copy(update={"override": {}}))
    tokenizer = parent_tokenizer(model)
    feed = Feed(
        config.data,
        tokenizer,
        seed=config.training.seed,
        batch_rows=config.training.batch_rows,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )
    held_out = held_out_rows(config, tokenizer) if is_main() else None
    decoder = load_parent(model, accelerator.device)
    if checkpoint is not None:
        load_weights(checkpoint, decoder.model)
    if decoder.attention == "flex_attention" and decoder.device.type == "cpu":
        raise UsageError("model.attention=flex_attention has no backward pass on CPU; use sdpa, or auto")
    if len(tokenizer) > decoder.vocabulary:  # else a new mask token would make rows for the missing ones, untrained
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {decoder.vocabulary}; "
            "use the tokenizer that belongs to the model"
        )
    check_row_length(config.data.row_length, decoder.model.config)
    probe(decoder)
    if config.draft_adapter is not None:
        adapter = DraftAdapter(decoder.model, config.draft_adapter)
        decoder, mask_token_id = Decoder(decoder.model, adapter), adapter.mask_token_id
        probe_adapter(decoder)
    elif masks:
        mask_token_id = choose_mask_token(decoder, tokenizer, model.mask_token)
        check_round_trip(tokenizer, mask_token_id)
    else:
        mask_token_id = None
    # Look at the first batch, so that most bad data stops before anything is written.
    check_tokens(feed.peek(), decoder.vocabulary, mask_token_id)
    without_dropout(decoder.model)
    if not config.training.compile:  # which would not see through it
        run_in_parts(decoder)
    if size := dense_mask_bytes(config, decoder, accelerator.num_processes):
        accelerator.print(
            f"attention: '{decoder.attention}' with a dense mask, up to {size / 2**20:,.0f} MiB for each forward pass "
            "of a process; shorter rows or a smaller training.micro_batch_rows make it less"
        )
    lora = None
    if config.lora is not None:
        lora = LoraAdapter(decoder.model, config.lora, mask_token_id, config.model.path)
    return tokenizer, feed, decoder, mask_token_id, lora, held_out


def held_out_rows(config: AdaptConfig, tokenizer: Any) -> Rows | None:
    """The first held-out rows, or None where none are wanted or left (a single document, `data.held_out` = 0)."""
    if not (config.data.held_out and config.training.evaluate_rows):
        return None
    try:
        stream = RowStream(config.data, tokenizer, seed=config.training.seed, held_out=True)
        return stream.next(config.training.evaluate_rows)
    except NoDocument:
        return None


def dense_mask_bytes(config: AdaptConfig, decoder: Decoder, processes: int) -> int:
    """The most that the dense masks of one forward pass take, where there are any."""
    rows = config.training.batch_rows // processes
    rows, length = min(config.training.micro_batch_rows or rows, rows), config.data.row_length
    noised = config.recipe.views * length if config.masks else 0
    if decoder.adapter is None:
        return decoder.dense_mask_bytes(rows, noised + length, noised + length)
    return decoder.dense_mask_bytes(rows, length, length) + decoder.dense_mask_bytes(rows, noised, noised + length)


def make_optimizer(options: OptimizerConfig, trained: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices alone, its states in 32 or in 8 bits."""
    decay = [p for p in trained.parameters() if p.ndim >= 2]
    plain = [p for p in trained.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    betas = (options.beta_1, options.beta_2)
    if options.name == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, betas=betas, fused=True)
    from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]  # checked by `load`

    return AdamW8bit(groups, lr=options.lr, betas=betas)


def save(run: Run) -> None:
    """Save a resumable checkpoint at the run's step."""
    state = {
        "stream": merged(gather(run.feed.state())),
        "config": run.config.model_dump(mode="json"),
        "seconds": run.seconds,
    }
    options = run.config.training
    run.checkpoint = save_checkpoint(
        Path(run.config.output),
        run.step,
        run.trained,
        run.optimizer,
        state,
        options.keep_last,
        keep_every=options.keep_every and options.keep_every * options.checkpoint_every,
        sharded=options.checkpoint == "sharded",
    )


def restore(run: Run, folder: Path) -> None:
    """Go on from a checkpoint.

    Raises:
        UsageError: it was made under a configuration that would break the run.
    """
    saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for change in check_differences(saved["config"], run.config, f"cannot resume from {folder}"):
        run.accelerator.print(f"resuming: {change}")
    state = load_checkpoint(folder, run.trained, run.optimizer)
    run.feed.load_state(state["stream"])
    run.step, run.seconds, run.checkpoint = state["step"], state.get("seconds", 0.0), folder


def check_differences(saved: Mapping[str, Any], config: AdaptConfig, failure: str) -> list[str]:
    """In words, what differs from the configuration that a run was started with and may differ.

    Raises:
        UsageError: what may not.
    """
    before, now = _flat(saved), _flat(config.model_dump(mode="json"))
    differing = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and k != "output"]
    named = {k: f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in differing}
    if breaking := [named[k] for k in differing if k not in MAY_CHANGE_ON_RESUME]:
        raise UsageError(f"{failure}: {'; '.join(breaking)}; set them back, or start in a new --output")
    return list(named.values())


def check_finished_stages(stages: list[AdaptConfig]) -> None:
    """UsageError where a stage that is done was run under another configuration than it has now."""
    for stage in stages:
        resolved = Path(stage.output) / RESOLVED_CONFIG
        saved = yaml.safe_load(resolved.read_text(encoding="utf-8")) if resolved.is_file() else None
        if saved:
            check_differences(saved, stage, f"cannot resume: {stage.output} is finished")


def check_output(output: Path, stages: list[AdaptConfig], resume: bool) -> None:
    """Refuse a folder with something in it, unless it is a run that is to be resumed, and one that cannot be made."""
    if output.is_file():
        raise UsageError(f"output {output} is a file; give a folder")
    above = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"output folder {output} cannot be made: {above} cannot be written; choose another")
    empty = is_empty(output)
    if not empty and not resume:
        raise UsageError(f"output folder {output} is not empty; choose another --output, or go on with --resume auto")
    if not empty and not (output / RESOLVED_CONFIG).is_file():
        raise UsageError(f"output folder {output} is not that of a run ({RESOLVED_CONFIG} is missing); choose another")
    if not resume:
        return
    own = {Path(stage.output) for stage in stages}
    held = [folder for folder in (output, *sorted(output.glob("stage-*"))) if list_checkpoints(folder)]
    if others := [folder for folder in held if folder not in own]:
        raise UsageError(
            f"cannot resume: {others[0]} holds checkpoints of a run with other stages; set the stages back, or "
            f"start in a new --output, with model.path={output} if that run is finished"
        )
    if not held and any((output / name).exists() for name in ("config.json", "adapter_config.json")):
        raise UsageError(
            f"cannot resume: {output} holds a finished model and no checkpoint to go on from; choose another --output"
        )


def is_empty(folder: Path) -> bool:
    """Whether nothing is there but a lock."""
    return not folder.is_dir() or all(path.name == LOCK for path in folder.iterdir())


def trim_log(path: Path, steps: int) -> int:
    """Drop log lines of steps that will be done again, and what cannot be read.

    Returns:
        The number of damaged lines, without the last one that a killed run left unfinished.
    """
    if not path.is_file():
        return 0
    kept, damaged = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            again = json.loads(line.decode("utf-8"))["step"] >= steps
        except (ValueError, TypeError, KeyError):  # not JSON, or not a record
            damaged += 1
            continue
        if not again:
            kept.append(line)
    write_whole(path, b"".join(kept))
    return damaged


@contextmanager
def stop_on_sigterm() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM comes; the loop then saves and ends."""
    received: list[int] = []
    try:
        previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:  # not the main thread: the caller owns the signals
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(values, dict):
        return {prefix: values}
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat
