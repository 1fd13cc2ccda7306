"""A draft adapter's folder, in peft's format, and the fingerprint by which it knows its parent."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from nextblock.config.errors import UsageError, one_line
from nextblock.config.sections import BlockDiffusionSettings, DraftAdapterConfig, validate
from nextblock.gguf.files import gguf_fingerprint
from nextblock.model.correction import Correction, has_correction, load_correction, save_correction
from nextblock.model.decoder import Decoder
from nextblock.model.draft_adapter import DraftAdapter

WEIGHTS, PEFT_CONFIG, SETTINGS = "adapter_model.safetensors", "adapter_config.json", "draft_adapter.json"
MASK_VECTOR = "mask_vector.safetensors"
PEFT_PREFIX = "base_model.model."
SAMPLED = 4096
"""Bytes of each tensor that enter the fingerprint."""


def fingerprint(folder: Path) -> str:
    """A digest of the parent's weight files: name, shape, dtype and a sample of the bytes of every tensor.

    Args:
        folder: with safetensors files; or a GGUF file, which is another parent than its unpacked weights.
    """
    if folder.is_file():
        return gguf_fingerprint(folder, SAMPLED)
    digest = hashlib.blake2b(digest_size=16)
    tensors: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as handle:
            tensors |= dict.fromkeys(handle.keys(), file)
    for name in sorted(tensors):
        with safe_open(str(tensors[name]), framework="pt") as handle:
            part = handle.get_slice(name)
            shape = part.get_shape()
            rows = max(1, SAMPLED // max(1, math.prod(shape[1:]) * 2)) if shape else 0
            sample = part[:rows] if shape else handle.get_tensor(name)
        digest.update(f"{name} {shape} {sample.dtype}".encode())
        digest.update(sample.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_adapter(
    folder: Path,
    adapter: DraftAdapter,
    settings: BlockDiffusionSettings,
    parent: str,
    parent_folder: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a peft-format folder, with the mask vector, the settings, and the parent's name and fingerprint."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, first, second in zip(adapter.names, adapter.lora_A, adapter.lora_B, strict=True):
        for key, weight in zip(_keys(name), (first, second), strict=True):
            weights[key] = weight.detach().to("cpu", dtype).contiguous()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    save_file({"mask_vector": adapter.mask_vector.detach().cpu().to(dtype)}, folder / MASK_VECTOR)
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": parent,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": adapter.config.dropout,
        "target_modules": adapter.names,
        "bias": "none",
        "inference_mode": True,
    }
    own = {"block_diffusion": settings.model_dump(), "parent": parent, "fingerprint": fingerprint(parent_folder)}
    if adapter.correction is not None:
        save_correction(folder, adapter.correction, settings, parent, own["fingerprint"], dtype)
    (folder / PEFT_CONFIG).write_text(json.dumps(peft_config, indent=2), encoding="utf-8")
    (folder / SETTINGS).write_text(json.dumps(own, indent=2), encoding="utf-8")


@dataclass(frozen=True)
class StoredAdapter:
    """What a draft adapter's folder holds.

    parent: the name of the model it belongs to. digest: `fingerprint` of that model's weights.
    weights: name of an adapted layer -> A [r, in] and B [out, r].
    mask_vector: [D], what embeds the mask token.
    """

    folder: Path
    parent: str
    digest: str
    settings: BlockDiffusionSettings
    config: DraftAdapterConfig
    weights: dict[str, tuple[Tensor, Tensor]]
    mask_vector: Tensor

    def check_parent(self, weights: Path) -> str:
        """UsageError unless a folder (or GGUF file) holds the adapter's own parent; else its fingerprint."""
        found = fingerprint(weights)
        if self.digest != found:
            raise UsageError(
                f"draft adapter {self.folder} belongs to {self.parent} (weights {self.digest[:8]}), not to this model "
                f"(weights {found[:8]}); load it with its own parent"
            )
        return found


def read_adapter(folder: Path) -> StoredAdapter:
    """Read a saved adapter.

    Raises:
        UsageError: no whole adapter there.
    """
    try:
        own: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        peft_config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
        parent, digest, section = own["parent"], own["fingerprint"], own["block_diffusion"]
        config = DraftAdapterConfig(
            rank=peft_config["r"],
            alpha=peft_config["lora_alpha"],
            dropout=peft_config["lora_dropout"],
            target_modules=tuple(peft_config["target_modules"]),
        )
        stored = load_file(folder / WEIGHTS)
        first_second = {name: _keys(name) for name in config.target_modules}
        weights = {name: (stored[first], stored[second]) for name, (first, second) in first_second.items()}
        mask_vector = load_file(folder / MASK_VECTOR)["mask_vector"]
    except Exception as error:  # of whatever kind a file raises that is missing, cut or of another program
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UsageError(f"{folder} holds no draft adapter ({reason}); make one with `nextblock adapt`") from None
    if unnamed := sorted(stored.keys() - {key for keys in first_second.values() for key in keys}):
        raise UsageError(
            f"{folder / WEIGHTS} holds {unnamed[0]}, which is of no layer in target_modules of {PEFT_CONFIG}; bring "
            "both files of one adapter"
        )
    settings = validate(BlockDiffusionSettings, section)
    return StoredAdapter(folder, parent, digest, settings, config, weights, mask_vector)


def load_adapter(
    folder: Path, model: PreTrainedModel, parent_folder: Path
) -> tuple[DraftAdapter, BlockDiffusionSettings]:
    """Attach a saved adapter to its parent.

    Raises:
        UsageError: no whole adapter there, or one of another parent.
    """
    stored = read_adapter(folder)
    found = stored.check_parent(parent_folder)
    adapter = DraftAdapter(model, stored.config)
    made = {name: (a.shape, b.shape) for name, a, b in zip(adapter.names, adapter.lora_A, adapter.lora_B, strict=True)}
    for name, (a, b) in stored.weights.items():
        if made.get(name) != (a.shape, b.shape):
            raise UsageError(
                f"{folder / WEIGHTS} holds updates of {name} of shapes {tuple(a.shape)} and {tuple(b.shape)}, which "
                f"do not fit r={stored.config.rank} of {PEFT_CONFIG} and the model; bring both files of one adapter"
            )
    with torch.no_grad():
        for name, first, second in zip(adapter.names, adapter.lora_A, adapter.lora_B, strict=True):
            first.copy_(stored.weights[name][0])
            second.copy_(stored.weights[name][1])
        adapter.mask_vector.copy_(stored.mask_vector)
    adapter.correction = load_correction(
        folder, adapter.mask_vector.device, adapter.mask_token_id, stored.settings, found
    )
    adapter.requires_grad_(False).eval()
    if adapter.mask_vector.device.type == "cpu":
        adapter.merge_copies()
    adapter.settings = stored.settings
    return adapter, stored.settings


def _keys(name: str) -> tuple[str, str]:
    """What peft calls A and B of a layer."""
    return f"{PEFT_PREFIX}{name}.lora_A.weight", f"{PEFT_PREFIX}{name}.lora_B.weight"


def take_correction(model: Any, folder: Path, settings: BlockDiffusionSettings) -> None:
    """Put the correction head of a full model's folder beside the model, if it has one; UsageError for a foreign one.

    It is no part of the model's weights, which stay those that any program reads; `save_pretrained` writes both.
    """
    if not has_correction(folder) or hasattr(model, "correction"):
        return
    decoder = Decoder(model)
    head: Any = load_correction(folder, decoder.device, decoder.vocabulary, settings, fingerprint(folder))
    vars(model).update(correction=head, save_pretrained=partial(_save_with_head, model, head, settings))


def _save_with_head(
    model: Any,
    head: Correction,
    settings: BlockDiffusionSettings,
    save_directory: str | Path,
    *rest: Any,
    **options: Any,
) -> None:
    """`save_pretrained` of a model, and its correction head, which belongs to the weights as they are written."""
    type(model).save_pretrained(model, save_directory, *rest, **options)
    own = Path(save_directory)
    save_correction(own, head, settings, model.name_or_path, fingerprint(own), head.previous.dtype)
