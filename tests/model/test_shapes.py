"""Cards are known by the names that their drivers give them."""

from __future__ import annotations

import pytest

from nextblock.training.devices import DEVICES, device_named


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-80g"),  # as fast as its sibling
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_a_card_is_found_by_its_drivers_name(card, name):
    assert device_named(card) == DEVICES[name]


@pytest.mark.parametrize("card", ["NVIDIA L40", "Tesla V100-SXM2-16GB", "cpux"])
def test_an_unknown_card_is_not_taken_for_another(card):
    assert device_named(card) is None
