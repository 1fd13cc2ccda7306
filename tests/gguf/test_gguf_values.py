"""Every value of a GGUF header that changes what a model computes is taken over, or refused."""

from __future__ import annotations

import pytest

from gguf_files import source_model, write_header
from nextblock.config.errors import UsageError
from nextblock.model.loading import read_config
from nextblock.model.positions import layer_windows

GEMMA = {"embedding_length": 4608, "attention.head_count": 32, "attention.head_count_kv": 16}


@pytest.fixture(scope="module")
def source():
    return source_model()


@pytest.mark.parametrize(
    ("architecture", "values", "name", "expected"),
    [
        ("phi3", {"attention.sliding_window": 100}, "sliding_window", 100),
        ("gemma2", {"attn_logit_softcapping": 20.0, "attention.key_length": 16}, "attn_logit_softcapping", 20.0),
        ("gemma2", {"final_logit_softcapping": 0.0, "attention.key_length": 16}, "final_logit_softcapping", None),
        ("qwen3", {"attention.key_length": 16}, "head_dim", 16),
        ("starcoder2", {"rope.freq_base": 5000.0}, "rope_parameters", {"rope_theta": 5000.0, "rope_type": "default"}),
        ("nemotron", {"attention.layer_norm_epsilon": 0.25, "rope.dimension_count": 8}, "norm_eps", 0.25),
        ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, "max_position_embeddings", 256),
    ],
)
def test_what_a_header_says_is_what_the_config_says(architecture, values, name, expected, source, tmp_path):
    assert getattr(read_config(write_header(tmp_path, architecture, values, source)), name) == expected


@pytest.mark.parametrize(("layers", "scalar"), [(46, 4608 // 32), (42, 128)])
def test_scores_of_gemma_2_are_scaled_as_its_size_says(layers, scalar, source, tmp_path):
    values = {**GEMMA, "block_count": layers, "attention.key_length": 128, "rope.dimension_count": 128}
    assert read_config(write_header(tmp_path, "gemma2", values, source)).query_pre_attn_scalar == scalar


def test_each_kind_of_layer_has_its_own_rotary_base(source, tmp_path):
    values = {"rope.freq_base": 7000.0, "rope.freq_base_swa": 3000.0, "attention.key_length": 16}
    config = read_config(write_header(tmp_path, "gemma3", values, source))
    ropes = config.rope_parameters
    assert (ropes["full_attention"]["rope_theta"], ropes["sliding_attention"]["rope_theta"]) == (7000.0, 3000.0)


def test_a_window_that_no_token_reaches_changes_nothing(source, tmp_path):
    config = read_config(write_header(tmp_path, "llama", {"attention.sliding_window": 256}, source))
    assert layer_windows(config) == {"full_attention": None}


@pytest.mark.parametrize(
    ("architecture", "values", "said"),
    [
        ("llama", {"rope.scaling.factor": 4.0}, "rope.scaling.factor=4.0"),
        ("llama", {"rope.scale_linear": 4.0}, "rope.scaling.factor=4.0"),
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "rope.scaling.factor=4.0"),
        ("llama", {"rope.scaling.attn_factor": 1.5}, "rope.scaling.attn_factor=1.5"),
        ("llama", {"rope.dimension_count": 8, "attention.key_length": 16}, "rope.dimension_count=8"),
        ("llama", {"attention.sliding_window": 100}, "attention.sliding_window=100"),
        ("qwen2", {"attention.sliding_window": 100}, "attention.sliding_window=100"),
        ("llama", {"attention.value_length": 8}, "attention.value_length=8"),
        ("llama", {"attention.scale": 0.5}, "attention.scale=0.5"),
        ("llama", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping=30.0"),
        ("llama", {"embedding_scale": 12.0}, "embedding_scale=12.0"),
        ("llama", {"attention.causal": False}, "attention.causal=False"),
        ("llama", {"expert_count": 8, "expert_used_count": 2}, "expert_count=8"),
        (
            "gemma2",
            {"attention.sliding_window": 64, "attention.sliding_window_pattern": 1},
            "sliding_window_pattern=1",
        ),
    ],
)
def test_what_the_architecture_of_transformers_cannot_compute_is_refused(architecture, values, said, source, tmp_path):
    widths = {"attention.key_length": 16} if architecture == "gemma2" else {}
    with pytest.raises(UsageError, match=f"{said}, .*; use the model's safetensors folder") as error:
        read_config(write_header(tmp_path, architecture, {**widths, **values}, source))
    assert "\n" not in str(error.value)
