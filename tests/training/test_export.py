"""The folder that a run leaves, read as an ordinary model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nextblock.model.loading import load_tokenizer, read_config, read_settings
from nextblock.training.loop import train
from runs import config_of


def test_a_run_leaves_a_folder_that_is_an_ordinary_model_with_its_settings(place, tmp_path):
    run = train(config_of(place, tmp_path, training__steps=9))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    trained = run.decoder.model.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, trained[name]), name
    settings, tokenizer = read_settings(read_config(tmp_path)), load_tokenizer(tmp_path)
    assert settings is not None
    assert tokenizer is not None
    assert (settings.block_size, settings.mask_token_id) == (4, tokenizer.mask_token_id)
    assert plain.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_exported_dtype_is_the_one_asked_for(place, tmp_path):
    train(config_of(place, tmp_path, training__steps=9, model__export_dtype="bfloat16"))
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def write_parent(place: Path, folder: Path, **generation: Any) -> str:
    """A copy of the parent with this `generation_config.json`."""
    shutil.copytree(place / "llama", folder)
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return str(folder)


GREEDY = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 256}


def test_a_greedy_config_with_sampling_values_is_exported_without_them_and_with_one_line(place, tmp_path):
    parent = write_parent(place, tmp_path / "parent", **GREEDY)
    with pytest.warns(UserWarning, match=r"sets temperature=0.9, top_p=0.6, which .* \(do_sample=False\)"):
        train(config_of(place, tmp_path / "run", model__path=parent, training__steps=9))
    written = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert (written["do_sample"], written["eos_token_id"], written["pad_token_id"]) == (False, 256, 256)
    assert not {"temperature", "top_p"} & written.keys()
