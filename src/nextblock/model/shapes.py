"""Shapes of well-known models, for commands that need no weights: `plan`, and `bench` with random weights.

Figures are those of each model's `config.json`, written down so that nothing need be downloaded.
"""

from __future__ import annotations

from typing import Any

from nextblock.config.errors import UsageError, nearest

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16
    },
    "qwen3-4b": {
        **_QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32
    },
    "qwen3-8b": {
        **_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    # openPangu-Embedded-7B, parent of NBDiff-7B (its configuration's defaults): Llama with biases in attention
    "openpangu-7b": {
        "model_type": "llama",
        "vocab_size": 153376,
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "num_hidden_layers": 34,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rope_theta": 1.6e7,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 45892,
        "attention_bias": True,
        "tie_word_embeddings": False,
    },
    # no model: a head that outweighs everything else
    "large-vocabulary": {
        "model_type": "llama",
        "vocab_size": 151936,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
HUB_IDS = {
    "Qwen/Qwen3-0.6B": "qwen3-0.6b",
    "Qwen/Qwen3-0.6B-Base": "qwen3-0.6b",
    "Qwen/Qwen3-4B": "qwen3-4b",
    "Qwen/Qwen3-4B-Base": "qwen3-4b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-8B-Base": "qwen3-8b",
    "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2-1b",
    "FreedomIntelligence/openPangu-Embedded-7B-V1.1": "openpangu-7b",
}
"""Hub ids of these shapes."""


def shape_values(name: str) -> dict[str, Any]:
    """The Hugging Face config of a shape, `model_type` included; a copy.

    Raises:
        UsageError: unknown shape.
    """
    if name not in SHAPES:
        raise UsageError(f"shape '{name}' is unknown{nearest(name, list(SHAPES))}")
    return dict(SHAPES[name])
