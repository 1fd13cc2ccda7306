"""Memory and speed of known devices."""

from __future__ import annotations

import re
from dataclasses import dataclass


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
