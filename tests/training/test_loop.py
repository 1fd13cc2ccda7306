"""The loop: one pinned loss, its log, its signals."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import pytest

from nextblock.config.run import load_config
from nextblock.training.checkpoint import list_checkpoints
from nextblock.training.loop import train
from nextblock.training.resume import save
from nextblock.training.run import StepMetrics
from nextblock.workflows.adapt import adapt
from runs import config_of, start, weights

PINNED = {"first": 2.5938, "last": 2.4953, "last_diffusion": 2.7391, "last_ar": 2.6299}


def test_the_loss_of_a_short_adaptation_is_pinned(place, tmp_path):
    """20 steps with growth 1 -> 2 -> 4: any change of data order, noise, mask, loss or update moves these."""
    metrics: list[StepMetrics] = []
    config = config_of(place, tmp_path / "run", growth__delta=5, training__steps=20)
    train(config, on_step=metrics.append)
    assert [m.block_size for m in metrics] == [1] * 5 + [2] * 5 + [4] * 10
    assert metrics[0].loss == pytest.approx(PINNED["first"], abs=1e-3)
    assert metrics[-1].loss == pytest.approx(PINNED["last"], abs=1e-3)
    assert metrics[-1].diffusion_loss == pytest.approx(PINNED["last_diffusion"], abs=3e-3)
    assert metrics[-1].ar_loss == pytest.approx(PINNED["last_ar"], abs=3e-3)
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in logged] == [m.loss for m in metrics]


def test_the_resolved_configuration_is_saved_and_makes_the_same_run(place, tmp_path):
    config = config_of(place, tmp_path / "a", training__steps=9)
    train(config)
    assert load_config(tmp_path / "a" / "nextblock.yaml") == config
    train(load_config(tmp_path / "a" / "nextblock.yaml", {"output": str(tmp_path / "b")}))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_the_log_is_json_that_strict_readers_take(place, tmp_path):
    train(config_of(place, tmp_path / "run", training__steps=9))
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_ends_with_status_0(place, processes, undisturbed, tmp_path):
    output = tmp_path / "run"
    config = config_of(place, output, training__checkpoint_every=1000)
    process = start(processes, config)
    while not (output / "log.jsonl").exists() or not (output / "log.jsonl").read_text():
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 0
    (saved,) = list_checkpoints(output)
    assert 0 < int(saved.name.removeprefix("step-")) < 12
    assert not (output / "model.safetensors").exists()
    train(config, resume=True)
    assert weights(output) == undisturbed[0]


def test_the_seconds_of_a_run_are_those_of_checkpoints_and_evaluations_too(place, tmp_path, monkeypatch):
    def slowly(run: Any) -> None:
        time.sleep(0.3)
        save(run)

    monkeypatch.setattr("nextblock.training.loop.save", slowly)
    options = {"training__steps": 9, "training__checkpoint_every": 3}
    config = config_of(place, tmp_path / "run", **options)
    results = adapt(config, resume=True).results
    seconds = results["training"]["seconds"]
    assert results["command"].endswith("nextblock.yaml --output NEW")  # this one is not empty, so it would be refused
    steps = sum(json.loads(line)["step_seconds"] for line in (tmp_path / "run" / "log.jsonl").open())
    assert seconds > steps + 3 * 0.3
