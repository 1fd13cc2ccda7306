"""From logits to tokens: filters, draws, commitment and acceptance."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nextblock.config.errors import UsageError
from nextblock.config.sections import validate
from nextblock.decoding.options import DecodingConfig, Sampler
from nextblock.decoding.rows import Row
from nextblock.decoding.sampling import (
    commit,
    draw,
    filter_logits,
    generator,
    probability_of,
    residual,
    scores,
    uniforms,
    without,
)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("top_p", [None, 0.6])
def test_filters_are_those_of_transformers(temperature, top_k, top_p):
    logits = torch.randn(9, 20) * 2
    ours = filter_logits(logits, temperature, top_k, top_p)
    theirs = TemperatureLogitsWarper(temperature)(None, logits.clone())  # type: ignore[arg-type]
    if top_k is not None:
        theirs = TopKLogitsWarper(top_k)(None, theirs)  # type: ignore[arg-type]
    if top_p is not None:
        theirs = TopPLogitsWarper(top_p)(None, theirs)  # type: ignore[arg-type]
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


@pytest.mark.parametrize(("temperature", "expected"), [(1e-46, [0.0, 1.0, 0.0]), (1e39, [0.5, 0.5, 0.0])])
def test_a_temperature_beyond_float32_is_the_limit_that_it_stands_for(temperature, expected):
    logits = torch.tensor([[1.0, 9.0, -math.inf]])
    assert filter_logits(logits, temperature, None, None).softmax(-1).tolist() == [expected]


def test_of_a_nucleus_however_small_the_likeliest_token_is_left():
    assert filter_logits(torch.tensor([[1.0, 9.0]]), 1.0, None, 1e-46).softmax(-1).tolist() == [[0.0, 1.0]]


def test_a_line_with_its_own_options_is_filtered_as_it_is_alone():
    logits = 3 * torch.randn(6, 50)
    each = [(1.0, None, None), (0.5, 3, None), (1.0, None, 0.6), (1e-40, 99, 0.9), (2.0, 1, 1.0), (1.0, 50, 1e-46)]
    found = filter_logits(logits, *zip(*each, strict=True)).softmax(-1)
    for line, own, options in zip(logits, found, each, strict=True):
        assert own.tolist() == filter_logits(line[None], *options)[0].softmax(-1).tolist()


def test_a_draw_inverts_the_cumulative_distribution_and_skips_what_has_no_weight():
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]])
    for uniform, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (0.9999999, 3), (1.0, 3)):
        assert draw(weights, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_equal_logits_give_the_lowest_token_and_equal_scores_the_first_position():
    logits = torch.zeros(3, 5)
    token = logits.argmax(-1)
    assert token.tolist() == [0, 0, 0]
    torch.testing.assert_close(probability_of(logits, token), torch.full((3,), 0.2))
    assert commit([0.5, 0.5, 0.5], [0.5] * 3, sampler="confidence", threshold=None, steps_left=None) == [0]


def test_scores_are_probability_margin_and_minus_entropy():
    p = torch.tensor([[0.5, 0.3, 0.2]])
    chosen = torch.tensor([0.3])
    assert scores(p.log(), chosen, "confidence") is chosen
    torch.testing.assert_close(scores(p.log(), chosen, "margin"), torch.tensor([0.2]))
    entropy = -sum(x * math.log(x) for x in (0.5, 0.3, 0.2))
    for sampler in ("entropy", "entropy_bound"):
        torch.testing.assert_close(scores(p.log(), chosen, sampler), torch.tensor([-entropy]))


def test_entropy_of_a_filtered_distribution_is_finite():
    logits = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert scores(logits, torch.ones(1), "entropy").tolist() == [0.0]


def test_scores_of_each_line_by_its_own_rule_are_those_of_the_rule_alone():
    logits, chosen = torch.randn(8, 20, generator=torch.Generator().manual_seed(0)), torch.linspace(0, 1, 8)
    samplers: list[Sampler] = [*get_args(Sampler)] * 2
    found = scores(logits, chosen, samplers)
    for line, sampler in enumerate(samplers):
        assert found[line] == scores(logits, chosen, sampler)[line]


@pytest.mark.parametrize(
    ("sampler", "threshold", "expected"),
    [
        ("confidence", None, [2]),
        ("confidence", 0.6, [0, 2]),
        ("confidence", 0.99, [2]),
        ("margin", 0.5, [0, 2]),
        ("entropy", None, [2]),
        ("entropy", 0.6, [0, 2]),
        ("entropy_bound", 0.9, [0, 2]),
        ("entropy_bound", 0.01, [2]),
        ("entropy_bound", None, [2]),
    ],
)
def test_commit_takes_the_best_and_what_passes_the_threshold(sampler, threshold, expected):
    # entropies of four positions 0.5, 1.2, 0.1, 1.0
    score = [-0.5, -1.2, -0.1, -1.0] if sampler.startswith("entropy") else [0.7, 0.2, 0.8, 0.4]
    probability = [0.7, 0.2, 0.8, 0.4]
    assert commit(score, probability, sampler=sampler, threshold=threshold, steps_left=None) == expected


@given(count=st.integers(1, 32), steps=st.integers(1, 40))
def test_steps_finish_in_time_and_spread_evenly(count, steps):
    left, taken = count, []
    for step in range(steps):
        if not left:
            break
        taken.append(
            len(commit([0.1] * left, [0.1] * left, sampler="confidence", threshold=None, steps_left=steps - step))
        )
        left -= taken[-1]
    assert left == 0
    assert max(taken) - min(taken) <= 1


def test_a_row_draws_the_same_numbers_in_any_portions():
    one, other = generator(7), generator(7)
    assert uniforms(one, 5) == uniforms(other, 2) + uniforms(other, 3)
    row, numbers = Row(0, [1], limit=1, random=generator(7)), uniforms(generator(7), 5)
    assert row.peek(4) == numbers[:4]  # still to come
    assert [row.draw(1), row.draw(3), row.peek(1), row.draw(1)] == [
        numbers[:1],
        numbers[1:4],
        numbers[4:],
        numbers[4:],
    ]


# ------------------------------------------------------------------------------- rejection sampling


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=2, max_size=6))
@settings(deadline=None)
def test_acceptance_and_residual_add_up_to_the_target(weights):
    """Summed over the drafts: q min(1, p / q) + P(rejected) residual = p, for each token."""
    p = torch.tensor([float(w) for w, _ in weights], dtype=torch.float64)
    q = torch.tensor([float(w) for _, w in weights], dtype=torch.float64)
    p, q = (p / p.sum() if p.sum() else torch.full_like(p, 1 / len(p))), q / q.sum()
    kept = torch.minimum(p, q)
    rest = residual(p[None], q[None])[0]
    total = kept + (1 - kept.sum()) * rest / rest.sum()
    torch.testing.assert_close(total, p)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=2, max_size=6))
@settings(deadline=None)
def test_a_second_draft_leaves_the_target_what_it_is_whatever_the_first_was(weights):
    """Given a first draft that was rejected, second and last draw add up to max(p - q, 0), normalised."""
    p = torch.tensor([float(w) for w, _ in weights], dtype=torch.float64)
    q = torch.tensor([float(w) for _, w in weights], dtype=torch.float64)
    p, q = (p / p.sum() if p.sum() else torch.full_like(p, 1 / len(p))), q / q.sum()
    left = residual(p[None], q[None])[0]
    left = left / left.sum()
    for first in range(len(q)):
        second = without(q[None], torch.tensor([first]))[0]
        assert second[first] == 0
        second = second / second.sum()
        kept = torch.minimum(left, second)
        rest = residual(left[None], second[None])[0]
        torch.testing.assert_close(kept + (1 - kept.sum()) * rest / rest.sum(), left)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "difusion"}, "did you mean 'diffusion'"),
        ({"sampler": "confidense"}, "did you mean 'confidence'"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"threshold": 0.0}, r"threshold=0.0 must lie in \(0, 1\]"),
        ({"threshold": 1.5}, r"threshold=1.5 must lie in \(0, 1\]"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"top_p": 0.0}, "top_p=0.0 must lie in"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"draft_paths": 0}, "draft_paths=0 must be at least 1"),
        ({"draft_paths": 2, "draft_ahead": 1}, "draft_paths=2 does not go with draft_ahead"),
        ({"draft_length": "long"}, "draft_length"),
        ({"treshold": 0.5}, "unknown key 'treshold'; did you mean 'threshold'"),
    ],
)
def test_bad_options_end_in_one_line(options, message):
    with pytest.raises(UsageError, match=message) as error:
        validate(DecodingConfig, options)
    assert "\n" not in str(error.value)


def test_sub_blocks_must_divide_the_block_and_steps_the_sub_blocks():
    with pytest.raises(UsageError, match="sub_blocks=3 does not divide the block of 8; use one of 1, 2, 4, 8"):
        validate(DecodingConfig, {"sub_blocks": 3}).check_block(8)
    with pytest.raises(UsageError, match="steps=3 does not divide over sub_blocks=2"):
        validate(DecodingConfig, {"sub_blocks": 2, "steps": 3}).check_block(8)
