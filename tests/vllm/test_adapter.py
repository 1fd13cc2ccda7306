"""A draft adapter on its frozen parent in vLLM: the parent's own answers."""

from __future__ import annotations

import pytest

import nextblock as nb
from engines import LIMIT, PROMPTS, answers, check_speculation, engine


@pytest.fixture(scope="module")
def llm():
    with engine("tiny-ar", max_model_len=512, additional_config={"nextblock": {"draft_adapter": "tiny-draft"}}) as llm:
        yield llm


@pytest.fixture(scope="module")
def adapted():
    return nb.load("tiny-ar", draft_adapter="tiny-draft")


def test_the_answers_are_the_parents_own(llm, adapted):
    wanted = nb.load("tiny-ar").generate(PROMPTS, mode="ar", max_new_tokens=LIMIT).answers
    check_speculation(llm, adapted, wanted)


def test_diffusion_decides_what_nextblock_decides(llm, adapted):
    wanted = adapted.generate(PROMPTS[:8], mode="diffusion", max_new_tokens=LIMIT).answers
    assert answers(llm, PROMPTS[:8], mode="diffusion") == wanted
