"""Tiny random models of every supported family, for tests.

Weights are drawn from a wide normal distribution: with the usual 0.02 all logits are nearly equal, and a
test that compares two computations would pass whatever they did.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 97
BYTE_VOCABULARY = 260  # the byte tokenizer's 257 and three unused rows
MASK_ID = 96  # the last row; tests draw their tokens from 3 .. 95
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}

# family -> (model_type of its text configuration, sizes)
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA_LIKE),
    "qwen2": ("qwen2", _LLAMA_LIKE),
    "qwen3": ("qwen3", {**_LLAMA_LIKE, "head_dim": 8}),
    "mistral": ("mistral", _LLAMA_LIKE),
    "gemma3": (
        "gemma3_text",
        {**_LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 512},
    ),
    "olmo2": ("olmo2", _LLAMA_LIKE),
    "phi3": ("phi3", _LLAMA_LIKE),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_inner": 64}),
    "gpt_neox": (
        "gpt_neox",
        {key: value for key, value in _LLAMA_LIKE.items() if key != "num_key_value_heads"},
    ),
}

FAMILIES = list(_SETTINGS)
WINDOW = 5  # shorter than most documents of the tests
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}


def tiny_model(family: str, *, seed: int = 0, std: float = 0.25, **overrides: Any) -> PreTrainedModel:
    """A random `family` model in float32 and eval mode; equal seeds give equal weights.

    Two layers, width 32, four heads, 97 tokens. `overrides` go to the model's configuration; `std` is the
    standard deviation of the matrices. Vectors (norm weights, biases) keep their own value plus noise of
    0.1, so that no bias is zero and no norm is the identity. The global random state is left as it was.
    """
    model_type, sizes = _SETTINGS[family]
    return random_model(AutoConfig.for_model(model_type, **{**TOKENS, **sizes, **overrides}), seed=seed, std=std)


def nested_model(window: int, **overrides: Any) -> PreTrainedModel:
    """A random Gemma 3 that also reads images: its text model's values lie in a nested config."""
    sizes = {
        **_SETTINGS["gemma3"][1],
        "sliding_window": window,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    image = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**TOKENS, **sizes, **overrides}
    return random_model(
        AutoConfig.for_model("gemma3", text_config=text, vision_config={**image, "image_size": 28, "patch_size": 14})
    )


def longrope_model(original: int, **overrides: Any) -> PreTrainedModel:
    """A random Phi-3 whose rotary factors change beyond `original` positions."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 5.0, 8.0]}
    return tiny_model("phi3", original_max_position_embeddings=original, rope_parameters=rope, **overrides)


def random_model(config: PreTrainedConfig, *, seed: int = 0, std: float = 0.25) -> PreTrainedModel:
    """Random weights for a config, as `tiny_model` draws them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(0.0, std)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def head_rows(model: Any) -> list[torch.Tensor]:
    """The matrices of the embedding and of the head, one tensor where they are tied."""
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [layer.weight for layer in layers]


def pangu_folder(folder: Path) -> PreTrainedModel:
    """Write a tiny random folder in the layout of openPangu-Embedded and NBDiff; returns the same model as a Llama.

    Configuration, model and tokenizer name code of their own, which must not be run.
    """
    model = tiny_model("llama", vocab_size=300, attention_bias=True)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "eos_token_id", "tie_word_embeddings")
    code = {
        "AutoConfig": "configuration_openpangu_dense.PanguEmbeddedConfig",
        "AutoModelForCausalLM": "modeling_openpangu_dense.PanguEmbeddedForCausalLM",
    }
    own = {"model_type": "PanguEmbedded", "bias": True, "rope_theta": 10000.0, "torch_dtype": "float32"}
    config = {name: saved[name] for name in kept} | own | {"auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"AutoTokenizer": ["tokenization_openpangu.PanguTokenizer", None]}
    tokenizer_config = {"tokenizer_class": "PanguTokenizer", "auto_map": tokenizer}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    for module in ("configuration_openpangu_dense", "modeling_openpangu_dense", "tokenization_openpangu"):
        (folder / f"{module}.py").write_text("raise RuntimeError('code of the folder was run')")
    return model
