"""Activations that are computed again."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nextblock.model.training_mode import recompute_activations


@pytest.mark.parametrize("transformers_version", ["new", "before 5.23"])
def test_activations_are_computed_again_under_either_name_of_transformers(llama, monkeypatch, transformers_version):
    if transformers_version != "new":
        monkeypatch.setattr(llama, "activation_checkpointing_enable", None, raising=False)
        monkeypatch.setattr(
            llama,
            "gradient_checkpointing_enable",
            lambda options: llama._set_gradient_checkpointing(True, partial(checkpoint, **options)),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recompute_activations(llama)
    passes: list[int] = []
    llama.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    llama(torch.zeros(1, 3, dtype=torch.int64)).logits.sum().backward()
    assert len(passes) == 2
