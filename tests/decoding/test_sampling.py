"""From logits to tokens: filters, draws, commitment and acceptance."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from families import tiny_model
from nextblock.config.errors import UsageError
from nextblock.config.sections import BlockDiffusionSettings, DraftAdapterConfig, validate
from nextblock.decoding.batch import Row
from nextblock.decoding.check import _verify_sampled
from nextblock.decoding.drafts import Draft, _branches
from nextblock.decoding.events import BlockFinished, Committed, Rejected
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.decoding.options import DecodingConfig
from nextblock.decoding.sampling import (
    accepted,
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
from nextblock.model.draft_adapter import DraftAdapter


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


def test_drafts_are_accepted_by_their_ratio_up_to_the_first_that_is_not():
    assert accepted([0.5, 0.2, 0.9], [0.5, 0.4, 0.9], [0.99, 0.49, 0.0]) == 3
    assert accepted([0.5, 0.2, 0.9], [0.5, 0.4, 0.9], [0.99, 0.50, 0.0]) == 1
    assert accepted([0.0], [0.4], [0.0]) == 0


VOCABULARY, MASK, STEPS, SAMPLES = 7, 6, 4, 4000


@torch.no_grad()
def enumerated(model, prompt, temperature, top_k, top_p, mask: int | None = MASK):
    """Probability of every answer of STEPS tokens, from the model's own forward passes: {answer: p}."""
    found = {(): 1.0}
    for _ in range(STEPS):
        prefixes = list(found)
        logits = model(torch.tensor([prompt + list(p) for p in prefixes])).logits[:, -1].double()
        if mask is not None:
            logits[:, mask] = -torch.inf
        logits = logits / temperature
        longer = {}
        for prefix, row in zip(prefixes, logits, strict=True):
            order = row.argsort(descending=True).tolist()[: top_k or VOCABULARY]
            row = {t: math.exp(float(row[t])) for t in order}
            if top_p is not None:
                total, kept = sum(row.values()), {}
                for token, weight in row.items():
                    if sum(kept.values()) / total >= top_p:
                        break
                    kept[token] = weight
                row = kept
            for token, weight in row.items():
                if weight:
                    longer[(*prefix, token)] = found[prefix] * weight / sum(row.values())
        found = longer
    return found


def chi_square_p(counts, expected):
    """p-value of the counts; cells that are expected fewer than 8 times are put together."""
    pairs = [(counts.get(k, 0), e) for k, e in expected.items() if e >= 8]
    rare = [(counts.get(k, 0), e) for k, e in expected.items() if e < 8]
    if rare:
        pairs.append((sum(c for c, _ in rare), sum(e for _, e in rare)))
    statistic = sum((c - e) ** 2 / e for c, e in pairs)
    freedom = torch.tensor((len(pairs) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


@pytest.mark.parametrize(
    "how",
    [
        {"mode": "ar"},
        {"mode": "speculative"},
        {"mode": "speculative", "draft_ahead": 2},
        {"mode": "speculative", "draft_paths": 2},
        {"mode": "speculative", "draft_paths": 4, "draft_length": "auto"},
        {"mode": "speculative", "draft_length": "auto"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, None, None), (1.5, 5, 0.9)])
def test_sampling_has_the_ar_distribution(how, temperature, top_k, top_p):
    """Against all answers of a toy model, enumerated; a right sampler fails once in 1e6 (fixed seeds: never)."""
    model = tiny_model("llama", vocab_size=VOCABULARY, seed=3, std=0.12)
    prompt = [3, 4, 5]
    lm = BlockDiffusionLM(model, None, BlockDiffusionSettings(block_size=4, mask_token_id=MASK))
    stream = lm.stream(
        torch.tensor([prompt]).expand(SAMPLES, -1),
        max_new_tokens=STEPS,
        eos_token_id=[],
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=0,
        **how,
    )
    events = list(stream)
    answers = [tuple(row.answer) for row in stream.rows]
    expected = {k: SAMPLES * p for k, p in enumerated(model, prompt, temperature, top_k, top_p).items()}
    assert set(answers) <= set(expected)
    counts = {a: answers.count(a) for a in set(answers)}
    assert chi_square_p(counts, expected) > 1e-6
    if how["mode"] == "speculative":  # both ways were taken
        rejected = sum(isinstance(e, Rejected) for e in events)
        assert rejected > SAMPLES // 20
        assert sum(isinstance(e, Committed) for e in events) == SAMPLES * STEPS
    if "draft_paths" in how:
        assert sum(isinstance(e, BlockFinished) and e.path > 0 for e in events) > SAMPLES // 20


@pytest.mark.parametrize("paths", [1, 2, 3])
def test_two_tokens_checked_against_a_bad_draft_have_the_target_distribution(paths):
    """First and second token together, over 25 cells; a right check fails once in 1e6 (fixed seeds: never)."""
    first = torch.tensor([0.05, 0.5, 0.3, 0.1, 0.05])
    second = (torch.arange(25.0).reshape(5, 5) * 7 % 11 + 0.2).square()  # given the first
    second = second / second.sum(-1, keepdim=True)
    draft_of = torch.tensor([[0.7, 0.1, 0.1, 0.05, 0.05], [0.02, 0.08, 0.5, 0.1, 0.3]])
    count = 10_000
    rows = [Row(i, [1], limit=9, random=generator(i)) for i in range(count)]
    config = validate(DecodingConfig, {"mode": "speculative", "temperature": 1.0, "draft_paths": paths})
    batch: Any = SimpleNamespace(config=config, rows=rows, device=torch.device("cpu"))
    batch.confidence = lambda logits, tokens: logits.softmax(-1).gather(-1, tokens[:, None])[:, 0]
    batch.tell = lambda logits, tokens: (tokens.tolist(), batch.confidence(logits, tokens).tolist())
    logits = draft_of.log().expand(count, 2, 5)
    drawn = torch.tensor([row.draw(2) for row in rows], dtype=torch.float64)
    drafts = torch.stack([draw(logits[:, i].softmax(-1), drawn[:, i]) for i in range(2)], dim=1)
    branches = _branches(batch, logits, logits.softmax(-1), drafts, [2] * count) if paths > 1 else []
    draft = Draft(drafts, [2] * count, logits.softmax(-1), branches)
    target = torch.full((count, 6, 5), 0.2)
    target[:, 0] = first
    for index, found in enumerate(draft.paths):
        for path in found:
            target[index, path.nodes[1]] = second[path.tokens[0]]
    verdict = _verify_sampled(batch, target.log(), target, draft)
    # Where only one token was gained, the next pass would draw the second from the target itself.
    missing = draw(second[[gained[0] for gained in verdict.tokens]], torch.tensor([row.draw(1)[0] for row in rows]))
    pairs = [(*gained, last)[:2] for gained, last in zip(verdict.tokens, missing.tolist(), strict=True)]
    expected = {(a, b): count * float(first[a] * second[a, b]) for a in range(5) for b in range(5)}
    assert chi_square_p({pair: pairs.count(pair) for pair in expected}, expected) > 1e-6
    assert {number for number, kept in zip(verdict.paths, verdict.kept, strict=True) if kept} == set(range(paths))


@pytest.mark.parametrize(
    "how", [{}, {"draft_ahead": 2}, {"draft_length": "auto"}, {"top_k": 5, "top_p": 0.9}], ids=str
)
def test_sampling_with_a_draft_adapter_has_the_distribution_of_the_bare_parent(how):
    """Enumerated before the adapter is there; its mask token is no token of the parent, so none is left out."""
    model, prompt = tiny_model("llama", vocab_size=VOCABULARY, seed=3, std=0.12), [3, 4, 5]
    answers = enumerated(model, prompt, 1.0, how.get("top_k"), how.get("top_p"), mask=None)
    adapter = DraftAdapter(model, DraftAdapterConfig(rank=3)).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(std=0.3)
    adapter.merge_copies()
    section = BlockDiffusionSettings(block_size=4, mask_token_id=adapter.mask_token_id)
    stream = BlockDiffusionLM(model, None, section, adapter).stream(
        torch.tensor([prompt]).expand(SAMPLES, -1),
        mode="speculative",
        max_new_tokens=STEPS,
        eos_token_id=[],
        temperature=1.0,
        seed=0,
        **how,
    )
    rejected = sum(isinstance(event, Rejected) for event in stream)
    found = [tuple(row.answer) for row in stream.rows]
    assert set(found) <= set(answers)
    assert chi_square_p({a: found.count(a) for a in set(found)}, {k: SAMPLES * p for k, p in answers.items()}) > 1e-6
    assert rejected > SAMPLES // 20


def test_the_chi_square_test_can_tell_a_wrong_sampler():
    expected = {(t,): 600.0 for t in range(10)}
    wrong = {(t,): 600 + (80 if t < 5 else -80) for t in range(10)}
    assert chi_square_p(wrong, expected) < 1e-6 < chi_square_p(dict.fromkeys(expected, 600), expected)


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
