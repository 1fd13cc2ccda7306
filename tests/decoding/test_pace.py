"""Drafts of automatic length: what the costs of passes decide, and what they never decide."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from decoders import LENGTHS, language_model, padded, prompt
from families import MASK_ID, tiny_model
from nextblock.config.sections import CorrectionConfig, validate
from nextblock.decoding import lm as calls
from nextblock.decoding import pace
from nextblock.decoding.batch import Batch
from nextblock.decoding.drafts import Draft, planted
from nextblock.decoding.engine import decode
from nextblock.decoding.events import Stats
from nextblock.decoding.options import DecodingConfig
from nextblock.decoding.pace import Pacer
from nextblock.decoding.request import make_request
from nextblock.decoding.rows import Row
from nextblock.decoding.sampling import GREEDY, generator
from nextblock.model.correction import Correction
from nextblock.model.costs import Costs, costs_file
from nextblock.model.trees import likeliest_tree

CHEAP = {"check": {1: {1: 1.0, 8: 1.1}}, "draft": {1: 1.1}, "alone": {1: 9.0}}
DEAR = {"check": {1: {1: 1.0, 8: 99.0}}, "draft": {1: 40.0}, "alone": {1: 40.0}}
ALONE = {"check": {1: {1: 1.0, 8: 1.1}}, "draft": {1: 9.0}, "alone": {1: 0.1}}
AUTO = {"mode": "speculative", "draft_length": "auto", "max_new_tokens": 60, "eos_token_id": []}


def sure_of(token):
    """A model that says one token whatever it sees."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[token] = 1000 * model.model.norm.weight
        model.model.embed_tokens.weight.fill_(1)
    return model


@pytest.fixture
def with_costs(monkeypatch):
    def given(costs):
        monkeypatch.setattr(calls, "costs_of", lambda *_: Costs(**costs))

    return given


def test_drafts_are_as_long_as_they_can_be_where_they_are_right_and_width_is_free(with_costs):
    with_costs(CHEAP)
    lm = language_model(sure_of(7))
    found = lm.generate(prompt(3), **AUTO)
    assert found.stats.row_forwards == lm.generate(prompt(3), **{**AUTO, "draft_length": None}).stats.row_forwards
    assert found.stats.row_forwards["denoise"] == 8


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
@pytest.mark.parametrize("paths", [1, 3])
def test_where_the_free_token_costs_more_than_it_brings_drafts_do_without_it(with_costs, prediction, paths):
    """Whatever the drafts are worth: the answers are those of ar, for rows alone and together."""
    batch = padded([prompt(n) for n in LENGTHS])
    for model in (tiny_model("llama", std=0.25), sure_of(7)):
        with_costs(ALONE)
        lm = language_model(model, prediction=prediction)
        found, ar = lm.generate(**batch, **AUTO, draft_paths=paths), lm.generate(**batch, **{**AUTO, "mode": "ar"})
        assert found.answers == ar.answers
        assert found.stats.row_forwards["denoise"] > len(LENGTHS)
    # Eight tokens a cycle of two passes: seven drafts and one more; the prompt's pass brings the first.
    assert found.stats.row_forwards["denoise"] == len(LENGTHS) * -(-59 // 8)
    assert found.stats.kept == found.stats.drafts


def test_where_drafting_loses_steps_are_those_of_ar_but_for_a_few_tries(with_costs):
    lm = language_model(tiny_model("llama", std=0.25))
    for costs, tries in ((DEAR, 0), ({**DEAR, "draft": {1: 1.4}}, 1)):  # the first one after 20 of 30 cycles
        with_costs(costs)
        batch = padded([prompt(n) for n in LENGTHS])
        found, ar = lm.generate(**batch, **AUTO), lm.generate(**batch, **{**AUTO, "mode": "ar"})
        assert found.answers == ar.answers
        assert found.stats.row_forwards.get("denoise", 0) == tries * len(LENGTHS)
        assert sum(found.stats.row_forwards.values()) <= sum(ar.stats.row_forwards.values())


def test_a_draft_that_is_unsure_of_itself_is_not_checked_and_later_calls_know(monkeypatch):
    """A pass that drafts costs no more than another here, so only the check of it can lose."""
    costs = Costs(check={1: {1: 1.0, 8: 9.0}}, draft={1: 1.0}, alone={1: 9.0})
    monkeypatch.setattr(calls, "costs_of", lambda *_: costs)
    lm = language_model(tiny_model("llama", std=0.02))  # nearly uniform
    found = lm.generate(prompt(5), **AUTO)
    assert found.answers == lm.generate(prompt(5), **{**AUTO, "mode": "ar"}).answers
    assert "check" not in found.stats.row_forwards
    assert costs.share.chances(1)[0] < 0.5


@pytest.mark.parametrize("paths", [1, 3])
def test_what_a_sampled_row_draws_does_not_depend_on_the_machine_or_on_other_rows(with_costs, paths):
    lm, batch = language_model(tiny_model("llama", std=0.1)), padded([prompt(n) for n in LENGTHS])
    how, found = {**AUTO, "temperature": 1.0, "draft_paths": paths}, []
    for costs in (CHEAP, DEAR, ALONE):
        with_costs(costs)
        found.append(lm.generate(**batch, seed=3, **how))
    assert found[0].answers == found[1].answers
    assert found[0].stats.row_forwards == found[1].stats.row_forwards
    assert found[0].answers == [lm.generate(prompt(n), seed=3 + i, **how).answers[0] for i, n in enumerate(LENGTHS)]


def test_passes_are_measured_once_for_each_number_of_rows_and_kept_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pace, "_known", {})
    monkeypatch.setattr(calls, "costs_of", pace.costs_of)
    monkeypatch.setattr(pace, "busy", lambda device: False)
    measured = []

    def recorded(batch, costs, measure=pace.measure):
        measured.append(len(batch.rows))
        measure(batch, costs)

    monkeypatch.setattr(pace, "measure", recorded)
    lm = language_model(tiny_model("llama", max_position_embeddings=40))
    short = {**AUTO, "max_new_tokens": 4}
    lm.generate(prompt(3), **short)
    assert measured == [1]
    lm.generate(prompt(3).expand(3, -1), **short)
    assert measured == [1, 4]
    monkeypatch.setattr(pace, "_known", {})  # another process
    lm.generate(prompt(3).expand(4, -1), **short)
    assert measured == [1, 4]
    (of,) = (costs.of for costs in pace._known.values())
    costs = Costs.model_validate_json(costs_file(of).read_text())
    assert [*costs.check] == [*costs.draft] == [*costs.alone] == [1, 4]
    for line in costs.check.values():
        assert [*line] == [1, 2, 4, 8]
        assert [*line.values()] == sorted(line.values())
    monkeypatch.setattr(pace, "_known", {})
    costs.of["machine"] = "another"
    costs_file(of).write_text(costs.model_dump_json())
    with pytest.warns(UserWarning, match="measured again"):
        lm.generate(prompt(3), **short)
    assert measured == [1, 4, 1]
    lm.generate(prompt(3), temperature=1.0, **short)  # needs none
    assert measured == [1, 4, 1]


def test_a_busy_machine_times_nothing_and_keeps_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pace, "_known", {})
    monkeypatch.setattr(calls, "costs_of", pace.costs_of)
    monkeypatch.setattr(pace, "measure", None)  # would fail
    monkeypatch.setattr("os.getloadavg", lambda: (40.0, 0.0, 0.0), raising=False)
    lm = language_model(tiny_model("llama"))
    lm.generate(prompt(3), **{**AUTO, "max_new_tokens": 4})
    assert "the machine is busy" in capsys.readouterr().err
    assert not any(tmp_path.rglob("costs-*.json"))


def test_the_more_rows_share_a_pass_the_fewer_drafts_and_no_answer_changes(with_costs):
    """Costs by rows and width: a few rows draft, many do not."""
    lm = language_model(sure_of(7))
    passes = {"draft": {1: 1.1, 16: 20.0}, "alone": {1: 9.0, 16: 90.0}}
    with_costs({"check": {1: {1: 1.0, 8: 1.1}, 16: {1: 2.0, 8: 20.0}}, **passes})
    drafts = []
    for rows in (1, 4, 16):
        found = lm.generate(prompt(3).expand(rows, -1), **AUTO)
        assert found.answers == lm.generate(prompt(3).expand(rows, -1), **{**AUTO, "mode": "ar"}).answers
        drafts.append(found.stats.drafts / rows)
    assert drafts[0] > 0
    assert drafts == sorted(drafts, reverse=True)
    assert drafts[2] == 0


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("narrow", "wide", "number"), [(1.1, 1.3, 9), (1.1, 200.0, 7), (90.0, 200.0, 0)])
def test_of_a_tree_as_many_drafts_are_checked_as_bring_most_in_their_time(narrow, wide, number, alone):
    """The likeliest ones, by every number of them."""
    costs = Costs(check={2: {1: 1.0, 2: narrow, 8: max(narrow, 1.3), 16: wide}}, draft={2: 1.5}, alone={2: 1.2})
    names = [[3, 4], [5, 6], [7, 8]]
    trees = []
    for chance in (0.9, 0.6):
        value = [[[math.log(chance), math.log(1 - chance)]]] * 3
        trees.append(likeliest_tree(names, value, [[[0, 1]]] * 3, 3, 9))
    config = validate(DecodingConfig, {"mode": "speculative", "draft_paths": 4})
    rows = [Row(n, [1], 20, answer=[2], draft_length=config.draft_length) for n in range(2)]
    whole = planted(trees, torch.device("cpu"))
    found = Pacer(costs, 5, 4).cut(whole, rows, alone)
    check, *passes = costs.of_rows(2, 5, 20)

    def speed(n):
        kept = sum((1 if alone else 2) + sum(each.chance for each in tree[:n]) for tree in trees)
        return kept / (check[1 + n] + passes[alone][whole.lengths[0]])

    best = max(range(10), key=speed)
    assert found.tree == [tree[:best] for tree in trees]
    assert best == number
    assert found.lengths == [max((each.place + 1 for each in tree[:best]), default=0) for tree in trees]


def test_greedy_trees_of_automatic_size_give_the_answers_of_ar_in_fewer_passes_than_paths(with_costs):
    """Where width is free they are as large as they may be."""
    batch = padded([prompt(n) for n in LENGTHS])
    lm = language_model(tiny_model("llama", seed=1, std=0.05))
    with_costs({"check": {1: {1: 1.0, 64: 1.0}}, "draft": {1: 1.0}, "alone": {1: 9.0}})
    ar = lm.generate(**batch, **{**AUTO, "mode": "ar"})
    passes = []
    for paths in (1, 2, 6):
        found = lm.generate(**batch, **AUTO, draft_paths=paths)
        whole = lm.generate(**batch, **{**AUTO, "draft_length": None}, draft_paths=paths)
        assert found.answers == whole.answers == ar.answers
        assert found.stats.row_forwards == whole.stats.row_forwards
        passes.append(sum(found.stats.row_forwards.values()))
    assert passes == sorted(passes, reverse=True)
    assert passes[0] > passes[2]


def test_trees_have_costs_of_their_own_that_reach_as_far_as_their_widest_check(tmp_path, monkeypatch):
    """A pass that grows a tree costs more than one that drafts a chain: neither stands for the other."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pace, "_known", {})
    monkeypatch.setattr(calls, "costs_of", pace.costs_of)
    monkeypatch.setattr(pace, "busy", lambda device: False)
    lm = language_model(tiny_model("llama"))
    for paths in (1, 3, 1):
        lm.generate(prompt(3), **{**AUTO, "max_new_tokens": 4}, draft_paths=paths)
    assert [[*costs.check[1]] for costs in pace._known.values()] == [[1, 2, 4, 8], [1, 2, 4, 8, 16, 24]]


def test_a_head_that_corrects_drafts_has_its_passes_timed_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pace, "_known", {})
    monkeypatch.setattr(pace, "busy", lambda device: False)
    lm, config = language_model(tiny_model("llama")), DecodingConfig(mode="speculative", block_size=4)
    found = [pace.costs_of(lm.decoder, lm.settings, config, 1)]
    vars(lm.model)["correction"] = Correction(lm.decoder.vocabulary, CorrectionConfig(rank=2, candidates=3))
    found.append(pace.costs_of(lm.decoder, lm.settings, config, 1))
    assert found[0].of != found[1].of
    assert [costs.block for costs in found] == [4, 4]


def test_passes_that_are_stopped_while_they_are_timed_hold_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pace, "_known", {})
    monkeypatch.setattr(pace, "busy", lambda device: False)
    closed = []
    monkeypatch.setattr(pace.Batch, "close", lambda batch: closed.append(batch))

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pace, "measure", stopped)
    lm = language_model(tiny_model("llama"))
    with pytest.raises(KeyboardInterrupt):
        pace.costs_of(lm.decoder, lm.settings, DecodingConfig(mode="speculative", block_size=4), 1)
    assert len(closed) == 1


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
@pytest.mark.parametrize("alone", [False, True])
def test_where_width_is_dear_drafts_are_few_and_the_pass_that_makes_them_is_narrow(monkeypatch, prediction, alone):
    """And the answers stay; what is drawn with a seed comes from whole blocks."""
    passes: dict[str, Any] = {"draft": {1: 9.0 if alone else 1.3}, "alone": {1: 1.3 if alone else 9.0}}
    costs = Costs(check={1: {1: 1.0, 3: 1.02, 8: 8.0}}, **passes)
    monkeypatch.setattr(calls, "costs_of", lambda *_: costs)
    lm = language_model(sure_of(7), prediction=prediction)
    widths, forward = [], Batch.forward

    def seen(self, tokens, starts, causal, groups=None, **more):
        widths.append((tokens == MASK_ID).sum(1).max().item())
        return forward(self, tokens, starts, causal, groups, **more)

    monkeypatch.setattr(Batch, "forward", seen)
    found = lm.generate(prompt(3), **AUTO)
    assert found.answers == lm.generate(prompt(3), **{**AUTO, "mode": "ar"}).answers
    assert found.stats.row_forwards["denoise"] > 10
    assert 0 < max(widths) < 4
    widths.clear()
    lm.generate(prompt(3), **AUTO, temperature=1.0)
    assert (0 if alone else 1) <= max(widths) < 4  # what is drawn needs the free token
    widths.clear()
    lm.generate(prompt(3), **AUTO, temperature=1.0, seed=0)
    assert max(widths) == 7


def test_the_global_seed_repeats_a_drawn_answer_whatever_was_decoded_before(monkeypatch):
    """Though drafts go by what passes cost, and what was kept in earlier greedy calls tells how many pay."""
    costs = Costs(check={1: {1: 1.0, 8: 3.0}}, draft={1: 1.3}, alone={1: 9.0})
    monkeypatch.setattr(calls, "costs_of", lambda *_: costs)
    lm, drawn = language_model(sure_of(7)), language_model(tiny_model("llama"))
    before = costs.share.chances(7)

    def answer():
        torch.manual_seed(4)
        found = drawn.generate(prompt(3), **AUTO, temperature=1.0)
        return found.answers, found.stats.row_forwards

    first = answer()
    assert first[1]["denoise"]
    lm.generate(prompt(3), **AUTO)
    assert costs.share.chances(7) != before
    assert answer() == first


def test_what_lies_behind_an_end_token_is_not_checked():
    """However sure it is."""
    pacer = Pacer(Costs(**CHEAP), 8)
    row = Row(0, [1], 20, frozenset([7]), answer=[2], draft_length="auto")
    draft = Draft(torch.tensor([[3, 7, 7, 7]]), [4], chances=torch.ones(1, 4))
    assert pacer.cut(draft, [row], False).lengths == [2]


def test_chances_are_learned_from_drafts_that_were_there():
    """Not from places behind a shorter row's draft, nor for a row that must not depend on the machine."""
    pacer = Pacer(Costs(**CHEAP), 8)
    rows = [Row(n, [1], 20, answer=[2], draft_length="auto") for n in range(2)]
    drawn = Row(2, [1], 20, answer=[2], draft_length="auto", random=generator(0))
    draft = Draft(torch.full((3, 4), 5), [4, 1, 0], chances=torch.full((3, 4), 0.9))
    part = pacer.cut(draft, [*rows, drawn], False)
    assert part.lengths == [4, 1, 0]
    assert part.beyond == [[], [], []]
    part.beyond = [[], [], [0.9]]
    pacer.learn([*rows, drawn], part, [1, 1, 0], False)
    assert drawn.share.tried == 0
    assert pacer.costs.first.tried == 2  # in the place of the free token nothing was drafted
    assert pacer.costs.share.tried == pytest.approx([1.97, 0.97])
    rows[0].finish = "end_token"  # with the last draft that was kept
    pacer.learn(rows[:1], Draft(draft.tokens[:1], [4]), [3], False)
    assert pacer.costs.share.tried == pytest.approx([1.97 * 0.97 + 1, 0.97**2 + 1, 1.0])
    assert pacer.costs.share.kept[1:] == pytest.approx([1.0, 1.0])
    pacer.learn(rows[1:], Draft(draft.tokens[:1], [4]), [0], True)
    assert pacer.costs.first.tried == pytest.approx(2 * 0.97 + 1)


@pytest.mark.parametrize("beside", ["greedy", "free", "number"])
def test_a_seeded_row_draws_beside_any_other_what_it_draws_alone(beside):
    """The server batches such rows, and costs and chances are for those that may depend on them."""
    costs = {"check": {1: {1: 1.0, 64: 1.0}}, "draft": {1: 1.0}, "alone": {1: 9.0}}
    for std, seed in ((0.02, 6), (0.1, 0), (0.1, 6)):
        lm, answers = language_model(tiny_model("llama", std=std)), []
        for kinds in (["seeded"], [beside, "seeded"]):
            rows = []
            for number, kind in enumerate(kinds):
                tokens, how = prompt(5 if kind == "seeded" else 7), {**AUTO, "temperature": 1.0, "max_new_tokens": 120}
                request = make_request(lm.decoder, None, lm.settings, tokens, {**how, "seed": seed})
                row = request.rows[0]
                row.number, row.free = number, kind == "free"
                if kind in ("greedy", "number"):
                    row.random, row.sampling = None, GREEDY
                row.draft_length = 3 if kind == "number" else "auto"
                rows.append(row)
            with torch.inference_mode():
                batch = Batch(lm.decoder, lm.settings, request.config, rows, Stats(), costs=Costs(**costs))
                batch.begin()
                for _ in decode(batch):
                    pass
            answers.append(rows[-1].answer)
        assert answers[0] == answers[1]
