"""One thread decodes many requests that come and go."""

from __future__ import annotations

import gc
import threading
import time
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import nextblock as nb
from decoders import LENGTHS, language_model, prompt
from families import tiny_model
from nextblock.attention.cache import SlotCache
from nextblock.decoding.request import make_request
from nextblock.server import run as server
from nextblock.server.batching import Engine, Job, Progress
from nextblock.server.limits import Limits
from serving import until

MODES: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "diffusion", "threshold": 0.3},
    {"mode": "speculative"},
    {"mode": "speculative", "draft_ahead": 2},
    {"mode": "speculative", "draft_paths": 2},
]
DRAWN: dict[str, Any] = {"temperature": 0.8, "seed": 4}
DENOISED: list[dict[str, Any]] = [
    {"threshold": 0.3},
    {"threshold": None},
    {"sampler": "entropy"},
    {"sampler": "margin", "threshold": 0.1},
    {"sampler": "entropy_bound", "threshold": 1.0, "sub_blocks": 2},
    {"steps": 4, "sub_blocks": 4},
]


class Heard:
    """What one job was told."""

    def __init__(self, lm, ids, on_token=None, **options):
        request = make_request(lm.decoder, lm.tokenizer, lm.settings, ids, options)
        self.tokens: list[int] = []
        self.end: Progress | None = None
        self.done, self.begun = threading.Event(), threading.Event()
        if on_token is not None:
            request.rows[0].stop = on_token
        self.job = Job(request.rows[0], request.config, self.hear)

    def hear(self, progress):
        self.begun.set()
        self.tokens += progress.tokens
        if progress.finish is not None or progress.error is not None:
            self.end = progress
            self.done.set()

    def wait(self) -> Progress:
        assert self.done.wait(60)
        assert self.end is not None
        return self.end


@contextmanager
def running(lm, **options):
    engine = Engine(lm, **options)
    try:
        yield engine
    finally:
        engine.close()


def idle(engine):
    """No row, no batch and no cache is held."""
    until(lambda: not (engine.rows or engine.waiting or engine._running or engine._reading))
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is SlotCache and thing.rows]


def test_requests_of_all_modes_at_once_get_what_each_gets_alone(llama):
    lm, jobs, alone = language_model(llama), [], []
    for n, how in enumerate(MODES):
        for drawn in ({}, DRAWN):
            for length in LENGTHS[n % 2 :: 2]:
                options: dict[str, Any] = {**how, **drawn, "max_new_tokens": 7 + length}
                alone.append(lm.generate(prompt(length, n), **options).answers[0])
                jobs.append(Heard(lm, prompt(length, n), **options))
    with running(lm, max_rows=6, read_tokens=8) as engine:
        for heard in jobs:
            engine.submit([heard.job])
            time.sleep(0.002)
        assert all(heard.wait().error is None for heard in jobs)
        assert [heard.tokens for heard in jobs] == alone
        idle(engine)
        assert engine.stats.new_tokens == sum(map(len, alone))


@pytest.mark.parametrize("how", MODES[:3], ids=str)
def test_requests_that_differ_in_sampling_limits_and_stops_share_every_pass(llama, how):
    lm, sizes = language_model(llama), []
    each: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7, "seed": 1},
        {"temperature": 1.3, "top_k": 5, "seed": 2},
        {"temperature": 1.0, "top_p": 0.8, "seed": 3},
        {"max_new_tokens": 9},
        {"eos_token_id": [5]},
    ]
    each = [{**how, "max_new_tokens": 25, "eos_token_id": [], **own} for own in each]
    alone = [lm.generate(prompt(5 + n), **options).answers[0] for n, options in enumerate(each)]
    jobs = [Heard(lm, prompt(5 + n), **options) for n, options in enumerate(each)]
    jobs[1].job.row.top = 3
    hook = llama.model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with running(lm) as engine:
        engine.submit([heard.job for heard in jobs])
        assert all(heard.wait().error is None for heard in jobs)
    hook.remove()
    assert [heard.tokens for heard in jobs] == alone
    assert sizes[:3] == [len(jobs)] * 3
    assert len(sizes) == max(heard.job.row.passes for heard in jobs)


@pytest.mark.parametrize("mode", ["ar", "diffusion", "speculative"])
def test_requests_share_every_pass_whatever_they_choose_in_it(llama, mode):
    """Denoised by other rules, with options of other modes, or greedy beside drawn: the passes are of one shape."""
    lm, rows = language_model(llama), []
    each = [{**DENOISED[n], **(DRAWN if n % 2 else {})} for n in range(len(DENOISED))]
    if mode != "speculative":
        each += [{"draft_paths": 2}, {"draft_ahead": 2}, {"draft_length": 3}]
    each += [{"block_size": 4}] * (mode == "ar")
    each = [{"mode": mode, "max_new_tokens": 25, "eos_token_id": [], **own} for own in each]
    alone = [lm.generate(prompt(5 + n), **options).answers[0] for n, options in enumerate(each)]
    jobs = [Heard(lm, prompt(5 + n), **options) for n, options in enumerate(each)]
    hook = llama.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with running(lm) as engine:
        engine.submit([heard.job for heard in jobs])
        assert all(heard.wait().error is None for heard in jobs)
    hook.remove()
    assert [heard.tokens for heard in jobs] == alone
    assert rows[0] == len(jobs)
    assert len(rows) == max(heard.job.row.passes for heard in jobs)


@pytest.mark.parametrize("drawn", [{}, DRAWN], ids=["greedy", "drawn"])
def test_rows_denoised_by_other_rules_come_late_and_go_early_as_if_alone(llama, drawn):
    lm = language_model(llama)
    each: list[dict[str, Any]] = [{"mode": "diffusion", "max_new_tokens": 40, **own, **drawn} for own in DENOISED]
    alone = [lm.generate(prompt(5 + n), **options).answers[0] for n, options in enumerate(each)]
    jobs = [Heard(lm, prompt(5 + n), **options) for n, options in enumerate(each)]
    gone = [Heard(lm, prompt(6), **{**options, "max_new_tokens": 400, "eos_token_id": []}) for options in each]
    with running(lm) as engine:
        for heard, short in zip(jobs, gone, strict=True):
            engine.submit([short.job, heard.job])
            assert short.begun.wait(30)
            short.job.cancelled = True
        assert all(heard.wait().error is None for heard in jobs)
        assert [heard.tokens for heard in jobs] == alone
        idle(engine)
    assert not any(heard.end for heard in gone)


def test_batches_take_turns_a_pass_each(llama):
    """Requests of unlike modes, and of unlike shapes of passes: none waits for another's end."""
    lm, turns = language_model(llama), []
    each = [*MODES[:3], {"mode": "diffusion", "block_size": 4}, {"mode": "speculative", "draft_paths": 2}]
    jobs = [Heard(lm, prompt(5), **how, max_new_tokens=40, eos_token_id=[]) for how in each]
    for number, heard in enumerate(jobs):

        def tell(told, n=number, take=heard.job.tell):
            turns.append(n)
            take(told)

        heard.job.tell = tell
    with running(lm) as engine:
        engine.submit([heard.job for heard in jobs])
        for heard in jobs:
            heard.wait()
    all_begun = max(turns.index(number) for number in range(len(jobs))) + 1
    one_done = min(len(turns) - 1 - turns[::-1].index(number) for number in range(len(jobs)))
    together = turns[all_begun:one_done]
    assert len(together) > 10 * len(jobs)
    for low in range(len(together) - len(jobs) + 1):
        assert len({*together[low : low + len(jobs)]}) == len(jobs)


def test_drafting_stops_where_many_rows_make_it_dear_and_changes_no_answer(llama):
    """By nominal costs, where 16 tokens more in a pass cost as much as the pass of one."""
    lm = language_model(llama)
    options: dict[str, Any] = {"max_new_tokens": 30, "eos_token_id": []}
    alone = lm.generate(prompt(6), mode="ar", **options).answers[0]
    counts = {}
    for rows in (1, 16):
        jobs = [Heard(lm, prompt(6), mode="speculative", draft_length="auto", **options) for _ in range(rows)]
        with running(lm) as engine:
            engine.submit([heard.job for heard in jobs])
            assert all(heard.wait().error is None for heard in jobs)
            counts[rows] = engine.stats
        assert all(heard.tokens == alone for heard in jobs)
    assert counts[1].drafts > 0
    assert counts[16].drafts == counts[16].row_forwards.get("denoise", 0) == 0
    assert counts[16].forwards == 30


def test_forwards_are_counted_for_each_row_as_they_are_alone(llama):
    lm = language_model(llama)
    for mode in MODES[:3]:  # drafts of automatic length go by the load
        how = {**mode, "draft_length": None} if mode["mode"] == "speculative" else mode
        alone = lm.generate(prompt(9), max_new_tokens=20, **how).stats.forwards
        jobs = [Heard(lm, prompt(9), max_new_tokens=20, **how) for _ in range(3)]
        with running(lm) as engine:
            engine.submit([heard.job for heard in jobs])
            assert [heard.wait().forwards for heard in jobs] == [alone] * 3


def test_a_long_prompt_is_read_in_parts_between_the_steps_of_others(llama):
    lm = language_model(llama)
    short, long = (Heard(lm, prompt(n), mode="ar", max_new_tokens=m) for n, m in ((5, 60), (200, 5)))
    passes = []
    hook = llama.model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with running(lm, read_tokens=16) as engine:
        engine.submit([short.job])
        assert short.begun.wait(30)
        engine.submit([long.job])
        for heard in (short, long):
            heard.wait()
    hook.remove()
    assert max(passes) <= 16
    first = passes.index(16)
    assert passes[first : first + 24 : 2] == [16] * 12  # 192 tokens, and a token of the other row behind each part
    assert passes[first + 1 : first + 24 : 2] == [1] * 12
    assert long.tokens == lm.generate(prompt(200), mode="ar", max_new_tokens=5).answers[0]
    assert long.job.row.passes == 13 + 4
    assert short.tokens == lm.generate(prompt(5), mode="ar", max_new_tokens=60).answers[0]


@pytest.mark.parametrize("how", MODES, ids=str)
def test_a_cancelled_request_changes_no_other_and_holds_nothing(llama, how):
    lm = language_model(llama)
    options: dict[str, Any] = {**how, **DRAWN, "max_new_tokens": 20, "eos_token_id": []}
    jobs = [Heard(lm, prompt(n), **{**options, "max_new_tokens": m}) for n, m in ((5, 20), (9, 400), (7, 20), (6, 20))]
    with running(lm, max_rows=3) as engine:
        engine.submit([heard.job for heard in jobs])
        jobs[3].job.cancelled = True  # while it waits
        assert jobs[1].begun.wait(30)
        jobs[1].job.cancelled = True
        for n, length in ((0, 5), (2, 7)):
            jobs[n].wait()
            assert jobs[n].tokens == lm.generate(prompt(length), **options).answers[0]
        idle(engine)
    assert jobs[3].job.row.passes == 0
    assert jobs[1].end is None


def test_requests_that_are_cancelled_while_they_wait_hold_nothing(llama):
    lm = language_model(llama)
    long, *others = [Heard(lm, prompt(5), mode="ar", max_new_tokens=400, eos_token_id=[]) for _ in range(20)]
    with running(lm, max_rows=1) as engine:
        engine.submit([heard.job for heard in (long, *others)])
        assert long.begun.wait(30)
        for heard in others:
            heard.job.cancelled = True
        until(lambda: not engine._waiting)
        assert engine.rows == 1
        long.job.cancelled = True
        idle(engine)


@pytest.mark.parametrize("how", MODES[:3], ids=str)
def test_an_exception_in_one_row_ends_this_row_alone(llama, how):
    lm = language_model(llama)

    def fails(answer):
        if len(answer) > 3:
            raise ValueError("not this row's day")

    jobs = [
        Heard(lm, prompt(5), on_token=fails, max_new_tokens=20, **how),
        Heard(lm, prompt(7), max_new_tokens=20, **how),
    ]
    with running(lm) as engine:
        engine.submit([heard.job for heard in jobs])
        assert "not this row's day" in str(jobs[0].wait().error)
        assert jobs[1].wait().error is None
        assert jobs[1].tokens == lm.generate(prompt(7), max_new_tokens=20, **how).answers[0]
        idle(engine)


def test_a_pass_that_fails_ends_the_rows_of_its_batch_and_the_engine_goes_on(llama):
    lm = language_model(llama)
    poison = 77

    def fail(module, args, kwargs):
        if (kwargs["input_ids"] == poison).sum() > 3:
            raise RuntimeError("out of memory")

    handle = llama.model.register_forward_pre_hook(fail, with_kwargs=True)
    bad = Heard(lm, torch.full((1, 4), poison), mode="ar", max_new_tokens=5)
    good = Heard(lm, prompt(5), mode="diffusion", max_new_tokens=9)
    with running(lm) as engine:
        engine.submit([bad.job, good.job])
        assert "out of memory" in str(bad.wait().error)
        assert good.wait().error is None
        again = Heard(lm, prompt(5), mode="ar", max_new_tokens=5)
        engine.submit([again.job])
        assert again.wait().error is None
        idle(engine)
    handle.remove()


def test_closing_tells_those_who_wait():
    lm = language_model(tiny_model("llama"))
    heard = Heard(lm, prompt(5), mode="ar", max_new_tokens=400)
    engine = Engine(lm)
    engine.submit([heard.job])
    assert heard.begun.wait(30)
    engine.close()
    assert "closing" in str(heard.wait().error)


def test_the_shipped_draft_adapter_answers_beside_ar_mode():
    lm = nb.load("tiny-ar", draft_adapter="tiny-draft")
    ids = prompt(9)
    jobs = [Heard(lm, ids, mode="speculative", max_new_tokens=20) for _ in range(2)]
    with running(lm) as engine:
        engine.submit([jobs[0].job])
        assert jobs[0].begun.wait(30)
        engine.submit([jobs[1].job])
        for heard in jobs:
            heard.wait()
        assert jobs[0].tokens == jobs[1].tokens == lm.generate(ids, mode="ar", max_new_tokens=20).answers[0]


@pytest.mark.parametrize(("stored", "options"), [({}, {"block_size": 2, "draft_paths": 3}), ({"block_size": 2}, {})])
def test_passes_are_measured_for_the_block_that_requests_get(stored, options, monkeypatch):
    measured = []
    monkeypatch.setattr(server, "costs_of", lambda decoder, settings, config, rows: measured.append(config))
    server._costs(language_model(tiny_model("llama"), decoding=stored), options, Limits())
    assert {(config.block_size, config.draft_paths) for config in measured} == {(2, options.get("draft_paths", 1))}
    measured.clear()
    server._costs(language_model(tiny_model("llama"), decoding={"draft_length": 3}), {}, Limits())
    assert not measured
