"""A model as an ordinary Hugging Face folder: weights, tokenizer, and the settings of its decoding."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from nextblock.config.sections import BlockDiffusionSettings
from nextblock.data.encode import span_ends

CUSTOM_GENERATE_SOURCE = '''"""Block-diffusion decoding of this checkpoint, where the nextblock package is installed.

    model.generate(**inputs, custom_generate="path-or-hub-id", trust_remote_code=True, mode="speculative")
"""

import nextblock


def generate(model, **arguments):
    """Hand all arguments of `model.generate` on to nextblock."""
    return model.generate(custom_generate=nextblock.block_diffusion, **arguments)
'''
"""Content of `custom_generate/generate.py` in an exported folder."""


def export(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    settings: BlockDiffusionSettings | None,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write an ordinary Hugging Face folder of the parent's architecture, with the block_diffusion section.

    Args:
        settings: None for a model that stays autoregressive.
        folder: made if missing; files of an earlier export are replaced.
        dtype: of the weights on disk; None: the model's.
        weights: to write in place of the model's own, which may be spread over ranks.
    """
    export_settings(folder, model, tokenizer, settings)
    if dtype is None or dtype == model.dtype:
        model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
        return
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}  # by address: tied weights stay one tensor
    state = {}
    for name, value in (weights or model.state_dict()).items():
        rounded = value.to(dtype) if value.is_floating_point() else value
        state[name] = cast.setdefault((value.data_ptr(), value.shape), rounded)
    model.save_pretrained(folder, state_dict=state)
    # transformers has written the dtype of the model in memory into config.json.
    own, model.config.dtype = model.config.dtype, dtype
    model.config.save_pretrained(folder)
    model.config.dtype = own


def export_settings(
    folder: Path, model: PreTrainedModel, tokenizer: Any, settings: BlockDiffusionSettings | None
) -> None:
    """Write all that `export` writes but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, values in ((model, vars(model.config)), (tokenizer, getattr(tokenizer, "init_kwargs", {}))):
        if type(part).__module__.startswith("transformers."):  # else its code is written too, by save_pretrained
            values.pop("auto_map", None)  # names files that transformers did without, and so can the export
    if settings is not None:
        model.config.block_diffusion = settings.model_dump()
        (folder / "custom_generate").mkdir(exist_ok=True)
        (folder / "custom_generate" / "generate.py").write_text(CUSTOM_GENERATE_SOURCE, encoding="utf-8")
    generation = model.generation_config or GenerationConfig.from_model_config(model.config)
    if tokenizer is not None and (end := tokenizer.eos_token_id) is not None:
        ends = generation.eos_token_id
        # End tokens of the config that belong to another tokenizer would be ordinary tokens of this one.
        if end not in (ends if isinstance(ends, list) else [ends]):
            generation.eos_token_id = model.config.eos_token_id = end
            generation.bos_token_id = model.config.bos_token_id = tokenizer.bos_token_id
            generation.pad_token_id = model.config.pad_token_id = None
        ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
        if more := [token for token in span_ends(tokenizer) if token not in ends]:  # a turn of chat ends with these
            generation.eos_token_id = [*ends, *more]
        if generation.pad_token_id is None:
            pad = tokenizer.pad_token_id
            generation.pad_token_id = end if pad is None else pad
        tokenizer.save_pretrained(folder)
    _leave_out_idle(generation)
    model.generation_config = generation
    model.config.save_pretrained(folder)
    generation.save_pretrained(folder)


def _leave_out_idle(generation: GenerationConfig) -> None:
    """Unset values that the config's own way of decoding does not use, with one line on them.

    A greedy config with a temperature is common among parents, and transformers does not save one that was changed.
    """
    try:
        generation.validate(strict=True)
    except ValueError as error:
        idle = re.findall(r"^- `(\w+)`", str(error), re.MULTILINE)
        if not idle:
            raise
        said = ", ".join(f"{name}={getattr(generation, name)}" for name in idle)
        warnings.warn(
            f"the parent's generation_config.json sets {said}, which its own way of decoding does not use "
            f"(do_sample={generation.do_sample}); the result leaves that out",
            stacklevel=2,
        )
        for name in idle:
            setattr(generation, name, None)
