"""From logits to tokens: filters, draws, which positions of a block to commit, which drafts to keep.

Letters: N positions, V vocabulary, b block size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from nextblock.config.errors import UsageError, nearest
from nextblock.config.sections import Section

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


def filter_logits(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits of the distribution that is drawn from: float32 [N, V], -inf where it is zero.

    Temperature goes first, then top-k, then top-p, as in transformers. `logits` stays as it is.
    """
    if temperature != 1:
        scale = min(max(temperature, _TINY), 1 / _TINY)  # beyond lie the limits of float32, 0 / 0 and inf / inf
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / scale  # or a small one would overflow
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None and top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, before >= max(top_p, _TINY))
        logits = logits.masked_fill(dropped, -math.inf)
    return logits


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Inverse transform sampling: [N, V] non-negative weights and float64 [N] in [0, 1) -> int64 [N]."""
    total = probabilities.double().cumsum(-1)
    wanted = uniform.to(total)[:, None] * total[:, -1:]
    token = torch.searchsorted(total, wanted, right=True)
    # Rounding may land on the total itself: the last token that has any weight.
    last = (total < total[:, -1:]).sum(-1, keepdim=True)
    return torch.minimum(token, last)[:, 0]


def probability_of(logits: Tensor, token: Tensor) -> Tensor:
    """Of `token` int64 [...] under `logits` [..., V]: float32 [...]."""
    return (logits.gather(-1, token[..., None])[..., 0] - logits.logsumexp(-1)).exp()


def scores(logits: Tensor, probability: Tensor, sampler: Sampler) -> Tensor:
    """How sure the model is of each position, float32 [N], by its own logits; the highest is committed first.

    confidence: probability of the chosen token. entropy, entropy_bound: minus the entropy in nats.
    margin: probability of the likeliest token less that of the next.
    """
    if sampler == "confidence":
        return probability
    probabilities = logits.softmax(-1)
    if sampler == "margin":
        top = probabilities.topk(2, dim=-1).values
        return top[:, 0] - top[:, 1]
    return torch.xlogy(probabilities, probabilities).sum(-1)


def commit(
    score: Sequence[float],
    probability: Sequence[float],
    *,
    sampler: Sampler,
    threshold: float | None,
    steps_left: int | None,
) -> list[int]:
    """Which of the masked positions of a sub-block to commit now   (paper, section 6.1 and its sampler).

    Always the best one, of equals the first. With a threshold also every other one above it: whose
    probability (sampler `margin`: whose margin) exceeds it, or, for `entropy_bound`, those that follow in
    order of rising entropy while the sum of entropies stays within it. With a number of steps left also
    enough of the next best to finish evenly: the remaining positions over the remaining steps, rounded up.

    Args:
        score: from `scores`, of the masked positions in order.
        probability: of the chosen tokens.
    Returns:
        Indices into `score`, rising.
    """
    order = sorted(range(len(score)), key=lambda i: (-score[i], i))
    count = 1 if steps_left is None else -(-len(order) // max(1, steps_left))
    chosen = set(order[:count])
    if threshold is not None:
        if sampler == "entropy_bound":
            total = 0.0
            for index in order:
                total -= score[index]
                if total > threshold:
                    break
                chosen.add(index)
        else:
            certain = score if sampler == "margin" else probability
            chosen.update(i for i in order if certain[i] > threshold)
    return sorted(chosen)


def accepted(target: Sequence[float], draft: Sequence[float], uniform: Sequence[float]) -> int:
    """How many drafts rejection sampling keeps: draft i with probability min(1, p_i / q_i), up to the first not.

    Args:
        target, draft: p and q of each drafted token.
        uniform: one number in [0, 1) for each.
    """
    for index, (p, q, u) in enumerate(zip(target, draft, uniform, strict=True)):
        if u * q >= p:
            return index
    return len(target)


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """Weights of what follows a rejected draft: max(p - q, 0), [N, V], not normalised.

    With it each emitted token has the distribution p exactly. q = 0 gives p, and so does rounding that
    leaves nothing.
    """
    weights = (target - draft).clamp_min(0)
    return torch.where(weights.sum(-1, keepdim=True) > 0, weights, target)


def without(weights: Tensor, token: Tensor) -> Tensor:
    """Weights [N, V] of a draw that must not be `token` int64 [N], not normalised."""
    return weights.scatter(-1, token[:, None], 0)


def generator(seed: int) -> torch.Generator:
    """The random stream of one row. It lives on the CPU, so that every device draws the same numbers."""
    return torch.Generator().manual_seed(seed)


def uniforms(generator: torch.Generator, count: int) -> list[float]:
    """`count` numbers in [0, 1), 53 bits each."""
    return torch.rand(count, generator=generator, dtype=torch.float64).tolist()
