"""The input of a call, checked and brought into one form: rows of token ids with their own limits and ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from nextblock.config.errors import UsageError
from nextblock.config.sections import BlockDiffusionSettings, validate
from nextblock.data.encode import encode_prompt, prompts_of_ids
from nextblock.data.records import check_characters
from nextblock.data.text import TextStream, opening
from nextblock.decoding.events import Finish
from nextblock.decoding.options import DecodingConfig, resolve_config
from nextblock.decoding.rows import Row
from nextblock.decoding.sampling import Denoising, Sampling, generator
from nextblock.model.decoder import Decoder, end_tokens
from nextblock.model.loading import no_tokenizer

Message = Mapping[str, Any]
Prompts = str | Message | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]] | Tensor
"""Texts, chats, token ids, or what a tokenizer returns: a mapping that holds `input_ids`."""


class CallOptions(DecodingConfig):
    """The options of one call of `generate` or `stream`: how to decode, and what belongs to these prompts."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    max_new_tokens: int | Sequence[int] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=256, description="longest answer, in tokens; or one for each row"
    )
    attention_mask: Tensor | None = Field(
        default=None, description="int or bool [B, T], 0 at padding of token ids; padding on the left or on the right"
    )
    seed: int | Sequence[int] | None = Field(
        default=None,
        description="of the random draws: row i of a batch draws what it would draw alone with `seed + i`; or one "
        "seed for each row; None: from torch's global random state",
    )
    stop: str | Sequence[str] | Sequence[Sequence[str]] = Field(
        default=(),
        description="strings that end an answer, or a list of them for each row; the text is cut before the first",
    )
    eos_token_id: int | Sequence[int] | Sequence[Sequence[int]] | None = Field(
        default=None, description="end tokens, or a list of them for each row; default: the model's; []: none"
    )


@dataclass
class Request:
    """A checked call: options, rows, and of each row the stop strings and `data.text.opening`."""

    config: DecodingConfig
    rows: list[Row]
    stop: list[tuple[str, ...]]
    opening: list[str]


def make_request(
    decoder: Decoder,
    tokenizer: Any,
    settings: BlockDiffusionSettings | None,
    prompts: Prompts,
    options: Mapping[str, Any],
) -> Request:
    """Check all of the input of a call.

    Raises:
        UsageError: anything wrong, in one line.
    """
    rest = dict(options)
    attention_mask, seed = rest.pop("attention_mask", None), _plain(rest.pop("seed", None))
    stop, ends = rest.pop("stop", ()), rest.pop("eos_token_id", None)
    limits = _plain(rest.get("max_new_tokens"))
    if isinstance(limits, list):
        del rest["max_new_tokens"]
        limits = [validate(DecodingConfig, {"max_new_tokens": limit}).max_new_tokens for limit in limits]
    config = resolve_config(settings, rest, drafted=decoder.adapter is not None)
    longest = decoder.max_positions
    if longest is not None and rest.get("block_size") is not None and (config.block_size or 0) > longest:
        raise UsageError(f"block_size={config.block_size} is larger than the model's context of {longest}; use less")
    encoded, openings = _encode(tokenizer, prompts, attention_mask, decoder.model.name_or_path or "")
    context = _check_prompts(decoder, [ids for _, ids in encoded])
    count = len(encoded)
    limits = _for_each(
        "max_new_tokens", limits if isinstance(limits, list) else [config.max_new_tokens] * count, count
    )
    ends = _lists_for_each("eos_token_id", end_tokens(decoder, tokenizer) if ends is None else ends, int, count)
    stops = _lists_for_each("stop", stop, str, count)
    if any(stops) and tokenizer is None:
        raise UsageError("stop: stop strings need a tokenizer, and this model has none")
    if any(not string for strings in stops for string in strings):
        raise UsageError("stop holds an empty string, which every text contains; leave it out")
    seeds = _seeds(seed, count) if config.temperature > 0 or seed is not None else []
    rows = [
        Row(
            number=i,
            prompt=ids,
            limit=min(limits[i], context - len(ids)),
            end_tokens=frozenset(ends[i]),
            stop=_stopper(tokenizer, stops[i], openings[i]) if stops[i] else None,
            random=generator(seeds[i]) if config.temperature > 0 else None,
            sampling=Sampling(config.temperature, config.top_k, config.top_p),
            denoising=Denoising(config.sampler, config.threshold, config.sub_blocks, config.steps),
            draft_length=config.draft_length,
            free=seed is None,
            padding=padding,
        )
        for i, (padding, ids) in enumerate(encoded)
    ]
    return Request(config, rows, stops, openings)


def _encode(
    tokenizer: Any, prompts: Any, attention_mask: Tensor | None, model_path: str
) -> tuple[list[tuple[list[int], list[int]]], list[str]]:
    """(left padding, prompt ids) and opening of every row. `model_path`: to say why there is no tokenizer."""
    if isinstance(prompts, Tensor):
        if prompts.ndim not in (1, 2) or prompts.is_floating_point() or prompts.dtype == torch.bool:
            raise UsageError(f"prompts is a {prompts.dtype} tensor of shape {tuple(prompts.shape)}; give int64 [B, T]")
        prompts = {"input_ids": prompts}
    if isinstance(prompts, Mapping) and "input_ids" in prompts:  # what a tokenizer returns
        attention_mask = prompts.get("attention_mask") if attention_mask is None else attention_mask
        rows = prompts_of_ids(_plain(prompts["input_ids"]), _plain(attention_mask))
        return rows, [""] * len(rows)
    if attention_mask is not None:
        raise UsageError("attention_mask goes with token ids alone; texts and chats need none")
    if tokenizer is None:
        raise UsageError(f"{no_tokenizer(model_path)}; give token ids as a LongTensor [B, T]")
    if not isinstance(prompts, Iterable):
        raise UsageError(
            f"prompts is of type {type(prompts).__name__}; give a text, messages, a list of these, or ids"
        )
    items = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
    if items and isinstance(items[0], Mapping):
        items = [items]  # one chat
    for number, item in enumerate(items):
        check_characters(item, f"prompt {number}")
    rows = [([], _from_text(tokenizer, number, item)) for number, item in enumerate(items)]
    in_chats = "" if all(isinstance(item, str) for item in items) else opening(tokenizer)
    return rows, ["" if isinstance(item, str) else in_chats for item in items]


def _from_text(tokenizer: Any, number: int, item: Any) -> list[int]:
    """Ids of a text, or of a chat up to where the assistant speaks: what training would have seen there."""
    chat = isinstance(item, Sequence) and all(isinstance(message, Mapping) and "role" in message for message in item)
    if not isinstance(item, str) and not chat:
        raise UsageError(f"prompt {number} is neither a text nor a list of chat messages with role and content")
    return encode_prompt(item, tokenizer, f"prompt {number}")


def _check_prompts(decoder: Decoder, prompts: list[list[int]]) -> int:
    """The positions that the call may use; UsageError for prompts that do not fit them or the vocabulary."""
    if not prompts:
        raise UsageError("prompts is empty; give at least one")
    context, vocabulary = decoder.context(min(map(len, prompts))) or 2**62, decoder.vocabulary
    declared = getattr(decoder.config, "max_position_embeddings", None) or 2**62
    for number, ids in enumerate(prompts):
        if not ids:
            raise UsageError(f"prompt {number} is empty; give each at least one token")
        if context <= len(ids) < declared:
            raise UsageError(
                f"prompt {number} has {len(ids)} tokens and another at most {context}, beyond which the model's "
                "longrope factors change; decode the longer prompts apart from the others"
            )
        if len(ids) >= context:
            raise UsageError(
                f"prompt {number} has {len(ids)} tokens, but the model's context is {context}; leave room for at "
                "least one new token"
            )
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise UsageError(f"prompt {number} has token ids outside the vocabulary of {vocabulary}")
    return context


def _for_each(name: str, values: Sequence[Any], count: int) -> list[Any]:
    if len(values) != count:
        raise UsageError(f"{name} has {len(values)} values for {count} prompts; give one, or one for each")
    return list(values)


def _lists_for_each(name: str, value: Any, kind: type, count: int) -> list[tuple[Any, ...]]:
    """From one item, items for all rows, or a list of items for each row."""
    value = [] if value is None else _plain(value)
    value = value if isinstance(value, list) else [value]
    for_each = any(isinstance(items, list) for items in value)
    lists = _for_each(name, value, count) if for_each else [value] * count
    for items in lists:
        for item in items if isinstance(items, list) else [items]:
            if not isinstance(item, kind) or isinstance(item, bool):
                raise UsageError(f"{name} holds {item!r}; give {'whole numbers' if kind is int else 'strings'}")
        if not isinstance(items, list):
            raise UsageError(f"{name} holds {items!r} beside a list; give a list for each prompt, or one for all")
    return [tuple(items) for items in lists]


def _seeds(seed: Any, count: int) -> list[int]:
    if seed is None:
        return torch.randint(2**62, (count,)).tolist()
    seeds = seed if isinstance(seed, list) else [seed]
    for one in seeds:
        if not isinstance(one, int) or isinstance(one, bool) or not -(2**63) <= one < 2**63:
            raise UsageError(f"seed={one!r} must be a whole number from -2**63 to 2**63 - 1")
    return _for_each("seed", seeds, count) if isinstance(seed, list) else [seed + i for i in range(count)]


def _plain(value: Any) -> Any:
    """Tensors, arrays and their numbers as Python's own; sequences as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(item) for item in value] if isinstance(value, list | tuple | set | frozenset | range) else value


def _stopper(tokenizer: Any, stop: tuple[str, ...], opening: str) -> Callable[[list[int]], Finish | None]:
    """A check of the growing answer for stop strings; called once for each token."""
    text = TextStream(tokenizer, stop, opening)

    def check(answer: list[int]) -> Finish | None:
        text.put(answer[-1])
        return "stop_string" if text.stopped else None

    return check
