"""What a folder holds: heads, openPangu, settings, and folders that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig

import nextblock as nb
from families import tiny_model
from nextblock.config.errors import UsageError
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.model.decoder import Decoder
from nextblock.model.loading import (
    load_model,
    load_tokenizer,
    read_config,
    read_settings,
    replace_values,
    resolve_adapter,
)
from nextblock.model.mask_token import choose_mask_token
from nextblock.model.parent import byte_tokenizer
from nextblock.model.probe import probe
from nextblock.training.export import export
from nextblock.workflows.adapt import adapt


@pytest.fixture
def untied_in_fact(tmp_path) -> Path:
    """A folder whose config.json says that the head is the embedding, while its file holds another head."""
    tiny_model("llama", vocab_size=257).save_pretrained(tmp_path / "parent")
    config = json.loads((tmp_path / "parent" / "config.json").read_text())
    (tmp_path / "parent" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return tmp_path / "parent"


def test_a_head_in_the_file_stays_whatever_the_config_says(untied_in_fact, tmp_path):
    tokens, model = torch.arange(3, 23)[None], load_model(untied_in_fact)
    before = model(tokens).logits
    mask_id = choose_mask_token(Decoder(model), byte_tokenizer(), None)
    assert torch.equal(model(tokens).logits[..., :mask_id], before)
    export(tmp_path / "out", model, None, BlockDiffusionSettings(mask_token_id=mask_id))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(tokens).logits[..., :mask_id], before)


def test_a_plain_model_has_no_settings(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    assert read_settings(read_config(tmp_path)) is None
    assert load_tokenizer(tmp_path) is None


def test_a_recurrent_model_is_refused_before_its_weights_are_read(tmp_path):
    MambaConfig(hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(UsageError, match="architecture 'mamba' carries a recurrent state"):
        load_model(tmp_path)


def folder(path: Path, **files: str) -> Path:
    path.mkdir(exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no config.json"),
        ({"config__json": "{"}, "cannot read"),
        ({"config__json": '{"model_type": "llama"}'}, "has no weights (*.safetensors)"),
        ({"config__json": '{"model_type": "llamo"}', "model__safetensors": ""}, "cannot load model"),
        ({"config__json": '{"model_type": "bert"}', "model__safetensors": ""}, None),
        ({"config__json": '{"model_type": "t5"}', "model__safetensors": ""}, "is not a causal decoder"),
        ({"config__json": '{"model_type": "llama"}', "model__safetensors": "no"}, "cannot load model"),
    ],
)
def test_a_folder_that_holds_no_usable_model_stops_with_one_line(tmp_path, files, said):
    with pytest.raises(UsageError) as refused:
        probe(Decoder(load_model(folder(tmp_path / "m", **files))))
    assert "\n" not in str(refused.value)
    assert said is None or said in str(refused.value)


def test_a_missing_model_folder_and_a_file_are_named(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_model(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        load_model(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "said"), [("~no-such-user/x", "unknown user"), ("Once upon a time " * 20, "File name too long")]
)
@pytest.mark.parametrize("load", [load_model, load_tokenizer, resolve_adapter])
def test_a_name_that_can_be_no_path_is_refused(load, name, said):
    with pytest.raises(UsageError, match=said):
        load(name)


def test_an_openpangu_folder_is_a_llama_with_biases_in_attention_and_runs_no_code_of_its_own(pangu):
    folder, llama = pangu
    model = load_model(folder)
    assert type(model) is type(llama)
    tokens = torch.arange(3, 23)[None]
    assert torch.equal(model(tokens).logits, llama(tokens).logits)
    assert load_tokenizer(folder) is None
    assert read_config(folder, trust_remote_code=True).model_type == "llama"


def test_an_openpangu_config_keeps_its_own_defaults(pangu):
    folder, _ = pangu
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "rope_theta"}))
    assert read_config(folder).rope_parameters["rope_theta"] == 1.6e7
    (folder / "config.json").write_text(json.dumps({**config, "bias": False}))
    assert not read_config(folder).attention_bias


def test_an_openpangu_folder_is_adapted_to_an_ordinary_llama_that_decodes_in_every_mode(pangu, tmp_path):
    folder, _ = pangu
    config = {
        "model": {"path": str(folder), "mask_token": 299},
        "data": {"sources": [{"path": "task:algebra"}], "row_length": 64},
        "growth": {"b_max": 4, "delta": 1},
        "training": {"steps": 4, "batch_rows": 2, "evaluate_rows": 0},
        "output": str(tmp_path / "out"),
    }
    with pytest.raises(UsageError, match=r"tokenizer of .* is code in its folder.*set model.tokenizer"):
        adapt(config)
    assert not (tmp_path / "out").exists()
    adapt(config, {"model.tokenizer": "bytes"})
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], "auto_map" in written) == ("llama", False)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    lm, tokens = nb.load(tmp_path / "out"), torch.arange(3, 13)[None]
    expected = plain.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for mode in ("ar", "speculative", "diffusion"):
        out = lm.generate(tokens, mode=mode, max_new_tokens=8, eos_token_id=[]).sequences
        assert torch.equal(out, expected) or mode == "diffusion"
        assert out.shape == expected.shape


def test_given_settings_take_the_place_of_the_checkpoints_own(llama, tmp_path):
    config, whole = llama.config, BlockDiffusionSettings(mask_token_id=5)
    assert read_settings(config, whole) is whole
    assert read_settings(config, {"mask_token_id": 5}) == whole
    assert read_settings(config, "{mask_token_id: 5}") == whole
    (tmp_path / "settings.json").write_text('{"mask_token_id": 5}')
    assert read_settings(config, str(tmp_path / "settings.json")) == whole
    assert read_settings(config, "nbdiff-7b") == BlockDiffusionSettings(block_size=32, mask_token_id=45830)
    config.block_diffusion = {"block_size": 4, "mask_token_id": 9}
    assert read_settings(config, {"mask_token_id": 5}) == BlockDiffusionSettings(block_size=4, mask_token_id=5)
    assert read_settings(config) == BlockDiffusionSettings(block_size=4, mask_token_id=9)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nbdif-7b", "did you mean 'nbdiff-7b'"),
        ("{mask_token_id: [", "settings {mask_token_id: ["),
        ("{block_size: 4}", "mask_token_id is missing"),
        ({"mask_token_id": 5, "blocksize": 4}, "did you mean 'block_size'"),
    ],
)
def test_settings_that_cannot_be_read_are_refused_in_one_line(llama, given, said):
    with pytest.raises(UsageError) as refused:
        read_settings(llama.config, given)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_in_shards_loads_whole_and_one_that_lacks_a_shard_names_it(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="30KB")
    again = load_model(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in llama.state_dict().items())
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(UsageError, match=r"cannot load model .*model-00002-of-"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"vocab_size": 50}, r"hold lm_head.weight of shape \(97, 32\), config.json says \(50, 32\)"),
        ({"num_hidden_layers": 3}, r"lack 9 of the weights .* model.layers.2.input_layernorm.weight"),
        ({"num_attention_heads": 3}, r"hidden size \(32\) is not a multiple of the number of attention heads \(3\)"),
        ({"hidden_size": "x"}, r"Field 'hidden_size' expected int, got str"),
        ({"block_diffusion": 5}, r"block_diffusion of config.json is 5; it must be a mapping"),
        ([1], r"config.json holds no mapping"),
    ],
)
def test_a_config_that_does_not_fit_says_what_is_wrong(llama, tmp_path, values, said):
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **values} if isinstance(values, dict) else values))
    with pytest.raises(UsageError, match=said) as refused:
        nb.load(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_replaced_value_of_a_wrong_kind_is_refused_by_its_name(llama):
    with pytest.raises(UsageError, match=r"model.override.hidden_size='x': .*expected int"):
        replace_values(llama.config, {"hidden_size": "x"})


def test_settings_may_be_long_and_known_names_in_any_case(llama):
    assert read_settings(llama.config, "{mask_token_id: 5" + " " * 300 + "}") == BlockDiffusionSettings(
        mask_token_id=5
    )
    assert read_settings(llama.config, "NBDiff-7B") == read_settings(llama.config, "nbdiff-7b")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 90}, r"of shape \(97, 32\), config.json says \(90, 32\)"),
        ({"num_attention_heads": 5}, "hidden size .* is not a multiple of the number of attention"),
        ({"rope_parameters": {"rope_type": "other"}}, "KeyError 'other'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 leaves no attention"),
        ({"block_diffusion": 5}, "block_diffusion of config.json is 5; it must be a mapping"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_with_its_cause(llama, tmp_path, changes, said):
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UsageError, match=said):
        nb.load(tmp_path)


def test_settings_and_a_tokenizer_config_that_are_no_mappings_are_refused(llama, tmp_path):
    with pytest.raises(UsageError, match="settings is 5; it must be a mapping"):
        read_settings(llama.config, 5)  # pyright: ignore[reportArgumentType]
    llama.config.block_diffusion = "nbdiff-7b"  # a name, which `settings` alone may be
    for given in (None, "nbdiff-7b", {"block_size": 4}):
        with pytest.raises(UsageError, match=r"block_diffusion of config\.json is 'nbdiff-7b'; it must be a mapping"):
            read_settings(llama.config, given)
    del llama.config.block_diffusion
    export(tmp_path, llama, byte_tokenizer(), None)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UsageError, match="cannot load the tokenizer"):
        nb.load(tmp_path)
