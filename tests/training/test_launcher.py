"""What `accelerate launch` asks for: followed, or refused in one line."""

from __future__ import annotations

import json
import multiprocessing
from typing import Any

import pytest

from nextblock.config.errors import UsageError
from nextblock.config.run import load_config
from nextblock.training.launcher import check_launcher, fsdp_of_launcher
from nextblock.training.loop import train
from runs import config_of, finish, launch, weights


def test_gradient_accumulation_of_a_launcher_changes_nothing(place, tmp_path, monkeypatch):
    """Micro-batches are ours; accelerate would divide the loss by its own number once more."""
    expected = train(config_of(place, tmp_path / "a", training__steps=9))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    found = train(config_of(place, tmp_path / "b", training__steps=9))
    norms = [
        [json.loads(line)["grad_norm"] for line in (run.output / "log.jsonl").open()] for run in (expected, found)
    ]
    assert norms[0] == norms[1]


UNHEARD = {
    "DeepSpeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, "set training.fsdp=true: FSDP2 shares out"),
    "another precision": ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "set training.mixed_precision"),
    "compiling": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "set training.compile=true"),
    "tensor parallelism": ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "leave parallelism_config out"),
    "FSDP 1": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "start with --fsdp_version 2"),
    "offloading": ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "true"}, "leave it out"),
    "checkpointing": (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
        "set training.gradient_checkpointing=true",
    ),
}


@pytest.mark.parametrize("what", UNHEARD)
def test_what_a_launcher_asks_for_and_would_not_get_is_refused_before_anything_is_written(
    place, tmp_path, monkeypatch, what
):
    said, cure = UNHEARD[what]
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    name, value = list(said.items())[-1]
    with pytest.raises(UsageError, match=f"{name}={value}, which a run of nextblock does not follow; .*{cure}"):
        train(config_of(place, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_settings_of_a_launcher_that_ask_for_nothing_are_taken(place, tmp_path, monkeypatch):
    quiet = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "FSDP_VERSION": "1"}
    for name, value in quiet.items():
        monkeypatch.setenv(name, value)
    check_launcher(config_of(place, tmp_path))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_launcher(config_of(place, tmp_path, training__mixed_precision="bf16"))


def test_a_second_run_of_a_process_may_have_another_precision(place, tmp_path):
    for number, precision in enumerate(("no", "bf16", "no")):
        config = config_of(place, tmp_path / str(number), training__steps=9, training__mixed_precision=precision)
        run = train(config)
        assert run.accelerator.mixed_precision == precision
    assert weights(tmp_path / "0") == weights(tmp_path / "2") != weights(tmp_path / "1")


def fsdp_and_then_copies(rank: int, first: dict[str, Any], second: dict[str, Any]) -> None:
    assert train(load_config(first)).is_sharded
    assert not train(load_config(second)).is_sharded
    assert not fsdp_of_launcher()


def test_sharding_of_one_run_does_not_reach_the_next(place, tmp_path):
    options = {"training__steps": 9, "data__shards": 2}
    configs = [config_of(place, tmp_path / str(n), training__fsdp=not n, **options) for n in range(2)]
    values = [config.model_dump(mode="json") for config in configs]
    ranks = launch(multiprocessing.get_context("spawn"), tmp_path, fsdp_and_then_copies, *values)
    assert finish(ranks) == [0, 0], (tmp_path / "stderr-0").read_text()
