"""An exported checkpoint is an ordinary model of its parent's family."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from families import MASK_ID, head_rows, tiny_model
from layouts import make_rows
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.model.loading import read_config, read_settings
from nextblock.training.export import export


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_loads_in_plain_transformers_with_the_same_logits(family, tied, tmp_path):
    model = tiny_model(family, tie_word_embeddings=tied)
    export(tmp_path, model, None, BlockDiffusionSettings(block_size=8, mask_token_id=MASK_ID, context="block_causal"))
    assert not torch.equal(head_rows(model)[0], head_rows(model)[1]) or tied
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = make_rows([[[20]]], 20).tokens
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, model(tokens).logits, rtol=1e-6, atol=1e-6)
    section = json.loads((tmp_path / "config.json").read_text())["block_diffusion"]
    assert section["block_size"] == 8
    settings = read_settings(read_config(tmp_path))
    assert settings == BlockDiffusionSettings(block_size=8, mask_token_id=MASK_ID, context="block_causal")


def test_an_export_in_bfloat16_holds_rounded_weights_and_leaves_the_model_as_it_was(llama, tmp_path):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    export(tmp_path, llama, None, BlockDiffusionSettings(mask_token_id=MASK_ID), torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert llama.dtype == torch.float32
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert plain.dtype == torch.bfloat16
    for name, value in plain.state_dict().items():
        assert torch.equal(value, before[name].bfloat16()), name


def test_tied_weights_are_exported_once_in_any_dtype(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    for dtype in (torch.float32, torch.bfloat16):
        export(tmp_path / str(dtype), model, None, BlockDiffusionSettings(mask_token_id=MASK_ID), dtype)
        with safe_open(tmp_path / str(dtype) / "model.safetensors", "pt") as weights:
            assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
