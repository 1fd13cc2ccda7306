"""Drafts of automatic length: what the costs of passes decide, and what they never decide."""

from __future__ import annotations

import pytest
import torch

from decoders import LENGTHS, language_model, padded, prompt
from families import tiny_model
from nextblock.decoding import lm as calls
from nextblock.decoding import pace
from nextblock.model.costs import Costs, costs_file

CHEAP = {"check": {1: {1: 1.0, 8: 1.1}}, "draft": {1: 1.1}}
DEAR = {"check": {1: {1: 1.0, 8: 99.0}}, "draft": {1: 40.0}}
AUTO = {"mode": "speculative", "draft_length": "auto", "max_new_tokens": 60, "eos_token_id": []}


@pytest.fixture
def with_costs(monkeypatch):
    def given(costs):
        monkeypatch.setattr(calls, "costs_of", lambda *_: Costs(**costs))

    return given


def test_drafts_are_as_long_as_they_can_be_where_they_are_right_and_width_is_free(with_costs):
    with_costs(CHEAP)
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = 1000 * model.model.norm.weight  # sure of itself
        model.model.embed_tokens.weight.fill_(1)
    lm = language_model(model)
    found = lm.generate(prompt(3), **AUTO)
    assert found.stats.row_forwards == lm.generate(prompt(3), **{**AUTO, "draft_length": None}).stats.row_forwards
    assert found.stats.row_forwards["denoise"] == 8


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
    costs = Costs(check={1: {1: 1.0, 8: 9.0}}, draft={1: 1.0})
    monkeypatch.setattr(calls, "costs_of", lambda *_: costs)
    lm = language_model(tiny_model("llama", std=0.02))  # nearly uniform
    found = lm.generate(prompt(5), **AUTO)
    assert found.answers == lm.generate(prompt(5), **{**AUTO, "mode": "ar"}).answers
    assert "check" not in found.stats.row_forwards
    assert costs.share.kept / costs.share.tried < 0.5


@pytest.mark.parametrize("paths", [1, 3])
def test_what_a_sampled_row_draws_does_not_depend_on_the_machine_or_on_other_rows(with_costs, paths):
    lm, batch = language_model(tiny_model("llama", std=0.1)), padded([prompt(n) for n in LENGTHS])
    how, found = {**AUTO, "temperature": 1.0, "draft_paths": paths}, []
    for costs in (CHEAP, DEAR):
        with_costs(costs)
        found.append(lm.generate(**batch, seed=3, **how))
    assert found[0].answers == found[1].answers
    assert found[0].stats.row_forwards == found[1].stats.row_forwards
    assert found[0].answers == [lm.generate(prompt(n), seed=3 + i, **how).answers[0] for i, n in enumerate(LENGTHS)]


def test_passes_are_measured_once_for_each_number_of_rows_and_kept_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(pace, "_known", {})
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
    assert [*costs.check] == [*costs.draft] == [1, 4]
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


def test_the_more_rows_share_a_pass_the_fewer_drafts_and_no_answer_changes(with_costs):
    """Costs by rows and width: a few rows draft, many do not."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[7] = 1000 * model.model.norm.weight  # sure of itself
        model.model.embed_tokens.weight.fill_(1)
    lm = language_model(model)
    with_costs({"check": {1: {1: 1.0, 8: 1.1}, 16: {1: 2.0, 8: 20.0}}, "draft": {1: 1.1, 16: 20.0}})
    drafts = []
    for rows in (1, 4, 16):
        found = lm.generate(prompt(3).expand(rows, -1), **AUTO)
        assert found.answers == lm.generate(prompt(3).expand(rows, -1), **{**AUTO, "mode": "ar"}).answers
        drafts.append(found.stats.drafts / rows)
    assert drafts[0] > 0
    assert drafts == sorted(drafts, reverse=True)
    assert drafts[2] == 0
