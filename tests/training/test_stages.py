"""Stages: each begins where the one before ended, and a kill in any of them changes nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nextblock.config.errors import UsageError
from nextblock.config.run import AdaptConfig, load_config, stage_configs
from nextblock.measure.report.figures import plot_losses
from nextblock.model.loading import read_config
from nextblock.training.log import read_log
from nextblock.training.loop import train
from nextblock.training.run import StepMetrics
from nextblock.workflows.adapt import adapt
from runs import config_of, signal_at, start, weights


def staged(place: Path, output: Path, **overrides: Any) -> AdaptConfig:
    """Growth at a constant rate; cooldown on longer rows; prompts and answers at another rate."""
    talk = place / "talk.jsonl"
    rows = [{"prompt": f"{a} plus 1 is", "completion": f" {a + 1}."} for a in range(40)]
    talk.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    stages = [
        {"name": "base", "optimizer": {"schedule": "constant"}},
        {
            "name": "long",
            "model": {"override": {"max_position_embeddings": 1024, "rope_parameters": {"rope_theta": 5e5}}},
            "data": {"row_length": 64},
            "optimizer": {"schedule": "wsd", "decay_share": 1.0},
            "training": {"steps": 4, "batch_rows": 2},
        },
        {
            "name": "sft",
            "data": {"sources": [{"path": str(talk)}], "row_length": 64},
            "growth": {"b_max": 8, "delta": 2},
            "optimizer": {"lr": 1e-3},
            "training": {"steps": 5},
            "fresh_optimizer": True,
        },
    ]
    return config_of(place, output, stages=stages, **overrides)


def test_a_stage_has_what_the_run_has_but_for_what_it_sets(place, tmp_path):
    base, long, sft = stage_configs(staged(place, tmp_path))
    assert [Path(stage.output).name for stage in (base, long, sft)] == ["stage-1-base", "stage-2-long", "stage-3-sft"]
    assert [stage.data.row_length for stage in (base, long, sft)] == [32, 64, 64]
    assert [(stage.growth.b_0, stage.growth.b_max) for stage in (base, long, sft)] == [(1, 4), (4, 4), (4, 8)]
    assert [stage.optimizer.warmup_steps for stage in (base, long, sft)] == [2, 0, 2]
    assert [stage.optimizer.lr for stage in (base, long, sft)] == [3e-3, 3e-3, 1e-3]
    assert sft.model.override == long.model.override


REFUSED = {
    "an unknown key": (
        {"stages.1.data.row_lenght": 9},
        "stages.1 (long): unknown key 'data.row_lenght'",
    ),
    "a contradiction": ({"stages.1.data.row_length": 66}, "stages.1 (long): data.row_length=66 is not a multiple"),
    "a key of the run": ({"stages.2.training.seed": 1}, "stages.2 (sft): training.seed holds for the whole run"),
    "a tracker of its own": (
        {"stages.1.training.trackers": ["wandb"]},
        "stages.1 (long): training.trackers holds for the whole run",
    ),
    "another parent": ({"stages.1.model.path": "x"}, "stages.1 (long): model.path holds for the whole run"),
    "a name that is no folder": ({"stages.0.name": "a/b"}, "stages.0.name='a/b'"),
    "an adapter": ({"draft_adapter": {}, "growth.b_0": 2}, "draft_adapter is trained in one stage"),
    "low-rank updates": ({"lora": {}}, "lora is trained in one stage"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_contradictory_stages_are_refused_in_one_line(place, tmp_path, what):
    overrides, said = REFUSED[what]
    values = staged(place, tmp_path).model_dump(mode="json")
    with pytest.raises(UsageError) as refused:
        load_config(values, overrides)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_bad_data_of_a_later_stage_stop_the_run_before_the_first(place, tmp_path):
    for overrides, said in (
        ({"stages.2.data.sources": [{"path": "./absent.jsonl"}]}, "absent.jsonl"),
        ({"stages.1.data.row_length": 2048}, "over the model's 1024 positions"),
        ({"stages.1.model.override": {"rope_thta": 1}}, "stage long: model.override.rope_thta: the config"),
        ({"stages.1.model.override": {"hidden_size": 64}}, "stage long: model.override={'hidden_size': 64}: lm_head"),
        ({"stages.1.model.override": {"rope_parameters": {"rope_type": "yarn"}}}, "stage long: the config makes no"),
    ):
        config = load_config(staged(place, tmp_path / "run").model_dump(mode="json"), overrides)
        with pytest.raises(UsageError) as refused:
            train(config)
        assert said in str(refused.value)
        assert not (tmp_path / "run").exists()


def test_a_later_stage_of_a_model_from_scratch_is_checked_against_its_positions(place, tmp_path):
    scratch = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = {"intermediate_size": 32, "max_position_embeddings": 64}
    stages = [{"name": "base"}, {"name": "long", "data": {"row_length": 128}}]
    config = config_of(place, tmp_path / "run", model__scratch={**scratch, **shape}, stages=stages)
    with pytest.raises(UsageError, match=r"stage long: data.row_length=128 is over the model's 64 positions"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_from_one_with_other_stages_nor_over_a_model_without_checkpoints(place, tmp_path):
    stages = [{"name": "a", "training": {"steps": 9}}, {"name": "b", "training": {"steps": 2}}]
    plain = config_of(place, tmp_path / "plain", training__steps=9)
    train(plain)
    before = weights(tmp_path / "plain")
    with pytest.raises(UsageError, match=r"plain holds checkpoints of a run with other stages; set the stages back"):
        train(config_of(place, tmp_path / "plain", stages=stages), resume=True)
    shutil.rmtree(tmp_path / "plain" / "checkpoints")
    with pytest.raises(UsageError, match="holds a finished model and no checkpoint to go on from"):
        train(plain, resume=True)
    assert weights(tmp_path / "plain") == before

    train(config_of(place, tmp_path / "staged", stages=stages))
    renamed = [stages[0], {**stages[1], "name": "c"}]
    for other in ({}, {"stages": renamed}):
        with pytest.raises(UsageError, match=r"stage-[12]-[ab] holds checkpoints of a run with other stages"):
            train(config_of(place, tmp_path / "staged", **other), resume=True)
    more = [*stages, {"name": "c", "training": {"steps": 2}}]
    assert train(config_of(place, tmp_path / "staged", stages=more), resume=True).finished


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory) -> tuple[Path, list[StepMetrics]]:
    """A run of three stages that nothing stops, with its report."""
    output, metrics = tmp_path_factory.mktemp("stages") / "run", []
    result = adapt(staged(place, output), on_step=metrics.append)
    assert result.finished
    return output, metrics


def test_the_log_and_the_report_go_through_all_stages(whole):
    output, metrics = whole
    assert [m.step for m in metrics] == list(range(21))
    assert [m.stage for m in metrics] == ["base"] * 12 + ["long"] * 4 + ["sft"] * 5
    assert [m.block_size for m in metrics[11:]] == [4] * 5 + [4, 4, 8, 8, 8]
    rates = [m.learning_rate for m in metrics[12:16]]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == metrics[11].learning_rate
    assert len((output / "log.jsonl").read_text().splitlines()) == 21
    results = json.loads((output / "results.json").read_text())
    assert results["training"]["stages"] == [[0, "base"], [12, "long"], [16, "sft"]]
    axes = plot_losses(read_log(output / "log.jsonl"), None, results["training"]["stages"]).axes[0]
    assert {" base", " long", " sft"} <= {text.get_text() for text in axes.texts}


def test_each_stage_leaves_a_model_and_the_last_is_the_run_s(whole):
    output, _ = whole
    assert read_config(output / "stage-1-base").max_position_embeddings == 512
    assert read_config(output / "stage-2-long").max_position_embeddings == 1024
    config = read_config(output)
    assert (config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (1024, 5e5)
    assert config.block_diffusion["block_size"] == 8
    assert weights(output) != weights(output / "stage-2-long") != weights(output / "stage-1-base")


def test_constant_and_cooldown_stages_of_equal_data_are_one_run_with_that_schedule(place, tmp_path):
    """Weights, moments and data go on over the border: two constant stages equal one constant run."""
    run = config_of(place, tmp_path / "one", optimizer__schedule="constant")
    train(run)
    halves = [{"name": "a", "training": {"steps": 9}}, {"name": "b", "training": {"steps": 3}}]
    train(config_of(place, tmp_path / "two", optimizer__schedule="constant", stages=halves))
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_a_stage_with_a_fresh_optimizer_differs_from_one_that_carries_it(place, tmp_path):
    for fresh in (False, True):
        second = {"name": "b", "training": {"steps": 3}, "optimizer": {"warmup_steps": 0}, "fresh_optimizer": fresh}
        stages = [{"name": "a", "training": {"steps": 9}}, second]
        train(config_of(place, tmp_path / str(fresh), stages=stages))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("False", "True"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [5, 12, 13, 15, 16, 18])
def test_a_run_killed_in_any_stage_ends_with_the_weights_of_one_that_was_not(place, processes, whole, tmp_path, steps):
    config = staged(place, tmp_path / "run")
    process = processes.Process(target=killed_after, args=(config.model_dump(mode="json"), steps))
    process.start()
    process.join()
    assert process.exitcode == 9
    process = start(processes, config)
    process.join()
    assert process.exitcode == 0
    assert weights(tmp_path / "run") == weights(whole[0])
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(21))


def killed_after(values: dict[str, Any], steps: int) -> None:
    """Train, and end without a word as step `steps` of the run has been logged."""

    def stop(metrics: StepMetrics) -> None:
        if metrics.step + 1 == steps:
            os._exit(9)

    torch.set_num_threads(1)
    train(load_config(values), on_step=stop)


def test_a_resume_in_a_later_stage_reads_the_checkpoint_of_that_stage_alone_and_once(place, tmp_path, monkeypatch):
    import nextblock.training.checkpoint as module

    config = staged(place, tmp_path / "run")
    train(config, on_step=lambda metrics: signal_at(metrics, 13))  # the second of stage 2
    real, read, digested, loaded = module._digest, module.load, [], []

    def digest(file: Path) -> str:
        digested.append(file)
        return real(file)

    def load(state: Any, checkpoint_id: Path, **options: Any) -> None:
        loaded.append((*state, checkpoint_id))
        read(state, checkpoint_id=checkpoint_id, **options)

    monkeypatch.setattr(module, "_digest", digest)
    monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr("nextblock.training.loop.train_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(config, resume=True)
    (folder,) = {file.parent for file in digested}
    assert folder.parent.parent.name == "stage-2-long"
    assert len(digested) == len(set(digested)) == 3
    assert loaded == [("model", folder), ("optimizer", folder)]


def test_a_finished_stage_that_is_changed_is_named_on_resume(place, tmp_path):
    """Else the steps of later stages would be counted from elsewhere, and their noise be another."""
    output = tmp_path / "run"

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 14:
            os.kill(os.getpid(), 15)

    run = train(staged(place, output), on_step=stop)
    assert not run.finished
    with pytest.raises(UsageError, match=r"stage-1-base is finished: optimizer\.lr was 0\.003, is 0\.5"):
        train(staged(place, output, **{"stages.0.optimizer.lr": 0.5}), resume=True)
    assert train(staged(place, output), resume=True).finished
