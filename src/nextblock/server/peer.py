"""Transformers' own continuous batching, asked as a server is: in this process and without HTTP."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.decoding.request import make_request
from nextblock.model.decoder import end_tokens
from nextblock.server.limits import Limits
from nextblock.server.load import Ask, Seen

PAGE = 64
"""Tokens of a page of its cache. On a CPU the number of pages must be given: by itself it takes all of the memory."""


@contextmanager
def transformers_batching(
    lm: BlockDiffusionLM, prompts: Sequence[Any], max_tokens: int, limits: Limits
) -> Iterator[Ask]:
    """Asks for greedy answers of `max_tokens` at most.

    Args:
        prompts: those that will be asked.
        limits: how many requests and tokens share a pass, as in our own server.
    """
    read = {"max_new_tokens": max_tokens, "mode": "ar"}
    ids = {repr(p): make_request(lm.decoder, lm.tokenizer, lm.settings, [p], read).rows[0].prompt for p in prompts}
    ends, numbers = end_tokens(lm.decoder, lm.tokenizer), itertools.count()
    rows = limits.max_rows
    pages = rows * -(-(max(map(len, ids.values())) + max_tokens) // PAGE)
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=pages,
        max_batch_tokens=max(limits.pass_tokens, rows),
        max_requests_per_batch=rows,
    )
    greedy = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, eos_token_id=ends, pad_token_id=0)
    model: Any = lm.model
    with model.continuous_batching_context_manager(greedy, continuous_batching_config=config) as manager:

        async def ask(prompt: Any) -> Seen:
            seen, news, name = Seen(perf_counter()), asyncio.Queue[Any](), f"request {next(numbers)}"
            manager.register_result_handler(name, news.put_nowait)
            manager.add_request(
                ids[repr(prompt)], request_id=name, max_new_tokens=max_tokens, streaming=True, eos_token_id=ends
            )
            while True:
                result = await news.get()
                seen.arrivals.append(perf_counter())
                if result.is_finished():
                    seen.tokens, seen.error = len(result.generated_tokens), str(result.error or "")
                    return seen

        yield ask
