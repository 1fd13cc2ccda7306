"""Short training runs that several test files make."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
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


def as_rank(
    rank: int, count: int, port: int, told: str, body: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """What torchrun sets, then `body`; standard error goes to a file."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    sys.stderr = open(told, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
    faulthandler.enable(2)  # tells where a rank was that the C library has ended
    body(rank, *arguments)


def adapt_rank(rank: int, values: dict[str, Any], stop_after: int | None = None) -> None:
    """Train; end without a word after `stop_after` steps, as a machine that goes away."""
    from nextblock.training import loop
    from nextblock.training.step import train_step

    if stop_after is not None:

        def doomed(run: Any, step: int) -> Any:
            if run.first_step + step == stop_after:
                os._exit(0)
            return train_step(run, step)

        loop.train_step = doomed
    loop.train(load_config(values), resume=True)


def launch(processes: Any, folder: Path, body: Callable[..., None], *arguments: Any, count: int = 2) -> list[Any]:
    """Start `body(rank, *arguments)` on `count` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(count):
        options = (rank, count, port, str(folder / f"stderr-{rank}"), body, arguments)
        ranks.append(processes.Process(target=as_rank, args=options))
        ranks[-1].start()
    return ranks


def finish(ranks: list[Any]) -> list[int]:
    """Exit statuses. A rank that waits for ever is ended, and fails the test."""
    for process in ranks:
        process.join(120)
    hung = [process for process in ranks if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung
    return [process.exitcode for process in ranks]
