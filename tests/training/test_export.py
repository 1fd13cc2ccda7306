"""The folder that a run leaves, read as an ordinary model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from families import MASK_ID, head_rows, tiny_model
from layouts import make_rows
from nextblock.config.errors import UsageError
from nextblock.config.run import stage_configs
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.model.loading import load_tokenizer, read_config, read_settings
from nextblock.training.export import export, write_parts
from nextblock.training.loop import train
from nextblock.workflows.adapt import adapt
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


def test_a_run_stores_the_decoding_defaults_that_it_was_given(place, tmp_path):
    overrides = {"training__steps": 9, "training__evaluate_rows": 0, "decoding__sub_blocks": 2, "decoding__top_p": 0.9}
    adapt(config_of(place, tmp_path / "run", **overrides))
    settings = read_settings(read_config(tmp_path / "run"))
    assert settings is not None
    assert settings.decoding == {"sub_blocks": 2, "top_p": 0.9}


def test_decoding_defaults_are_those_of_the_last_stage(place, tmp_path):
    stages = [{"name": "short", "growth": {"b_max": 2}}, {"name": "long", "growth": {"b_max": 4}}]
    short, long = stage_configs(config_of(place, tmp_path / "run", stages=stages, decoding__sub_blocks=4))
    assert (short.decoding, long.decoding) == ({}, {"sub_blocks": 4})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"decoding__sub_bloks": 2}, "decoding: unknown key 'sub_bloks'"),
        ({"decoding__sub_blocks": 3}, "decoding: sub_blocks=3"),
        ({"decoding__draft_paths": 2, "decoding__draft_ahead": 2}, "decoding: draft_"),
        ({"decoding__sub_blocks": 2, "growth__b_max": 1}, "decoding: the result decodes in ar mode alone"),
    ],
)
def test_decoding_defaults_that_no_call_could_begin_with_are_refused_before_the_run(place, tmp_path, overrides, said):
    with pytest.raises(UsageError) as refused:
        adapt(config_of(place, tmp_path / "run", training__steps=9, **overrides))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_export_in_files_holds_what_an_export_in_one_holds(family, tied, dtype, tmp_path):
    if family == "qwen3_moe":  # experts lie in one tensor in memory, and in one each in the files
        shape = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "head_dim": 8}
        config = AutoConfig.for_model(family, **SMALL, **shape, tie_word_embeddings=tied)
        model: Any = AutoModelForCausalLM.from_config(config)
    else:
        model = tiny_model(family, tie_word_embeddings=tied)
    export(tmp_path / "one", model, None, None, dtype)
    export(tmp_path / "files", model, None, None, dtype, weights=False)
    write_parts(tmp_path / "files", model, dtype, file_bytes=20_000)
    wanted = load_file(tmp_path / "one" / "model.safetensors")
    files = sorted((tmp_path / "files").glob("*.safetensors"))
    assert len(files) > 1
    assert all("-of-" in file.name for file in files)
    found = {name: value for file in files for name, value in load_file(file).items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    index = json.loads((tmp_path / "files" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == wanted.keys()
    assert (tmp_path / "files" / "config.json").read_text() == (tmp_path / "one" / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "files", dtype="auto")
    tokens = make_rows([[[20]]], 20).tokens
    if dtype is None:
        assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)


def test_tied_weights_are_exported_once_in_any_dtype(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    for dtype in (torch.float32, torch.bfloat16):
        export(tmp_path / str(dtype), model, None, BlockDiffusionSettings(mask_token_id=MASK_ID), dtype)
        with safe_open(tmp_path / str(dtype) / "model.safetensors", "pt") as weights:
            assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
