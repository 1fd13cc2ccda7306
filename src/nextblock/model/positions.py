"""Windows, positions and other values of the text model's config."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping

from transformers import PreTrainedConfig

from nextblock.config.errors import UsageError


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that describes the text model: a nested one where images or sound come with it."""
    return config.get_text_config(decoder=True)


def steady_positions(config: PreTrainedConfig) -> int | None:
    """Longest sequence whose positions mean the same in every pass, if the config says.

    Of `longrope` factors and scales (`short_*`, `long_*`), transformers takes the short or the long ones by the
    largest position of the pass. So beyond the original length a token would depend on what else is in its row,
    batch or cache.
    `dynamic` factors change beyond `max_position_embeddings`, which nothing here exceeds.
    """
    config = text_config(config)
    ropes = getattr(config, "rope_parameters", None) or {}
    longest = [getattr(config, "max_position_embeddings", None)]
    for rope in (ropes, *ropes.values()):  # one, or one for each kind of layer
        if not isinstance(rope, Mapping) or rope.get("rope_type") != "longrope":
            continue
        if any(rope.get(f"short_{part}") != rope.get(f"long_{part}") for part in ("factor", "mscale")):
            longest.append(rope["original_max_position_embeddings"])
    return min((n for n in longest if n is not None), default=None)


def check_row_length(length: int, config: PreTrainedConfig) -> None:
    """UsageError for training rows of `length` tokens where the model's positions end earlier."""
    positions = steady_positions(config)
    if positions is None or length <= positions:
        return
    text = text_config(config)
    cure = f"data.row_length={length} is over the model's {positions} positions; use at most {positions}"
    if positions < text.max_position_embeddings:
        cure += ", beyond which its longrope factors change, or give model.override.rope_parameters.short_factor the "
        cure += "values of long_factor"
    elif getattr(text, "rope_parameters", None):  # learned positions cannot be made more
        cure += ", or raise model.override.max_position_embeddings"
    raise UsageError(cure)


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """Kind of layer -> sliding window, read from the config.

    A window that the config's class does not declare is stray: transformers keeps it, the architecture ignores it.

    Raises:
        UsageError: a kind of layer other than full or sliding attention.
    """
    config = text_config(config)
    window = getattr(config, "sliding_window", None)
    declared = "sliding_window" in _parameters(type(config))
    if not declared or getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UsageError(
                f"architecture '{config.model_type}' has layers of kind '{kind}', which cannot take a block "
                "mask; use a decoder with full or sliding-window attention"
            )
    if not kinds:
        return {"sliding_attention" if window else "full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


@functools.cache
def _parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind).parameters
