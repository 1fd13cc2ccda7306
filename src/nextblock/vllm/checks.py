"""What the plug-in can do: an engine's settings and a request's options, checked; each refusal is one line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from nextblock.config.errors import UsageError, nearest
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.decoding.options import DecodingConfig, resolve_config, with_stored
from nextblock.model.adapter_files import StoredAdapter, read_adapter
from nextblock.model.loading import read_settings, resolve_adapter, weights_folder
from nextblock.model.mask_token import check_mask_token

VERSIONS = "0.32."
OPTIONS = ("mode", "block_size", "threshold", "sampler", "sub_blocks", "steps")
"""Of a request, in `extra_args` of its SamplingParams (over HTTP `vllm_xargs`); as in `DecodingConfig`."""
OF_VLLM = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")
"""What vLLM itself keeps in `extra_args`."""
NOT_IN_DIFFUSION = {
    "logprobs": (None, "are of the AR head, which does not choose the tokens there"),
    "structured_outputs": (None, "follow the AR head from left to right"),
    "logit_bias": (None, "acts on the AR head"),
    "allowed_token_ids": (None, "act on the AR head"),
    "bad_words": ([], "act on the AR head"),
    "presence_penalty": (0, "acts on the AR head"),
    "frequency_penalty": (0, "acts on the AR head"),
    "repetition_penalty": (1, "acts on the AR head"),
    "min_p": (0, "acts on the AR head"),
    "min_tokens": (0, "acts on the AR head"),
}
"""Fields of SamplingParams, the value that asks for nothing, and why any other is refused in diffusion mode."""


def draft_adapter(config: Any) -> StoredAdapter | None:
    """The draft adapter that an engine's `additional_config` names.

    Raises:
        UsageError: an unknown key of ours, or no adapter there.
    """
    ours = (config.additional_config or {}).get("nextblock") or {}
    for name in ours:
        if name != "draft_adapter":
            raise UsageError(f"additional_config.nextblock.{name} is unknown{nearest(name, ['draft_adapter'])}")
    return _adapter_at(str(ours["draft_adapter"])) if "draft_adapter" in ours else None


@lru_cache(maxsize=1)
def _adapter_at(path: str) -> StoredAdapter:
    return read_adapter(resolve_adapter(path))


def settings_of(config: Any) -> BlockDiffusionSettings | None:
    """The block-diffusion settings of an engine's draft adapter, else of its model."""
    adapter = draft_adapter(config)
    return read_settings(config.model_config.hf_config) if adapter is None else adapter.settings


def check_vllm() -> None:
    """UsageError for a vLLM whose inner names this plug-in does not know, or that was told not to load it."""
    from vllm import __version__ as version  # pyright: ignore[reportMissingImports]

    if not version.startswith(VERSIONS):
        raise UsageError(
            f"vLLM {version} is not known to this nextblock, which works with {VERSIONS}x; install "
            "`vllm>=0.32,<0.33`, or leave nextblock out of speculative_config"
        )
    if (plugins := os.environ.get("VLLM_PLUGINS")) is not None and "nextblock" not in plugins.split(","):
        raise UsageError(f"VLLM_PLUGINS={plugins} leaves out nextblock, which checks requests; add nextblock to it")


def check_engine(config: Any) -> None:
    """Refuse an engine that would fail or give another model's answers, before its weights are loaded.

    Args:
        config: vLLM's VllmConfig, which names our speculator.
    Raises:
        UsageError: what does not go, and what to do.
    """
    check_vllm()
    adapter, model, settings = draft_adapter(config), config.model_config, settings_of(config)
    if settings is None:
        raise UsageError(
            f"model {model.model} has no block-diffusion settings in its config.json, so it cannot draft; adapt it "
            "with `nextblock adapt`, or name a draft adapter: additional_config={'nextblock': {'draft_adapter': DIR}}"
        )
    for value, wanted in ((settings.prediction, "shifted"), (settings.context, "context_causal")):
        if value != wanted:
            raise UsageError(
                f"model {model.model} is {value}: vLLM's own pass must be the one that commits a block, which needs "
                f"{wanted}; use `nextblock serve` for it"
            )
    drafts, most = config.num_speculative_tokens, settings.block_size - 1
    if drafts > most:
        raise UsageError(
            f"num_speculative_tokens={drafts} is more than a block of {settings.block_size} has behind its first "
            f"token; use {most} or fewer"
        )
    _check_parallel(config, adapter)
    if adapter is None:
        name = "block_diffusion.mask_token_id of the checkpoint"
        check_mask_token(settings.mask_token_id, model.get_vocab_size(), name)
    else:
        adapter.check_parent(Path(weights_folder(model.model, model.revision)))


def _check_parallel(config: Any, adapter: StoredAdapter | None) -> None:
    """Refuse ways to run a model in which a draft pass is not one plain pass of the whole model."""
    parallel = config.parallel_config
    sizes = {
        "pipeline_parallel_size": "a draft pass needs all layers in one place; use tensor_parallel_size",
        "decode_context_parallel_size": "a draft pass needs the whole context in one place; leave it at 1",
    }
    for name, why in sizes.items():
        if (size := getattr(parallel, name)) > 1:
            raise UsageError(f"{name}={size} does not go with nextblock's drafts: {why}")
    if parallel.data_parallel_size > 1 and config.model_config.is_moe:
        raise UsageError(
            f"data_parallel_size={parallel.data_parallel_size} does not go with nextblock's drafts of a model with "
            "experts, whose ranks would wait for each other's passes; start one engine for each"
        )
    if config.lora_config is not None:
        raise UsageError("enable_lora does not go with nextblock's drafts; merge the LoRA adapter into the model")
    if config.kv_transfer_config is not None:
        raise UsageError("kv_transfer_config does not go with nextblock's drafts, which use the cache; leave it out")
    if adapter is not None and parallel.tensor_parallel_size > 1:
        raise UsageError(
            f"tensor_parallel_size={parallel.tensor_parallel_size} does not go with a draft adapter, which acts on "
            "whole layers; use data_parallel_size, or an adapted model"
        )
    if adapter is not None and not config.model_config.enforce_eager:
        raise UsageError("a draft adapter acts between the layers, which compiled passes skip; set enforce_eager=True")


def check_request(config: Any, params: Any) -> None:
    """UsageError for a request's options that are wrong, or that its mode cannot do.

    Args:
        config: vLLM's VllmConfig.
        params: vLLM's SamplingParams.
    """
    settings = settings_of(config)
    assert settings is not None
    options = request_options(settings, config.num_speculative_tokens + 1, params.extra_args)
    if options.mode != "diffusion":
        return
    for name, (nothing, why) in NOT_IN_DIFFUSION.items():
        if (value := getattr(params, name, nothing)) != nothing and value is not None:
            raise UsageError(f"{name}={value!r} in diffusion mode: {why}; leave it out, or use mode='speculative'")


def request_options(settings: BlockDiffusionSettings, most: int, extra: Mapping[str, Any] | None) -> DecodingConfig:
    """How one request is decoded; without options of its own in speculative mode.

    Args:
        most: tokens of the longest block that the engine has room for.
        extra: `extra_args` of its SamplingParams.
    """
    given = {name: value for name, value in (extra or {}).items() if name not in OF_VLLM}
    for name in given:
        if name not in OPTIONS:
            raise UsageError(f"vllm_xargs.{name} is unknown{nearest(name, OPTIONS)}")
    size = given.get("block_size", most)
    if isinstance(size, int) and size > most:
        raise UsageError(
            f"block_size={size} is more than this engine has room for, whose num_speculative_tokens is {most - 1}; "
            f"use {most} or less"
        )
    values = {"mode": "speculative", **{name: None if value == "none" else value for name, value in given.items()}}
    if (with_stored(settings, values).block_size or settings.block_size) > most:
        values["block_size"] = most  # only then: the block of a call comes without the checkpoint's sub-blocks
    return resolve_config(settings, values)
