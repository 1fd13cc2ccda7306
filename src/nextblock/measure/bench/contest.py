"""Contestants that decode the same prompts in turn, and what each took.

Times of different runs on one machine differ by more than the effects that are looked for. So contestants
alternate batch by batch within one run, a round is one pass over its prompts, and what is reported is the
median over rounds of the ratio within a round.

Letters: B prompts of a batch, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, GenerationConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from nextblock.config.errors import UsageError
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.decoding.request import make_request
from nextblock.measure.bench.prompts import Options, variant_name
from nextblock.measure.machine import synchronize

TokenLists = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Contestant:
    """A way to decode a batch of prompts (lists of token ids), as a round of that batch alone."""

    name: str
    options: Options
    run: Callable[[TokenLists], Round]


@dataclass
class Round:
    """What one contestant took for the batches of a round.

    answers: token ids of each answer, end token included.
    seconds: of the whole calls. first_token_seconds: of each call until a token was decided.
    forwards: calls of the model. row_forwards: these times the rows that took part in them.
    """

    answers: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    first_token_seconds: list[float] = field(default_factory=list)
    forwards: int = 0
    row_forwards: int = 0

    def add(self, other: Round) -> None:
        """Book another batch."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def new_tokens(self) -> int:
        """Tokens of all answers, end tokens included."""
        return sum(map(len, self.answers))

    @property
    def tokens_per_second(self) -> float:
        """Answer tokens over the seconds of all calls, prefill included."""
        return self.new_tokens / self.seconds


def alternate(
    contestants: Sequence[Contestant],
    rounds: Sequence[Sequence[TokenLists]],
    on_call: Callable[[], None] = lambda: None,
) -> list[list[Round]]:
    """Let contestants take turns at every batch of every round; for each of them its rounds.

    Args:
        rounds: the batches of each round.
        on_call: called after each batch of each contestant.
    """
    results = [[Round() for _ in rounds] for _ in contestants]
    for number, batches in enumerate(rounds):
        for batch in batches:
            for contestant, own in zip(contestants, results, strict=True):
                own[number].add(contestant.run(batch))
                on_call()
    return results


def make_batches(prompts: TokenLists, size: int) -> list[TokenLists]:
    """Whole batches of `size` prompts; what is left over is not used. UsageError for less than one batch."""
    if size < 1:
        raise UsageError(f"batch={size} must be at least 1")
    if len(prompts) < size:
        raise UsageError(f"batch={size} is more than the {len(prompts)} prompts; use more examples")
    return [prompts[start : start + size] for start in range(0, len(prompts) - size + 1, size)]


def left_padded(prompts: TokenLists, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [B, T], padded on the left as transformers' generate needs them."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * n + list(prompt) for n, prompt in zip(padding, prompts, strict=True)])
    mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()
    return tokens.to(device), mask.to(device)


def compared(rounds: Sequence[Round], reference: Sequence[Round]) -> dict[str, float]:
    """`tokens_per_second`, and `speedup`, the ratio to the reference in the same round: medians over rounds.

    `speedup_low` and `speedup_high` are those of the lowest and the highest round.
    """
    pairs = zip(rounds, reference, strict=True)
    ratios = [own.tokens_per_second / other.tokens_per_second for own, other in pairs]
    return {
        "tokens_per_second": median(each.tokens_per_second for each in rounds),
        "speedup": median(ratios),
        "speedup_low": min(ratios),
        "speedup_high": max(ratios),
    }


def our_mode(
    lm: BlockDiffusionLM, options: Options, max_new_tokens: int, ends: Sequence[int], stop: Sequence[str] = ()
) -> Contestant:
    """One of this package's modes, greedy unless `options` say else; the tokens and strings given end an answer."""
    device = lm.decoder.device
    given: Options = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "eos_token_id": list(ends)}
    given |= {"stop": [*stop], **options}

    def run(prompts: TokenLists) -> Round:
        tokens, mask = left_padded(prompts, device)
        synchronize(device)
        began = time.perf_counter()
        request = make_request(lm.decoder, lm.tokenizer, lm.settings, tokens, {**given, "attention_mask": mask})
        stream = lm.run(request, began)  # as `lm.generate`, which also decodes the texts
        for _ in stream:
            pass
        synchronize(device)
        seconds = time.perf_counter() - began
        stats = stream.stats
        answers, passes = [row.answer for row in stream.rows], sum(stats.row_forwards.values())
        return Round(answers, seconds, [stats.first_token_seconds], stats.forwards, passes)

    return Contestant(variant_name(options), options, run)


class _Passes(BaseStreamer):
    """Counts what transformers' generate hands out, once after each pass, and notes when the first token came."""

    def __init__(self) -> None:
        self.count = -1  # the prompt comes before them
        self.first_at = 0.0

    def put(self, value: Tensor) -> None:
        self.count += 1
        if self.count == 1:
            self.first_at = time.perf_counter()

    def end(self) -> None:
        pass


def transformers_generate(
    lm: BlockDiffusionLM,
    max_new_tokens: int,
    ends: Sequence[int],
    static_length: int | None = None,
    assisted: tuple[str, Options] | None = None,
    temperature: float = 0.0,
) -> Contestant:
    """transformers' own `generate` on the bare model: with its default cache, or compiled with a static one.

    Args:
        ends: end tokens, none if empty.
        static_length: slots of the static cache, made once and reset for each batch, so that shapes stay the
            same and nothing is compiled twice; all batches must then have one size. None: the default dynamic cache.
        assisted: (name, arguments of `generate`) of an assisted decoding, such as prompt lookup; batch 1 only.
        temperature: 0 is greedy.
    """
    model: Any = lm.model
    device = lm.decoder.device
    name, extra = assisted or ("", {})
    name = f"transformers, {name}" if assisted else "transformers"
    plain = _plain(max_new_tokens, ends, temperature)
    cache = None
    if static_length is not None:
        name = "transformers, static cache, compiled"
        cache = StaticCache(config=model.config, max_cache_len=static_length)
        compiling: Any = CompileConfig()
        compiling._compile_all_devices = True  # by itself it compiles on accelerators alone
        plain.compile_config = compiling
        extra = {"past_key_values": cache}

    def run(prompts: TokenLists) -> Round:
        tokens, mask = left_padded(prompts, device)
        passes = _Passes()  # a counter inside the model would have it compiled again at each count
        drafted: list[int] = []
        assistant: Any = extra.get("assistant_model")
        hook: Any = assistant and assistant.register_forward_hook(lambda *_: drafted.append(1))
        # generate fills what is unset from the model's own generation config: penalties, say, or sampling.
        own, model.generation_config = model.generation_config, plain
        synchronize(device)
        began = time.perf_counter()
        try:
            with torch.inference_mode(), nullcontext() if lm.adapter is None else lm.adapter.removed(lm.model):
                if cache is not None:
                    cache.reset()
                out = model.generate(tokens, attention_mask=mask, streamer=passes, **extra)
            synchronize(device)
        finally:
            model.generation_config = own
            if hook:
                hook.remove()
        seconds = time.perf_counter() - began
        answers = [_cut(answer, ends) for answer in out[:, tokens.shape[1] :].tolist()]
        count = passes.count + len(drafted)
        # Rows that have finished are computed on until the last one has: their passes count.
        return Round(answers, seconds, [passes.first_at - began], count, count * len(answers))

    return Contestant(name, {}, run)


def _plain(max_new_tokens: int, ends: Sequence[int], temperature: float) -> Any:
    """A generation config that asks for nothing else."""
    options: Any = {"eos_token_id": list(ends) or None, "pad_token_id": ends[0] if ends else 0}
    options |= {"temperature": temperature, "top_k": 0} if temperature else {}
    return GenerationConfig(do_sample=temperature > 0, max_new_tokens=max_new_tokens, use_cache=True, **options)


def _cut(answer: list[int], ends: Sequence[int]) -> list[int]:
    """Up to the first end token, which stays."""
    return answer[: next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))]
