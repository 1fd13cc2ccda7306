"""What the processes of a run take of their hosts, and what they tell each other."""

from __future__ import annotations

import torch

from nextblock.config.run import AdaptConfig
from nextblock.measure.plan.work import Counts, micro_rows
from nextblock.training.export import FILE_BYTES
from nextblock.training.shards import whole_because


def host_memory(
    config: AdaptConfig, counts: Counts, *, sharding: int, copy: int, on_cpu: tuple[int, int] | None, evaluated: bool
) -> dict[str, int]:
    """Bytes of the host that a process takes beside those of Python, libraries and rows.

    loading: until the parent is on the device. training: with the copy of a checkpoint. end: evaluation and export,
    in the first process.

    Args:
        sharding: processes that share one copy of the model.
        copy: this process's part of a checkpoint.
        on_cpu: bytes at the peak of a step and of the evaluation, where the host is the device.
        evaluated: whether the end has an evaluation.
    """
    size = getattr(torch, config.model.dtype).itemsize
    whole, largest, step, evaluation = counts.parent * size, counts.largest * size, 0, 0
    held = loading = whole // sharding
    if on_cpu is not None:
        step, evaluation = on_cpu
        # Embedding, head and two layers are gathered when the model is tried out; to read takes no more.
        outside = counts.kept if counts.kept >= counts.largest else counts.kept + counts.largest
        loading += (outside + 2 * counts.layer) * size
    elif evaluated:
        held, loading, evaluation = 0, largest, whole
    else:
        held, loading = 0, largest
    if sharding == 1 or whole_because(config.model, config.correction) is not None:
        loading = whole
    export = 0 if config.draft_adapter is not None else whole
    if sharding > 1:
        stored = counts.parent * getattr(torch, config.model.export_dtype or config.model.dtype).itemsize
        export = held + min(FILE_BYTES, stored) + largest
    return {"loading": loading, "training": copy + step, "end": max(export, evaluation)}
