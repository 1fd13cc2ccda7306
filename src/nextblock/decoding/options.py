"""The options of decoding, each stated once: name, type, default, limits and meaning.

Signatures of `generate` and its like, the command line, its help and `docs/configuration.md` are made from
`DecodingConfig`. This module loads without torch, so that `nextblock --help` takes no seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from numbers import Integral
from typing import Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from nextblock.config.errors import UsageError
from nextblock.config.sections import BlockDiffusionSettings, Section, validate

Mode = Literal["ar", "diffusion", "speculative"]
Sampler = Literal["confidence", "entropy", "margin", "entropy_bound"]
MODES: tuple[str, ...] = get_args(Mode)


class DecodingConfig(Section):
    """How to decode: the options of `generate`, their defaults and their limits."""

    mode: Mode = Field(
        default="diffusion",
        description="ar: token by token; diffusion: a block at a time; speculative: a block at a time, AR's output",
    )
    max_new_tokens: int = Field(default=256, ge=1, description="longest answer, in tokens")
    block_size: int | None = Field(default=None, ge=1, description="tokens in a block; default: the checkpoint's")
    sub_blocks: int = Field(
        default=1, ge=1, description="diffusion: runs of equal length in which a block is denoised, in order"
    )
    sampler: Sampler = Field(default="confidence", description="diffusion: which masked positions to commit first")
    threshold: float | None = Field(
        default=0.9,
        gt=0,
        le=1,
        description="diffusion: commit all positions above it (entropy_bound: the bound in nats); none: one a step",
    )
    steps: int | None = Field(
        default=None, ge=1, description="diffusion: denoising steps per block; none: as many as it takes"
    )
    temperature: float = Field(default=0.0, ge=0, description="0: greedy")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="nucleus: fewest tokens whose probabilities reach this sum"
    )
    top_k: int | None = Field(default=None, ge=1, description="only the k likeliest tokens")
    draft_length: int | Literal["auto"] | None = Field(
        default="auto",
        description="speculative: tokens that a check may refuse; auto: as long as it pays here; none: the block",
    )
    draft_ahead: int = Field(
        default=0,
        ge=0,
        description="speculative: places where a check may end for which the same pass makes the next draft",
    )
    draft_paths: int = Field(
        default=1,
        ge=1,
        description="speculative: check at most the drafts of so many paths, as a tree that branches where unsure",
    )

    @field_validator("draft_length", mode="before")
    @classmethod
    def _length(cls, value: Any) -> Any:
        if getattr(value, "ndim", None) == 0:  # a number of torch or numpy
            value = value.item()
        if value in (None, "auto"):
            return value
        if isinstance(value, str) and value.isdecimal():  # as the command line gives it
            value = int(value)
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise UsageError(f"draft_length={value} is not a number of tokens; use 1 or more, or auto")
        if int(value) < 1:
            raise UsageError(f"draft_length={value} must be at least 1")
        return int(value)

    @model_validator(mode="after")
    def _one_way_of_drafting(self) -> Self:
        if self.draft_paths > 1 and self.draft_ahead:
            raise UsageError(
                f"draft_paths={self.draft_paths} does not go with draft_ahead, which would need a next draft behind "
                "every path; leave one of them out"
            )
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
                "only; use mode='ar', give a draft adapter, or adapt it with `nextblock adapt`"
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
