"""Resumable training checkpoints: whole or absent, of one process or in shards."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from nextblock.config.errors import UsageError
from nextblock.config.files import PARTIAL, unwritten
from nextblock.training.ranks import errors_on_all_ranks, is_main

MANIFEST, STATE, WEIGHTS, OPTIMIZER = "manifest.json", "state.json", "model.safetensors", "optimizer.pt"
PARTS = ({STATE, WEIGHTS, OPTIMIZER}, {STATE, ".metadata"})
"""What every full checkpoint and every sharded one consists of."""
CHECKPOINTS = "checkpoints"


def remove_partial(output: Path) -> None:
    """Remove checkpoints that a killed run left half written."""
    for folder in (output / CHECKPOINTS).glob(f"{PARTIAL}*"):
        shutil.rmtree(folder, ignore_errors=True)


def save_checkpoint(
    output: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int,
    *,
    keep_every: int | None = None,
    sharded: bool = False,
) -> Path:
    """Write weights, optimizer and state after `step` steps, complete or not at all; all ranks call it together.

    Everything goes into a temporary folder with a manifest of sizes and digests, is flushed to disk, and
    appears under its name by one rename.

    Args:
        state: JSON-serialisable; rank 0's counts.
        keep: how many of the newest to keep.
        keep_every: keep those whose step is a multiple of this as well.
        sharded: each rank writes its part (torch.distributed.checkpoint), in a folder that all must see;
            else rank 0 gathers and writes everything.
    Raises:
        UsageError: the disk is full or cannot be written; earlier checkpoints are left as they are.
    """
    folder = checkpoint_folder(output, step)
    partial = folder.with_name(f"{PARTIAL}{folder.name}")
    main = is_main()
    whole = None if sharded else (whole_weights(model), gathered(optimizer.state_dict()))
    try:
        with errors_on_all_ranks(), _named_failure(folder):
            if main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
        with errors_on_all_ranks(), _named_failure(folder):
            if sharded:
                save_shards(partial, model, optimizer)
            elif main and whole is not None:
                save_file(whole[0], partial / WEIGHTS)
                torch.save(whole[1], partial / OPTIMIZER)
        with errors_on_all_ranks(), _named_failure(folder):
            if main:
                (partial / STATE).write_text(json.dumps({"step": step, **state}), encoding="utf-8")
                digests = {file.name: _digest(file) for file in sorted(partial.iterdir())}
                (partial / MANIFEST).write_text(json.dumps(digests), encoding="utf-8")
                for file in partial.iterdir():
                    _flush(file)
                if folder.exists():  # the same step written again after a resume
                    shutil.rmtree(folder)
                os.replace(partial, folder)
                _flush(folder.parent)
    except UsageError:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if main:
        for old in _superseded(list_checkpoints(output), folder, keep, keep_every):
            shutil.rmtree(old, ignore_errors=True)
    return folder


@contextmanager
def _named_failure(folder: Path) -> Iterator[None]:
    """What stops a write, in one line."""
    try:
        yield
    # A full disk is an OSError for Python, and something else for each library that writes.
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        inner = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        reason, cure = unwritten(inner) or (str(inner).strip().splitlines()[0], "free space")
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


def newest_whole_checkpoint(output: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every file has its recorded digest, and a line on each damaged one passed over."""
    damaged = []
    for folder in reversed(list_checkpoints(output)):
        fault = _fault(folder)
        if fault is None:
            return folder, [f"{line}; going on from {folder.name}" for line in damaged]
        damaged.append(f"checkpoint {folder} is damaged ({fault})")
    return None, damaged


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read weights and optimizer back in place, on as many ranks as there are; returns the state with its `step`."""
    load_weights(folder, model)
    load_optimizer(folder, model, optimizer)
    return json.loads((folder / STATE).read_text(encoding="utf-8"))


def load_weights(folder: Path, model: nn.Module) -> None:
    """Read a checkpoint's weights in place. Ranks need not call it together."""
    own = model.state_dict()
    if not (folder / WEIGHTS).exists():
        from torch.distributed.checkpoint.state_dict_loader import load

        load({"model": own}, checkpoint_id=folder, no_dist=True)
        return
    with safe_open(str(folder / WEIGHTS), framework="pt") as file, torch.no_grad():
        for name in list(file.keys()):
            own[name].copy_(_placed(file.get_tensor(name), own[name]))


def load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Read a checkpoint's optimizer state in place; of sharded checkpoints, all ranks together."""
    if not (folder / OPTIMIZER).exists():
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        moments = get_optimizer_state_dict(model, optimizer)
        load({"optimizer": moments}, checkpoint_id=folder)
        set_optimizer_state_dict(model, optimizer, optim_state_dict=moments)
        return
    saved = torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu", mmap=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in saved["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameters[number].shape:
                values[name] = _placed(value, parameters[number])
    optimizer.load_state_dict(saved)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers on the CPU of rank 0, tied ones once; all ranks call it together."""
    once = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    own = model.state_dict()
    found = gathered({name: value for name, value in own.items() if name in once})
    return {name: value.contiguous() for name, value in found.items() if value is not None}


def gathered(values: Any) -> Any:
    """Nested dicts and lists with every tensor whole and on the CPU; None for each, but on rank 0. All together."""

    def whole(tensor: Tensor) -> Tensor | None:
        # A copy: what the collective returns is a promise of a tensor, without storage that could be written.
        tensor = tensor.full_tensor().clone() if isinstance(tensor, DTensor) else tensor
        return tensor.detach().cpu() if is_main() else None

    return recursively_apply(whole, values)


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, where `like` is sharded; else the tensor."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def save_shards(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write this rank's part of weights and optimizer."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save

    weights, moments = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


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


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None for a whole one."""
    try:
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"no readable {MANIFEST}"
    if not isinstance(recorded, dict) or not any(parts <= recorded.keys() for parts in PARTS):
        return f"{MANIFEST} does not list its files"
    for name, digest in recorded.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _digest(folder / name) != digest:
            return f"{name} has changed"
    return None
