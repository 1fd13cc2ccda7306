"""`nextblock plan`: what a run takes, from its configuration alone: parameters, memory, FLOPs and time.

Memory is counted rather than guessed: one training step runs on fake tensors, which have shapes and no values, and
every storage that it makes is added up while it lives. Time is FLOPs over a stated share of the device's peak.

Letters: B rows, L clean tokens of a row, N noised ones, b block size, k views.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import is_offline_mode
from transformers import PreTrainedConfig

from nextblock.config.errors import UsageError, nearest, one_line
from nextblock.config.run import AdaptConfig, stage_configs
from nextblock.config.sections import ModelConfig
from nextblock.measure.plan.memory import GIB, evaluation_memory, step_memory
from nextblock.measure.plan.work import (
    count_parameters,
    micro_rows,
    noised_tokens,
    run_flops,
    step_flops,
)
from nextblock.model.loading import check_architecture, config_as_stored, replace_values, resolve
from nextblock.model.parent import scratch_config
from nextblock.model.positions import check_row_length, steady_positions
from nextblock.model.shapes import HUB_IDS, shape_values
from nextblock.training.devices import DEVICES
from nextblock.training.flops import Flops, kind_of_training
from nextblock.training.launcher import check_sharding

USABLE = 0.92
"""Share of a GPU's memory that a step may take; the rest is for the driver, libraries and fragments."""

PARALLEL = ("ddp", "fsdp2")


@dataclass(frozen=True)
class Plan:
    """What a run takes. Bytes and FLOPs are numbers of one device and of one step; `seconds` of the whole run.

    memory: kind -> bytes on one device at the moment of a step's peak.
    evaluation_bytes: at the peak of the final evaluation, on the first device; 0 without one.
    peak_bytes: of a step or of the final evaluation, whichever takes more.
    largest_row: longest row that fits, up to the model's positions; None where memory is not known.
    """

    model: str
    trained: str
    parameters: int
    trained_parameters: int
    trained_share: float
    row_length: int
    batch_rows: int
    micro_batch_rows: int
    block_size: int
    noised_tokens: int
    device: str
    devices: int
    parallel: str | None
    memory: dict[str, int]
    peak_bytes: int
    evaluation_bytes: int
    fits: bool | None
    largest_row: int | None
    flops: Flops
    mfu: float
    tokens_per_second: float | None
    step_seconds: float | None
    seconds: float | None
    device_hours: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"useful_flops": self.flops.useful}


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run: the plan of its configuration, its optimizer steps, and the useful FLOPs of all of them."""

    name: str
    steps: int
    run_flops: float
    plan: Plan


@dataclass(frozen=True)
class StagedPlan:
    """What a run in stages takes. A device needs the memory of the largest stage; all else adds up."""

    stages: tuple[StagePlan, ...]

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def run_flops(self) -> float:
        """Useful FLOPs of the whole run."""
        return sum(stage.run_flops for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Bytes on one device at the peak of the stage that takes most."""
        return max(stage.plan.peak_bytes for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """Whether every stage fits; None where memory is not known."""
        fits = [stage.plan.fits for stage in self.stages]
        return None if None in fits else all(fits)

    @property
    def seconds(self) -> float | None:
        """Of the whole run; None where the device's speed is not known."""
        return _sum(stage.plan.seconds for stage in self.stages)

    @property
    def device_hours(self) -> float | None:
        """Of the whole run; None where the device's speed is not known."""
        return _sum(stage.plan.device_hours for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: each stage's as its plan's, and the totals."""
        totals = ("steps", "run_flops", "peak_bytes", "fits", "seconds", "device_hours")
        own = [
            {"name": stage.name, "steps": stage.steps, "run_flops": stage.run_flops} | stage.plan.as_dict()
            for stage in self.stages
        ]
        return {"stages": own} | {name: getattr(self, name) for name in totals}


def _sum(values: Iterable[float | None]) -> float | None:
    """None where one is not known."""
    found = list(values)
    return None if None in found else sum(cast(list[float], found))


# ----------------------------------------------------------------------------------------------- entry


def plan(
    config: AdaptConfig,
    *,
    device: str | None = None,
    devices: int | None = None,
    parallel: str | None = None,
    mfu: float = 0.4,
) -> Plan:
    """Say what a run without stages, or one stage of another, takes, at the largest block size.

    Args:
        config: checked configuration, without stages; of the model only its shape is read.
        device: a name in `DEVICES`; "cpu": a step with attention in parts, no time. None: `machine.gpu`.
        devices: how many there are; None: `machine.gpus`.
        parallel: with more than one device: "ddp" copies everything, "fsdp2" shards weights, gradients and optimizer;
            None: as `training.fsdp` says.
        mfu: share of the device's peak that useful FLOPs reach.
    Raises:
        UsageError: unknown device, a batch that does not divide, a model whose shape is not known, or what `adapt`
            refuses on such devices.
        ValueError: a configuration with stages, which are for `plan_stages`.
    """
    if config.stages:
        raise ValueError("this run has stages, which plan_stages plans")
    device, devices = device or config.machine.gpu, config.machine.gpus if devices is None else devices
    check_machine(device, parallel, mfu)
    shape, rows = model_shape(config.model), config.training.batch_rows
    check_run(config, shape, device, devices)
    parallel = parallel or ("fsdp2" if config.training.fsdp else "ddp")
    sharding = devices if parallel == "fsdp2" else 1
    if sharding > 1:
        check_sharding(config)
    kinds = step_memory(config, shape, device=device, devices=devices, sharding=sharding)
    evaluation, room = evaluation_memory(config, shape, device=device), DEVICES[device].memory_gib
    peak = max(sum(kinds.values()), sum(evaluation.values()))
    counts = count_parameters(config, shape)
    flops, tflops = step_flops(config, shape, counts, config.growth.b_max), DEVICES[device].tflops
    step_seconds = seconds = None
    if tflops is not None:
        speed = tflops * 1e12 * mfu * devices
        step_seconds, seconds = flops.useful / speed, run_flops(config, shape, counts) / speed
    return Plan(
        model=config.model.path if config.model.scratch is None else "random weights",
        trained=kind_of_training(config),
        parameters=counts.parent,
        trained_parameters=counts.trained,
        trained_share=counts.trained / counts.parent,
        row_length=config.data.row_length,
        batch_rows=rows,
        micro_batch_rows=micro_rows(config, devices),
        block_size=config.growth.b_max,
        noised_tokens=noised_tokens(config, config.growth.b_max, config.data.row_length),
        device=device,
        devices=devices,
        parallel=parallel if devices > 1 else None,
        memory=kinds,
        peak_bytes=peak,
        evaluation_bytes=sum(evaluation.values()),
        fits=None if room is None else peak <= USABLE * room * GIB,
        largest_row=None if room is None else largest_row(config, shape, device, devices, sharding, peak),
        flops=flops,
        mfu=mfu,
        tokens_per_second=None if step_seconds is None else rows * config.data.row_length / step_seconds,
        step_seconds=step_seconds,
        seconds=seconds,
        device_hours=None if seconds is None else seconds * devices / 3600,
    )


def plan_stages(
    config: AdaptConfig,
    *,
    device: str | None = None,
    devices: int | None = None,
    parallel: str | None = None,
    mfu: float = 0.4,
) -> StagedPlan:
    """Say what each stage of a run takes, and all of them. Arguments as of `plan`.

    Raises:
        UsageError: as `plan`, with the stage's name.
    """
    check_machine(device or config.machine.gpu, parallel, mfu)
    found = []
    for number, (stage, own) in enumerate(zip(config.stages, stage_configs(config), strict=True)):
        try:
            one = plan(own, device=device, devices=devices, parallel=parallel, mfu=mfu)
        except UsageError as error:
            raise UsageError(f"stages.{number} ({stage.name}): {error}") from None
        shape = model_shape(own.model)
        flops = run_flops(own, shape, count_parameters(own, shape))
        found.append(StagePlan(stage.name, own.training.steps, flops, one))
    return StagedPlan(tuple(found))


def shortfall(found: Plan | StagedPlan, config: AdaptConfig) -> str | None:
    """One line where the run of `config` does not fit the GPU that it is planned for; None where it fits."""
    plans = [stage.plan for stage in found.stages] if isinstance(found, StagedPlan) else [found]
    short = max((one for one in plans if one.fits is False), key=lambda one: one.peak_bytes, default=None)
    if short is None:
        return None
    training, room = config.training, cast(float, DEVICES[short.device].memory_gib)
    cures = {
        "training.fsdp=true": short.parallel == "ddp" and short.trained == "full" and config.optimizer.name == "adamw",
        "training.gradient_checkpointing=true": not training.gradient_checkpointing,
        "training.micro_batch_rows=1": short.micro_batch_rows > 1,
        f"data.row_length={short.largest_row}": short.largest_row is not None,
        "a larger GPU": True,
        "more of them": short.parallel == "fsdp2",
    }
    ways = ", ".join(cure for cure, helps in cures.items() if helps)
    return (
        f"this run does not fit on {short.devices} x {short.device}: {short.peak_bytes / GIB:,.1f} GiB at the peak of "
        f"one are over {USABLE:.0%} of its {room:.0f} GiB; what makes it less: {ways}"
    )


def check_run(config: AdaptConfig, shape: PreTrainedConfig, device: str, devices: int) -> None:
    """UsageError for what `adapt` refuses on such devices: rows that do not divide or are too long, a CPU."""
    rows = config.training.batch_rows
    if devices < 1 or rows % devices:
        raise UsageError(
            f"training.batch_rows={rows} does not divide over {devices} devices; "
            f"use {max(1, rows // max(1, devices)) * max(1, devices)} rows"
        )
    check_row_length(config.data.row_length, shape)
    if config.model.attention == "flex_attention" and device == "cpu":
        raise UsageError("model.attention=flex_attention has no backward pass on CPU; use sdpa, or auto")
    if config.model.quantization and device == "cpu":
        raise UsageError(f"model.quantization={config.model.quantization} needs a CUDA device; leave it out on cpu")


def check_machine(device: str, parallel: str | None, mfu: float) -> None:
    """UsageError for an unknown device or way of sharing, or a share of the peak that is none."""
    if device not in DEVICES:
        raise UsageError(f"gpu '{device}' is unknown{nearest(device, list(DEVICES))}")
    if parallel is not None and parallel not in PARALLEL:
        raise UsageError(f"parallel '{parallel}' is unknown{nearest(parallel, PARALLEL)}")
    if not 0 < mfu <= 1:
        raise UsageError(f"mfu={mfu} is a share of the peak; use more than 0 and at most 1")


def model_shape(config: ModelConfig) -> PreTrainedConfig:
    """The parent's Hugging Face config: `scratch`, a folder, the cache, a known shape, or downloaded alone.

    Raises:
        UsageError: a model that is none of these.
    """
    shape = _shape(config)
    replace_values(shape, config.override)
    return shape


def _shape(config: ModelConfig) -> PreTrainedConfig:
    if config.scratch is not None:
        return scratch_config(config.scratch)
    source = resolve(config.path)
    known = config.path in HUB_IDS
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:  # of a model that is known nothing is downloaded, of another its config alone
        shape = config_as_stored(source, local_files_only=known, **options)
    except Exception as error:  # transformers raises many kinds here; each means that there is no config to read
        if Path(source).is_dir():
            raise UsageError(f"cannot read the config of model {config.path}: {one_line(error)}") from None
        if not known:
            why = "the Hub is not asked (HF_HUB_OFFLINE)" if is_offline_mode() else f"the Hub says: {one_line(error)}"
            raise UsageError(
                f"model {config.path} is not on this machine and its shape is not among those known "
                f"({', '.join(sorted(set(HUB_IDS.values())))}); {why}; download its config.json, or set model.scratch"
            ) from None
        shape = scratch_config(shape_values(HUB_IDS[config.path]))
    check_architecture(shape)
    return shape


def largest_row(
    config: AdaptConfig, shape: PreTrainedConfig, device: str, devices: int, sharding: int, peak: int
) -> int | None:
    """The longest row, in whole blocks and within about 3 %, whose step fits; None if not even one block does."""
    unit = config.growth.b_max
    room = USABLE * cast(float, DEVICES[device].memory_gib) * GIB
    longest = steady_positions(shape)

    def size(length: int) -> int:
        step = step_memory(config, shape, device=device, devices=devices, sharding=sharding, row_length=length)
        evaluation = evaluation_memory(config, shape, device=device, row_length=length)
        return max(sum(step.values()), sum(evaluation.values()))

    low, high = (config.data.row_length, None) if peak <= room else (unit, config.data.row_length)
    low_size, high_size = (peak, 0) if high is None else (size(low), peak)
    if low_size > room:
        return None
    while high is None:  # the whole context, or doubling where the model names no limit
        length = 2 * low if longest is None else longest // unit * unit
        found = size(length) if length > low else low_size
        if found > room:
            high, high_size = length, found
        elif longest is not None:
            return length
        else:
            low, low_size = length, found
    while high - low > max(unit, 0.03 * low):
        # Memory is a maximum of straight lines of the row's length, so below its chord: what the chord allows, fits.
        length = low + int((room - low_size) / (high_size - low_size) * (high - low)) // unit * unit
        if length - low <= 0.03 * low:
            return length
        low, low_size = length, size(length)
    return low
