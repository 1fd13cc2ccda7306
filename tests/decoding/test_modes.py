"""The three modes against transformers and each other, alone and in batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoders import LENGTHS, language_model, padded, prompt, reference
from families import MASK_ID, tiny_model
from nextblock.attention.cache import SlotCache
from nextblock.decoding.batch import Batch
from nextblock.decoding.events import Committed, Rejected, RowFinished
from nextblock.decoding.request import make_request

# ------------------------------------------------------------------------------- ar and speculative


def test_ar_mode_gives_the_tokens_of_transformers(family_model):
    ids = prompt(9)
    plain = family_model.generate(ids, max_new_tokens=24, do_sample=False, suppress_tokens=[MASK_ID])
    out = language_model(family_model).generate(ids, mode="ar", max_new_tokens=24)
    assert torch.equal(out.sequences, plain)


def test_speculative_mode_gives_the_tokens_of_ar_mode(family_model):
    lm = language_model(family_model)
    batch = padded([prompt(n) for n in LENGTHS])
    ar = lm.generate(**batch, mode="ar", max_new_tokens=30)
    for paths in (1, 3):
        speculative = lm.generate(**batch, mode="speculative", max_new_tokens=30, draft_paths=paths)
        assert speculative.answers == ar.answers
        assert speculative.finish == ar.finish


@given(
    seed=st.integers(0, 1000),
    block=st.sampled_from([1, 2, 3, 8, 16]),
    draft_length=st.sampled_from([None, 1, 4, "auto"]),
    draft_ahead=st.sampled_from([0, 0, 1, 3, 9]),
    draft_paths=st.sampled_from([1, 2, 5, 40]),
    prediction=st.sampled_from(["shifted", "aligned"]),
    context=st.sampled_from(["context_causal", "block_causal"]),
    repeats=st.booleans(),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_speculative_mode_is_lossless_whatever_the_draft(
    seed, block, draft_length, draft_ahead, draft_paths, prediction, context, repeats
):
    draft_ahead = draft_ahead if block > 2 else 0
    draft_paths = 1 if draft_ahead else draft_paths
    # A weak model repeats itself, so that drafts are often right; a wild one rejects most of them.
    model = tiny_model("llama", seed=seed, std=0.02 if repeats else 0.25)
    lm = language_model(model, block, prediction=prediction, context=context)
    batch = padded([prompt(n, seed) for n in LENGTHS])
    ar = lm.generate(**batch, mode="ar", max_new_tokens=[9, 20, 1, 14])
    out = lm.generate(
        **batch,
        mode="speculative",
        max_new_tokens=[9, 20, 1, 14],
        draft_length=draft_length,
        draft_ahead=draft_ahead,
        draft_paths=draft_paths,
    )
    assert out.answers == ar.answers
    # Two tokens or more for the two passes of a cycle, whatever was drafted.
    assert sum(out.stats.row_forwards.values()) <= sum(ar.stats.row_forwards.values())


def test_right_drafts_are_kept_whole():
    """A model that always says the same token: each cycle of two passes yields a whole block."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    out = language_model(model, 8).generate(prompt(3), mode="speculative", max_new_tokens=25)
    assert out.answers == [[0] * 25]
    assert out.stats.row_forwards == {"prefill": 1, "denoise": 3, "check": 3}
    assert (out.stats.drafts, out.stats.kept) == (18, 18)
    assert out.stats.tokens_per_forward == 25 / 7


def test_drafts_behind_an_answer_s_end_are_neither_kept_nor_rejected():
    """A model that always says the same token, and a token at which one answer ends in the middle of its drafts."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    lm = language_model(model, 8)
    options = {"mode": "speculative", "max_new_tokens": 40, "draft_length": None, "eos_token_id": []}
    request = make_request(lm.decoder, None, lm.settings, prompt(3), options)
    request.rows[0].stop = lambda answer: "criteria" if len(answer) == 13 else None
    stream = lm.run(request, 0.0)
    events = [*stream]
    assert len(request.rows[0].answer) == 13
    # One token of the prompt's pass; of a whole cycle a free one, six drafts and the check's own; then one and three.
    assert stream.stats.kept == stream.stats.drafts == 6 + 3
    assert not [event for event in events if isinstance(event, Rejected)]


@pytest.mark.parametrize("mode", ["ar", "speculative", "diffusion"])
def test_a_row_s_last_event_is_that_it_is_finished(llama, mode):
    lm = language_model(llama)
    for count in (2, 9):  # two: the prompt's, and a step without drafts
        request = make_request(lm.decoder, None, lm.settings, prompt(5), {"mode": mode, "max_new_tokens": count})
        assert isinstance([*lm.run(request, 0.0)][-1], RowFinished)


def test_the_masks_that_are_kept_do_not_grow_with_the_answer(llama, monkeypatch):
    made: list[Batch] = []
    monkeypatch.setattr("nextblock.decoding.lm.Batch", lambda *given: made.append(Batch(*given)) or made[-1])
    for count in (30, 200):
        options = {"mode": "speculative", "draft_length": 3, "max_new_tokens": count}
        language_model(llama).generate(prompt(5), eos_token_id=[], **options)
    short, long = (len(batch.masks._templates) for batch in made)
    assert short == long


# ------------------------------------------------------------------------------------------- filters


FILTERED = [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}]


@pytest.mark.parametrize("filtered", FILTERED, ids=str)
@pytest.mark.parametrize(
    "how",
    [{"mode": "ar"}]
    + [
        {"mode": "diffusion", "sampler": sampler, "threshold": level, "sub_blocks": 2}
        for sampler, level in (("confidence", 0.1), ("entropy", 0.1), ("margin", 0.05), ("entropy_bound", 1.0))
    ]
    + [
        {"mode": "speculative", **more}
        for more in ({}, {"draft_ahead": 2}, {"draft_paths": 3}, {"draft_length": "auto"})
    ],
    ids=str,
)
def test_a_draw_that_has_no_choice_decides_what_greedy_decoding_decides_at_the_same_cost(llama, how, filtered):
    """How sure the model is does not depend on what a filter leaves to draw from."""
    lm, batch = language_model(llama), padded([prompt(n) for n in LENGTHS])
    greedy = lm.stream(**batch, max_new_tokens=25, **how)
    seen = [event for event in greedy if isinstance(event, Committed)]
    drawn = lm.stream(**batch, max_new_tokens=25, seed=1, **{"temperature": 1.0, **filtered}, **how)
    found = [event for event in drawn if isinstance(event, Committed)]
    assert [row.answer for row in drawn.rows] == [row.answer for row in greedy.rows]
    if how["mode"] == "diffusion":  # each token in the same pass
        assert [(e.row, e.offset, e.step) for e in found] == [(e.row, e.offset, e.step) for e in seen]
        assert drawn.stats.row_forwards == greedy.stats.row_forwards
    confidences = {(e.row, e.offset): e.confidence for e in seen}
    assert {(e.row, e.offset): e.confidence for e in found} == pytest.approx(confidences, abs=1e-5)


# ------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("mode", ["ar", "diffusion", "speculative"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_row_of_a_batch_gets_what_it_gets_alone(family_model, mode, temperature):
    lm = language_model(family_model)
    prompts = [prompt(n) for n in LENGTHS]
    options: dict[str, Any] = {"mode": mode, "temperature": temperature, "threshold": 0.3}
    limits = [30, 7, 18, 25]
    batch = lm.generate(**padded(prompts), max_new_tokens=limits, seed=5, **options)
    for i, ids in enumerate(prompts):
        alone = lm.generate(ids, max_new_tokens=limits[i], seed=5 + i, **options)
        assert batch.answers[i] == alone.answers[0]
        assert batch.finish[i] == alone.finish[0]


@pytest.mark.parametrize("mode", ["diffusion", "speculative"])
def test_a_batch_costs_each_row_the_passes_that_it_takes_alone(llama, mode):
    lm = language_model(llama)
    prompts = [prompt(n) for n in LENGTHS]
    batch = lm.generate(**padded(prompts), mode=mode, max_new_tokens=20, temperature=1.0, seed=0)
    alone = [lm.generate(p, mode=mode, max_new_tokens=20, temperature=1.0, seed=i) for i, p in enumerate(prompts)]
    total = {}
    for out in alone:
        for kind, count in out.stats.row_forwards.items():
            total[kind] = total.get(kind, 0) + count
    assert batch.stats.row_forwards == total
    assert batch.stats.forwards == max(out.stats.forwards for out in alone)


@pytest.mark.parametrize(
    "options",
    [
        {"draft_ahead": 1},
        {"draft_ahead": 3},
        {"draft_length": "auto"},
        {"draft_length": "auto", "draft_ahead": 2},
        {"draft_paths": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_row_gets_the_same_and_pays_the_same_however_it_is_drafted(llama, options, temperature):
    lm = language_model(llama)
    prompts = [prompt(n) for n in LENGTHS]
    options = {"mode": "speculative", "temperature": temperature, **options}
    batch = lm.generate(**padded(prompts), max_new_tokens=25, seed=5, **options)
    alone = [lm.generate(p, max_new_tokens=25, seed=5 + i, **options) for i, p in enumerate(prompts)]
    assert batch.answers == [out.answers[0] for out in alone]
    if temperature:  # greedy batches may check more of a draft than a row alone needs, never less
        paid = [sum(out.stats.row_forwards.values()) for out in alone]
        assert sum(batch.stats.row_forwards.values()) == sum(paid)


@pytest.mark.parametrize("mode", ["ar", "diffusion", "speculative"])
def test_memory_goes_by_what_is_decoded_not_by_what_might_be(monkeypatch, mode):
    """One long answer beside seven short ones, and a limit that is never reached."""
    model: Any = tiny_model("llama", max_position_embeddings=10**7)
    allocated = []

    def recorded(self, layer, part, states, allocate=SlotCache.allocate):
        slots = allocate(self, layer, part, states)
        allocated.append(slots.shape[0] * slots.shape[2])
        return slots

    monkeypatch.setattr(SlotCache, "allocate", recorded)
    tokens = prompt(5).expand(8, -1)
    out = language_model(model).generate(tokens, mode=mode, max_new_tokens=[400] + [4] * 7, eos_token_id=[])
    assert [len(answer) for answer in out.answers] == [400] + [4] * 7
    assert max(allocated) < 8 * 100
    first = language_model(model).generate(tokens, mode=mode, max_new_tokens=1, eos_token_id=[]).answers[0][0]
    allocated.clear()
    language_model(model).generate(tokens[:1], mode=mode, max_new_tokens=10**7 - 5, eos_token_id=[first])
    assert max(allocated) < 100


@pytest.mark.parametrize(
    ("mode", "more"), [("ar", {}), ("diffusion", {}), ("speculative", {}), ("speculative", {"draft_paths": 3})]
)
def test_answers_end_at_the_model_s_last_position(mode, more):
    for family in ("llama", "gpt2"):
        sizes = {"n_positions": 24} if family == "gpt2" else {"max_position_embeddings": 24}
        model: Any = tiny_model(family, **sizes)
        lm = language_model(model)
        long, short = prompt(19), prompt(2)
        out = lm.generate(
            **padded([long, short]), mode=mode, max_new_tokens=50, eos_token_id=[], threshold=None, **more
        )
        assert [len(a) for a in out.answers] == [5, 22]
        assert out.answers[0] == lm.generate(long, mode=mode, eos_token_id=[], threshold=None, **more).answers[0]
        assert out.answers[1] == lm.generate(short, mode=mode, eos_token_id=[], threshold=None, **more).answers[0]
        if mode == "diffusion":  # the last block is as short as what is left of the context
            assert out.answers[0] == reference(model, long[0].tolist(), 5, 5, 1, "top")
        else:
            plain = model.generate(
                short, max_new_tokens=22, do_sample=False, suppress_tokens=[MASK_ID], eos_token_id=None
            )
            assert out.answers[1] == plain[0, 2:].tolist()


@pytest.mark.parametrize("mode", ["ar", "diffusion", "speculative"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_mask_token_is_never_generated(llama, mode, temperature):
    with torch.no_grad():  # a head that wants nothing else
        llama.lm_head.weight[MASK_ID] *= 20
    out = language_model(llama).generate(
        **padded([prompt(n) for n in LENGTHS]), mode=mode, temperature=temperature, seed=0, max_new_tokens=30
    )
    assert all(MASK_ID not in answer for answer in out.answers)
