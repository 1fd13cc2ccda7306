"""The log of a run and its trackers, and what is measured for them: the loss by noise and by offset.

Letters: S masked tokens, b block size.
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

from nextblock.config.errors import UsageError
from nextblock.config.files import write_whole
from nextblock.recipe.corruption import NOISE_LEVELS, MaskedTargets

PROJECT, TRACKERS = "nextblock", "trackers"
OFFSETS = 64
"""Bins of the loss by offset; in a block that is larger, neighbours share one."""


class LossProfile:
    """Sums of the masked tokens' cross-entropy by bin of the block's masked share and by offset in the block.

    Kept on the model's device: nothing is read back before `record`.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.noise = torch.zeros(2, NOISE_LEVELS, device=device)
        self.offset = torch.zeros(2, min(block_size, OFFSETS), device=device)

    def add(self, masked: MaskedTargets, nats: Tensor) -> None:
        """Take in a micro-batch: the cross-entropies [S] of its masked tokens."""
        bins = self.offset.shape[1]
        pairs = torch.stack([nats, torch.ones_like(nats)])
        self.noise.index_add_(1, masked.noise, pairs)
        self.offset.index_add_(1, masked.offset * bins // self.block_size, pairs)

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
    accelerator: Accelerator, path: Path, config: Mapping[str, Any], step: int
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends one record to the log of a run and hands its numbers to the trackers.

    Args:
        accelerator: with the trackers asked for; they are opened and closed here. Only its main process writes.
        path: a JSONL file; trackers that write files have the folder `trackers` beside it.
        config: the resolved configuration as dotted keys, for the trackers.
        step: the next of the run; what the log has from there on goes (`trim_log`).
    """
    if accelerator.is_main_process and (damaged := trim_log(path, step)):
        accelerator.print(f"{path}: {damaged} damaged lines were dropped")
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


def read_log(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of one kind in `log.jsonl`, in order; none if there is no such file.

    Args:
        path: the file.
        kind: "profile" (`LossProfile`), "evaluation" (`evaluate_midway`) or "resume" (what was changed then); None:
            the steps.
    Raises:
        UsageError: the file cannot be read, or a line holds no JSON object; the last one may be unfinished, as a
            killed run leaves it.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; change its rights") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line.decode("utf-8"))
        except ValueError as error:
            if number < len(lines):
                raise UsageError(f"{path}, line {number} is not JSON ({error}); delete the line") from error
            break
        if not isinstance(record, dict):
            raise UsageError(f"{path}, line {number} holds a {type(record).__name__}, not an object; delete the line")
        records.append(record)
    return [record for record in records if record.get("kind") == kind]


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
