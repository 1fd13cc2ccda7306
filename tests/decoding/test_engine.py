"""From a call to the model's forward pass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import nextblock
from decoders import language_model, prompt


@pytest.mark.parametrize(
    "how",
    [
        {"mode": "ar"},
        {"mode": "diffusion"},
        {"mode": "speculative"},
        {"mode": "speculative", "draft_ahead": 2},
        {"mode": "speculative", "draft_paths": 2},
    ],
    ids=str,
)
def test_five_calls_lead_from_generate_to_the_models_forward(llama, how):
    """`generate`, the engine, the mode, the batch, the decoder."""
    home, depths = nextblock.__path__[0], []

    def look(*_: Any) -> None:
        frame, found = sys._getframe(), 0
        while frame is not None:
            found += frame.f_code.co_filename.startswith(home)
            frame = frame.f_back
        depths.append(found)

    llama.model.register_forward_pre_hook(look)
    language_model(llama).generate(prompt(5), max_new_tokens=20, threshold=None, **how)
    assert len(depths) > 3
    assert max(depths[1:]) == 5  # the first pass reads the prompt


@pytest.mark.parametrize("mode", ["ar", "diffusion", "speculative"])
def test_the_global_switch_to_inference_is_off_between_two_events(llama, mode):
    with language_model(llama).stream(prompt(5), mode=mode, max_new_tokens=9) as stream:
        for _ in stream:
            assert not torch.is_inference_mode_enabled()


def test_a_token_takes_fewer_operations_than_in_plain_generate(llama):
    lm, ids = language_model(llama), prompt(9)
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def operations(generate: Callable[[int], Any]) -> int:
        """Of 32 tokens; what a call costs apart from its tokens falls out."""
        counts = []
        for tokens in (33, 65):
            with profile(activities=[ProfilerActivity.CPU]) as found:
                generate(tokens)
            counts.append(len(found.events() or ()))
        return counts[1] - counts[0]

    ours = operations(lambda n: lm.generate(ids, mode="ar", max_new_tokens=n, eos_token_id=[]))
    theirs = operations(lambda n: llama.generate(ids, max_new_tokens=n, **settings))
    assert 0 < ours <= theirs
