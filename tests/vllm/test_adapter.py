"""A draft adapter on its frozen parent in vLLM: the parent's own answers."""

from __future__ import annotations

import pytest

import nextblock as nb
from engines import LIMIT, PROMPTS, answers, counted, engine


@pytest.fixture(scope="module")
def llm():
    with engine("tiny-ar", max_model_len=512, additional_config={"nextblock": {"draft_adapter": "tiny-draft"}}) as llm:
        yield llm


@pytest.fixture(scope="module")
def adapted():
    return nb.load("tiny-ar", draft_adapter="tiny-draft")


def test_the_answers_are_the_parents_own(llm, adapted):
    wanted = nb.load("tiny-ar").generate(PROMPTS, mode="ar", max_new_tokens=LIMIT).answers
    blocks = adapted.generate(PROMPTS, mode="speculative", draft_length=None, max_new_tokens=LIMIT)
    checks = blocks.stats.row_forwards["check"]
    for alone in (False, True):
        before = counted(llm, "spec_decode_num_drafts")
        assert answers(llm, PROMPTS, alone) == wanted
        done = counted(llm, "spec_decode_num_drafts") - before
        print(f"checks: {done} in vLLM, {checks} in nextblock")
        assert done <= 1.1 * checks


def test_diffusion_decides_what_nextblock_decides(llm, adapted):
    wanted = adapted.generate(PROMPTS[:8], mode="diffusion", max_new_tokens=LIMIT).answers
    assert answers(llm, PROMPTS[:8], mode="diffusion") == wanted
