"""The processes of a run: what torchrun or `accelerate launch` started, and how they share the work."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    ParallelismConfig,
    ProjectConfiguration,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from nextblock.config.errors import UsageError, require
from nextblock.config.run import AdaptConfig
from nextblock.training.log import TRACKERS
from nextblock.training.ranks import errors_on_all_ranks, process_state

OF_A_LAUNCHER: dict[str, tuple[str | None, str]] = {
    "ACCELERATE_MIXED_PRECISION": ("no", "leave it out, or set training.mixed_precision instead"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "leave it out, or set training.compile=true instead"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "leave Megatron-LM out"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("false", "leave parallelism_config out"),
    "FSDP_VERSION": ("2", "start with --fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": ("false", "leave it out"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", "leave it out, or set training.gradient_checkpointing=true instead"),
    "FSDP_IGNORED_MODULES": (None, "leave it out"),
}
"""Variables of `accelerate launch` that a run does not follow: the value that asks for nothing, and what to do."""


def check_batch(config: AdaptConfig, devices: int | None = None) -> None:
    """UsageError for rows that do not divide over the processes, or over the devices of a plan."""
    rows, ranks = config.training.batch_rows, devices or process_state().num_processes
    if rows % ranks:
        over = f"{ranks} {'devices' if devices else 'processes'}"
        raise UsageError(
            f"training.batch_rows={rows} does not divide over {over}; use {max(1, rows // ranks) * ranks}"
        )


def check_launcher(config: AdaptConfig) -> None:
    """UsageError for what `accelerate launch` was asked for and a run would leave undone without a word."""
    sharded = config.training.fsdp or fsdp_of_launcher()
    for name, (nothing, cure) in OF_A_LAUNCHER.items():
        value = os.environ.get(name)
        if value is None or value.lower() == nothing or (name.startswith("FSDP_") and not sharded):
            continue
        if name == "ACCELERATE_MIXED_PRECISION" and value == config.training.mixed_precision:
            continue
        raise UsageError(f"the launcher has set {name}={value}, which a run of nextblock does not follow; {cure}")


def check_sharding(config: AdaptConfig, devices: int | None = None) -> None:
    """UsageError for what FSDP2 does not share out, or not over so many processes, or devices of a plan."""
    over, ranks = config.machine.shard_over, devices or process_state().num_processes
    if over is not None and ranks % over:
        kind = "devices" if devices else "processes"
        raise UsageError(f"machine.shard_over={over} does not divide {ranks} {kind}; use a divisor, or leave it out")
    if config.lora is not None or config.draft_adapter is not None:
        raise UsageError("FSDP has no use for lora or a draft adapter, whose weights are small; start without it")
    if config.optimizer.name == "adamw_8bit":
        raise UsageError("optimizer.name=adamw_8bit cannot share out its states; use adamw, or start without FSDP")


def check_unsharded(config: AdaptConfig) -> None:
    """UsageError for what only FSDP2 does, where several processes share nothing out."""
    if config.machine.shard_over is not None or config.machine.hold_gradients:
        raise UsageError(
            "machine.shard_over and machine.hold_gradients are of FSDP2; set training.fsdp=true, or leave them out"
        )


def fsdp_of_launcher() -> bool:
    """Whether `accelerate launch --use_fsdp`, or a configuration of accelerate with FSDP, has started this process."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


_SET_HERE: set[str] = set()
"""Variables that accelerate has set for the last run of this process, and its launcher had not."""


def forget_last_run() -> None:
    """Take back what accelerate keeps of an earlier run, or stage, of this process; the processes stay as they met."""
    for name in _SET_HERE:
        os.environ.pop(name, None)
    _SET_HERE.clear()
    state = process_state()
    if state.distributed_type == DistributedType.FSDP:
        state.distributed_type = DistributedType.MULTI_GPU if torch.cuda.is_available() else DistributedType.MULTI_CPU
    AcceleratorState._reset_state()


def make_accelerator(config: AdaptConfig) -> Accelerator:
    """The processes of this run and how they share the work: DDP, or FSDP2 if the run or its launcher asks for it.

    Raises:
        UsageError: rows that do not divide over the processes, a launcher that asks for something else, or a tracker
            that is not installed.
    """
    forget_last_run()
    with errors_on_all_ranks():
        check_batch(config)
        check_launcher(config)
        for name in config.training.trackers:  # before accelerate warns of them
            require(name, "trackers", f"training.trackers={name}")
    plugin = None
    if process_state().num_processes == 1:
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # nothing to share out
    elif not (config.training.fsdp or fsdp_of_launcher()):
        check_unsharded(config)
    else:
        check_sharding(config)
        if not fsdp_of_launcher():
            _SET_HERE.add("ACCELERATE_USE_FSDP")
        policy = None
        if config.training.mixed_precision == "bf16":
            # accelerate's own would also round the sums of losses, and so every gradient, to 8 bits.
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            cpu_ram_efficient_loading=False,  # a launcher's default, which leaves ranks without weights to check
            mixed_precision_policy=policy,
        )
    accelerator = Accelerator(
        mixed_precision=config.training.mixed_precision,
        # Micro-batches are ours: what a launcher sets would divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        fsdp_plugin=plugin,
        log_with=list(config.training.trackers) or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(config.output) / TRACKERS)),
    )
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate leaves CPU processes to DDP, but FSDP2 runs there as well.
        process_state().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    if plugin is not None and (over := config.machine.shard_over) is not None:
        copies = accelerator.num_processes // over
        mesh = ParallelismConfig(dp_replicate_size=copies, dp_shard_size=over)
        accelerator.state.parallelism_config = mesh
        vars(accelerator.state)["device_mesh"] = mesh.get_device_mesh(accelerator.device.type)  # annotated as None
    return accelerator
