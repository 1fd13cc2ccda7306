"""What the plug-in refuses: each in one line that says what to do, before an engine or an answer begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import nextblock as nb
from engines import SPECULATIVE
from nextblock.model.loading import resolve
from nextblock.vllm.checks import check_engine, check_request
from nextblock.vllm.drafter import expand


def config_of(model: str = "tiny-bd", **options: Any) -> Any:
    """An engine's configuration, as vLLM makes it before any weight is loaded."""
    from vllm.engine.arg_utils import EngineArgs  # pyright: ignore

    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "speculative_config": SPECULATIVE}
    return EngineArgs(model=resolve(model), **defaults | options).create_engine_config()


def with_settings(folder: Path, source: str = "tiny-bd", **settings: Any) -> str:
    """A copy of a shipped model with other block-diffusion settings."""
    shutil.copytree(resolve(source), folder)
    values = json.loads((folder / "config.json").read_text())
    values["block_diffusion"] = values.get("block_diffusion", {}) | settings
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def refused(call: Any, *words: str) -> None:
    with pytest.raises(nb.UsageError) as found:
        call()
    said = str(found.value)
    assert "\n" not in said
    for word in words:
        assert word in said, said


ADAPTER = {"nextblock": {"draft_adapter": "tiny-draft"}}


def test_an_adapted_folder_and_an_adapter_on_its_parent_pass():
    assert config_of().num_lookahead_tokens == 16
    assert config_of("tiny-ar", additional_config=ADAPTER).num_lookahead_tokens == 16


def test_engines_that_do_not_ask_are_left_alone(tmp_path):
    aligned = with_settings(tmp_path / "aligned", prediction="aligned")
    assert config_of(aligned, speculative_config=None).num_lookahead_tokens == 0


@pytest.mark.parametrize(("key", "value"), [("prediction", "aligned"), ("context", "block_causal")])
def test_checkpoints_whose_blocks_vllm_could_not_commit(tmp_path, key, value):
    folder = with_settings(tmp_path / "other", **{key: value})
    refused(lambda: config_of(folder), value, "use `nextblock serve`")


def test_a_folder_without_settings():
    refused(lambda: config_of("tiny-ar"), "no block-diffusion settings", "nextblock adapt")


def test_a_draft_adapter_of_another_parent():
    refused(lambda: config_of("tiny-bd", additional_config=ADAPTER), "belongs to tiny-ar", "its own parent")


def test_a_draft_adapter_that_is_not_there():
    nowhere = {"nextblock": {"draft_adapter": "/nowhere"}}
    refused(lambda: config_of("tiny-ar", additional_config=nowhere), "/nowhere", "nextblock adapt")
    misspelt = {"nextblock": {"draft_adaptor": "tiny-draft"}}
    refused(lambda: config_of("tiny-ar", additional_config=misspelt), "draft_adaptor", "draft_adapter")


def test_a_draft_adapter_in_compiled_passes():
    refused(lambda: config_of("tiny-ar", additional_config=ADAPTER, enforce_eager=False), "set enforce_eager=True")


def test_more_drafts_than_a_block_has():
    refused(lambda: config_of(speculative_config={**SPECULATIVE, "num_speculative_tokens": 32}), "32", "use 31")


def test_a_mask_token_outside_the_vocabulary(tmp_path):
    folder = with_settings(tmp_path / "other", mask_token_id=9999)
    refused(lambda: config_of(folder), "mask_token_id", "9999", "0 to 263")


@pytest.mark.parametrize(
    ("name", "size", "model", "cure"),
    [
        ("pipeline_parallel_size", 2, "tiny-bd", "tensor_parallel_size"),
        ("decode_context_parallel_size", 2, "tiny-bd", "leave it at 1"),
        ("tensor_parallel_size", 5, "tiny-ar", "data_parallel_size"),
    ],
)
def test_ways_to_spread_a_model_in_which_no_draft_pass_is_whole(name, size, model, cure):
    config = config_of(model, additional_config=ADAPTER if model == "tiny-ar" else {})
    setattr(config.parallel_config, name, size)  # without the devices that vLLM would look for
    refused(lambda: check_engine(config), f"{name}={size}", cure)


@pytest.mark.parametrize("name", ["lora_config", "kv_transfer_config"])
def test_what_else_would_run_inside_a_draft_pass(name):
    config = config_of()
    setattr(config, name, object())
    refused(lambda: check_engine(config), "does not go with nextblock's drafts")


def test_ranks_with_experts_that_would_wait_for_each_other(monkeypatch):
    config = config_of()
    config.parallel_config.data_parallel_size = 2
    check_engine(config)
    monkeypatch.setattr(type(config.model_config), "is_moe", True)
    refused(lambda: check_engine(config), "data_parallel_size=2", "one engine for each")


def test_a_plug_in_that_vllm_is_told_not_to_load(monkeypatch):
    config = config_of()
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    refused(lambda: check_engine(config), "VLLM_PLUGINS=another", "add nextblock")


def test_an_unknown_version_of_vllm(monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.33.1")
    refused(config_of, "vLLM 0.33.1", "install `vllm>=0.32,<0.33`")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"mode": "diffuse"}, ["mode", "diffusion"]),
        ({"treshold": 0.9}, ["treshold", "threshold"]),
        ({"threshold": 1.5}, ["threshold", "1"]),
        ({"mode": "diffusion", "block_size": 64}, ["block_size=64", "use 16"]),
        ({"mode": "diffusion", "sub_blocks": 3}, ["sub_blocks=3", "does not divide"]),
    ],
    ids=str,
)
def test_wrong_options_of_a_request(extra, words):
    from vllm import SamplingParams  # pyright: ignore

    refused(lambda: check_request(config_of(), SamplingParams(extra_args=extra)), *words)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logprobs", 1),
        ("structured_outputs", {"regex": "[0-9]+"}),
        ("logit_bias", {65: 1.0}),
        ("allowed_token_ids", [65]),
        ("bad_words", ["ten"]),
        ("presence_penalty", 0.5),
        ("frequency_penalty", 0.5),
        ("repetition_penalty", 1.2),
        ("min_p", 0.1),
        ("min_tokens", 3),
    ],
)
def test_what_diffusion_mode_cannot_do(name, value):
    from vllm.sampling_params import StructuredOutputsParams  # pyright: ignore

    from vllm import SamplingParams  # pyright: ignore

    given = {name: StructuredOutputsParams(**value) if name == "structured_outputs" else value}
    config = config_of()
    check_request(config, SamplingParams(**given))
    in_diffusion = SamplingParams(**given, extra_args={"mode": "diffusion"})
    refused(lambda: check_request(config, in_diffusion), name, "mode='speculative'")


def test_vllm_still_drops_what_its_expand_kernel_computes_and_ours_does_not():
    """Where this fails vLLM has mended its kernel: `mend_expand_kernel` can go."""
    from vllm.platforms import current_platform  # pyright: ignore
    from vllm.utils.cpu_triton_utils import _expand_kernel_impl  # pyright: ignore

    current_platform.import_kernels()
    value, ends = torch.tensor([0.0, 2.0]), torch.tensor([2, 5], dtype=torch.int32)
    of_vllm, ours = torch.full((5,), -7.0), torch.full((5,), -7.0)
    _expand_kernel_impl(of_vllm, value, ends, 0, 1)
    expand(ours, value, ends, 0, 1)
    assert of_vllm.tolist() == [-7.0] * 5
    assert ours.tolist() == [1, 1, 2, 2, 2]
