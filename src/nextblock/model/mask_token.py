"""The mask token: found in the checkpoint or the tokenizer, or made; and whether it outlives an export."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nextblock.config.errors import UsageError, one_line
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.model.decoder import Decoder
from nextblock.model.loading import read_settings

MASK_TOKEN = "<|mask|>"


@torch.no_grad()
def fill_rows(decoder: Decoder, rows: range) -> None:
    """Set rows of embedding and head to the mean of those in front of them."""
    layers = {id(m): m for m in (decoder.model.get_input_embeddings(), decoder.model.get_output_embeddings())}
    for layer in layers.values():
        for name in ("weight", "bias"):
            values = getattr(layer, name, None)
            if values is not None:
                values[rows.start : rows.stop] = mean_row(values[: rows.start])


def mean_row(values: Tensor) -> Tensor:
    """[R, ...] -> [...], summed in float32."""
    return values.float().mean(dim=0).to(values.dtype)


def choose_mask_token(
    decoder: Decoder,
    tokenizer: Any,
    wanted: int | str | None,
    fill: Callable[[Decoder, range], None] = fill_rows,
    name: str = "model.mask_token",
) -> int:
    """The mask token's id; makes one where the model has none, with embedding and head rows at the mean.

    In this order: `wanted`; the id in the checkpoint's settings; the tokenizer's own mask token, or one called
    MASK_TOKEN; an unused row of a padded vocabulary; a new row.

    Args:
        fill: what gives the rows of a token that was made their values.
        name: what the option is called that gave `wanted`.
    Raises:
        UsageError: an id outside the vocabulary, a token that is not in it, or an end token.
    """
    settings = read_settings(decoder.model.config)
    if wanted is not None:
        mask_id = _wanted_mask(decoder, tokenizer, wanted, name)
    elif settings is not None:
        mask_id = settings.mask_token_id
        check_mask_token(mask_id, decoder.vocabulary, "block_diffusion.mask_token_id of the checkpoint")
    elif tokenizer is not None and (token := tokenizer.mask_token or MASK_TOKEN) in (ids := tokenizer.get_vocab()):
        mask_id = int(ids[token])
        if tokenizer.mask_token is None:
            tokenizer.mask_token = token
        check_mask_token(mask_id, decoder.vocabulary, "the tokenizer's mask token")
    else:
        return _add_mask_token(decoder, tokenizer, fill)
    model = decoder.model
    for source in (model.generation_config, decoder.config, tokenizer):
        ends = getattr(source, "eos_token_id", None)
        if mask_id in (ends if isinstance(ends, list) else [ends]):
            raise UsageError(f"mask token id {mask_id} is an end token; set {name} to another")
    if tokenizer is not None and tokenizer.mask_token_id not in (None, mask_id):  # what is exported tells one story
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask_id)
    return mask_id


def check_vocabulary(tokenizer: Any, vocabulary: int) -> None:
    """UsageError for tokens that the model has no row for: it cannot read them, and a new mask token would add rows.

    Special tokens may lack one, as that of images does in text models of Gemma 3: no text becomes such a token. The
    first batch shows whether a chat template needs one.
    """
    spare = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    spare -= {tokenizer.bos_token_id, tokenizer.eos_token_id}
    if any(number >= vocabulary and number not in spare for number in tokenizer.get_vocab().values()):
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {vocabulary}; "
            "use the tokenizer that belongs to the model"
        )


def check_round_trip(tokenizer: Any, mask_id: int) -> None:
    """Save and read a tokenizer, as an export and its user will.

    Raises:
        UsageError: it cannot be saved, some tokens then have other ids (added ones do where the vocabulary has holes),
            or the mask token shares its id with another.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
            after = type(tokenizer).from_pretrained(folder).get_vocab()
        except Exception as error:  # tokenizers raise anything
            raise UsageError(f"the tokenizer cannot be saved and loaded again: {one_line(error)}") from None
    for token, number in tokenizer.get_vocab().items():
        if after.get(token) != number:
            raise UsageError(
                f"the tokenizer reads {token!r} as id {number}, but once saved and loaded as {after.get(token)}: its "
                "ids have holes, which an added token upsets; set model.mask_token to an unused id or token of its own"
            )
    if len(tokens := [token for token, number in after.items() if number == mask_id]) > 1:
        raise UsageError(f"the tokenizer reads {tokens} as one id, {mask_id}; set model.mask_token to an unused one")


def _wanted_mask(decoder: Decoder, tokenizer: Any, wanted: int | str, name: str) -> int:
    if isinstance(wanted, str):
        if tokenizer is None or wanted not in tokenizer.get_vocab():
            raise UsageError(
                f"{name}={wanted!r} is not in the tokenizer's vocabulary; give an id, or leave it out "
                "to have one added"
            )
        wanted = int(tokenizer.convert_tokens_to_ids(wanted))
    check_mask_token(wanted, decoder.vocabulary, name)
    return wanted


def check_given_mask(
    path: str, vocabulary: int, tokenizer: Any, settings: BlockDiffusionSettings, given: bool
) -> None:
    """Refuse a mask token that the model at `path` has not, and warn where the tokenizer has another.

    given: the settings are the caller's own, not the checkpoint's.
    """
    name = "settings.mask_token_id" if given else "block_diffusion.mask_token_id of the checkpoint"
    check_mask_token(settings.mask_token_id, vocabulary, name)
    read_as = getattr(tokenizer, "mask_token_id", None)
    if not given and read_as not in (None, settings.mask_token_id):
        warnings.warn(
            f"{path}: the tokenizer reads its mask token as id {read_as}, the model was trained with "
            f"{settings.mask_token_id}; text that holds either may be read wrongly",
            stacklevel=3,
        )


def check_mask_token(mask_id: int, vocabulary: int, name: str) -> None:
    """UsageError for a mask token id, called `name`, that is no row of the embedding."""
    if not 0 <= mask_id < vocabulary:
        raise UsageError(f"{name}={mask_id} is outside the vocabulary; ids run from 0 to {vocabulary - 1}")


def _add_mask_token(decoder: Decoder, tokenizer: Any, fill: Callable[[Decoder, range], None]) -> int:
    """A new special token: on the first unused row of a padded vocabulary if there is one, else a new row."""
    rows = decoder.vocabulary
    if tokenizer is None:
        mask_id = rows
    else:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
        mask_id = int(tokenizer.mask_token_id)
    if mask_id >= rows:
        decoder.model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    fill(decoder, range(min(mask_id, rows), mask_id + 1))  # with those of special tokens that had no row
    return mask_id
