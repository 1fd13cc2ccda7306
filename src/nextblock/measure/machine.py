"""The machine that a figure was measured on."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, for the report's foot."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {package: metadata.version(package) for package in ("torch", "transformers", "nextblock")}
    return {
        "python": platform.python_version(),
        **versions,
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
    }


MEMORY_MEANING = {
    "cuda": "peak of torch's CUDA allocator while decoding, weights included",
    "cpu": "peak resident memory of the process while decoding, weights and Python included",
}
GIB = 2**30


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that the clock shows finished work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gib(device: torch.device, run: Callable[[], Any]) -> float | None:
    """Run, and say what memory it took at most, as `MEMORY_MEANING` says; None where the system cannot tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) / GIB
    with suppress(AttributeError, OSError, TypeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed shall not count
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the high-water mark back
    except OSError:
        run()
        return None
    run()
    return high_water_mark_gib()


def high_water_mark_gib() -> float | None:
    """Most resident memory of this process so far; None where the system cannot tell."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / GIB
    return None
