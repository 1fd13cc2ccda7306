"""From logits to tokens: filters, draws, which positions of a block to commit, which drafts to keep.

Letters: N positions, V vocabulary, b block size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nextblock.decoding.options import Sampler

TINY = 1e-30
"""Temperatures and top-p go no lower: below lie the limits of float32."""


class Sampling(NamedTuple):
    """How a row draws; temperature 0: it does not, it takes the likeliest token."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None


GREEDY = Sampling()


class Denoising(NamedTuple):
    """Which masked positions a row commits; as in `DecodingConfig`."""

    sampler: Sampler = "confidence"
    threshold: float | None = None
    sub_blocks: int = 1
    steps: int | None = None


ONE_A_STEP = Denoising()


def filter_logits(
    logits: Tensor,
    temperature: float | Sequence[float],
    top_k: int | Sequence[int | None] | None,
    top_p: float | Sequence[float | None] | None,
) -> Tensor:
    """Logits of the distribution that is drawn from: float32 [N, V], -inf where it is zero.

    Temperature goes first, then top-k, then top-p, as in transformers. `logits` stays as it is. Each option is one
    value, or one for each of the N: a line gets the same in both ways.
    """
    size, each = logits.shape[-1], [[v] if v is None or isinstance(v, int | float) else v for v in (top_k, top_p)]
    scales = [temperature] if isinstance(temperature, int | float) else temperature
    counts, sums = [min(k or size, size) for k in each[0]], [1.0 if p is None else max(p, TINY) for p in each[1]]

    def column(values: Sequence[float], dtype: torch.dtype = logits.dtype) -> Tensor:
        return on_device(values, logits.device, dtype)[:, None]

    if any(scale != 1 for scale in scales):
        bounded = [min(max(scale, TINY), 1 / TINY) for scale in scales]  # beyond lie 0 / 0 and inf / inf
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / column(bounded)  # or a small one would overflow
    if min(counts) < size:
        widest = max(int(k) for k in counts if k < size)
        places = column([min(k, widest) - 1 for k in counts], torch.int64).expand(len(logits), 1)
        kth = logits.topk(widest, dim=-1).values.gather(1, places)
        kth = kth + column([0.0 if k < size else -math.inf for k in counts])
        logits = logits.masked_fill(logits < kth, -math.inf)
    if min(sums) < 1:
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        most = column([p if p < 1 else math.inf for p in sums])
        dropped = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, before >= most)
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


def scores(logits: Tensor, probability: Tensor, sampler: Sampler | list[Sampler]) -> Tensor:
    """How sure the model is of each position, float32 [N], by its own logits; the highest is committed first.

    `sampler` is one, or one for each of the N: a line gets the same in both ways.

    confidence: probability of the chosen token. entropy, entropy_bound: minus the entropy in nats.
    margin: probability of the likeliest token less that of the next.
    """
    if isinstance(sampler, list):
        if len(kinds := set(sampler)) == 1:
            return scores(logits, probability, *kinds)
        found = torch.empty_like(probability)
        for kind in kinds:
            at = on_device([n for n, own in enumerate(sampler) if own == kind], logits.device)
            found[at] = scores(logits[at], probability[at], kind)
        return found
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


def on_device(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a tensor, without waiting for what the device still has to do."""
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


def generator(seed: int) -> torch.Generator:
    """The random stream of one row. It lives on the CPU, so that every device draws the same numbers."""
    return torch.Generator().manual_seed(seed)


def uniforms(generator: torch.Generator, count: int) -> list[float]:
    """`count` numbers in [0, 1), 53 bits each."""
    return torch.rand(count, generator=generator, dtype=torch.float64).tolist()
