"""An adapted model in vLLM: its answers are nextblock's own, in each mode."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from engines import LIMIT, PROMPTS, answers, check_speculation, counted, engine

CONTEXT = 1024


@pytest.fixture(scope="module")
def llm():
    with engine("tiny-bd", drafts=31, max_model_len=CONTEXT) as llm:
        yield llm


def test_greedy_speculation_gives_the_ar_answers_with_as_many_checks_as_nextblock(llm, ours):
    check_speculation(llm, ours, ours.generate(PROMPTS, mode="ar", max_new_tokens=LIMIT).answers)


def test_ar_mode_drafts_nothing(llm, ours):
    before = counted(llm, "spec_decode_num_drafts")
    assert answers(llm, PROMPTS[:8], mode="ar") == ours.generate(PROMPTS[:8], mode="ar", max_new_tokens=LIMIT).answers
    assert counted(llm, "spec_decode_num_drafts") == before


@pytest.mark.parametrize(
    "options",
    [{}, {"threshold": "none"}, {"block_size": 8, "sub_blocks": 2, "sampler": "margin"}, {"steps": 4}],
    ids=str,
)
def test_diffusion_decides_what_nextblock_decides(llm, ours, options):
    prompts = PROMPTS if not options else PROMPTS[:6]
    given = {name: None if value == "none" else value for name, value in options.items()}
    wanted = ours.generate(prompts, mode="diffusion", max_new_tokens=LIMIT, **given).answers
    assert answers(llm, prompts, mode="diffusion", extra_args=options) == wanted
    if not options:
        assert answers(llm, prompts, alone=True, mode="diffusion") == wanted


def test_rows_of_different_modes_share_a_batch(llm, ours):
    from vllm import SamplingParams  # pyright: ignore

    modes = [("ar", "speculative", "diffusion")[number % 3] for number in range(12)]
    sampling = [SamplingParams(temperature=0, max_tokens=LIMIT, extra_args={"mode": mode}) for mode in modes]
    found = llm.generate(PROMPTS[:12], sampling, use_tqdm=False)
    for prompt, mode, output in zip(PROMPTS, modes, found, strict=False):
        assert list(output.outputs[0].token_ids) == ours.generate(prompt, mode=mode, max_new_tokens=LIMIT).answers[0]


def test_five_turns_read_their_past_from_the_prefix_cache(llm, ours):
    talks = [ours.tokenizer.encode(prompt) for prompt in PROMPTS[:6]]
    before = counted(llm, "prefix_cache_hits")
    for turn in range(5):
        wanted = [ours.generate(torch.tensor([talk]), mode="ar", max_new_tokens=48).answers[0] for talk in talks]
        assert answers(llm, talks, max_tokens=48) == wanted
        more = [ours.tokenizer.encode(f"\n\n{prompt}") for prompt in PROMPTS[6 + turn :]]
        talks = [talk + own + next_one for talk, own, next_one in zip(talks, wanted, more, strict=False)]
    assert counted(llm, "prefix_cache_hits") > before


def test_answers_end_at_the_context_limit_and_leave_their_neighbours(llm, ours):
    text = ours.tokenizer.encode("\n\n".join(PROMPTS) * 2)
    prompts = [text[: CONTEXT - left] for left in (3, 15, 16, 17, 40)] + [ours.tokenizer.encode(PROMPTS[0])]
    plain = answers(llm, prompts, mode="ar", ignore_eos=True)
    assert [len(answer) for answer in plain] == [3, 15, 16, 17, 40, LIMIT]
    assert answers(llm, prompts, ignore_eos=True) == plain
    decided = answers(llm, prompts, mode="diffusion", ignore_eos=True)
    assert [len(answer) for answer in decided] == [len(answer) for answer in plain]


def test_sampled_tokens_have_the_ar_distribution(llm):
    """At temperature 2: the distance to AR is no larger than that of AR to itself, drawn again."""

    def draw(mode: str) -> Counter:
        drawn = answers(llm, PROMPTS[:1] * 800, mode=mode, temperature=2.0, top_k=4, max_tokens=4)
        return Counter((place, token) for answer in drawn for place, token in enumerate(answer) if place)

    def distance(one: Counter, other: Counter) -> float:
        both = {*one, *other}
        return 0.5 * sum(abs(one[key] / one.total() - other[key] / other.total()) for key in both)

    plain, again, drafted = draw("ar"), draw("ar"), draw("speculative")
    print(f"total variation: ar to ar {distance(plain, again):.4f}, ar to speculative {distance(plain, drafted):.4f}")
    assert distance(plain, drafted) < 1.5 * distance(plain, again) + 0.01


def test_seeded_diffusion_draws_the_same_again(llm):
    drawn = [answers(llm, PROMPTS[:8], mode="diffusion", temperature=2.0, seed=seed) for seed in (5, 5, 6)]
    assert drawn[0] == drawn[1] != drawn[2]
