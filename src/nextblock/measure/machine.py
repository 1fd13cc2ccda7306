"""The machine that a figure was measured on."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

MEMORY_MEANING = {
    "cuda": "peak of torch's CUDA allocator while decoding, weights included",
    "cpu": "peak resident memory of the process while decoding, weights and Python included",
}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, for the report's foot."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("torch", "transformers", "nextblock")},
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
    }


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock shows finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
