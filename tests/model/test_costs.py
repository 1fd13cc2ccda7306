"""What passes cost, how many drafts pay by that, and the file in which costs are kept."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest

from families import tiny_model
from nextblock.model.costs import (
    Costs,
    Pause,
    Share,
    best_length,
    costs_file,
    fingerprint,
    first_pause,
    kept_by,
    read_costs,
    write_costs,
)

OF = {"model": "0123", "machine": "this one"}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_expected_kept_drafts_are_those_of_all_outcomes():
    chances = [0.9, 0.5, 0.7, 0.2]
    for length, found in enumerate(kept_by(chances)):
        expected = 0.0
        for outcome in itertools.product([True, False], repeat=length):
            odds = math.prod(c if right else 1 - c for c, right in zip(chances, outcome, strict=False))
            expected += odds * (outcome.index(False) if False in outcome else length)
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("drafted", [False, True])
def test_no_choice_of_lengths_row_by_row_brings_more_tokens_in_its_time(drafted):
    """All of them tried, for random chances, costs and ends of rows."""
    rng = random.Random(0)
    chosen = set()
    for _ in range(300):
        kept = [kept_by([rng.random() ** 0.3 for _ in range(rng.randint(0, 4))]) for _ in range(rng.randint(1, 3))]
        check = [0.0, *itertools.accumulate([1.0, *(rng.random() * rng.choice([0.05, 0.5]) for _ in range(4))])]
        draft = 1 + 2 * rng.random()
        speeds = {}
        for lengths in itertools.product(*(range(len(line)) for line in kept)):
            tokens = sum(1 + 1 + line[n] for line, n in zip(kept, lengths, strict=True))
            first = draft if drafted or any(lengths) else check[1]
            speeds[lengths] = tokens / (first + check[1 + max(lengths)])
        speed, best = best_length(kept, check, draft, drafted)
        assert speed == pytest.approx(max(speeds.values()))
        own = tuple(min(best, len(line) - 1) for line in kept)
        assert speeds[own] == pytest.approx(max(speeds.values()))
        chosen.add(best)
    assert chosen == {0, 1, 2, 3, 4}


def test_costs_between_measured_sizes_lie_between_their_costs():
    costs = Costs(
        of=OF,
        check={1: {1: 1.0, 4: 2.5, 8: 3.5}, 8: {1: 2.0, 4: 6.0, 8: 8.0}},
        draft={1: 4.0, 8: 9.0},
        alone={1: 3.0, 8: 8.0},
    )
    assert costs.of_rows(1, 7) == ([0.0, 1.0, 1.5, 2.0, 2.5, 2.75, 3.0, 3.25, 3.5], 4.0, 3.0)
    check, draft, alone = costs.of_rows(8, 3)
    assert (check[1], check[4], draft, alone) == (2.0, 6.0, 9.0, 8.0)
    assert costs.of_rows(16, 0) == ([0.0, 4.0], 18.0, 16.0)
    for rows in range(1, 8):
        few, more = costs.of_rows(rows, 7), costs.of_rows(rows + 1, 7)
        assert all(a < b for a, b in zip(few[0][1:], more[0][1:], strict=True))
        assert few[1] < more[1]


def test_drafting_that_does_not_pay_is_tried_less_and_less_often():
    pause = Pause()
    tried = [cycle for cycle in range(1, 320) if pause.decide(0, 6, first=10) == 6]
    assert tried == [10, 30, 70, 150, 230, 310]
    assert pause.decide(3, 6, first=10) == 3
    assert [cycle for cycle in range(1, 20) if pause.decide(0, 6, first=10)] == [10]


@pytest.mark.parametrize("draft", [1.0, 1.7, 3.0, 20.0])
def test_tries_take_about_a_hundredth_of_the_time(draft):
    """A try is a cycle whose first pass costs what a draft costs."""
    check = [0.0, 1.0]
    cycles = first_pause(check, draft)
    assert cycles >= 4
    assert (draft - 1) / (2 * cycles) <= 0.0101


def test_the_share_of_kept_drafts_is_theirs_and_older_ones_count_less():
    share = Share(memory=0.5)
    assert share.chance(prior=0.3) == pytest.approx(0.3)
    share.learn(3, 4)
    assert share.chance(0, weight=0) == 0.75
    assert share.chance(prior=0.25, weight=4) == 0.5
    share.learn(0, 1)
    assert share.chance(0, weight=0) == 1.5 / 3


def test_costs_are_kept_for_the_same_model_on_the_same_machine(recwarn):
    assert read_costs(OF) == Costs(of=OF)
    costs = Costs(of=OF, check={1: {1: 0.5, 8: 1.5}}, draft={1: 2.0}, alone={1: 1.5}, share=Share(1.0, 9.0))
    write_costs(costs)
    assert read_costs(OF) == costs.model_copy(update={"share": Costs().share})
    assert not recwarn.list


def test_costs_of_another_machine_are_not_taken():
    write_costs(Costs(of={**OF, "machine": "another"}, check={1: {1: 0.5}}, draft={1: 2.0}, alone={1: 2.0}))
    with pytest.warns(UserWarning, match=r"are of another machine \(another\); they are measured again"):
        assert read_costs(OF) == Costs(of=OF)


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]",
        "\xff",
        {"check": {"1": {"1": 0.5}}},
        {"check": {"1": {"1": 0.5}}, "draft": {"1": 1.0}},
        {"check": {"1": {"8": 0.5}}, "draft": {"1": 1.0}, "alone": {"1": 1.0}},
        {"check": {"1": {"1": -1.0}}, "draft": {"1": 1.0}, "alone": {"1": 1.0}},
        {"check": {"1": {"1": "fast"}}, "draft": {"1": 1.0}, "alone": {"1": 1.0}},
        {"check": {"0": {"1": 1.0}}, "draft": {"0": 1.0}, "alone": {"0": 1.0}},
    ],
    ids=str,
)
def test_damaged_costs_are_measured_again(damage):
    costs_file(OF).parent.mkdir()
    text = damage if isinstance(damage, str) else json.dumps({"of": OF, **damage})
    costs_file(OF).write_text(text, encoding="latin-1")
    with pytest.warns(UserWarning, match="cannot be read; they are measured again"):
        assert read_costs(OF) == Costs(of=OF)


def test_a_disk_that_takes_nothing_is_said(tmp_path):
    (tmp_path / "nextblock").write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="could not be kept"):
        write_costs(Costs(of=OF))


def test_models_are_told_apart_by_their_shapes_and_by_what_else_is_said():
    model, wider = tiny_model("llama"), tiny_model("llama", intermediate_size=80)
    assert fingerprint(model, 8) == fingerprint(tiny_model("llama", seed=5), 8)
    found = {fingerprint(*args)["model"] for args in ((model, 8), (model, 16), (wider, 8), (tiny_model("qwen3"), 8))}
    assert len(found) == 4
