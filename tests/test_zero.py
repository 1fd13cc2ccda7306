"""DeepSpeed's ZeRO behind `accelerate launch`: the run of one process, and its checkpoints."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from nextblock import zero
from nextblock.config import UsageError, load_config
from nextblock.ranks import join
from test_ranks import adapt_rank, alone, assert_same_run, finish, launch, losses, on_one  # noqa: F401
from test_train import config_of

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


def zero_rank(rank: int, stage: int, values: dict[str, Any], stop_after: int | None = None) -> None:
    """Train as `accelerate launch --use_deepspeed --zero_stage STAGE` would have it."""
    os.environ.update(
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_DEEPSPEED_ZERO_STAGE=str(stage),
        ACCELERATE_MIXED_PRECISION="no",
        DS_ACCELERATOR="cpu",
    )
    adapt_rank(rank, values, stop_after)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("rows", [None, 1])
def test_zero_gives_the_losses_and_weights_of_one_process(place, processes, alone, tmp_path, stage, rows):  # noqa: F811
    config = config_of(place, tmp_path / "run", data__shards=2, training__micro_batch_rows=rows)
    ranks = launch(processes, tmp_path, zero_rank, stage, config.model_dump(mode="json"))
    assert finish(ranks) == [0, 0]
    assert_same_run(tmp_path / "run", alone(2))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_of_zero_resumes_without_it_and_back(place, processes, alone, tmp_path, stage):  # noqa: F811
    config = config_of(place, tmp_path / "run", data__shards=2)
    ranks = launch(processes, tmp_path, zero_rank, stage, config.model_dump(mode="json"), 5)
    assert finish(ranks) == [0, 0]
    assert len(losses(tmp_path / "run")) == 5
    on_one(processes, config)
    assert_same_run(tmp_path / "run", alone(2))
    back = config_of(place, tmp_path / "back", data__shards=2)
    process = processes.Process(target=adapt_rank, args=(0, back.model_dump(mode="json"), 7))
    process.start()
    process.join()
    assert finish(launch(processes, tmp_path, zero_rank, stage, back.model_dump(mode="json"))) == [0, 0]
    assert_same_run(tmp_path / "back", alone(2))


@pytest.mark.parametrize(
    ("settings", "overrides", "told"),
    [
        ({"zero_optimization": {"stage": 3}}, {}, "training.fsdp=true"),
        ({}, {}, "stages 1 and 2"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, {}, "section optimizer"),
        ({"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}, {}, "section scheduler"),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, {}, "section fp16"),
        ({"zero_optimization": {"stage": 2}}, {"checkpoint": "sharded"}, "training.checkpoint=full"),
    ],
)
def test_what_a_run_would_not_follow_is_refused_in_one_line(settings, overrides, told):
    training = {"steps": 4, **overrides}
    config = load_config({"data": {"sources": [{"path": "x"}]}, "growth": {"b_max": 1}, "training": training})
    with pytest.raises(UsageError, match=told) as refused:
        zero.configure(settings, config, rows=4)
    assert "\n" not in str(refused.value)


def test_what_belongs_to_the_run_is_set():
    settings = {"zero_optimization": {"stage": 1}, "fp16": {"enabled": False}, "gradient_clipping": "auto"}
    training = {"steps": 4, "batch_rows": 8}
    values = {"data": {"sources": [{"path": "x"}]}, "growth": {"b_max": 1}, "training": training}
    zero.configure(settings, load_config(values | {"optimizer": {"grad_clip": 0.5}}), rows=4)
    assert settings["gradient_clipping"] == 0.5
    assert (settings["train_micro_batch_size_per_gpu"], settings["train_batch_size"]) == (4, 8)
    assert settings["gradient_accumulation_steps"] == 1


def test_a_missing_deepspeed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("nextblock.config.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"nextblock\[deepspeed\]"):
        join()
