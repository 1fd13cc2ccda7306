"""What processes take of their hosts and send each other, as numbers of parameters tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from nextblock.config.run import AdaptConfig
from nextblock.model.fakes import bare_model, low_rank_updates
from nextblock.training.export import FILE_BYTES
from nextblock.training.flops import Products, updates
from nextblock.training.shards import whole_because


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters, and the multiply-adds of the model.

    layer, outside, largest: of one layer, outside of all, and of the largest tensor.
    """

    parent: int
    trained: int
    layer: int
    outside: int
    largest: int
    products: Products


def count_parameters(config: AdaptConfig, shape: PreTrainedConfig) -> Counts:
    """Read off the model's modules, on the meta device."""
    with torch.device("meta"):
        model = bare_model(shape, torch.float32)
        parent = sum(p.numel() for p in model.parameters())
        adapter = low_rank_updates(config, model)
        head = 2 * config.correction.rank * model.get_input_embeddings().num_embeddings if config.correction else 0
        trained = head or parent if adapter is None else sum(p.numel() for p in adapter.parameters())
        layers = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)
        inside = sum(p.numel() for p in layers.parameters())
        return Counts(
            parent=parent,
            trained=trained,
            layer=inside // len(layers),
            outside=parent - inside,
            largest=max(p.numel() for p in model.parameters()),
            products=Products.of(model, () if adapter is None else updates(adapter)),
        )


def micro_rows(config: AdaptConfig, devices: int) -> int:
    """Rows in one forward pass on one device."""
    share = config.training.batch_rows // devices
    return min(config.training.micro_batch_rows or share, share)


def host_memory(
    config: AdaptConfig,
    counts: Counts,
    sharding: int,
    part: int,
    step: Mapping[str, int],
    evaluation: int,
    on_cpu: bool,
) -> dict[str, int]:
    """Bytes of the host that a process takes at most, beside those of Python, libraries and rows.

    loading: until the parent is on the device. training: with the copy of a checkpoint. end: in the first process,
    which exports and evaluates.

    Args:
        sharding: processes that share one copy of the model; 1: each has its own.
        part: of a checkpoint, that a process copies.
        step, evaluation: of the device, which is the host if `on_cpu`; no `evaluation`: 0.
    """
    size = getattr(torch, config.model.dtype).itemsize
    whole, stored = (
        counts.parent * size,
        counts.parent * getattr(torch, config.model.export_dtype or "float32").itemsize,
    )
    lasting = step["weights"] + step["optimizer"] if on_cpu else 0
    loading, export = whole, 0 if config.draft_adapter is not None else stored
    if sharding > 1:
        export = min(FILE_BYTES, stored) + counts.largest * size
        if whole_because(config.model, config.correction) is None:
            # Where the host is the device, trying the model out gathers weights: those outside the layers stand twice
            # for a moment, and then beside them a layer that does, and another.
            gathered = counts.outside + max(counts.outside, 3 * counts.layer)
            loading = whole // sharding + gathered * size if on_cpu else counts.largest * size
    return {
        "loading": loading,
        "training": part + (sum(step.values()) if on_cpu else 0),
        "end": max(part + lasting + export, evaluation if on_cpu or not evaluation else whole),
    }


def communication(config: AdaptConfig, counts: Counts, devices: int, sharding: int) -> dict[str, int]:
    """Bytes that a device receives from others in a step, by what they are, as collectives in rings send them.

    weights, gradients: among the devices that share one copy of the model. copies: gradients, among those that hold
    the same shard.
    """
    low, size = config.training.mixed_precision == "bf16", getattr(torch, config.model.dtype).itemsize
    if devices == 1:
        return {}
    if sharding == 1:
        return {"gradients": 2 * counts.trained * 4 * (devices - 1) // devices}
    passes = -(-(config.training.batch_rows // devices) // micro_rows(config, devices))
    times, copies = 1 if config.machine.hold_gradients else passes, devices // sharding
    # Layers are gathered forward and again backward; all else stays gathered. Gradients are summed in float32.
    gathered = (2 * counts.parent - counts.outside) * passes * (2 if low else size)
    found = {
        "weights": gathered * (sharding - 1) // sharding,
        "gradients": counts.trained * 4 * times * (sharding - 1) // sharding,
    }
    return found | ({"copies": 2 * counts.trained * 4 // sharding * (copies - 1) // copies} if copies > 1 else {})
