"""Tuning: candidates are valid, quality and drop mean what they say, and writing changes the settings alone."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from families import tiny_model
from nextblock.cli.main import app
from nextblock.config.errors import UsageError
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.decoding.lm import BlockDiffusionLM, load
from nextblock.decoding.options import resolve_config
from nextblock.measure.bench.contest import Round
from nextblock.measure.bench.figures import plot_tuning, tuning_table
from nextblock.measure.bench.prompts import Prompts, task_prompts
from nextblock.measure.tune import (
    MODES,
    Trial,
    Tuning,
    block_sizes,
    coarse_grid,
    complete,
    neighbours,
    setting_name,
    tune,
)
from nextblock.model.parent import byte_tokenizer
from nextblock.tasks import Example, Task
from nextblock.training.export import export
from nextblock.workflows.stored import writable_folder, write_decoding

VOCABULARY, MASK, END = 264, 263, 256


def make_lm(block_size=2):
    model = tiny_model("llama", vocab_size=VOCABULARY, eos_token_id=END, std=0.15)
    with torch.no_grad():
        model.lm_head.weight[MASK] = 0
    settings = BlockDiffusionSettings(block_size=block_size, mask_token_id=MASK, decoding={"temperature": 0.7})
    return BlockDiffusionLM(model, byte_tokenizer(), settings)


def trial(mode, options, **figures):
    values = {
        "stage": "fine",
        "examples": 4,
        "quality": 1.0,
        "interval": (0.5, 1.0),
        "p_value": 1.0,
        "drop": 0.0,
        "drop_error": 0.0,
        "speedup": 1.0,
    }
    values |= {"tokens_per_second": 10.0, "tokens_per_forward": 1.0, **figures}
    options = complete({"mode": mode, **options}, 8)
    return Trial(name=setting_name(options), mode=mode, options=options, **values)


# ------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize("size", [1, 2, 3, 4, 12, 32])
@pytest.mark.parametrize("mode", MODES)
def test_every_candidate_is_one_that_generate_takes(mode, size):
    settings = BlockDiffusionSettings(block_size=size, mask_token_id=MASK)
    grid = coarse_grid(mode, size)
    if mode == "speculative":
        grid.append(complete({"mode": mode, "draft_paths": 2}, size))
    for options in [*grid, *(near for setting in grid for near in neighbours(setting))]:
        resolve_config(settings, options)
        assert options["block_size"] <= size


def test_block_sizes_are_the_largest_divisors():
    assert block_sizes(32) == [32, 16, 8, 4]
    assert block_sizes(6) == [6, 3, 2]
    assert block_sizes(1) == [1]


def test_neighbours_differ_from_the_setting_and_from_each_other():
    for mode in MODES:
        options = coarse_grid(mode, 8)[1]
        near = neighbours(options)
        assert options not in near
        assert all(a != b for i, a in enumerate(near) for b in near[:i])


def test_a_complete_setting_hides_what_the_checkpoint_sets():
    settings = BlockDiffusionSettings(block_size=8, mask_token_id=MASK, decoding={"sub_blocks": 2, "threshold": 0.1})
    config = resolve_config(settings, complete({"mode": "diffusion", "block_size": 4}, 8))
    assert (config.sub_blocks, config.threshold, config.block_size) == (1, 0.9, 4)


# -------------------------------------------------------------------------------------------- measuring


@pytest.fixture(scope="module")
def tuned():
    """Both modes on a task that is right where the answer's first byte is even: a random model gets some of it."""

    def grade(text, case):
        return bool(text) and ord(text[0]) % 2 == 0

    cases = tuple(Example(f"problem {index}", "", "", str(index)) for index in range(9))
    prompts = Prompts("task", [case.prompt for case in cases], Task("even", lambda s, i: cases[i], grade), cases)
    calls = []
    found = tune(make_lm(), prompts, max_drop=0, max_new_tokens=4, on_call=lambda *counts: calls.append(counts))
    return found, calls


def test_lossless_settings_lose_nothing_and_the_fastest_of_them_is_chosen(tuned):
    found, _ = tuned
    speculative = [t for t in found.trials if t.mode == "speculative"]
    assert all(t.drop == 0 for t in speculative)
    allowed = [t.speedup for t in speculative if t.stage == "fine"]
    assert found.best["speculative"].speedup == max(allowed)
    assert found.winner.speedup >= max(allowed)


def test_ar_mode_is_what_the_others_are_measured_against(tuned):
    found, _ = tuned
    ar = found.trials[0]
    assert (ar.mode, ar.drop, ar.drop_error, ar.speedup, ar.tokens_per_forward) == ("ar", 0, 0, 1, 1)
    for t in found.trials:
        if t.stage == "fine":
            assert t.drop == pytest.approx(100 * (ar.quality - t.quality))
            assert t.examples == 9


def test_no_choice_loses_more_than_is_allowed_and_each_setting_is_listed_once(tuned):
    found, _ = tuned
    assert all(t.drop <= 0 for t in found.best.values() if t is not None)
    assert [t for t in found.trials if t.chosen] == [t for t in found.trials if t in found.best.values()]
    options = [t.options for t in found.trials]
    assert all(a != b for i, a in enumerate(options) for b in options[:i])


def test_progress_ends_at_the_total_of_each_pass(tuned):
    _, calls = tuned
    ends = [number for number, (done, total) in enumerate(calls) if done == total]
    assert len(ends) == 2  # coarse and fine
    assert ends[-1] == len(calls) - 1


def test_results_are_plain_json_with_table_and_plot(tuned):
    found, _ = tuned
    results = json.loads(json.dumps(found.as_dict()))
    assert results["decoding"]["mode"] == found.winner.mode
    plot_tuning(results["trials"], found.measure, 2.0).canvas.draw()
    assert tuning_table(results["trials"], found.measure).row_count == sum(t.stage == "fine" for t in found.trials)


def test_without_a_task_quality_is_the_share_of_answers_equal_to_ar_modes():
    found = tune(make_lm(), Prompts("p.txt", ["a", "b", "c"]), modes=["speculative"], max_new_tokens=4)
    assert found.measure == "agreement with AR"
    assert all(t.quality == 1 for t in found.trials)


# ---------------------------------------------------------------------------------------------- choice


def test_both_modes_defaults_are_written_from_one_block_size():
    fast = trial("diffusion", {"block_size": 4, "threshold": 0.8}, speedup=3.0)
    same = trial("speculative", {"block_size": 4, "draft_length": 2}, speedup=1.5)
    other = trial("speculative", {"block_size": 8}, speedup=2.0)
    found = Tuning("accuracy", "p", 2.0, [fast, same, other], {"diffusion": fast, "speculative": other})
    decoding = found.decoding()
    assert found.winner is fast
    assert (decoding["mode"], decoding["block_size"], decoding["threshold"]) == ("diffusion", 4, 0.8)
    assert decoding["draft_length"] == 2


def test_nothing_allowed_means_nothing_to_write():
    found = Tuning("accuracy", "p", 0.0, [], {"diffusion": None})
    assert found.winner is None
    assert found.decoding() == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": ["difusion"]}, "did you mean 'diffusion'"),
        ({"modes": ["ar"]}, "mode 'ar' cannot be tuned"),
        ({"max_drop": -1}, "max_drop=-1 must lie between 0 and 100"),
        ({"batch": 3}, "batch=3 is more than the 2 prompts"),
        ({"extra": [{"mode": "diffusion", "sub_blocks": 3}]}, "sub_blocks=3 does not divide"),
    ],
)
def test_bad_input_is_refused_before_decoding(changes, message):
    with pytest.raises(UsageError, match=message):
        tune(make_lm(), task_prompts("algebra", "train", 2), **changes)


def test_a_plain_ar_model_has_nothing_to_tune():
    lm = make_lm()
    lm.settings = None
    with pytest.raises(UsageError, match="nothing to tune; adapt it first"):
        tune(lm, Prompts("p", ["a"]))


def test_tokens_per_forward_of_a_round_counts_all_rows():
    assert Round([[1, 2], [3]], seconds=1.5, row_forwards=6).new_tokens == 3


# --------------------------------------------------------------------------------------------- writing


@pytest.fixture
def folder(tmp_path):
    lm = make_lm(8)
    export(tmp_path / "m", lm.model, lm.tokenizer, lm.settings)
    return tmp_path / "m"


def test_writing_changes_the_decoding_settings_and_no_other_byte(folder):
    before = (folder / "config.json").read_text()
    write_decoding(folder, {})
    assert (folder / "config.json").read_text() == before
    write_decoding(folder, {"mode": "diffusion", "block_size": 4, "threshold": 0.75})
    config, old = json.loads((folder / "config.json").read_text()), json.loads(before)
    assert config["block_diffusion"].pop("decoding") == {
        "temperature": 0.7,
        "mode": "diffusion",
        "block_size": 4,
        "threshold": 0.75,
    }
    old["block_diffusion"].pop("decoding")
    assert config == old
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []


def test_what_was_written_are_the_defaults_of_generate(folder):
    write_decoding(folder, {"mode": "speculative", "block_size": 4, "draft_length": 2})
    config = resolve_config(load(folder).settings, {})
    assert (config.mode, config.block_size, config.draft_length) == ("speculative", 4, 2)


def test_what_was_stored_of_options_that_must_fit_each_other_goes_with_the_first_that_is_written(folder):
    settings = load(folder).settings
    assert settings is not None
    stored = settings.model_copy(update={"decoding": {"steps": 2, "sub_blocks": 2, "threshold": 0.5}})
    tuned = complete({"mode": "diffusion", "threshold": 0.75}, 8)
    write_decoding(folder, stored.decoding)
    write_decoding(folder, tuned)
    written = load(folder).settings
    assert resolve_config(written, {}) == resolve_config(stored, tuned).model_copy(update={"temperature": 0.7})
    assert resolve_config(written, {}).steps is None


def test_a_write_that_fails_leaves_the_old_settings(folder, monkeypatch):
    before = (folder / "config.json").read_bytes()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UsageError, match="No space left on device"):
        write_decoding(folder, {"mode": "ar"})
    assert (folder / "config.json").read_bytes() == before
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("model", ["tiny-bd", "tiny-ar", "someone/model"])
def test_models_that_cannot_be_written_are_refused_before_they_load(model):
    with pytest.raises(UsageError, match="copy it first, and tune the copy"):
        writable_folder(model)
    result = CliRunner().invoke(app, ["tune", model, "--write"])
    assert isinstance(result.exception, UsageError)


def test_settings_of_a_draft_adapter_are_not_written_into_its_parent(folder):
    result = CliRunner().invoke(app, ["tune", str(folder), "--write", "--draft-adapter", "no/such/adapter"])
    assert isinstance(result.exception, UsageError)
    assert "those of the draft adapter" in str(result.exception)


def test_the_command_tunes_and_writes(folder, tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    arguments = ["--prompts", tmp_path / "p.txt", "--mode", "speculative", "--max-new-tokens", 3]
    outputs = ["--write", "--output", tmp_path / "t.json", "--variant", "speculative,block_size=2"]
    result = CliRunner().invoke(app, ["tune", *map(str, [folder, *arguments, *outputs])])
    assert result.exception is None, result.output
    settings = load(folder).settings
    assert settings is not None
    written = settings.decoding
    assert written["mode"] == "speculative"
    assert written == {**json.loads((tmp_path / "t.json").read_text())["decoding"], "temperature": 0.7}
    assert (tmp_path / "t.png").is_file()
