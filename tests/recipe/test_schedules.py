"""Block growth follows Eq. 3 (identity 10); lambda, annealing and learning rates are what their names say."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextblock.config.run import AdaptConfig, load_config
from nextblock.config.sections import GrowthConfig, OptimizerConfig
from nextblock.recipe.schedules import ar_weight, block_size, growth_steps, learning_rate, target_share

growths = st.builds(
    GrowthConfig,
    b_0=st.integers(1, 4),
    r=st.integers(2, 3),
    delta=st.integers(1, 50),
    s_0=st.integers(0, 60),
    b_max=st.integers(4, 64),
)


@given(growths, st.integers(0, 5000))
def test_the_block_size_is_equation_3(growth, step):
    exact = growth.b_0 * growth.r ** math.floor(max(0, step - growth.s_0) / growth.delta)
    assert block_size(step, growth) == min(growth.b_max, exact)


def test_the_paper_s_growth_from_1_to_32_in_powers_of_two():
    growth = GrowthConfig(b_0=1, r=2, delta=500, s_0=0, b_max=32)
    assert [block_size(s, growth) for s in (0, 499, 500, 1000, 1500, 2000, 2499, 2500, 10**9)] == [
        *(1, 1, 2, 4, 8, 16, 16, 32, 32)
    ]


@given(growths, st.integers(1, 400))
def test_growth_steps_are_exactly_the_steps_at_which_the_block_size_changes(growth, steps):
    sizes = [block_size(step, growth) for step in range(steps)]
    changes = [(s, size) for s, size in enumerate(sizes) if s == 0 or size != sizes[s - 1]]
    assert growth_steps(growth, steps) == changes


def config(**overrides: object) -> AdaptConfig:
    values = {"data": {"sources": [{"path": "x"}]}, "growth": {"b_max": 16, "delta": 10}}
    return load_config(values, {key.replace("__", "."): value for key, value in overrides.items()})


def test_lambda_is_constant_unless_it_is_annealed():
    assert {ar_weight(step, config(recipe__ar_weight=0.3)) for step in range(0, 300, 7)} == {0.3}


def test_lambda_anneals_in_equal_steps_from_the_first_to_the_last_block_size():
    annealed = config(recipe__ar_weight=0.5, recipe__ar_weight_final=0.1)
    weights = [ar_weight(step, annealed) for step in (0, 9, 10, 20, 30, 40, 299)]
    assert weights == pytest.approx([0.5, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1])


def test_without_growth_an_annealed_lambda_is_at_its_final_value():
    fixed = config(growth__b_0=16, recipe__ar_weight=0.5, recipe__ar_weight_final=0.1)
    assert ar_weight(0, fixed) == 0.1


def test_the_share_of_the_target_mask_rises_from_0_to_1_and_then_the_baseline_is_over():
    annealed = config(growth__b_0=16, recipe__annealed_mask_steps=50)
    assert [target_share(step, annealed) for step in (0, 25, 49, 50, 299)] == [0.0, 0.5, 0.98, None, None]
    assert target_share(0, config()) is None


def rates(steps: int = 100, **options: object) -> list[float]:
    optimizer = OptimizerConfig.model_validate({"lr": 1.0, "warmup_steps": 10, "min_lr_ratio": 0.1} | options)
    return [learning_rate(step, optimizer, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_warmup_rises_linearly_to_the_peak_and_no_rate_is_ever_above_it(schedule):
    values = rates(schedule=schedule)
    assert values[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert max(values) == pytest.approx(1.0)
    assert min(values) > 0


def test_constant_stays_at_the_peak():
    assert set(rates(schedule="constant")[10:]) == {1.0}


def test_cosine_falls_from_the_peak_through_the_middle_to_the_final_ratio():
    values = rates(steps=1010, schedule="cosine")
    assert values[10] == pytest.approx(1.0)
    assert values[510] == pytest.approx(0.55)
    assert values[-1] == pytest.approx(0.1, abs=1e-4)
    assert all(a >= b for a, b in itertools.pairwise(values[10:]))


def test_wsd_is_stable_and_then_decays_linearly_over_its_last_share():
    values = rates(schedule="wsd", decay_share=0.3)
    assert set(values[10:71]) == {1.0}
    steps = {round(a - b, 12) for a, b in itertools.pairwise(values[70:])}
    assert steps == {0.03}
    assert values[-1] == pytest.approx(0.1 + 0.9 / 30)


def test_wsd_without_decay_is_constant_to_the_end():
    assert set(rates(schedule="wsd", decay_share=0.0)[10:]) == {1.0}


def test_a_run_without_warmup_starts_at_the_peak():
    assert rates(schedule="constant", warmup_steps=0)[0] == 1.0
