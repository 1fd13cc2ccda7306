"""Short training runs that several test files make."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from nextblock.config.run import AdaptConfig, load_config
from nextblock.training.loop import train
from nextblock.training.run import StepMetrics


def config_of(place: Path, output: Path, **overrides: Any) -> AdaptConfig:
    """Twelve steps of growth from 1 to 4 on short sums; overrides are keys with `__` for each dot."""
    values = {
        "model": {"path": str(place / "llama"), "tokenizer": "bytes"},
        "data": {"sources": [{"path": str(place / "sums.jsonl")}], "row_length": 32, "held_out": 0.0},
        "growth": {"b_max": 4, "delta": 4},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "training": {"steps": 12, "batch_rows": 4, "checkpoint_every": 2, "evaluate_rows": 0},
        "output": str(output),
    }
    return load_config(values, {key.replace("__", "."): value for key, value in overrides.items()})


def weights(output: Path) -> bytes:
    """The file of weights of a finished run."""
    return (output / "model.safetensors").read_bytes()


def run_to_the_end(values: Mapping[str, Any], kill_in: str | None = None, after: int = 0) -> None:
    """Body of a training process; kills itself at the (`after` + 1)-th call of the function `kill_in`, if given."""
    torch.set_num_threads(1)
    if kill_in is not None:
        module, name = kill_in.rsplit(".", 1)
        owner: Any = __import__(module, fromlist=[name])
        real, calls = getattr(owner, name), []

        def doomed(*args: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) > after:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(owner, name, doomed)
    train(load_config(values), resume=True)


def start(processes: Any, config: AdaptConfig, *how: Any) -> BaseProcess:
    """Start a process of `run_to_the_end`."""
    process = processes.Process(target=run_to_the_end, args=(config.model_dump(mode="json"), *how))
    process.start()
    return process


def stopped_run(place: Path, output: Path, steps: int, **overrides: Any) -> AdaptConfig:
    """A run that ended by an error of the caller after `steps` steps."""
    config = config_of(place, output, **overrides)

    def stop(metrics: StepMetrics) -> None:
        if metrics.step + 1 == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=stop)
    return config


def signal_at(metrics: StepMetrics, step: int) -> None:
    """Send this process a SIGTERM after that step."""
    if metrics.step == step:
        os.kill(os.getpid(), signal.SIGTERM)
