"""Memory and speed of known devices, and the memory that is held."""

from __future__ import annotations

import ctypes
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30
M_MMAP_THRESHOLD = -3  # of malloc.h


@dataclass(frozen=True)
class Device:
    """A device as its data sheet has it. `tflops`: dense bfloat16 with float32 sums; None: time is not told."""

    memory_gib: float | None
    tflops: float | None


DEVICES = {
    "b200": Device(179.0, 2250.0),
    "h200": Device(140.4, 989.0),
    "h100-pcie": Device(79.6, 756.0),
    "h100": Device(79.6, 989.0),
    "a100-80g": Device(79.3, 312.0),
    "a100-40g": Device(39.6, 312.0),
    "l40s": Device(44.7, 362.0),
    "l4": Device(22.5, 121.0),
    "rtx5090": Device(31.8, 209.5),
    "rtx4090": Device(24.0, 165.2),
    "rtx3090": Device(23.7, 71.0),
    "cpu": Device(None, None),
}
"""By the name that `plan --gpu` takes; of two that fit a card's own name the first counts."""


def device_named(card: str) -> Device | None:
    """The device that a driver calls `card`, such as "NVIDIA H100 PCIe"; None if it is not among those known."""
    words = re.sub(r"[^a-z0-9]", "-", card.lower()).replace("rtx-", "rtx")
    for name, found in DEVICES.items():
        if f"-{name.removesuffix('-80g')}-" in f"-{words}-":
            return found
    return None


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held since the process began or `reset_peak_memory`: allocated on CUDA, resident elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    with suppress(OSError):  # Linux; getrusage knows the same peak, but goes on from before a reset
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextmanager
def freed_at_once() -> Iterator[None]:
    """In the `with` block, host memory that is freed in pieces of 128 KiB or more goes back to the system at once.

    glibc otherwise keeps most of it, and a pass over layers that come and go would hold them all.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**17)
    except (AttributeError, OSError, TypeError):  # another C library
        yield
        return
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 2**25)  # to which it grows by itself


def reset_peak_memory(device: torch.device) -> bool:
    """Let `peak_memory_gib` count from what is held now; False where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with suppress(AttributeError, OSError, TypeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)  # what earlier work freed shall not count
    with suppress(OSError):  # Linux alone
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False
