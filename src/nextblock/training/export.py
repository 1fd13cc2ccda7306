"""A model as an ordinary Hugging Face folder: weights, tokenizer, and the settings of its decoding."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from nextblock.config.sections import BlockDiffusionSettings
from nextblock.data.encode import span_ends
from nextblock.training.checkpoint import weights_of
from nextblock.training.ranks import errors_on_all_ranks, is_main

CUSTOM_GENERATE_SOURCE = '''"""Block-diffusion decoding of this checkpoint, where the nextblock package is installed.

    model.generate(**inputs, custom_generate="path-or-hub-id", trust_remote_code=True, mode="speculative")
"""

import nextblock


def generate(model, **arguments):
    """Hand all arguments of `model.generate` on to nextblock."""
    return model.generate(custom_generate=nextblock.block_diffusion, **arguments)
'''
"""Content of `custom_generate/generate.py` in an exported folder."""
FILE_BYTES = 4 * 10**9
"""Size of a file of weights that are spread over ranks."""


def export(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    settings: BlockDiffusionSettings | None,
    dtype: torch.dtype | None = None,
    *,
    weights: bool = True,
) -> None:
    """Write an ordinary Hugging Face folder of the parent's architecture, with the block_diffusion section.

    Args:
        settings: None for a model that stays autoregressive.
        folder: made if missing; files of an earlier export are replaced.
        dtype: of the weights on disk; None: the model's.
        weights: False: leave them to `write_parts`.
    """
    export_settings(folder, model, tokenizer, settings)
    own = model.state_dict() if weights else {}
    if dtype is None or dtype == model.dtype:
        model.save_pretrained(folder, state_dict=own)
        return
    cast: dict[tuple[int, torch.Size], torch.Tensor] = {}  # by address: tied weights stay one tensor
    state = {}
    for name, value in own.items():
        state[name] = cast.setdefault((value.data_ptr(), value.shape), value.to(_stored(value, dtype)))
    model.save_pretrained(folder, state_dict=state)
    # transformers has written the dtype of the model in memory into config.json.
    before, model.config.dtype = model.config.dtype, dtype
    model.config.save_pretrained(folder)
    model.config.dtype = before


def write_parts(
    folder: Path,
    model: PreTrainedModel,
    dtype: torch.dtype | None,
    writing: Callable[[], AbstractContextManager[None]] = nullcontext,
    file_bytes: int = FILE_BYTES,
) -> None:
    """Write weights that are spread over ranks, as `export` would, file by file. All ranks call it together.

    Args:
        folder: of rank 0, which writes and holds no more than one file's weights in its memory.
        writing: makes the context of each write, which turns errors of the disk into UsageError.
        file_bytes: size of a file, unless one tensor is larger.
    """
    own = weights_of(model)
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(value.shape, dtype=_stored(value, dtype), device="meta") for name, value in own.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=file_bytes,
    )
    places: dict[str, str] = {}
    for file, names in plan.filename_to_tensors.items():
        part: dict[str, Tensor] = {}
        for name in names:
            value = own[name]
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if is_main():
                part[name] = value.detach().to("cpu", _stored(value, dtype), copy=True)
        with errors_on_all_ranks(), writing():
            if is_main():
                part = revert_weight_conversion(model, part)
                save_file({name: value.contiguous() for name, value in part.items()}, folder / file, {"format": "pt"})
                places |= dict.fromkeys(part, file)
    if is_main() and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _stored(value: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a tensor is stored where weights are stored in `dtype`; None: as they are."""
    return dtype if dtype is not None and value.is_floating_point() else value.dtype


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
