"""The check leaves the AR distribution what it is, whatever was drafted."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from families import tiny_model
from nextblock.config.sections import BlockDiffusionSettings, DraftAdapterConfig, validate
from nextblock.decoding.check import accept_trunk, check_sampled
from nextblock.decoding.drafts import Draft, branch, lay_out
from nextblock.decoding.events import BlockFinished, Committed, Rejected
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.decoding.options import DecodingConfig
from nextblock.decoding.rows import Row
from nextblock.decoding.sampling import draw, generator
from nextblock.model.draft_adapter import DraftAdapter


def test_drafts_are_accepted_by_their_ratio_up_to_the_first_that_is_not():
    def kept(*numbers: list[float], drafts: int = 3) -> int:
        p, q, u = torch.tensor(numbers, dtype=torch.float64)[:, None]
        return int(accept_trunk(p, q, u, torch.arange(len(numbers[0]))[None] < drafts))

    assert kept([0.5, 0.2, 0.9], [0.5, 0.4, 0.9], [0.99, 0.49, 0.0]) == 3
    assert kept([0.5, 0.2, 0.9], [0.5, 0.4, 0.9], [0.99, 0.50, 0.0]) == 1
    assert kept([0.5, 0.2, 0.9], [0.5, 0.4, 0.9], [0.99, 0.49, 0.0], drafts=2) == 2
    assert kept([0.0], [0.4], [0.0]) == 0


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
    masks = SimpleNamespace(span=torch.arange)
    batch: Any = SimpleNamespace(config=config, rows=rows, device=torch.device("cpu"), masks=masks)
    logits = draft_of.log().expand(count, 2, 5)
    drawn = torch.tensor([row.draw(2) for row in rows], dtype=torch.float64)
    drafts = torch.stack([draw(logits[:, i].softmax(-1), drawn[:, i]) for i in range(2)], dim=1)
    draft = Draft(drafts, [2] * count, logits.softmax(-1))
    draft.branches = branch(batch, logits, draft) if paths > 1 else None
    tree = lay_out(batch, draft, torch.ones(count, 1, dtype=torch.int64))
    target = torch.full((count, tree.tokens.shape[1], 5), 0.2)
    target[:, 0] = first
    for path in range(paths):
        target[torch.arange(count), tree.slots[:, path, 1]] = second[tree.paths[:, path, 0]]
    verdict = check_sampled(rows, target, draft, tree)
    assert verdict.used is not None
    for row, used in zip(rows, verdict.used.tolist(), strict=True):
        row.draw(used)
    # Where only one token was gained, the next pass would draw the second from the target itself.
    missing = draw(second[verdict.tokens[:, 0]], torch.tensor([row.draw(1)[0] for row in rows]))
    gained = zip(verdict.tokens.tolist(), verdict.kept.tolist(), missing.tolist(), strict=True)
    pairs = [(*tokens[: kept + 1], last)[:2] for tokens, kept, last in gained]
    expected = {(a, b): count * float(first[a] * second[a, b]) for a in range(5) for b in range(5)}
    assert chi_square_p({pair: pairs.count(pair) for pair in expected}, expected) > 1e-6
    path = torch.zeros_like(verdict.kept) if verdict.path is None else verdict.path
    assert set(path[verdict.kept > 0].tolist()) == set(range(paths))


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
