"""The log of a run, and what it tells beside the loss of a step: the loss by noise level and by place in the block.

Letters: B rows, N slots of the noised half, S masked tokens, b block size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from nextblock.recipe.corruption import NOISE_LEVELS, UNSCORED, TwoView

PROJECT, TRACKERS = "nextblock", "trackers"
OFFSETS = 64
"""Most places of a block that the loss is told apart by; those of a larger block are pooled."""


class LossProfile:
    """Sums of the masked tokens' cross-entropy by noise level of the block and by offset in it.

    Kept on the model's device: nothing is read back before `record`.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.noise = torch.zeros(2, NOISE_LEVELS, device=device)
        self.offset = torch.zeros(2, min(block_size, OFFSETS), device=device)

    def add(self, view: TwoView, nats: Tensor, shifted: bool) -> None:
        """Take in a micro-batch: `nats` [S] of its masked tokens, in the order of `view.target`."""
        n = view.noised_length
        scored = view.target[:, :n] != UNSCORED
        offset = (view.places.position - view.places.block_start)[:, :n][scored] + int(shifted)
        places = self.offset.shape[1]
        pairs = torch.stack([nats, torch.ones_like(nats)])
        self.noise.index_add_(1, view.noise[scored], pairs)
        self.offset.index_add_(1, offset * places // self.block_size, pairs)

    def record(self, accelerator: Accelerator, step: int) -> dict[str, Any] | None:
        """A log record with means in nats over all ranks' tokens; None where nothing was masked."""
        over_ranks: list[Any] = [accelerator.reduce(sums) for sums in (self.noise, self.offset)]
        record: dict[str, Any] = {"kind": "profile", "step": step, "block_size": self.block_size}
        for name, (sums, counts) in zip(("noise", "offset"), (both.tolist() for both in over_ranks), strict=True):
            record[f"loss_by_{name}"] = [s / c if c else None for s, c in zip(sums, counts, strict=True)]
            record[f"tokens_by_{name}"] = [int(c) for c in counts]
        return record if sum(record["tokens_by_noise"]) else None


@contextmanager
def run_log(
    accelerator: Accelerator, path: Path, config: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends one record to the log of a run and hands its numbers to the trackers.

    Args:
        accelerator: with the trackers asked for; they are opened and closed here. Only its main process writes.
        path: a JSONL file; trackers that write files have the folder `trackers` beside it.
        config: the resolved configuration as dotted keys, for the trackers.
    """
    if accelerator.log_with:
        plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in config.items()}
        accelerator.project_configuration.logging_dir = str(path.parent / TRACKERS)  # not that of the first stage
        accelerator.init_trackers(PROJECT, config=plain)
    with (path if accelerator.is_main_process else Path("/dev/null")).open("a", encoding="utf-8") as log:

        def write(record: Mapping[str, Any]) -> None:
            log.write(json.dumps(finite(record)) + "\n")
            log.flush()
            if accelerator.log_with:
                accelerator.log(scalars(record), step=record["step"])

        try:
            yield write
        finally:
            if accelerator.is_main_process:
                for tracker in accelerator.trackers:
                    tracker.finish()


def finite(value: Any) -> Any:
    """The same with None for NaN and infinity, which JSON does not know: nothing masked has no loss, for one."""
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scalars(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a tracker takes it: known numbers and texts under one name each, lists entry by entry."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{record['kind']}/{key}" if "kind" in record else key
        if isinstance(value, list | tuple):
            found |= {f"{name}/{i}": entry for i, entry in enumerate(value)}
        elif key not in ("kind", "step"):
            found[name] = value
    return {k: v for k, v in found.items() if isinstance(v, str) or (v is not None and math.isfinite(v))}
