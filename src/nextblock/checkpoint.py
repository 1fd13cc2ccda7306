"""Resumable training checkpoints, whole or absent, and the Hugging Face folder that a run ends with."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from nextblock.config import BlockDiffusionSettings, UsageError

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"

CUSTOM_GENERATE_SOURCE = '''"""Block-diffusion decoding of this checkpoint, where the nextblock package is installed.

    model.generate(**inputs, custom_generate="path-or-hub-id", trust_remote_code=True, mode="speculative")
"""

import nextblock


def generate(model, **arguments):
    """Hand all arguments of `model.generate` on to nextblock."""
    return model.generate(custom_generate=nextblock.block_diffusion, **arguments)
'''
"""Content of `custom_generate/generate.py` in an exported folder."""


def save_checkpoint(
    output: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write weights, optimizer and state after `step` steps, complete or not at all; keep the last `keep`.

    Everything goes into a temporary folder with a manifest of sizes and digests, is flushed to disk, and
    appears under its name by one rename.

    Raises:
        UsageError: the disk is full or cannot be written; earlier checkpoints are left as they are.
    """
    folder = output / CHECKPOINTS / f"step-{step:08d}"
    partial = folder.with_name(f".partial-{folder.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_model(model, str(partial / "model.safetensors"))
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
        digests = {file.name: _digest(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps(digests), encoding="utf-8")
        for file in partial.iterdir():
            _flush(file)
        if folder.exists():  # the same step written again after a resume
            shutil.rmtree(folder)
        os.replace(partial, folder)
        _flush(folder.parent)
    # A full disk is an OSError for Python, a SafetensorError or a RuntimeError for the libraries that write.
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = (getattr(error, "strerror", None) or str(error)).strip().splitlines()[0]
        raise UsageError(
            f"cannot write checkpoint {folder}: {reason}; free space and resume with --resume auto"
        ) from None
    kept = list_checkpoints(output)
    # Later ones are damaged, else the run would have gone on from them; they must not count as kept.
    stale = [other for other in kept if other > folder]
    for old in [*kept[: -keep - len(stale)], *stale]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def list_checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first."""
    return sorted((output / CHECKPOINTS).glob("step-*"))


def newest_whole_checkpoint(output: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every file has its recorded digest, and a line on each damaged one passed over."""
    damaged = []
    for folder in reversed(list_checkpoints(output)):
        fault = _fault(folder)
        if fault is None:
            return folder, damaged
        damaged.append(f"checkpoint {folder} is damaged ({fault}); going back to the one before it")
    return None, damaged


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read weights and optimizer back in place; returns the saved state with its `step`."""
    load_model(model, str(folder / "model.safetensors"))
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def export(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    settings: BlockDiffusionSettings | None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write an ordinary Hugging Face folder of the parent's architecture, with the block_diffusion section.

    Args:
        settings: None for a model that stays autoregressive.
        folder: made if missing; files of an earlier export are replaced.
        dtype: of the weights on disk; None: the model's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if settings is not None:
        model.config.block_diffusion = settings.model_dump()
        (folder / "custom_generate").mkdir(exist_ok=True)
        (folder / "custom_generate" / "generate.py").write_text(CUSTOM_GENERATE_SOURCE, encoding="utf-8")
    generation = model.generation_config or GenerationConfig.from_model_config(model.config)
    if tokenizer is not None and (end := tokenizer.eos_token_id) is not None:
        ends = generation.eos_token_id
        # End tokens of the config that belong to another tokenizer would be ordinary tokens of this one.
        if end not in (ends if isinstance(ends, list) else [ends]):
            generation.eos_token_id = model.config.eos_token_id = end
            generation.bos_token_id = model.config.bos_token_id = tokenizer.bos_token_id
            generation.pad_token_id = model.config.pad_token_id = None
        if generation.pad_token_id is None:
            pad = tokenizer.pad_token_id
            generation.pad_token_id = end if pad is None else pad
        tokenizer.save_pretrained(folder)
    model.generation_config = generation
    if dtype is None or dtype == model.dtype:
        model.save_pretrained(folder)
        return
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}  # by address: tied weights stay one tensor
    state = {}
    for name, value in model.state_dict().items():
        rounded = value.to(dtype) if value.is_floating_point() else value
        state[name] = cast.setdefault((value.data_ptr(), value.shape), rounded)
    model.save_pretrained(folder, state_dict=state)
    # transformers has written the dtype of the model in memory into config.json.
    own, model.config.dtype = model.config.dtype, dtype
    model.config.save_pretrained(folder)
    model.config.dtype = own


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
    try:
        recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"no readable {MANIFEST}"
    for name, digest in recorded.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if _digest(folder / name) != digest:
            return f"{name} has changed"
    return None
