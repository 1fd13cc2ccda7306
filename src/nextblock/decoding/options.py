"""The options of decoding, stated once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, Self, TypedDict

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from nextblock.config.errors import UsageError, nearest
from nextblock.config.sections import BlockDiffusionSettings, Section, validate

Mode = Literal["ar", "diffusion", "speculative"]
Sampler = Literal["confidence", "entropy", "margin", "entropy_bound"]
_TINY = 1e-30
MODES: tuple[str, ...] = ("ar", "diffusion", "speculative")
SAMPLERS: tuple[str, ...] = ("confidence", "entropy", "margin", "entropy_bound")


class DecodingConfig(Section):
    """How to decode: the options of `generate`, their defaults and their limits, in one place."""

    mode: Mode = Field("diffusion", description="token by token, a block at a time, or a block with an exact check")
    max_new_tokens: int = Field(256, description="longest answer, in tokens")
    block_size: int | None = Field(None, description="tokens in a block; default: the checkpoint's")
    sub_blocks: int = Field(1, description="diffusion: runs of equal length in which a block is denoised, in order")
    sampler: Sampler = Field("confidence", description="diffusion: which masked positions to commit first")
    threshold: float | None = Field(
        0.9,
        description="diffusion: commit all positions above it (entropy_bound: the bound in nats); none: one a step",
    )
    steps: int | None = Field(None, description="diffusion: denoising steps per block; none: as many as it takes")
    temperature: float = Field(0.0, description="0: greedy")
    top_p: float | None = Field(None, description="nucleus: fewest tokens whose probabilities reach this sum")
    top_k: int | None = Field(None, description="only the k likeliest tokens")
    draft_length: int | Literal["auto"] | None = Field(
        None, description="speculative: tokens drafted per check; auto: by what was kept lately; default: the block"
    )
    draft_ahead: int = Field(
        0, description="speculative: points of acceptance for which the next draft is made in the check's own pass"
    )
    draft_paths: int = Field(
        1, description="speculative: paths of a draft, branching where it is unsure, that one check tries as a tree"
    )

    @field_validator("mode", "sampler", mode="before")
    @classmethod
    def _known(cls, value: object, info: object) -> object:
        name = info.field_name  # type: ignore[attr-defined]
        known = MODES if name == "mode" else SAMPLERS
        if value not in known:
            raise ValueError(f"unknown {name}{nearest(str(value), known)}")
        return value

    @field_validator("draft_length", mode="before")
    @classmethod
    def _length(cls, value: object) -> object:
        if value in (None, "auto"):
            return value
        if isinstance(value, Integral) and not isinstance(value, bool):
            return int(value)
        raise ValueError("is not a number of tokens; use 1 or more, or auto")

    @model_validator(mode="after")
    def _limits(self) -> Self:
        rules = (
            ("max_new_tokens", self.max_new_tokens >= 1, "must be at least 1"),
            ("block_size", self.block_size is None or self.block_size >= 1, "must be at least 1"),
            ("sub_blocks", self.sub_blocks >= 1, "must be at least 1"),
            ("threshold", self.threshold is None or 0 < self.threshold <= 1, "must lie in (0, 1]; none: one a step"),
            ("steps", self.steps is None or self.steps >= 1, "must be at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "must be 0 (greedy) or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "must lie in (0, 1]"),
            ("top_k", self.top_k is None or self.top_k >= 1, "must be at least 1"),
            ("draft_length", self.draft_length in (None, "auto") or int(self.draft_length) >= 1, "must be at least 1"),
            ("draft_ahead", self.draft_ahead >= 0, "must be 0 (draft in a pass of its own) or more"),
            ("draft_paths", self.draft_paths >= 1, "must be at least 1"),
            (
                "draft_paths",
                self.draft_paths == 1 or not self.draft_ahead,
                "does not go with draft_ahead, which would need a next draft behind every path; leave one of them out",
            ),
        )
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} {rule}")
        return self

    def check_block(self, block_size: int) -> None:
        """Refuse what does not fit the block.

        Raises:
            UsageError: sub-blocks that do not divide it, or steps that do not divide over the sub-blocks.
        """
        if block_size % self.sub_blocks:
            divisors = ", ".join(str(n) for n in range(1, block_size + 1) if block_size % n == 0)
            raise UsageError(
                f"sub_blocks={self.sub_blocks} does not divide the block of {block_size}; use one of {divisors}"
            )
        if self.steps is not None and self.steps % self.sub_blocks:
            raise UsageError(
                f"steps={self.steps} does not divide over sub_blocks={self.sub_blocks}; use a multiple of it"
            )


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


def with_stored(settings: BlockDiffusionSettings | None, options: Mapping[str, Any]) -> DecodingConfig:
    """Options given, else the checkpoint's `decoding`, else the defaults; UsageError for what contradicts itself."""
    stored = dict(settings.decoding) if settings is not None else {}
    for together in DEPENDENT:  # such options are all of the call, or all of the checkpoint
        if any(name in options for name in together):
            stored = {name: value for name, value in stored.items() if name not in together}
    return validate(DecodingConfig, {**stored, **options})


def resolve_config(
    settings: BlockDiffusionSettings | None, options: Mapping[str, Any], *, drafted: bool = False
) -> DecodingConfig:
    """The options of a call, as `with_stored`, for this checkpoint; `block_size` is then a number.

    Args:
        drafted: the settings are those of a draft adapter.
    Raises:
        UsageError: unknown or contradictory options, or a mode or a block that the checkpoint cannot do.
    """
    config = with_stored(settings, options)
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
