"""What the tokens of a cached pass see."""

from __future__ import annotations

import pytest
import torch

from families import tiny_model
from nextblock.attention.masks import decode_mask
from nextblock.decoding.masks import Masks
from nextblock.model.decoder import Decoder


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("start", [0, 1, 6])
def test_the_template_slice_is_the_mask_of_the_rule(causal, window, start):
    masks = Masks(Decoder(tiny_model("llama")), 10)
    width = 4
    for _ in range(2):  # made, then taken from the template
        mask = masks.aligned(start, width, causal, window)
    assert mask.shape == (1, 1, width, start + width)
    for i in range(width):
        for j in range(start + width):
            seen = j <= (start + i if causal else start + width - 1)
            seen = seen and (window is None or j > start + i - window)
            assert (mask[0, 0, i, j] == 0) == seen
            assert mask[0, 0, i, j] in (0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("window", [None, 30])
def test_a_template_that_is_made_anew_is_the_mask_of_the_rule(window):
    masks, width = Masks(Decoder(tiny_model("llama")), 10**7), 4
    for start in (0, 63, 64, 65, 300, 2000, 5):
        position = torch.arange(start, start + width)[None]
        expected = decode_mask(position, position, start + width, window)
        assert torch.equal(masks.aligned(start, width, True, window) == 0, expected)
