"""`nextblock bench decode`: transformers' `generate` against the three modes, on one model and one set of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from nextblock.config.errors import UsageError
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.measure.bench.contest import (
    Contestant,
    Round,
    TokenLists,
    alternate,
    compared,
    make_batches,
    our_mode,
    transformers_generate,
)
from nextblock.measure.bench.prompts import Options
from nextblock.training.devices import peak_memory_gib, reset_peak_memory

WARM_UP_ROUNDS = 2  # where passes are compiled: in the first call of a shape, and recorded in the second


@dataclass(frozen=True)
class Speed:
    """How one contestant did at one batch size; medians over rounds.

    speedup: tokens per second over those of transformers' generate (its default cache) in the same round;
        the lowest and the highest round show how far to trust it.
    forward_ms: milliseconds of a whole call per forward pass, so with all the work between two passes.
    tokens_per_forward: answer tokens over the passes that their rows took part in: prefill, denoise, check,
        commit and decode; for transformers also those of rows that had finished.
    equal_to_ar: share of prompts whose tokens equal those of transformers' generate.
    peak_memory_gib: of the batch with the longest prompt; `machine.MEMORY_MEANING` says of what.
    """

    name: str
    options: Options
    batch: int
    prompts: int
    rounds: int
    new_tokens: int
    tokens_per_second: float
    speedup: float
    speedup_low: float
    speedup_high: float
    first_token_seconds: float
    forward_ms: float
    tokens_per_forward: float
    equal_to_ar: float
    peak_memory_gib: float | None


def bench_decode(
    lm: BlockDiffusionLM,
    prompts: TokenLists,
    variants: Sequence[Options],
    *,
    batch: int,
    ends: Sequence[int],
    rounds: int = 5,
    max_new_tokens: int = 128,
    assisted: Sequence[tuple[str, Options]] = (),
    on_call: Callable[[], None] = lambda: None,
) -> list[Speed]:
    """Time every variant, and transformers' generate, at one batch size.

    Args:
        prompts: token ids; cut to whole batches.
        variants: options of `generate`, from `make_variants`.
        ends: end tokens of all contestants.
        rounds: passes over the prompts, after a warm-up.
        assisted: names and arguments of transformers' assisted decodings, which run at batch 1 alone.
        on_call: called after each batch of each contestant, `count_calls` times in all.
    Returns:
        transformers first, then the variants in order.
    Raises:
        UsageError: too few prompts or rounds, or prompts too long for the model's context.
    """
    if rounds < 1:
        raise UsageError(f"rounds={rounds} must be at least 1")
    batches = make_batches(prompts, batch)
    check_length(lm, prompts, max_new_tokens)
    device = lm.decoder.device
    longest = max(batches, key=lambda rows: max(map(len, rows)))
    common, room = (lm, max_new_tokens, ends), max(map(len, prompts)) + max_new_tokens
    contestants = [transformers_generate(*common)]
    contestants += [transformers_generate(*common, assisted=extra) for extra in assisted if batch == 1]
    contestants += [transformers_generate(*common, room)] if compares_compiled(lm) else []
    contestants += [our_mode(lm, options, max_new_tokens, ends) for options in variants]
    memory = []
    for contestant in contestants:
        for prompt_lists in batches * WARM_UP_ROUNDS if compares_compiled(lm) else [longest]:
            contestant.run(prompt_lists)
        known = reset_peak_memory(device)
        contestant.run(longest)
        memory.append(peak_memory_gib(device) if known else None)
        on_call()
    results = alternate(contestants, [batches] * rounds, on_call)
    return [
        _speed(contestant, own, results[0], batch, peak)
        for contestant, own, peak in zip(contestants, results, memory, strict=True)
    ]


def compares_compiled(lm: BlockDiffusionLM) -> bool:
    """Whether transformers' compiled decoding takes part too: where ours is compiled, and on CUDA in any case."""
    return lm.passes is not None or lm.decoder.device.type == "cuda"


def count_calls(compiled: bool, prompts: int, variants: int, batch: int, rounds: int, assisted: int = 0) -> int:
    """How often `bench_decode` calls `on_call`; `compiled` as of `compares_compiled`."""
    contestants = variants + 1 + compiled + (assisted if batch == 1 else 0)
    return contestants * (1 + rounds * (prompts // batch))


def check_length(lm: BlockDiffusionLM, prompts: TokenLists, max_new_tokens: int) -> None:
    """Refuse what one contestant would cut short and another would not."""
    longest, room = max(map(len, prompts)), lm.decoder.max_positions
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if room is not None and longest + max_new_tokens > room:
        raise UsageError(
            f"max_new_tokens={max_new_tokens} does not fit behind a prompt of {longest} tokens in the model's context "
            f"of {room}; use at most {room - longest}"
        )


def _speed(
    contestant: Contestant, rounds: Sequence[Round], reference: Sequence[Round], batch: int, memory: float | None
) -> Speed:
    first, expected = rounds[0], reference[0].answers
    return Speed(
        name=contestant.name,
        options=contestant.options,
        batch=batch,
        prompts=len(first.answers),
        rounds=len(rounds),
        new_tokens=first.new_tokens,
        **compared(rounds, reference),
        first_token_seconds=median(seconds for r in rounds for seconds in r.first_token_seconds),
        forward_ms=median(1000 * r.seconds / r.forwards for r in rounds),
        tokens_per_forward=first.new_tokens / first.row_forwards,
        equal_to_ar=sum(a == b for a, b in zip(first.answers, expected, strict=True)) / len(expected),
        peak_memory_gib=memory,
    )
