"""Resumable training checkpoints: written in parts by all ranks behind the training, whole or absent."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from nextblock.config.errors import UsageError, one_line
from nextblock.config.files import PARTIAL, unwritten, write_whole
from nextblock.training.ranks import errors_on_all_ranks, gather, is_main, process_state

MANIFEST, STATE, METADATA = "manifest.json", "state.json", ".metadata"
"""Files beside the ranks' parts: digests of all others, what is no tensor, and where each tensor lies."""
CHECKPOINTS = "checkpoints"
TIMEOUT = timedelta(hours=2)
"""Longest time for which a rank that has written its part waits for the others."""
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # as one process is


class CheckpointWriter:
    """Writes checkpoints of a run, one at a time, in a thread; the training waits for the copy to host memory alone.

    That memory, as large as this rank's part, is kept for the next one. All ranks call a method together.
    """

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._group: Any = None  # of its own: the thread must not speak between two words of the training

    def save(
        self,
        output: Path,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        keep: int,
        *,
        keep_every: int | None = None,
    ) -> Path:
        """Begin to write weights, optimizer and state after `step` steps; first wait for the checkpoint before.

        Everything goes into a temporary folder, which all ranks must see. Each rank writes and hashes its part, rank 0
        adds the manifest of sizes and digests, and the folder appears under its name by one rename.

        Args:
            state: JSON-serialisable; rank 0's counts.
            keep: how many of the newest to keep.
            keep_every: keep those whose step is a multiple of this as well.
        Returns:
            The folder, which is there when `finish` returns.
        Raises:
            UsageError: the checkpoint before could not be written.
        """
        self.finish()
        if self._group is None and process_state().num_processes > 1:
            self._group = torch.distributed.new_group(timeout=TIMEOUT, backend="gloo")
        values = {"model": weights_of(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        staged = on_host(own_part(values, {}), self._room)
        folder, text = checkpoint_folder(output, step), json.dumps({"step": step, **state})
        self._pending = self._thread.submit(self._write, folder, staged, text, keep, keep_every)
        return folder

    @property
    def failed(self) -> bool:
        """Whether the next `finish` is known to raise. Ranks may learn that at different times."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def finish(self) -> None:
        """Wait until the checkpoint begun last is written.

        Raises:
            UsageError: it could not be; earlier ones are left as they are.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            with errors_on_all_ranks():
                pending.result()

    def close(self) -> None:
        """Let the thread end what it writes, whatever comes of it. Ranks need not call it together."""
        self._thread.shutdown()
        self._room.clear()

    def _write(self, folder: Path, staged: dict[str, Any], state: str, keep: int, keep_every: int | None) -> None:
        partial, group, main = folder.with_name(f"{PARTIAL}{folder.name}"), self._group, is_main()
        try:
            with _named_failure(folder):  # what breaks between the ranks, and below what breaks in one of them
                if main:
                    shutil.rmtree(partial, ignore_errors=True)  # of a save that was broken off
                gather(None, group)  # `save` makes the folder on each rank: none may do so before it is away
                with errors_on_all_ranks(group), _named_failure(folder):
                    save(staged, storage_writer=FileSystemWriter(partial), process_group=group, no_dist=group is None)
                    if main:
                        write_whole(partial / STATE, state.encode())
                    own = {file.name: _digest(file) for file in sorted(partial.iterdir()) if _is_own(file)}
                parts = gather(own, group)
                with errors_on_all_ranks(group), _named_failure(folder):
                    if main:
                        _commit(partial, folder, {name: digest for part in parts for name, digest in part.items()})
        except UsageError:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if main:
            for old in _superseded(list_checkpoints(folder.parent.parent), folder, keep, keep_every):
                shutil.rmtree(old, ignore_errors=True)


def _commit(partial: Path, folder: Path, digests: dict[str, str]) -> None:
    """Make what all ranks have written a checkpoint."""
    write_whole(partial / MANIFEST, json.dumps(digests).encode())
    _flush(partial)
    if folder.exists():  # damaged, as the run has not gone on from it
        shutil.rmtree(folder)
    os.replace(partial, folder)
    _flush(folder.parent)


def _is_own(file: Path) -> bool:
    """Whether this rank has written a file of a checkpoint."""
    part = re.match(r"__(\d+)_", file.name)
    return process_state().process_index == (int(part[1]) if part else 0)


def own_part(values: Mapping[str, Any], held: dict[int, list[int]]) -> dict[str, Any]:
    """What this rank writes of nested mappings: tensors that n ranks hold alike are shared out among them by size.

    Args:
        held: n -> elements that each of the n has so far; empty for the outermost mapping.
    """
    own: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            if part := own_part(value, held):
                own[name] = part
        elif not isinstance(value, Tensor):
            own[name] = value
        else:
            place, copies = _replica(value)
            sizes = held.setdefault(copies, [0] * copies)
            least = sizes.index(min(sizes))
            sizes[least] += value.numel()
            if least == place:
                own[name] = value
    return own


@torch.no_grad()
def on_host(values: Mapping[str, Any], room: dict[str, Tensor]) -> dict[str, Any]:
    """A copy of nested mappings, with tensors and this rank's shards in host memory.

    The stager of torch.distributed.checkpoint copies the device mesh with each shard, which takes longer than these.

    Args:
        room: memory of the copy before, which is used again; filled where it is empty.
    """

    def copied(value: Any, place: str) -> Any:
        if isinstance(value, Mapping):
            return {name: copied(below, f"{place}.{name}") for name, below in value.items()}
        if not isinstance(value, Tensor):
            return copy.deepcopy(value)
        local = value.to_local() if isinstance(value, DTensor) else value
        if place not in room or (room[place].shape, room[place].dtype) != (
            local.shape,
            local.dtype,
        ):  # another stage's
            room[place] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
        room[place].copy_(local, non_blocking=True)
        return DTensor(room[place], value._spec, requires_grad=False) if isinstance(value, DTensor) else room[place]

    host = copied(values, "")
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return host


def _replica(tensor: Tensor) -> tuple[int, int]:
    """Which of how many copies of a tensor, or of its shard, this rank holds."""
    if not isinstance(tensor, DTensor):
        return process_state().process_index, process_state().num_processes
    place, copies = 0, 1
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            size = tensor.device_mesh.size(dim)
            place, copies = place * size + tensor.device_mesh.get_local_rank(dim), copies * size
    return place, copies


@contextmanager
def _named_failure(folder: Path) -> Iterator[None]:
    """What stops a write, in one line."""
    try:
        yield
    # A full disk is an OSError for Python, and something else for each library that writes.
    except (OSError, RuntimeError, CheckpointException) as error:
        inner = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason, cure = unwritten(inner) or (one_line(inner), "free space")
        if re.search("timed out|timeout", reason, re.IGNORECASE):
            reason, cure = f"a rank did not write its part within {TIMEOUT}", "see to its storage"
        raise UsageError(f"cannot write checkpoint {folder}: {reason}; {cure} and resume with --resume auto") from None


def _superseded(found: list[Path], newest: Path, keep: int, keep_every: int | None) -> list[Path]:
    """The checkpoints to delete once `newest` is written."""
    # Later ones are damaged, else the run would have gone on from them; they must not count as kept.
    stale = [folder for folder in found if _step(folder) > _step(newest)]
    old = [folder for folder in found if _step(folder) <= _step(newest)][:-keep]
    if keep_every is not None:
        old = [folder for folder in old if _step(folder) % keep_every]
    return old + stale


def _step(folder: Path) -> int:
    """The number of steps in the name of a checkpoint."""
    return int(folder.name.removeprefix("step-"))


def checkpoint_folder(output: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return output / CHECKPOINTS / f"step-{step:08d}"


def list_checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first: those named `step-` and digits. Others are the user's."""
    found = (output / CHECKPOINTS).glob("step-*")
    return sorted((f for f in found if re.fullmatch(r"step-[0-9]+", f.name) and f.is_dir()), key=_step)


def remove_partial(output: Path) -> None:
    """Remove checkpoints that a killed run left half written."""
    for folder in (output / CHECKPOINTS).glob(f"{PARTIAL}*"):
        shutil.rmtree(folder, ignore_errors=True)


def newest_whole_checkpoint(output: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every file has its recorded digest, and a line on each one passed over.

    All ranks call it together; each reads its share of the files.
    """
    passed = []
    for folder in reversed(gather(list_checkpoints(output) if is_main() else [])[0]):
        fault = _fault(folder)
        if fault is None:
            return folder, [f"{line}; going on from {folder.name}" for line in passed]
        passed.append(f"checkpoint {folder} {fault}")
    return None, passed


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None for a whole one. All ranks call it together."""
    fault, recorded = None, {}
    try:
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        fault = f"is damaged (no readable {MANIFEST})"
    else:
        if isinstance(recorded, dict) and "optimizer.pt" in recorded:
            fault = "is of an earlier version of nextblock, which alone can go on from it"
        elif not isinstance(recorded, dict) or not {STATE, METADATA} <= recorded.keys():
            fault = f"is damaged ({MANIFEST} does not list its files)"
    state = process_state()
    for name in [] if fault else sorted(recorded)[state.process_index :: state.num_processes]:
        if not (folder / name).is_file():
            fault = f"is damaged ({name} is missing)"
        elif _digest(folder / name) != recorded[name]:
            fault = f"is damaged ({name} has changed)"
    return next((said for said in gather(fault) if said), None)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read weights and optimizer back in place, on as many ranks as there are; returns the state with its `step`."""
    load_weights(folder, model)
    load_optimizer(folder, model, optimizer)
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def load_weights(folder: Path, model: nn.Module) -> None:
    """Read a checkpoint's weights in place, of shards this rank's part. Ranks need not call it together."""
    load({"model": weights_of(model)}, checkpoint_id=folder, no_dist=True)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, tied ones once; not copied."""
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    return {name: value for name, value in model.state_dict().items() if name in once}


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read a checkpoint's optimizer state in place; all ranks together."""
    moments = get_optimizer_state_dict(model, optimizer)
    load({"optimizer": moments}, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(model, optimizer, optim_state_dict=moments)


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while piece := stream.read(2**24):
            digest.update(piece)
    return f"{file.stat().st_size}:{digest.hexdigest()}"


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
