"""Rows that join a batch at work, and rows that leave it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nextblock as nb
from decoders import LENGTHS, language_model, prompt
from families import longrope_model, tiny_model
from nextblock.decoding.batch import Batch
from nextblock.decoding.engine import decode
from nextblock.decoding.events import Stats
from nextblock.decoding.request import make_request

HOW: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "diffusion", "threshold": 0.3},
    {"mode": "diffusion", "threshold": None, "block_size": 4, "sub_blocks": 2},
    {"mode": "speculative"},
    {"mode": "speculative", "draft_length": None},
    {"mode": "speculative", "draft_paths": 3},
]
DRAWN: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95}


def rows_of(lm, prompts, **options):
    """(config, rows), each row as it would be alone, numbered through."""
    requests = [make_request(lm.decoder, lm.tokenizer, lm.settings, p, options) for p in prompts]
    rows = [request.rows[0] for request in requests]
    for number, row in enumerate(rows):
        row.number = number
    return requests[0].config, rows


@torch.inference_mode()
def drive(lm, config, arrivals, chunk=10**9, between=lambda step, rows: None):
    """Rows join a running batch: `arrivals` is a list of (step, row). Returns the batch when all is done."""
    batch, steps, step = None, iter(()), 0
    pending = list(arrivals)
    while pending or batch is not None:
        now = [row for at, row in pending if at <= step]
        pending = [(at, row) for at, row in pending if at > step]
        for row in now:
            made = Batch(lm.decoder, lm.settings, config, [row], Stats())
            low = 0
            while low + chunk < len(row.prompt):
                made.read(low, low + chunk)
                low += chunk
            made.begin(low)
            if not made.rows:
                continue
            if batch is None:
                batch, steps = made, decode(made)
            else:
                batch.join(made)
        between(step, [row for _, row in arrivals])
        if batch is not None and next(steps, None) is None:
            assert not batch.rows
            assert not batch.joining
            batch = None
        step += 1
        assert step < 1000


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("drawn", [{}, DRAWN], ids=["greedy", "drawn"])
def test_a_row_that_joins_late_decides_what_it_decides_alone(llama, how, drawn):
    lm = language_model(llama)
    prompts, limits = [prompt(n) for n in (*LENGTHS, 23, 3)], [20, 33, 9, 25, 14, 40]
    alone = [
        lm.generate(p, max_new_tokens=limit, seed=5, **how, **drawn).answers[0]
        for p, limit in zip(prompts, limits, strict=True)
    ]
    for arrivals in ([0, 1, 2, 3, 7, 12], [9, 5, 1, 0, 30, 31]):
        config, rows = rows_of(lm, prompts, seed=5, **how, **drawn)
        for row, limit in zip(rows, limits, strict=True):
            row.limit = limit
        drive(lm, config, list(zip(arrivals, rows, strict=True)), chunk=6)
        assert [row.answer for row in rows] == alone


@pytest.mark.parametrize("model", [("tiny-bd", None), ("tiny-ar", "tiny-draft")], ids=str)
def test_rows_of_the_shipped_models_join_late_as_well(model):
    lm = nb.load(model[0], draft_adapter=model[1])
    prompts = [f"Q: Leo has {n} bags with {n + 2} coins in each. How many coins does Leo have?\nA:" for n in (3, 9)]
    prompts.append("Q: 3 + 4 = ?\nA:")
    for mode in ("diffusion", "speculative"):
        plain: dict[str, Any] = {"mode": mode}
        for options in (plain, {**plain, "temperature": 1.0, "seed": 3}):
            alone = [lm.generate(p, max_new_tokens=20, **options).answers[0] for p in prompts]
            config, rows = rows_of(lm, prompts, max_new_tokens=20, **options)
            drive(lm, config, list(zip((0, 2, 3), rows, strict=True)))
            assert [row.answer for row in rows] == alone


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_longer_row_joins_layers_with_a_sliding_window(family):
    lm = language_model(tiny_model(family, sliding_window=9))
    prompts = [prompt(4), prompt(40)]
    for how in HOW[:4]:
        alone = [lm.generate(p, max_new_tokens=12, **how).answers[0] for p in prompts]
        config, rows = rows_of(lm, prompts, max_new_tokens=12, **how)
        drive(lm, config, [(0, rows[0]), (2, rows[1])], chunk=16)
        assert [row.answer for row in rows] == alone


@pytest.mark.parametrize("how", HOW, ids=str)
def test_a_cancelled_row_leaves_at_the_next_step_as_if_it_had_never_been_there(llama, how):
    lm = language_model(llama)
    prompts = [prompt(n) for n in (5, 11, 7)]
    alone = [lm.generate(p, max_new_tokens=24, seed=5, **how, **DRAWN).answers[0] for p in prompts]
    for at in (0, 1, 2, 5):
        config, rows = rows_of(lm, prompts, max_new_tokens=24, seed=5, **how, **DRAWN)
        passes = []

        def cancel(step, rows, at=at, passes=passes):
            if step >= at and rows[1].finish is None:
                rows[1].finish = "cancelled"
                passes.append(rows[1].passes)

        drive(lm, config, list(zip((0, 0, 3), rows, strict=True)), between=cancel)
        assert [rows[0].answer, rows[2].answer] == [alone[0], alone[2]]
        assert not passes or rows[1].passes <= passes[0] + 2  # a step of speculative mode has two


def test_the_cache_gives_back_the_room_of_a_long_row_that_left(llama):
    lm = language_model(llama)
    config, rows = rows_of(lm, [prompt(300), prompt(5), prompt(6)], mode="ar", max_new_tokens=40)
    rows[0].limit = 3
    with torch.inference_mode():
        batch = Batch(lm.decoder, lm.settings, config, rows[:1], Stats())
        batch.begin()
        steps = decode(batch)
        for row in rows[1:]:
            other = Batch(lm.decoder, lm.settings, config, [row], Stats())
            other.begin()
            batch.join(other)
            for _ in range(5):
                next(steps)
            assert [row.number for row in batch.rows] == [*range(1, row.number + 1)]
    assert batch.cache.keys[0].shape[0] == 2
    assert batch.cache.keys[0].shape[2] < 200


def test_rows_on_both_sides_of_longrope_keep_their_own_context():
    lm = language_model(longrope_model(32))
    short, long = (make_request(lm.decoder, None, lm.settings, prompt(n), {}) for n in (9, 40))
    contexts = [
        Batch(lm.decoder, lm.settings, request.config, request.rows, Stats()).context for request in (short, long)
    ]
    assert contexts[0] != contexts[1]


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "seed": 1, "sampler": "entropy", "threshold": 0.9},
    {"temperature": 1.3, "top_k": 5, "seed": 2, "sampler": "margin", "sub_blocks": 4},
    {"temperature": 1.0, "top_p": 0.8, "seed": 3, "draft_length": "auto", "threshold": None},
    {"draft_length": "auto", "sampler": "entropy_bound", "threshold": 0.8},
    {"temperature": 2.0, "top_k": 9, "top_p": 0.9, "seed": 4, "draft_length": 2, "steps": 4, "sub_blocks": 2},
]


@pytest.mark.parametrize("how", [HOW[n] for n in (0, 1, 3)], ids=str)
@pytest.mark.parametrize("arrivals", [[0] * 6, [4, 0, 2, 7, 1, 3]], ids=["together", "late"])
def test_rows_of_unlike_choices_share_a_batch_and_get_what_each_gets_alone(llama, how, arrivals):
    lm, alone, rows, config = language_model(llama), [], [], None
    for number, (length, own) in enumerate(zip((*LENGTHS, 23, 3), MIXED, strict=True)):
        options: dict[str, Any] = {**how, **own, "max_new_tokens": 12 + number}
        alone.append(lm.generate(prompt(length), **options).answers[0])
        request = make_request(lm.decoder, None, lm.settings, prompt(length), options)
        config, rows = request.config, [*rows, *request.rows]
        rows[-1].number = number
    drive(lm, config, list(zip(arrivals, rows, strict=True)))
    assert [row.answer for row in rows] == alone
