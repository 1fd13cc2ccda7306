"""What passes cost, how many drafts pay by that, and the file in which costs are kept."""

from __future__ import annotations

import itertools
import json
import math
import random

import pytest

from families import tiny_model
from nextblock.model.costs import (
    NOMINAL,
    Costs,
    Pause,
    Places,
    Share,
    best_length,
    costs_file,
    fingerprint,
    first_pause,
    kept_by,
    outcome,
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
        for found_right in itertools.product([True, False], repeat=length):
            odds = math.prod(c if right else 1 - c for c, right in zip(chances, found_right, strict=False))
            expected += odds * (found_right.index(False) if False in found_right else length)
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("drafted", [False, True])
def test_no_choice_of_lengths_row_by_row_brings_more_tokens_in_its_time(drafted):
    """All of them tried, for random chances, costs and ends of rows."""
    rng = random.Random(0)
    chosen = set()
    for _ in range(300):
        kept = [kept_by([rng.random() ** 0.3 for _ in range(rng.randint(0, 4))]) for _ in range(rng.randint(1, 3))]
        check = [0.0, *itertools.accumulate([1.0, *(rng.random() * rng.choice([0.05, 0.5]) for _ in range(4))])]
        draft = [*itertools.accumulate([1 + 2 * rng.random(), *(0.2 * rng.random() for _ in range(4))])]
        made = draft[rng.randint(0, 4)] if drafted else None
        speeds = {}
        for lengths in itertools.product(*(range(len(line)) for line in kept)):
            tokens = sum(1 + 1 + line[n] for line, n in zip(kept, lengths, strict=True))
            first = made or (draft[max(lengths)] if any(lengths) else check[1])
            speeds[lengths] = tokens / (first + check[1 + max(lengths)])
        speed, best = best_length(kept, check, made or draft)
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
    check, draft, alone = costs.of_rows(1, 4, 7)
    assert check == [0.0, 1.0, 1.5, 2.0, 2.5, 2.75, 3.0, 3.25, 3.5]
    # Of 0 to b - 2 drafts behind the free token, and of 0 to b - 1 without it: over 3 to b + 1, and 1 to b tokens.
    assert draft == pytest.approx([4 * cost / 2.75 for cost in (2.0, 2.5, 2.75)])
    assert alone == pytest.approx([3 * cost / 2.5 for cost in (1.0, 1.5, 2.0, 2.5)])
    check, draft, alone = costs.of_rows(8, 4, 3)
    assert (check[1], check[4], draft[-1], alone[-1]) == (2.0, 6.0, 9.0, 8.0)
    check, draft, alone = costs.of_rows(16, 8, 0)
    assert (check[1], draft[-1], alone[-1]) == (4.0, 18.0, 16.0)
    for rows in range(1, 8):
        few, more = costs.of_rows(rows, 8, 7), costs.of_rows(rows + 1, 8, 7)
        assert all(a < b for a, b in zip(few[0][1:], more[0][1:], strict=True))
        assert few[1][-1] < more[1][-1]


def test_a_smaller_block_costs_what_its_share_of_the_measured_one_does():
    """As for the block that was measured, at the same number of drafts."""
    lines = {"check": {1: {1: 1.0, 4: 2.5, 16: 9.0}}, "draft": {1: 12.0}, "alone": {1: 10.0}}
    costs = Costs(of=OF, **lines, block=16)
    (check, draft, alone), (few, short, lone) = costs.of_rows(1, 16, 16), costs.of_rows(1, 4, 4)
    assert few == check[: len(few)]
    assert short == pytest.approx(draft[: len(short)])
    assert lone == pytest.approx(alone[: len(lone)])
    assert costs.of_rows(1, 32, 0)[2][-1] > alone[-1]


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


def test_costs_of_drafts_are_those_of_blocks_of_whole_steps():
    check, draft, alone = NOMINAL.of_rows(1, 16, 16, step=16)
    assert len(check) == 18
    assert draft == [2.0] * 15
    assert alone == [2.0] * 16
    exact = NOMINAL.of_rows(1, 16, 16)
    for found, fine, more in zip(NOMINAL.of_rows(1, 16, 16, step=8)[1:], exact[1:], (2, 1), strict=True):
        # n drafts need n + 2 tokens, or n + 1 without the free one: 8 or 16 here.
        assert found == [fine[8 - more]] * (9 - more) + [fine[-1]] * 8


def test_chances_of_places_are_those_of_drafts_whose_checks_end_where_they_are_unsure():
    """Drafts of which only the sure part is checked: what was not checked counts by its own chances."""
    rng, places = random.Random(1), Places(memory=1.0)
    for _ in range(4000):
        own = [1.0, 1.0, rng.choice([1.0, 0.5]), 0.5]
        checked = 2 + 2 * (own[2] == 1.0)
        kept = next((n for n, chance in enumerate(own[:checked]) if rng.random() >= chance), checked)
        places.learn(outcome(kept, checked, own[checked:]))
    assert places.chances(4) == pytest.approx([1.0, 1.0, 0.75, 0.5], abs=0.03)


def test_a_place_that_was_never_tried_is_as_good_as_the_one_before_it():
    places = Places(prior=0.8)
    assert places.chances(3) == [0.8] * 3
    places.learn(outcome(0, 0, []))
    places.learn(outcome(1, 5, []))  # the first was kept, the second was not
    first, second, third = places.chances(3)
    assert first == pytest.approx((1 + 2 * 0.8) / 3)
    assert third == second == pytest.approx(2 * first / 3)
    places.learn(outcome(2, 2, [0.5, 0.25]))
    assert places.kept == pytest.approx([1.97, 1.0, 0.5, 0.125])
    assert places.tried == pytest.approx([1.97, 1.97, 1.0, 0.5])


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
    costs = Costs(of=OF, check={1: {1: 0.5, 8: 1.5}}, draft={1: 2.0}, alone={1: 1.5}, share=Places([1.0], [9.0]))
    write_costs(costs)
    assert read_costs(OF) == costs.model_copy(update={"share": Costs().share})
    assert not recwarn.list


def test_what_two_processes_measure_is_kept_of_both():
    one, other = (Costs(of=OF, check={n: {1: n, 8: 9.0}}, draft={n: 2.0}, alone={n: 1.5}) for n in (1, 4))
    write_costs(one)
    write_costs(other)
    assert [*read_costs(OF).check] == [*other.check] == [4, 1]
    assert read_costs(OF).check == {1: {1: 1, 8: 9.0}, 4: {1: 4, 8: 9.0}}


def test_without_a_home_folder_costs_are_measured_and_not_kept(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless() -> None:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("nextblock.model.costs.Path.home", homeless)
    assert read_costs(OF) == Costs(of=OF)
    with pytest.warns(UserWarning, match="could not be kept .*: there is no home folder; set XDG_CACHE_HOME"):
        write_costs(Costs(of=OF))


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
