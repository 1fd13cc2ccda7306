"""Engines of vLLM for the tests of the plug-in, and their answers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nextblock.model.loading import resolve
from nextblock.tasks import get_task

LIMIT = 96
SPECULATIVE = {"method": "custom_class", "model": "nextblock.vllm.Drafter", "num_speculative_tokens": 15}
PROMPTS = [get_task("word_problems").example("test", number).prompt for number in range(30)]


@contextmanager
def engine(model: str, drafts: int = 15, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` that makes so many drafts, in this process; gone behind the `with` block."""
    from vllm.distributed import cleanup_dist_env_and_memory  # pyright: ignore

    from vllm import LLM  # pyright: ignore

    defaults = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 16, "disable_log_stats": False, "seed": 0}
    llm = LLM(
        model=resolve(model), speculative_config=SPECULATIVE | {"num_speculative_tokens": drafts}, **defaults | options
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def answers(
    llm: Any, prompts: list[Any], alone: bool = False, mode: str | None = None, **params: Any
) -> list[list[int]]:
    """Token ids of each answer; `alone`: one prompt after the other."""
    from vllm import SamplingParams  # pyright: ignore

    extra = params.pop("extra_args", {}) | ({} if mode is None else {"mode": mode})
    sampling = SamplingParams(**{"temperature": 0, "max_tokens": LIMIT, "extra_args": extra} | params)
    prompts = [{"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt for prompt in prompts]
    batches = [[prompt] for prompt in prompts] if alone else [prompts]
    found = [output for batch in batches for output in llm.generate(batch, sampling, use_tqdm=False)]
    return [list(output.outputs[0].token_ids) for output in found]


def counted(llm: Any, name: str) -> int:
    """A counter of the engine."""
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == f"vllm:{name}")


def check_speculation(llm: Any, ours: Any, wanted: list[list[int]]) -> None:
    """All prompts, at once and one after the other: the answers are `wanted`, with no more checks than nextblock's."""
    blocks = ours.generate(PROMPTS, mode="speculative", draft_length=None, max_new_tokens=LIMIT)
    checks = blocks.stats.row_forwards["check"]
    for alone in (False, True):
        before = counted(llm, "spec_decode_num_drafts")
        assert answers(llm, PROMPTS, alone) == wanted
        done = counted(llm, "spec_decode_num_drafts") - before
        print(f"checks: {done} in vLLM, {checks} in nextblock")
        assert done <= 1.1 * checks
