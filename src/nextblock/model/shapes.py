"""Shapes of well-known models, for commands that need no weights: `plan`, and `bench` with random weights.

Figures are those of each model's `config.json`, written down so that nothing need be downloaded.
"""

from __future__ import annotations

from typing import Any

from nextblock.config.errors import UsageError, nearest


def _shape(
    kind: str, vocabulary: int, width: int, mlp: int, layers: int, heads: int, kv: int, positions: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": positions,
        "tie_word_embeddings": True,
        **more,
    }


_QWEN3: dict[str, Any] = {"head_dim": 128, "rms_norm_eps": 1e-6}
_PANGU: dict[str, Any] = {"rope_theta": 1.6e7, "rms_norm_eps": 1e-5, "attention_bias": True}
_PANGU |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 45892}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": _shape("qwen3", 151936, 1024, 3072, 28, 16, 8, 40960, **_QWEN3),
    "qwen3-4b": _shape("qwen3", 151936, 2560, 9728, 36, 32, 8, 40960, **_QWEN3),
    "qwen3-8b": _shape("qwen3", 151936, 4096, 12288, 36, 32, 8, 40960, **_QWEN3, tie_word_embeddings=False),
    "llama-3.2-1b": _shape("llama", 128256, 2048, 8192, 16, 32, 8, 131072, head_dim=64, rms_norm_eps=1e-5),
    "smollm2-135m": _shape("llama", 49152, 576, 1536, 30, 9, 3, 8192, rope_theta=1e5, rms_norm_eps=1e-5),
    # openPangu-Embedded-7B, parent of NBDiff-7B (its configuration's defaults): Llama with biases in attention
    "openpangu-7b": _shape("llama", 153376, 4096, 12800, 34, 32, 8, 32768, **_PANGU, tie_word_embeddings=False),
    # no model: a head that outweighs everything else
    "large-vocabulary": _shape("llama", 151936, 256, 768, 4, 4, 4, 4096),
}
HUB_IDS = {
    "Qwen/Qwen3-0.6B": "qwen3-0.6b",
    "Qwen/Qwen3-0.6B-Base": "qwen3-0.6b",
    "Qwen/Qwen3-4B": "qwen3-4b",
    "Qwen/Qwen3-4B-Base": "qwen3-4b",
    "Qwen/Qwen3-8B": "qwen3-8b",
    "Qwen/Qwen3-8B-Base": "qwen3-8b",
    "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2-1b",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m",
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
