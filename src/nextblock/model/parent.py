"""The parent of a run: loaded, or made from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import is_offline_mode
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from nextblock.config.errors import UsageError, nearest, one_line
from nextblock.config.sections import ModelConfig
from nextblock.gguf.files import find_gguf
from nextblock.model.decoder import Decoder
from nextblock.model.loading import (
    check_architecture,
    choose_attention,
    config_as_stored,
    load_model,
    load_tokenizer,
    no_tokenizer,
    read_config,
    replace_values,
    resolve,
)
from nextblock.model.shapes import HUB_IDS, shape_values


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token for each byte of UTF-8 text, id 256 the end token; a turn of chat is its bare text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


def parent_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of a run: the parent's, or the one that `config.tokenizer` names."""
    if config.tokenizer == "bytes":
        return byte_tokenizer()
    source = config.tokenizer or config.source
    tokenizer = load_tokenizer(source, config.revision, config.trust_remote_code)
    if tokenizer is None:
        raise UsageError(f"{no_tokenizer(source, config.revision)}; adapting reads text: set model.tokenizer")
    return tokenizer


def scratch_config(scratch: Mapping[str, Any]) -> PreTrainedConfig:
    """The Hugging Face config that plain values describe; `model_type` is llama if they name none.

    Raises:
        UsageError: an unknown `model_type` or one that cannot be adapted, an unknown value or one of a wrong kind.
    """
    values = dict(scratch)
    kind = str(values.pop("model_type", "llama"))
    try:
        plain, shape = AutoConfig.for_model(kind), AutoConfig.for_model(kind, **values)
    except Exception as error:  # of whatever kind a config raises at values that it cannot take
        raise UsageError(f"model.scratch with model_type={kind!r}: {one_line(error)}") from None
    # Transformers keeps values that it does not know, without a word; the rotary ones are their older names.
    known = {*plain.to_dict(), *plain.attribute_map, "rope_theta", "rope_scaling", "partial_rotary_factor"}
    if unknown := sorted(values.keys() - known):
        close = nearest(unknown[0], sorted(known))
        raise UsageError(f"model.scratch.{unknown[0]}: the config of architecture '{kind}' has no such value{close}")
    check_architecture(shape)
    return shape


def parent_config(model: ModelConfig) -> PreTrainedConfig:
    """The config of the parent that a run begins with, its values replaced."""
    if model.scratch is None:
        return read_config(model.source, model.revision, model.trust_remote_code, model.override)
    config = scratch_config(model.scratch)
    replace_values(config, model.override)
    return config


def load_parent(config: ModelConfig, device: torch.device | str | None = None) -> Decoder:
    """The parent of a run: loaded, or random weights of `config.scratch`'s shape."""
    dtype = getattr(torch, config.dtype)
    if config.scratch is None:
        model = load_model(
            config.source,
            dtype=dtype,
            attention=config.attention,
            device=device,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            override=config.override,
            quantization=config.quantization,
        )
        return Decoder(model)
    shape = parent_config(config)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    attention = choose_attention(shape, config.attention, target)
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=attention)
    return Decoder(cast(Any, model).to(target).eval())


def model_shape(config: ModelConfig) -> PreTrainedConfig:
    """The parent's Hugging Face config: `scratch`, a folder, the cache, a known shape, or downloaded alone.

    Raises:
        UsageError: a model that is none of these.
    """
    shape = _stored_shape(config) if config.scratch is None else scratch_config(config.scratch)
    replace_values(shape, config.override)
    return shape


def _stored_shape(config: ModelConfig) -> PreTrainedConfig:
    if find_gguf(config.source, config.revision) is not None:
        return read_config(config.source, config.revision)
    source = resolve(config.path)
    known = config.path in HUB_IDS
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:  # of a model that is known nothing is downloaded, of another its config alone
        shape = config_as_stored(source, local_files_only=known, **options)
    except Exception as error:  # transformers raises many kinds here; each means that there is no config to read
        if Path(source).is_dir():
            raise UsageError(f"cannot read the config of model {config.path}: {one_line(error)}") from None
        if not known:
            why = "the Hub is not asked (HF_HUB_OFFLINE)" if is_offline_mode() else f"the Hub says: {one_line(error)}"
            raise UsageError(
                f"model {config.path} is not on this machine and its shape is not among those known "
                f"({', '.join(sorted(set(HUB_IDS.values())))}); {why}; download its config.json, or set model.scratch"
            ) from None
        shape = scratch_config(shape_values(HUB_IDS[config.path]))
    check_architecture(shape)
    return shape
