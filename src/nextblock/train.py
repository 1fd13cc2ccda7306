"""The training loop. One step reads like the paper; state lives at the edges."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from nextblock import schedules
from nextblock.adapter import DraftAdapter, save_adapter
from nextblock.attention_mask import block_diffusion_rule
from nextblock.checkpoint import export, load_checkpoint, newest_whole_checkpoint, save_checkpoint
from nextblock.config import AdaptConfig, BlockDiffusionSettings, UsageError, require
from nextblock.corruption import TwoView, corrupt
from nextblock.data import Rows, RowStream, check_tokens
from nextblock.lora import LoraAdapter
from nextblock.model import (
    Decoder,
    choose_mask_token,
    load_parent,
    parent_tokenizer,
    probe,
    read_config,
    weights_folder,
    without_dropout,
)
from nextblock.objective import DraftLoss, TwoViewLoss
from nextblock.tracking import LossProfile, peak_flops, peak_memory_gib, run_log, useful_flops

LOG = "log.jsonl"
RESOLVED_CONFIG = "nextblock.yaml"
MAY_CHANGE_ON_RESUME = (
    "output",
    "training.micro_batch_rows",
    "training.checkpoint_every",
    "training.keep_last",
    "training.evaluate_rows",
    "training.evaluate_every",
    "training.profile_every",
    "training.trackers",
    "training.compile",
    "training.gradient_checkpointing",
    "model.export_dtype",
    "model.attention",
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
    stream: RowStream
    mask_token_id: int | None
    lora: LoraAdapter | None = None
    step: int = 0
    profile: LossProfile | None = None

    @property
    def trained(self) -> torch.nn.Module:
        """What has been learned, so what a checkpoint holds: LoRA's or the draft adapter's weights, or all."""
        if self.lora is not None:
            return self.lora.weights
        return self.decoder.adapter or self.decoder.model

    @property
    def peak_flops(self) -> float | None:
        """The bfloat16 peak that MFU is measured against; None where it is not known or another dtype computes."""
        low = self.config.training.mixed_precision == "bf16" or self.config.model.dtype == "bfloat16"
        return peak_flops(self.accelerator.device) if low else None

    def flops(self, view: TwoView) -> float:
        """Useful floating-point operations of a micro-batch; 0 where nothing is measured against them."""
        if self.peak_flops is None:
            return 0.0
        whole = self.lora is None and self.decoder.adapter is None
        return useful_flops(self.decoder, view, trained=whole, clean_trained=self.decoder.adapter is None)

    @property
    def settings(self) -> BlockDiffusionSettings | None:
        """What the checkpoint tells a sampler; None after plain AR training (b = 1 to the end)."""
        if self.mask_token_id is None:
            return None
        return BlockDiffusionSettings(
            block_size=self.config.growth.b_max,
            mask_token_id=self.mask_token_id,
            context=self.config.recipe.context,
            prediction=self.config.recipe.prediction,
        )


def train_step(run: Run, step: int) -> StepMetrics:
    """One optimizer step on one global batch   (paper, Eq. 1-5).

    Every rank reads the whole global batch and computes its own share of the rows, so N is known
    everywhere without communication, and neither micro-batches nor ranks enter the result.
    """
    config, recipe, start = run.config, run.config.recipe, time.perf_counter()
    block_size = schedules.block_size(step, config.growth)
    ar_weight = schedules.ar_weight(step, config)
    rule = block_diffusion_rule(recipe.context, schedules.target_share(step, config))
    rows = run.stream.next(config.training.batch_rows)
    check_tokens(rows, run.decoder.vocabulary, run.mask_token_id)
    global_tokens = int((rows.offset >= 0).sum())
    # For adapters with dropout: it must not depend on what ran before, or a resumed run would differ.
    torch.manual_seed(config.training.seed + 1_000_003 * step + run.accelerator.process_index)

    profiled = (step + 1) % config.training.profile_every == 0
    run.profile = LossProfile(block_size, run.accelerator.device) if profiled else None
    sums, flops = torch.zeros(5, dtype=torch.float64), 0.0
    batches = list(micro_batches(run, rows))
    for number, micro in enumerate(batches):
        view = corrupt(
            micro,
            block_size,
            mask_token_id=run.mask_token_id or 0,  # None: at b = 1 nothing is masked
            end_token_id=run.tokenizer.eos_token_id,
            recipe=recipe,
            seed=config.training.seed,
            step=step,
        )
        flops += run.flops(view)
        view = view.to(run.accelerator.device)
        last = number == len(batches) - 1
        with nullcontext() if last else run.accelerator.no_sync(run.loss):
            losses = run.loss(view, rule, score_ar=ar_weight > 0, soft=recipe.soft_weight > 0, profile=profiled)
            # Data parallelism averages gradients over ranks; the loss is a sum over them.
            total = losses.total(ar_weight, recipe.views, recipe.soft_weight)
            run.accelerator.backward(total / global_tokens * run.accelerator.num_processes)
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
    grad_norm = float(clip_grad_norm_(run.trained.parameters(), config.optimizer.grad_clip))
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise UsageError(
            f"step {step}: loss {loss} and gradient norm {grad_norm} are not finite (rows "
            f"{rows.number.tolist()}); nothing was updated: lower optimizer.lr, or look at these rows"
        )
    run.optimizer.step()
    run.optimizer.zero_grad()
    seconds, device = time.perf_counter() - start, run.accelerator.device
    return StepMetrics(
        step=step,
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
    )


def micro_batches(run: Run, rows: Rows) -> Iterator[Rows]:
    """This rank's rows of the global batch, in micro-batches."""
    ranks, rank = run.accelerator.num_processes, run.accelerator.process_index
    share = len(rows) // ranks
    size = run.config.training.micro_batch_rows or share
    for start in range(rank * share, (rank + 1) * share, size):
        yield rows.slice(start, min(start + size, (rank + 1) * share))


def train(
    config: AdaptConfig,
    *,
    resume: bool = False,
    on_step: Callable[[StepMetrics], None] | None = None,
    evaluate: Callable[[Run], Mapping[str, Any] | None] | None = None,
) -> Run:
    """Adapt the parent and leave a Hugging Face folder in `config.output`.

    Args:
        config: checked configuration.
        resume: go on from the newest whole checkpoint in the output folder, if there is one.
        on_step: called on the main process after each step.
        evaluate: called on every process each `training.evaluate_every` steps; what it returns is logged.
    Returns:
        The run, with the trained model in memory. `run.step` is below `config.training.steps` when a
        SIGTERM ended it early (a checkpoint was saved).
    Raises:
        UsageError: bad input, before anything is written.
    """
    output = Path(config.output)
    check_output(output, resume)
    run = prepare(config)
    main = run.accelerator.is_main_process
    if resume:
        restore(run, output)
    if main:
        output.mkdir(parents=True, exist_ok=True)
        (output / RESOLVED_CONFIG).write_text(
            yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
        )
        trim_log(output / LOG, run.step)
    flat_config = _flat(config.model_dump(mode="json"))
    with stop_on_sigterm() as stop, run_log(run.accelerator, output / LOG, flat_config) as write:
        while run.step < config.training.steps and not stop:
            metrics = train_step(run, run.step)
            run.step += 1
            write(asdict(metrics))
            if on_step and main:
                on_step(metrics)
            if run.profile and (profile := run.profile.record(run.accelerator, metrics.step)):
                write(profile)
            due = config.training.evaluate_every
            if evaluate and due and run.step % due == 0 and (found := evaluate(run)):
                write({"kind": "evaluation", "step": metrics.step, **found})
            if run.step % config.training.checkpoint_every == 0 or run.step == config.training.steps or stop:
                save(run, output)
    if main and run.step == config.training.steps:
        export_run(run, output)
    return run


def export_run(run: Run, output: Path) -> None:
    """Write what the run ends with: a Hugging Face folder, or the draft adapter's."""
    model = run.config.model
    dtype = getattr(torch, model.export_dtype) if model.export_dtype else None
    adapter, settings = run.decoder.adapter, run.settings
    if run.lora is not None:
        run.lora.save(output / "adapter")
        export(output, merged_model(run, run.lora), run.tokenizer, settings, dtype)
        return
    if adapter is None:
        export(output, run.decoder.model, run.tokenizer, settings, dtype)
        return
    assert settings is not None
    parent = weights_folder(model.path, model.revision)
    save_adapter(output, adapter, settings, model.path, parent, dtype or torch.float32)


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


def prepare(config: AdaptConfig) -> Run:
    """Read data, load and check the parent, and hand both to accelerate. Writes nothing."""
    for name in config.training.trackers:
        require(name, "trackers", f"training.trackers={name}")
    accelerator = Accelerator(
        mixed_precision=config.training.mixed_precision,
        log_with=list(config.training.trackers) or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(config.output) / "trackers")),
    )
    rows, ranks = config.training.batch_rows, accelerator.num_processes
    if rows % ranks:
        raise UsageError(
            f"training.batch_rows={rows} does not divide over {ranks} processes; use {max(1, rows // ranks) * ranks}"
        )
    torch.manual_seed(config.training.seed)  # for weights that start random
    if config.lora is not None:
        require("peft", "lora", "lora")
    if config.model.scratch is None:  # what can be known without reading data or weights comes first
        read_config(config.model.path, config.model.revision, config.model.trust_remote_code)
    tokenizer = parent_tokenizer(config.model)
    stream = RowStream(config.data, tokenizer, seed=config.training.seed)
    decoder = load_parent(config.model, accelerator.device)
    if decoder.attention == "flex_attention" and decoder.device.type == "cpu":
        raise UsageError("model.attention=flex_attention has no backward pass on CPU; use sdpa, or auto")
    longest = decoder.max_positions
    if longest is not None and config.data.row_length > longest:
        raise UsageError(
            f"data.row_length={config.data.row_length} is over the model's {longest} positions; use at most {longest}"
        )
    probe(decoder)
    if config.draft_adapter is not None:
        adapter = DraftAdapter(decoder.model, config.draft_adapter)
        decoder, mask_token_id = Decoder(decoder.model, adapter), adapter.mask_token_id
    elif config.growth.b_max > 1 or config.recipe.prediction == "aligned":
        mask_token_id = choose_mask_token(decoder, tokenizer, config.model.mask_token)
    else:
        mask_token_id = None
    start = stream.state()  # look at the first batch, so that most bad data stops before anything is written
    check_tokens(stream.next(config.training.batch_rows), decoder.vocabulary, mask_token_id)
    stream.load_state(start)
    without_dropout(decoder.model)
    lora = None
    if config.lora is not None:
        lora = LoraAdapter(decoder.model, config.lora, mask_token_id, config.model.path)
    trained = lora.weights if lora is not None else decoder.adapter or decoder.model
    trained.requires_grad_(True)
    if config.training.gradient_checkpointing:
        decoder.model.gradient_checkpointing_enable({"use_reentrant": False})
        decoder.model.train()  # transformers recomputes activations in train mode alone
    if config.training.compile:
        decoder.model.base_model.compile()
    decay = [p for p in trained.parameters() if p.ndim >= 2]
    plain = [p for p in trained.parameters() if p.ndim < 2]
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(options.beta_1, options.beta_2),
        fused=True,
    )
    objective = TwoViewLoss(decoder) if decoder.adapter is None else DraftLoss(decoder)
    loss, optimizer = accelerator.prepare(objective, optimizer)
    return Run(config, accelerator, tokenizer, decoder, loss, optimizer, stream, mask_token_id, lora)


def save(run: Run, output: Path) -> None:
    """Save a resumable checkpoint at the run's step."""
    if run.accelerator.is_main_process:
        state = {"stream": run.stream.state(), "config": run.config.model_dump(mode="json")}
        keep = run.config.training.keep_last
        save_checkpoint(output, run.step, run.trained, run.optimizer, state, keep)
    run.accelerator.wait_for_everyone()


def restore(run: Run, output: Path) -> None:
    """Go on from the newest whole checkpoint in `output`, if there is one.

    Raises:
        UsageError: the checkpoint was made under a configuration that would break the run.
    """
    folder, damaged = newest_whole_checkpoint(output)
    for line in damaged:
        run.accelerator.print(line)
    if folder is None:
        return
    saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    before, now = _flat(saved["config"]), _flat(run.config.model_dump(mode="json"))
    differing = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    breaking = [k for k in differing if k not in MAY_CHANGE_ON_RESUME]
    if breaking:
        named = "; ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in breaking)
        raise UsageError(f"cannot resume from {folder}: {named}; set them back, or start in a new --output")
    state = load_checkpoint(folder, run.trained, run.optimizer)
    run.stream.load_state(state["stream"])
    run.step = state["step"]


def check_output(output: Path, resume: bool) -> None:
    """Refuse a folder with something in it, unless a run is to be resumed there."""
    if output.is_file():
        raise UsageError(f"output {output} is a file; give a folder")
    if output.is_dir() and any(output.iterdir()) and not resume:
        raise UsageError(f"output folder {output} is not empty; choose another --output, or go on with --resume auto")


def trim_log(path: Path, steps: int) -> None:
    """Drop log lines of steps that will be done again, and one that a killed run left unfinished."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] >= steps:
            break
        kept.append(line)
    path.write_text("".join(kept), encoding="utf-8")


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
