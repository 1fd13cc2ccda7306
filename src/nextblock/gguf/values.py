"""Values of a header that change what a model computes: each is taken into the config, or the file is refused.

transformers reads some of them for some architectures, and passes over the rest without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedConfig

from nextblock.config.errors import UsageError

Value = Callable[[str], Any]
"""Key, without the architecture's name in front -> value; None where the header has none."""

NORMS = ("layer_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon")
TAKEN: dict[str, tuple[str, ...]] = {
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", *NORMS),
    "attention.layer_norm_epsilon": NORMS,
    "attention.key_length": ("global_head_dim", "head_dim"),
    "attention.key_length_swa": ("head_dim",),
    "attention.shared_kv_layers": ("num_kv_shared_layers",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_weights_norm": ("norm_topk_prob",),
}
"""Key -> names for it in configs; the first that the architecture has gets the value."""

INERT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "attention.shared_kv_layers"), (0,)),
    **dict.fromkeys(("attention.temperature_length", "attention.temperature_scale"), (0, 1)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping"), (0,)),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale", "expert_weights_scale"), (0, 1)),
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_weights_norm"), (0,)),
    "expert_group_count": (0, 1),
    "attention.output_scale": (0, 1),
    "attention.causal": (True,),
    "expert_gating_func": (0, 1),  # none said, softmax
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (0, 1),
}
"""Key -> values with which it changes nothing; with others a config that has no name for it computes something else.

A key that is in `TAKEN` alone is passed over where the config has no name for it: others below see to it."""

HIDDEN_BY_HEADS = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the one model of a family that scales its scores by hidden size over heads, as llama.cpp knows it."""


def take_values(config: PreTrainedConfig, value: Value, file: Path) -> None:
    """Put what a header says into the config that transformers made of it.

    Raises:
        UsageError: a value that the architecture in transformers has no place for.
    """

    def refuse(key: str, said: Any, why: str) -> NoReturn:
        raise UsageError(f"model file {file} says {key}={said}, {why}; use the model's safetensors folder")

    declared = inspect.signature(type(config)).parameters
    for key in {**TAKEN, **INERT}:
        said = value(key)
        name = next((name for name in TAKEN.get(key, ()) if name in declared), None)
        if said is None or (name is None and (key not in INERT or said in INERT[key])):
            continue
        if key == "expert_gating_func" and hasattr(config, "scoring_func"):
            continue  # transformers has taken it
        if name is None:
            refuse(key, said, f"which architecture '{config.model_type}' of transformers does not compute")
        setattr(config, name, said or None if "softcapping" in key or key.endswith("sliding_window") else said)
    _rotary(config, value, refuse)
    _windows(config, value, refuse)
    _heads(config, value, refuse)


def _rotary(config: PreTrainedConfig, value: Value, refuse: Callable[..., NoReturn]) -> None:
    """The base of the rotary positions, of each kind of layer, and how much of a head they turn; nothing is scaled."""
    kind, factor = value("rope.scaling.type"), value("rope.scaling.factor") or value("rope.scale_linear")
    why = "which scales the rotary positions, and transformers does not read that from GGUF"
    if kind not in (None, "none", "linear"):
        refuse("rope.scaling.type", kind, why)
    if kind != "none" and factor not in (None, 0, 1):  # without a type it is linear
        refuse("rope.scaling.factor", factor, why)
    ropes: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_kind: dict[str, Any] = {name: rope for name, rope in ropes.items() if isinstance(rope, Mapping)}
    base, sliding = value("rope.freq_base"), value("rope.freq_base_swa")
    for name, rope in by_kind.items() or ([("", ropes)] if ropes else []):
        wanted = sliding if name == "sliding_attention" else base
        if wanted is not None:
            rope["rope_theta"] = wanted
    if not by_kind and sliding not in (None, base):
        refuse("rope.freq_base_swa", sliding, f"and architecture '{config.model_type}' has one base for all layers")
    turned = value("rope.dimension_count")
    if turned is None or by_kind or not ropes:
        return
    computed = int(_head_dim(config) * (ropes.get("partial_rotary_factor") or 1))
    if turned != computed:
        refuse("rope.dimension_count", turned, f"and architecture '{config.model_type}' turns {computed}")


def _windows(config: PreTrainedConfig, value: Value, refuse: Callable[..., NoReturn]) -> None:
    """The sliding window, and which layers have one."""
    window = value("attention.sliding_window")
    if not window:
        return
    kinds = getattr(config, "layer_types", None)
    has = getattr(config, "sliding_window", None) == window and getattr(config, "use_sliding_window", True)
    slides = [bool(has) and (kinds is None or kinds[n] == "sliding_attention") for n in range(_layers(config))]
    if not any(slides) and window < (value("context_length") or window + 1):
        refuse("attention.sliding_window", window, f"and architecture '{config.model_type}' has no such window")
    pattern = value("attention.sliding_window_pattern")
    if isinstance(pattern, int):  # every so many layers one sees all
        pattern = [not pattern or n % pattern < pattern - 1 for n in range(_layers(config))]
    if pattern is not None and any(slides) and [bool(slide) for slide in pattern] != slides:
        refuse("attention.sliding_window_pattern", value("attention.sliding_window_pattern"), "other layers than here")


def _heads(config: PreTrainedConfig, value: Value, refuse: Callable[..., NoReturn]) -> None:
    """The width of heads, and by what their scores are scaled."""
    width = _head_dim(config)
    for key in ("attention.key_length", "attention.value_length"):
        said = value(key)
        if said not in (None, width, getattr(config, "global_head_dim", None)):
            refuse(key, said, f"and heads of architecture '{config.model_type}' have a width of {width}")
    if (layers := HIDDEN_BY_HEADS.get(config.model_type)) is not None:  # no key says it
        scalar = config.hidden_size // config.num_attention_heads if _layers(config) == layers else width
        config.query_pre_attn_scalar = scalar
    scale, computed = value("attention.scale"), (getattr(config, "query_pre_attn_scalar", None) or width) ** -0.5
    if scale and abs(scale - computed) > 1e-5 * computed:
        refuse("attention.scale", scale, f"and architecture '{config.model_type}' scales by {computed:.6g}")


def _head_dim(config: PreTrainedConfig) -> int:
    """The width of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _layers(config: PreTrainedConfig) -> int:
    return config.num_hidden_layers
