"""`nextblock plan`: what a run takes, from its configuration alone: parameters, memory, FLOPs and time.

Memory is counted rather than guessed: one training step runs on fake tensors, which have shapes and no values, and
every storage that it makes is added up while it lives. Time is FLOPs over a stated share of the device's peak.

Letters: B rows, L clean tokens of a row, N noised ones, b block size, k views.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, TypedDict, Unpack, cast

from transformers import PreTrainedConfig

from nextblock.config.errors import UsageError, nearest
from nextblock.config.run import AdaptConfig, stage_configs
from nextblock.measure.plan.memory import evaluation_memory, step_memory
from nextblock.measure.plan.work import noised_tokens, run_flops, step_flops
from nextblock.model.loading import check_backward, check_quantization
from nextblock.model.parent import model_shape
from nextblock.model.positions import check_row_length, steady_positions
from nextblock.training.devices import DEVICES, GIB
from nextblock.training.flops import Flops, kind_of_training
from nextblock.training.footprint import communication, count_parameters, host_memory, micro_rows
from nextblock.training.launcher import check_batch, check_sharding, check_unsharded

USABLE = 0.92
"""Share of a GPU's memory that a step may take; the rest is for the driver, libraries and fragments."""

PARALLEL = ("ddp", "fsdp2")


class Machine(TypedDict, total=False):
    """What a run is planned for.

    device: a name in `DEVICES`; "cpu": a step with attention in parts, no time. Left out or None: `machine.gpu`.
    devices: how many there are; `machine.gpus`.
    parallel: with more than one device: "ddp" copies everything, "fsdp2" shards weights, gradients and optimizer;
        as `training.fsdp` says.
    mfu: share of the device's peak that useful FLOPs reach; 0.4.
    bandwidth: of the storage that checkpoints go to, in GB/s, over all machines; 1.
    """

    device: str | None
    devices: int | None
    parallel: str | None
    mfu: float
    bandwidth: float


@dataclass(frozen=True)
class Plan:
    """What a run without stages, or a stage, takes: bytes of one device, FLOPs of one step and of all `steps`.

    memory: kind -> bytes on one device at the moment of a step's peak.
    host_memory: of `nextblock.training.footprint.host_memory`. communication: of `communication` there.
    evaluation_bytes: at the peak of the final evaluation, on the first device; 0 without one.
    peak_bytes: of a step or of the final evaluation, whichever takes more.
    largest_row: longest row that fits, up to the model's positions; None where memory is not known.
    run_flops: useful FLOPs of the whole run. seconds, device_hours: of the whole run.
    checkpoint_bytes, checkpoint_seconds: trained weights and optimizer states, and their time to the storage.
    store_bytes: token ids of all steps, in a token store that is read once; spans and documents take more.
    feed_tokens_per_second: what each process must be given, where the device's speed is known.
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
    host_memory: dict[str, int]
    communication: dict[str, int]
    peak_bytes: int
    evaluation_bytes: int
    fits: bool | None
    largest_row: int | None
    flops: Flops
    steps: int
    run_flops: float
    mfu: float
    tokens_per_second: float | None
    step_seconds: float | None
    seconds: float | None
    device_hours: float | None
    checkpoint_bytes: int
    checkpoint_seconds: float
    store_bytes: int
    feed_tokens_per_second: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"useful_flops": self.flops.useful}


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run."""

    name: str
    plan: Plan


@dataclass(frozen=True)
class StagedPlan:
    """What a run in stages takes. A device needs the memory of the largest stage; all else adds up.

    fits, seconds and device_hours are None where the device's memory or speed is not known.
    """

    stages: tuple[StagePlan, ...]

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.plan.steps for stage in self.stages)

    @property
    def run_flops(self) -> float:
        """Useful FLOPs of the whole run."""
        return sum(stage.plan.run_flops for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Bytes on one device at the peak of the stage that takes most."""
        return max(stage.plan.peak_bytes for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """Whether every stage fits."""
        fits = [stage.plan.fits for stage in self.stages]
        return None if None in fits else all(fits)

    @property
    def seconds(self) -> float | None:
        """Of the whole run."""
        return _sum(stage.plan.seconds for stage in self.stages)

    @property
    def device_hours(self) -> float | None:
        """Of the whole run."""
        return _sum(stage.plan.device_hours for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: each stage's as its plan's, and the totals."""
        totals = ("steps", "run_flops", "peak_bytes", "fits", "seconds", "device_hours")
        stages = [{"name": stage.name} | stage.plan.as_dict() for stage in self.stages]
        return {"stages": stages} | {name: getattr(self, name) for name in totals}


def _sum(values: Iterable[float | None]) -> float | None:
    """None where one is not known."""
    found = list(values)
    return None if None in found else sum(cast(list[float], found))


# ----------------------------------------------------------------------------------------------- entry


def plan_run(config: AdaptConfig, **machine: Unpack[Machine]) -> Plan | StagedPlan:
    """What a run takes, with stages or without. Raises as `plan`."""
    return plan_stages(config, **machine) if config.stages else plan(config, **machine)


def plan(config: AdaptConfig, **machine: Unpack[Machine]) -> Plan:
    """Say what a run without stages, or one stage of another, takes, at the largest block size.

    Args:
        config: checked configuration, without stages; of the model only its shape is read.
    Raises:
        UsageError: unknown device, a batch that does not divide, a model whose shape is not known, or what `adapt`
            refuses on such devices.
        ValueError: a configuration with stages, which are for `plan_stages`.
    """
    if config.stages:
        raise ValueError("this run has stages, which plan_stages plans")
    device, devices, parallel, mfu, bandwidth = check_machine(config, machine)
    shape = model_shape(config.model)
    sharding = check_run(config, shape, device, devices, parallel)
    kinds = step_memory(config, shape, device=device, devices=devices, sharding=sharding)
    evaluation, room = sum(evaluation_memory(config, shape, device=device).values()), DEVICES[device].memory_gib
    peak = max(sum(kinds.values()), evaluation)
    counts, size = count_parameters(config, shape), config.growth.b_max
    flops, all_flops = step_flops(config, shape, counts, size), run_flops(config, shape, counts)
    tflops, batch_tokens = DEVICES[device].tflops, config.training.batch_rows * config.data.row_length
    speed = None if tflops is None else tflops * 1e12 * mfu * devices
    # Trained weights are float32 (`run._weights`), and each has two states.
    checkpoint = counts.trained * (4 + 2 * (1 if config.optimizer.name == "adamw_8bit" else 4))
    ids = 2 if getattr(shape, "vocab_size", 2**32) <= 2**16 else 4
    return Plan(
        model=config.model.path if config.model.scratch is None else "random weights",
        trained=kind_of_training(config),
        parameters=counts.parent,
        trained_parameters=counts.trained,
        trained_share=counts.trained / counts.parent,
        row_length=config.data.row_length,
        batch_rows=config.training.batch_rows,
        micro_batch_rows=micro_rows(config, devices),
        block_size=size,
        noised_tokens=noised_tokens(config, size, config.data.row_length),
        device=device,
        devices=devices,
        parallel=parallel if devices > 1 else None,
        memory=kinds,
        host_memory=host_memory(config, counts, sharding, checkpoint // devices, kinds, evaluation, device == "cpu"),
        communication=communication(config, counts, devices, sharding),
        peak_bytes=peak,
        evaluation_bytes=evaluation,
        fits=None if room is None else peak <= USABLE * room * GIB,
        largest_row=None if room is None else largest_row(config, shape, device, devices, sharding, peak),
        flops=flops,
        steps=config.training.steps,
        run_flops=all_flops,
        mfu=mfu,
        tokens_per_second=speed and batch_tokens / (flops.useful / speed),
        step_seconds=speed and flops.useful / speed,
        seconds=speed and all_flops / speed,
        device_hours=speed and all_flops / speed * devices / 3600,
        checkpoint_bytes=checkpoint,
        checkpoint_seconds=checkpoint / (bandwidth * 1e9),
        store_bytes=ids * batch_tokens * config.training.steps,
        feed_tokens_per_second=speed and batch_tokens / (flops.useful / speed) / devices,
    )


def plan_stages(config: AdaptConfig, **machine: Unpack[Machine]) -> StagedPlan:
    """Say what each stage of a run takes, and all of them.

    Raises:
        UsageError: as `plan`, with the stage's name.
    """
    check_machine(config, machine)
    found = []
    for number, (stage, own) in enumerate(zip(config.stages, stage_configs(config), strict=True)):
        try:
            found.append(StagePlan(stage.name, plan(own, **machine)))
        except UsageError as error:
            raise UsageError(f"stages.{number} ({stage.name}): {error}") from None
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
        "a draft adapter or LoRA in place of all weights": short.trained == "full",
        "a larger GPU": True,
        "more of them": short.parallel == "fsdp2",
        "several of them with training.fsdp=true": short.devices == 1 and short.trained == "full",
    }
    ways = ", ".join(cure for cure, helps in cures.items() if helps)
    return (
        f"this run does not fit on {short.devices} x {short.device}: {short.peak_bytes / GIB:,.1f} GiB at the peak of "
        f"one are over {USABLE:.0%} of its {room:.0f} GiB; what makes it less: {ways}"
    )


def check_run(config: AdaptConfig, shape: PreTrainedConfig, device: str, devices: int, parallel: str) -> int:
    """How many devices share a copy of the model; UsageError for what `adapt` refuses on such devices."""
    check_batch(config, devices)
    check_row_length(config.data.row_length, shape)
    kind = "cpu" if device == "cpu" else "cuda"
    check_backward(config.model.attention, kind)
    check_quantization(config.model.quantization, kind)
    if devices == 1:
        return 1
    if parallel == "ddp":
        check_unsharded(config)
        return 1
    check_sharding(config, devices)
    return config.machine.shard_over or devices


def check_machine(config: AdaptConfig, machine: Machine) -> tuple[str, int, str, float, float]:
    """Device, number, way of sharing, MFU and bandwidth, as given or as the configuration has them; all checked."""
    device, devices = machine.get("device") or config.machine.gpu, machine.get("devices")
    devices = config.machine.gpus if devices is None else devices
    parallel = machine.get("parallel") or ("fsdp2" if config.training.fsdp else "ddp")
    mfu = machine.get("mfu", 0.4)
    for name, value, known in (("gpu", device, tuple(DEVICES)), ("parallel", parallel, PARALLEL)):
        if value not in known:
            raise UsageError(f"{name} '{value}' is unknown{nearest(value, known)}")
    if devices < 1:
        raise UsageError(f"gpus={devices} must be at least 1")
    if not 0 < mfu <= 1:
        raise UsageError(f"mfu={mfu} is a share of the peak; use more than 0 and at most 1")
    if not 0 < (bandwidth := machine.get("bandwidth", 1.0)) < float("inf"):
        raise UsageError(f"bandwidth={bandwidth} is GB/s; use a number above 0")
    return device, devices, parallel, mfu, bandwidth


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
