"""Configuration: what is refused before anything is loaded, in one line, and what comes out resolved."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nextblock.config.errors import UsageError, nearest
from nextblock.config.files import read_yaml, to_yaml
from nextblock.config.run import AdaptConfig, load_config
from nextblock.config.sections import BlockDiffusionSettings, ModelConfig, Section, Source, type_in_words, validate

MINIMAL: dict[str, Any] = {"data": {"sources": [{"path": "text"}], "row_length": 64}}


def refusal(overrides: dict[str, Any], base: Any = MINIMAL) -> str:
    with pytest.raises(UsageError) as refused:
        load_config(base, overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ------------------------------------------------------------------------------- reading


def test_defaults_are_the_papers_recipe_and_agree_with_each_other():
    config = load_config(MINIMAL)
    assert config.growth.b_0 == 1
    assert (config.growth.r, config.growth.b_max) == (2, 32)
    assert config.recipe.ar_weight == 0.5
    assert (config.recipe.context, config.recipe.prediction) == ("context_causal", "shifted")
    assert config.recipe.noise_per == "block"


def test_a_resolved_copy_in_yaml_gives_the_same_configuration(tmp_path):
    config = load_config(MINIMAL, {"growth.b_max": 16, "optimizer.lr": "3e-4", "model.scratch": {"vocab_size": 7}})
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    assert load_config(copy) == config


def test_a_configuration_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError, match="frozen"):
        load_config(MINIMAL).growth.b_max = 4  # type: ignore[misc]


def test_overrides_reach_nested_keys_and_list_items_and_leave_the_source_as_it_was():
    values = {"data": {"sources": [{"path": "a"}, {"path": "b"}]}}
    config = load_config(values, {"data.sources.1.path": "c", "data.sources.2.path": "d", "training.steps": 999})
    assert [source.path for source in config.data.sources] == ["a", "c", "d"]
    assert config.training.steps == 999
    assert values == {"data": {"sources": [{"path": "a"}, {"path": "b"}]}}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"data.sources.5.path": "x"}, "'5' is not an index into a list of 1"),
        ({"data.sources.first.path": "x"}, "'first' is not an index"),
        ({"data.row_length.x": 1}, "'x' lies below a plain value"),
    ],
)
def test_an_override_that_leads_nowhere_is_named(overrides, said):
    assert said in refusal(overrides)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a: [", "cannot read the configuration"),
        (b"\xff\xfe\xfa", "cannot read the configuration"),
        (b"- 1", "expected a mapping"),
        (b"", "data is missing"),
    ],
)
def test_a_file_that_is_not_a_configuration_stops_with_one_line(tmp_path, content, said):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    assert said in refusal({}, path)


def test_an_override_may_begin_a_list():
    assert load_config({"data": {"row_length": 64}}, {"data.sources.0.path": "a"}).data.sources[0].path == "a"
    stages = load_config(MINIMAL, {"stages.0.name": "x", "stages.1.name": "y", "training.steps": 999}).stages
    assert [stage.name for stage in stages] == ["x", "y"]


def test_a_missing_file_is_named(tmp_path):
    assert "absent.yaml" in refusal({}, tmp_path / "absent.yaml")


# ------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("growht.b_max", "growth"),
        ("growth.bmax", "b_max"),
        ("optimizer.learning_rate", "learning_rate"),
        ("data.row_lenght", "row_length"),
        ("data.sources.0.fromat", "format"),
        ("recipe.noise_par", "noise_per"),
        ("training.step", "steps"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_right_one(key, right):
    said = refusal({key: 1})
    assert key.split(".")[-1] in said or key.split(".")[0] in said
    assert said.startswith("unknown key")
    if right != "learning_rate":  # nothing is near: all are listed
        assert f"did you mean '{right}'?" in said
    else:
        assert "choose from lr, schedule, " in said


def test_nearest_names_the_closest_choice_or_all():
    assert nearest("entropi", ["confidence", "entropy"]) == "; did you mean 'entropy'?"
    assert nearest("zzz", ["a", "b"]) == "; choose from a, b"


# ------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("growth.b_0", 0),
        ("growth.r", 1),
        ("growth.delta", 0),
        ("growth.s_0", -1),
        ("recipe.ar_weight", -0.1),
        ("recipe.full_mask_share", 1.1),
        ("recipe.random_start_share", -0.1),
        ("recipe.context", "both"),
        ("recipe.prediction", "none"),
        ("recipe.noise_per", "token"),
        ("recipe.views", 0),
        ("optimizer.lr", 0),
        ("optimizer.schedule", "linear"),
        ("training.steps", 0),
        ("training.steps", "many"),
        ("training.batch_rows", 0),
        ("data.sources", []),
        ("data.sources.0.weight", 0),
        ("data.held_out", 1.0),
        ("model.dtype", "float16"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_key_and_value(key, value):
    said = refusal({key: value})
    assert said.startswith((f"{key}={value!r}: ", f"{key}={value} must ", f"{key}={value} is not a "))


def test_true_is_no_number_and_one_is_no_text():
    numbers = {
        f"{name}.{key}": field
        for name, section in AdaptConfig.model_fields.items()
        if isinstance(section.annotation, type) and issubclass(section.annotation, Section)
        for key, field in section.annotation.model_fields.items()
        if "number" in type_in_words(field.annotation)
    }
    assert {"model.mask_token", "training.steps", "optimizer.lr", "training.keep_every"} <= numbers.keys()
    for key, field in numbers.items():
        for value in (True, False):
            assert refusal({key: value}) == f"{key}={value} is not {type_in_words(field.annotation)}"
    assert refusal({"model.path": 1}) == "model.path=1 is not a text"
    assert refusal({"lora": {"target_modules": [1]}}) == "lora.target_modules=[1] is not a text or a list"
    assert refusal({"training.steps": 300.5}) == "training.steps=300.5 is not a whole number"
    with pytest.raises(UsageError, match="mask_token_id=True is not a whole number"):
        validate(BlockDiffusionSettings, {"mask_token_id": True})


def test_a_bare_no_in_yaml_is_the_name_no_where_that_is_a_choice(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("data: {sources: [{path: text}], row_length: 64}\ntraining: {mixed_precision: no}\n")
    assert load_config(file).training.mixed_precision == "no"
    assert load_config(MINIMAL, {"training.mixed_precision": read_yaml("no")}).training.mixed_precision == "no"
    assert "mixed_precision" in refusal({"training.mixed_precision": True})


@pytest.mark.parametrize("key", ["optimizer.lr", "optimizer.weight_decay", "data.sources.0.weight"])
def test_numbers_are_finite(key):
    assert refusal({key: float("inf")}) == f"{key}=inf is not a finite number"


def test_a_number_is_read_as_one_however_its_power_of_ten_is_written(tmp_path):
    for text, number in {"1e-4": 1e-4, "1e3": 1000, "1.5e3": 1500, "-2E-2": -0.02, ".5e1": 5, "+1e+2": 100}.items():
        assert read_yaml(f"{{a: {text}}}") == {"a": number}
        assert read_yaml(to_yaml({"a": text})) == {"a": text}
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: {sources: [{path: a.txt}]}\nmodel: {override: {rope_theta: 1e6}}\noptimizer: {lr: 1e-4}\n"
        "training: {steps: 1e3}\n"
    )
    config = load_config(path)
    assert config.model.override == {"rope_theta": 1e6}
    assert (config.optimizer.lr, config.training.steps) == (1e-4, 1000)


def test_what_must_be_set_is_named():
    assert "data.sources.0.path is missing" in refusal({}, {"data": {"sources": [{}]}})
    assert "data is missing" in refusal({}, {"model": {}})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"growth.b_0": 64}, "growth.b_0=64 is larger than growth.b_max=32; start at or below it"),
        ({"data.row_length": 16}, "data.row_length=16 is smaller than the block growth.b_max=32; use at least 32"),
        ({"data.row_length": 100}, "data.row_length=100 is not a multiple of growth.b_max=32; use 96"),
        (
            {"training.steps": 250},
            "growth.b_max=32 is not reached in training.steps=250; use at least training.steps=251, or a smaller "
            "growth.delta",
        ),
        ({"growth.s_0": 100, "training.steps": 350}, "use at least training.steps=351"),
        ({"model.dtype": "bfloat16"}, "set model.dtype=float32 and training.mixed_precision=bf16"),
        ({"recipe.views": 3, "recipe.complementary": True}, "recipe.views=3 is odd, but recipe.complementary"),
        (
            {"recipe.annealed_mask_steps": 10},
            "recipe.annealed_mask_steps=10 replaces block growth; set growth.b_0 to growth.b_max=32",
        ),
        (
            {"recipe.annealed_mask_steps": 10, "growth.b_0": 32, "recipe.context": "block_causal"},
            "recipe.annealed_mask_steps=10 needs recipe.context=context_causal",
        ),
    ],
)
def test_keys_that_contradict_each_other_are_refused_with_rule_and_cure(overrides, said):
    assert said in refusal(overrides)


@pytest.mark.parametrize("steps", [251, 10_000])
def test_a_growth_that_reaches_its_target_is_accepted(steps):
    assert load_config(MINIMAL, {"training.steps": steps}).training.steps == steps


@pytest.mark.parametrize("section", ["lora", "draft_adapter"])
def test_a_frozen_parent_may_be_in_bfloat16(section):
    config = load_config(MINIMAL, {"model.dtype": "bfloat16", f"{section}.rank": 4, "growth.b_0": 2})
    assert config.model.dtype == "bfloat16"


def test_full_sequence_diffusion_is_a_block_as_long_as_the_row():
    config = load_config(MINIMAL, {"growth.b_0": 64, "growth.b_max": 64})
    assert isinstance(config, AdaptConfig)


def test_settings_left_out_take_the_defaults_of_the_format():
    settings = validate(BlockDiffusionSettings, {"mask_token_id": 5})
    assert settings.model_dump(exclude={"decoding"}) == {
        "block_size": 32,
        "mask_token_id": 5,
        "context": "context_causal",
        "prediction": "shifted",
    }


def test_every_option_says_what_it_is():
    silent = [
        f"{section.__name__}.{name}"
        for section in (ModelConfig, Source, *(f.annotation for f in AdaptConfig.model_fields.values()))
        if isinstance(section, type) and hasattr(section, "model_fields")
        for name, field in section.model_fields.items()
        if not field.description
    ]
    allowed = {"format", "weight_decay", "beta_1", "beta_2", "seed", "warmup_steps"}
    assert {name.split(".")[1] for name in silent} <= allowed


def test_an_option_that_chose_the_form_of_checkpoints_is_named_as_gone():
    values = {"data": {"sources": [{"path": "task:arithmetic"}]}, "training": {"checkpoint": "sharded"}}
    with pytest.raises(UsageError, match=r"training.checkpoint is no option any more: .*; leave it out"):
        load_config(values)


def test_an_output_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(MINIMAL, {"output": "~/runs/x"}).output == str(tmp_path / "runs" / "x")
    assert load_config(MINIMAL, {"output": "runs/~x"}).output == "runs/~x"
    said = "output ~no-such-user/x is in the home folder of an unknown user; write the whole path"
    assert refusal({"output": "~no-such-user/x"}) == said
