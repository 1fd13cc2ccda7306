"""A cache too small for the batch: vLLM preempts rows and reads them again."""

from __future__ import annotations

import pytest

from engines import LIMIT, PROMPTS, answers, counted, engine


@pytest.fixture(scope="module")
def llm():
    with engine("tiny-bd", drafts=31, max_model_len=256, block_size=32, num_gpu_blocks_override=30) as llm:
        yield llm


@pytest.mark.parametrize("mode", ["speculative", "diffusion"])
def test_preempted_rows_go_on_as_if_nothing_had_happened(llm, ours, mode):
    before = counted(llm, "num_preemptions")
    same_as = "ar" if mode == "speculative" else mode
    assert answers(llm, PROMPTS, mode=mode) == ours.generate(PROMPTS, mode=same_as, max_new_tokens=LIMIT).answers
    print(f"{mode}: {counted(llm, 'num_preemptions') - before} preemptions")
    assert counted(llm, "num_preemptions") > before
