"""The input of a call, checked and brought into one form: rows of token ids with their own limits and ends."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from nextblock.batch import Row
from nextblock.config import BlockDiffusionSettings, UsageError, validate
from nextblock.encoding import encode_prompt
from nextblock.events import Finish
from nextblock.model import Decoder
from nextblock.sampling import DecodingConfig, Mode, Sampler, generator
from nextblock.text import TextStream

Prompts = str | Sequence[str] | Sequence[Mapping[str, str]] | Sequence[Sequence[Mapping[str, str]]] | Tensor


DEPENDENT = (("draft_ahead", "draft_paths"), ("block_size", "sub_blocks", "steps"))
"""Options whose values must fit each other."""


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`. Those that `DecodingConfig` does not explain:

    attention_mask: int or bool [B, T], 0 at padding of token ids; padding on the left or on the right.
    seed: of the random draws: row i of a batch draws what it would draw alone with `seed + i`; or one seed
        for each row. None: from torch's global random state.
    stop: strings that end an answer, or a list of them for each row; the text is cut before the first.
    eos_token_id: end tokens, or a list of them for each row; default: the model's; []: none.
    max_new_tokens: one number, or one for each row.
    """

    attention_mask: Tensor | None
    seed: int | Sequence[int] | None
    stop: str | Sequence[str] | Sequence[Sequence[str]]
    eos_token_id: int | Sequence[int] | Sequence[Sequence[int]] | None
    max_new_tokens: int | Sequence[int]
    mode: Mode
    block_size: int | None
    sub_blocks: int
    sampler: Sampler
    threshold: float | None
    steps: int | None
    temperature: float
    top_p: float | None
    top_k: int | None
    draft_length: int | Literal["auto"] | None
    draft_ahead: int
    draft_paths: int


@dataclass
class Request:
    """A checked call: options, rows, and the stop strings of each row."""

    config: DecodingConfig
    rows: list[Row]
    stop: list[tuple[str, ...]]


def resolve_config(
    settings: BlockDiffusionSettings | None, options: Mapping[str, Any], *, drafted: bool = False
) -> DecodingConfig:
    """Options given, else the checkpoint's `decoding`, else the defaults; `block_size` is then a number.

    Args:
        drafted: the settings are those of a draft adapter.
    Raises:
        UsageError: unknown or contradictory options, or a mode or a block that the checkpoint cannot do.
    """
    stored = dict(settings.decoding) if settings is not None else {}
    for together in DEPENDENT:  # such options are all of the call, or all of the checkpoint
        if any(name in options for name in together):
            stored = {name: value for name, value in stored.items() if name not in together}
    config = validate(DecodingConfig, {**stored, **options})
    if settings is None:
        if config.mode != "ar":
            raise UsageError(
                f"mode={config.mode!r}: this checkpoint has no block_diffusion settings, so it works in ar mode "
                "only; use mode='ar', or adapt it with `nextblock adapt`"
            )
        return config
    size = config.block_size or settings.block_size
    if config.mode == "diffusion":
        config.check_block(size)
    if config.mode == "speculative" and config.draft_ahead and size < 3:
        raise UsageError(f"draft_ahead={config.draft_ahead} needs a block_size of at least 3, not {size}")
    if drafted and config.mode == "ar":
        warnings.warn("mode='ar': a draft adapter has no effect in it; use speculative mode", stacklevel=4)
    elif drafted and size > settings.block_size:
        raise UsageError(
            f"block_size={size} is larger than the {settings.block_size} that the draft adapter was trained with; use "
            f"at most {settings.block_size}"
        )
    elif config.mode != "ar" and size > settings.block_size:
        warnings.warn(
            f"block_size={size} is larger than the {settings.block_size} that the model was trained with; "
            "expect worse text",
            stacklevel=4,  # whoever called `generate` or `stream`
        )
    return config.model_copy(update={"block_size": size})


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
    attention_mask, seed = rest.pop("attention_mask", None), rest.pop("seed", None)
    stop, ends = rest.pop("stop", ()), rest.pop("eos_token_id", None)
    limits = rest.get("max_new_tokens")
    if isinstance(limits, Sequence):
        rest["max_new_tokens"] = min(limits, default=1)  # the one that could be too small
    config = resolve_config(settings, rest, drafted=decoder.adapter is not None)
    encoded = _encode(tokenizer, prompts, attention_mask)
    context = _check_prompts(decoder, [ids for _, ids in encoded])
    count = len(encoded)
    limits = _for_each(
        "max_new_tokens", limits if isinstance(limits, Sequence) else [config.max_new_tokens] * count, count
    )
    ends = _lists_for_each("eos_token_id", end_tokens(decoder, tokenizer) if ends is None else ends, int, count)
    stops = _lists_for_each("stop", stop, str, count)
    if any(stops) and tokenizer is None:
        raise UsageError("stop: stop strings need a tokenizer, and this model has none")
    if any(not string for strings in stops for string in strings):
        raise UsageError("stop holds an empty string, which every text contains; leave it out")
    seeds = _seeds(seed, count) if config.temperature > 0 else []
    rows = [
        Row(
            number=i,
            prompt=ids,
            limit=min(limits[i], context - len(ids)),
            end_tokens=frozenset(ends[i]),
            stop=_stopper(tokenizer, stops[i]) if stops[i] else None,
            random=generator(seeds[i]) if seeds else None,
            padding=padding,
        )
        for i, (padding, ids) in enumerate(encoded)
    ]
    return Request(config, rows, stops)


def end_tokens(decoder: Decoder, tokenizer: Any) -> list[int]:
    """The model's end tokens: of its generation config, its config or its tokenizer."""
    for source in (getattr(decoder.model, "generation_config", None), decoder.model.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return list(found) if isinstance(found, list | tuple) else [int(found)]
    return []


def _encode(tokenizer: Any, prompts: Any, attention_mask: Tensor | None) -> list[tuple[list[int], list[int]]]:
    """(left padding, prompt ids) of every row."""
    if isinstance(prompts, Tensor):
        return _from_tensor(prompts, None if attention_mask is None else torch.as_tensor(attention_mask))
    if attention_mask is not None:
        raise UsageError("attention_mask goes with token ids alone; texts and chats need none")
    if tokenizer is None:
        raise UsageError("this model has no tokenizer; give token ids as a LongTensor [B, T]")
    items = [prompts] if isinstance(prompts, str) else list(prompts)
    if items and isinstance(items[0], Mapping):
        items = [items]  # one chat
    return [([], _from_text(tokenizer, number, item)) for number, item in enumerate(items)]


def _from_text(tokenizer: Any, number: int, item: Any) -> list[int]:
    """Ids of a text, or of a chat up to where the assistant speaks: what training would have seen there."""
    chat = isinstance(item, Sequence) and all(isinstance(message, Mapping) for message in item)
    if not isinstance(item, str) and not chat:
        raise UsageError(f"prompt {number} is neither a text nor a list of chat messages with role and content")
    return encode_prompt(item, tokenizer, f"prompt {number}")


def _from_tensor(tokens: Tensor, attention_mask: Tensor | None) -> list[tuple[list[int], list[int]]]:
    """Rows of a padded tensor as (left padding, ids)."""
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise UsageError(f"prompts is a {tokens.dtype} tensor of shape {tuple(tokens.shape)}; give int64 [B, T]")
    if attention_mask is None:
        return [([], ids) for ids in tokens.tolist()]
    attention_mask = attention_mask[None] if attention_mask.ndim == 1 else attention_mask
    if attention_mask.shape != tokens.shape:
        raise UsageError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, the prompts {tuple(tokens.shape)}; "
            "they must be equal"
        )
    encoded = []
    for number, (ids, mask) in enumerate(zip(tokens.tolist(), attention_mask.bool().tolist(), strict=True)):
        low = mask.index(True) if True in mask else len(mask)
        high = low + sum(mask)
        if not all(mask[low:high]):
            raise UsageError(f"attention_mask of prompt {number} has holes; pad on the left or on the right only")
        encoded.append((ids[:low], ids[low:high]))
    return encoded


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
    if isinstance(value, Tensor):
        value = value.tolist()
    value = [value] if isinstance(value, kind) else list(value or ())
    if value and not isinstance(value[0], kind):
        return [tuple(items) for items in _for_each(name, value, count)]
    return [tuple(value)] * count


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        return torch.randint(2**62, (count,)).tolist()
    return _for_each("seed", seed, count) if isinstance(seed, Sequence) else [int(seed) + i for i in range(count)]


def _stopper(tokenizer: Any, stop: tuple[str, ...]) -> Callable[[list[int]], Finish | None]:
    """A check of the growing answer for stop strings; called once for each token."""
    text = TextStream(tokenizer, stop)

    def check(answer: list[int]) -> Finish | None:
        text.put(answer[-1])
        return "stop_string" if text.stopped else None

    return check
