"""DeepSpeed's ZeRO, stages 1 and 2, where `accelerate launch` asks for it: its settings, and its state in our terms.

ZeRO shares out the optimizer (stage 2: and the gradients) over the processes, or moves it to the CPU. Weights and
moments pass in and out whole, so a checkpoint is that of any other run.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from nextblock.config import AdaptConfig, UsageError

MOMENTS = ("exp_avg", "exp_avg_sq")


def asked_for() -> bool:
    """Whether `accelerate launch --use_deepspeed`, or a configuration of accelerate, has started this process."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def configure(settings: dict[str, Any], config: AdaptConfig, rows: int) -> None:
    """Put into DeepSpeed's configuration what a run decides itself.

    Args:
        settings: DeepSpeed's configuration, changed in place.
        rows: of a batch on one process.
    Raises:
        UsageError: for what the run would not follow.
    """
    if settings.get("zero_optimization", {}).get("stage", 0) not in (1, 2):
        raise UsageError(
            "a run takes DeepSpeed's ZeRO stages 1 and 2; set zero_stage to one of them, or leave DeepSpeed out: "
            "training.fsdp=true shares out the weights as stage 3 does"
        )
    for section in ("optimizer", "scheduler", "fp16"):
        if settings.get(section, {}).get("enabled", section in settings):
            raise UsageError(
                f"the section {section} of DeepSpeed's configuration is not followed; leave it out, and set "
                "optimizer.* and training.mixed_precision of the run"
            )
    if config.optimizer.name != "adamw" or config.training.checkpoint != "full":
        raise UsageError("under DeepSpeed use optimizer.name=adamw and training.checkpoint=full")
    settings.update(
        gradient_accumulation_steps=1,  # micro-batches are ours
        gradient_clipping=config.optimizer.grad_clip,
        train_micro_batch_size_per_gpu=rows,
        train_batch_size=config.training.batch_rows,
        steps_per_print=10**9,
    )


def holds(model: nn.Module) -> bool:
    """Whether ZeRO keeps the masters of this model's weights."""
    return any(hasattr(parameter, "_hp_mapping") for parameter in model.parameters())


def update(engine: Any) -> float:
    """Clip and make the optimizer's step; the norm of the gradient, which is known only then."""
    engine.step()
    norm = engine.get_global_grad_norm()
    return math.nan if norm is None else float(norm)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the model, tied ones once; trained ones are the masters. All ranks together."""
    from deepspeed.utils import safe_get_full_fp32_param  # pyright: ignore[reportMissingImports]

    found: dict[str, Tensor] = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        master = safe_get_full_fp32_param(parameter) if hasattr(parameter, "_hp_mapping") else None
        found[name] = parameter if master is None else master
    return found


def set_weights(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Put the float32 masters to these weights."""
    from deepspeed.utils import safe_set_full_fp32_param  # pyright: ignore[reportMissingImports]

    for name, parameter in model.named_parameters():
        if name in values and hasattr(parameter, "_hp_mapping"):
            safe_set_full_fp32_param(parameter, values[name].to(parameter.device, torch.float32))


def moments(optimizer: Any) -> dict[str, Any]:
    """What the optimizer's `state_dict` is without ZeRO. All ranks together."""
    from deepspeed.utils import safe_get_full_optimizer_state  # pyright: ignore[reportMissingImports]

    zero, state, groups = optimizer.optimizer, {}, []
    _link(zero)
    partitions = zip(zero.optimizer.param_groups, zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
    for options, parameters, partition in partitions:
        step = torch.as_tensor(zero.optimizer.state[partition]["step"], dtype=torch.float32)
        first = len(state)
        for parameter in parameters:
            whole = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
            state[len(state)] = {"step": step.clone(), **whole}
        own = {name: value for name, value in options.items() if name != "params"}
        groups.append({**own, "params": list(range(first, len(state)))})
    return {"state": state, "param_groups": groups}


def set_moments(optimizer: Any, saved: dict[str, Any]) -> None:
    """Put the optimizer to what `moments`, or any optimizer of these parameters, gave."""
    from deepspeed.utils import safe_set_full_optimizer_state  # pyright: ignore[reportMissingImports]

    zero, state = optimizer.optimizer, saved["state"]
    on_cpu = not isinstance(zero.optimizer, torch.optim.AdamW)  # DeepSpeed's own, which counts steps in an int
    numbers = iter(sorted(state))
    pairs = []
    for parameters, partition in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        pairs += [(parameter, state[next(numbers)]) for parameter in parameters]
        step = pairs[-1][1]["step"]
        own: dict[str, Any] = {name: torch.zeros_like(partition) for name in MOMENTS}
        own["step"] = int(step) if on_cpu else step.to(partition.device, torch.float32).clone()
        zero.optimizer.state[partition] = own
    _link(zero)
    for parameter, values in pairs:
        for name in MOMENTS:
            safe_set_full_optimizer_state(parameter, values[name].to(parameter.device), name)


def _link(zero: Any) -> None:
    """Tell DeepSpeed where the moments of each parameter lie: its first step does so before all of them exist."""
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()
