"""`python benchmarks/checkpoints.py`: what a checkpoint costs the step, and what kills cost the run, on two processes.

Side by side in one run: how long a step is held by a checkpoint that is written and hashed while all wait, and by one
that a thread writes. Then a run whose processes are killed one by one in the middle of saves, under torchrun.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoModelForCausalLM, LlamaConfig

from nextblock.config.files import to_yaml
from nextblock.training.checkpoint import (
    CHECKPOINTS,
    STATE,
    CheckpointWriter,
    _commit,
    _digest,
    _is_own,
    list_checkpoints,
    newest_whole_checkpoint,
)
from nextblock.training.ranks import end_process_group, gather, is_main, process_state

RANKS = 2


def torchrun(*arguments: str, restarts: int = 0) -> list[str]:
    """The command that starts a script or module on all ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    return [*launcher, "--max-restarts", str(restarts), "--monitor-interval", "0.1", *arguments]


def made_model(layers: int, width: int, vocabulary: int) -> Any:
    """A Llama with random weights in float32."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(shape, dtype=torch.float32)


def saves(output: Path, layers: int, width: int, vocabulary: int, rounds: int) -> dict[str, Any]:
    """Seconds for which saves hold the step, waiting and not, and seconds of a step alone and beside a write."""
    process_state()
    model = made_model(layers, width, vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    tokens = torch.randint(0, vocabulary, (1, 64))

    def step() -> float:
        began = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began

    def plain(number: int) -> None:
        partial = output / CHECKPOINTS / f".plain-{number}"
        weights, moments = get_state_dict(model, optimizer)
        save({"model": weights, "optimizer": moments}, checkpoint_id=partial)
        if is_main():
            (partial / STATE).write_text("{}")
        parts = gather({file.name: _digest(file) for file in partial.iterdir() if _is_own(file)})
        if is_main():
            _commit(partial, output / CHECKPOINTS / "plain", {name: part[name] for part in parts for name in part})
        gather(0)

    step()
    found: dict[str, list[float]] = {"waiting": [], "held": [], "written": [], "step": [], "step_beside": []}
    writer = CheckpointWriter()
    for number in range(rounds):
        gather(0)
        began = time.perf_counter()
        plain(number)
        found["waiting"].append(time.perf_counter() - began)
        found["step"] += [step() for _ in range(2)]
        gather(0)
        began = time.perf_counter()
        writer.save(output, number, model, optimizer, {}, keep=1)
        found["held"].append(time.perf_counter() - began)
        assert writer._pending is not None
        while not writer._pending.done():
            found["step_beside"].append(step())
        writer.finish()
        found["written"].append(time.perf_counter() - began)
    writer.close()
    whole = newest_whole_checkpoint(output)[0] is not None  # all ranks together
    parameters = sum(p.numel() for p in model.parameters())
    medians = {name: statistics.median(values or [0.0]) for name, values in found.items()}
    return {"parameters": parameters, "whole": whole, "held_first": found["held"][0], **medians}


def run_file(folder: Path, name: str, steps: int) -> tuple[Path, Path]:
    """The configuration of a short run with a checkpoint after every step, and its output folder."""
    texts = folder / "sums.jsonl"
    texts.write_text(
        "\n".join(json.dumps({"text": f"{a} plus {b} is {a + b}."}) for a in range(12) for b in range(12))
    )
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    values = {
        "model": {"scratch": {"model_type": "llama", "vocab_size": 260, **shape}, "tokenizer": "bytes"},
        "data": {"sources": [{"path": str(texts)}], "row_length": 32, "held_out": 0.0},
        "growth": {"b_max": 4, "delta": 4},
        "training": {"steps": steps, "batch_rows": 4, "checkpoint_every": 1, "evaluate_rows": 0},
        "output": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(to_yaml(values))
    return path, folder / name


def kill_in_save(launcher: subprocess.Popen[Any], output: Path, moments: random.Random, dead: set[int]) -> int:
    """Kill a rank while a checkpoint is half written, some checkpoints on; the step of the last whole one then.

    Args:
        launcher: torchrun, whose children are the ranks.
        dead: ranks that were killed, which torchrun may not have noticed yet; those of the same start are added.
    """
    before, more = list_checkpoints(output), moments.randrange(1, 4)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    while launcher.poll() is None:
        ranks = [int(pid) for pid in children.read_text().split()]
        begun = any((output / CHECKPOINTS).glob(".partial-step-*"))
        last = list_checkpoints(output)
        if begun and not dead & set(ranks) and len(ranks) == RANKS and _steps_on(before, last) >= more:
            os.kill(moments.choice(ranks), signal.SIGKILL)
            dead |= set(ranks)
            return _number(last)
        time.sleep(moments.uniform(0, 0.002))
    raise SystemExit("the run ended before all its kills")


def _number(found: list[Path]) -> int:
    return int(found[-1].name.removeprefix("step-")) if found else 0


def _steps_on(before: list[Path], now: list[Path]) -> int:
    return _number(now) - _number(before)


def kills(folder: Path, count: int) -> dict[str, Any]:
    """A run that loses a process `count` times, each time in a save, beside one that loses none."""
    steps = 6 * count + 12
    file, undisturbed = run_file(folder, "undisturbed", steps)
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(torchrun("-m", "nextblock", "adapt", str(file)), check=True, **quiet)
    file, output = run_file(folder, "killed", steps)
    command = torchrun("-m", "nextblock", "adapt", str(file), "--resume", "auto", restarts=count)
    process, lost, dead, moments = subprocess.Popen(command, **quiet), 0, set(), random.Random(0)
    try:
        for _ in range(count):
            reached = kill_in_save(process, output, moments, dead)
            lost += _number(list_checkpoints(output)) < reached
        status = process.wait()
    finally:
        process.kill()
    weights = (
        [(where / "model.safetensors").read_bytes() for where in (undisturbed, output)] if status == 0 else [0, 1]
    )
    return {"kills": count, "checkpoints_lost": lost, "status": status, "same_weights": weights[0] == weights[1]}


def on_ranks(*arguments: str) -> dict[str, Any]:
    """What rank 0 of this script prints, started on all ranks."""
    done = subprocess.run(torchrun(__file__, *arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(
    layers: Annotated[int, typer.Option(help="of the model that is saved")] = 30,
    width: Annotated[int, typer.Option(help="a multiple of 64")] = 576,
    vocabulary: Annotated[int, typer.Option()] = 49_152,
    rounds: Annotated[int, typer.Option(help="checkpoints of each kind")] = 5,
    killed: Annotated[int, typer.Option(help="processes that are killed in saves")] = 20,
    small: Annotated[bool, typer.Option("--small", help="a small model and few turns, to see that all works")] = False,
    only: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print one table."""
    if only is not None:
        found = saves(only, layers, width, vocabulary, rounds)
        if is_main():
            print(json.dumps(found))
        end_process_group()
        return
    if small:
        layers, width, vocabulary, rounds, killed = 2, 64, 512, 2, 1
    with tempfile.TemporaryDirectory() as name:
        shape = [f"--layers={layers}", f"--width={width}", f"--vocabulary={vocabulary}", f"--rounds={rounds}"]
        found = on_ranks("--only", str(Path(name) / "saves"), *shape)
        found |= kills(Path(name), killed)
    table = Table(title=f"Checkpoints of {found['parameters'] / 1e6:.1f} M parameters on {RANKS} processes")
    table.add_column("measured")
    table.add_column("value", justify="right")
    table.add_row("the step is held, all wait for write and hash", f"{found['waiting']:.3f} s")
    table.add_row("the step is held, a thread writes", f"{found['held']:.3f} s")
    table.add_row("ratio", f"{found['held'] / found['waiting']:.3f}")
    table.add_row("the same, first checkpoint of a run", f"{found['held_first'] / found['waiting']:.3f}")
    table.add_row("until it is written", f"{found['written']:.3f} s")
    table.add_row("a step alone", f"{found['step']:.3f} s")
    table.add_row("a step beside a write", f"{found['step_beside']:.3f} s")
    table.add_row("the last one is whole", str(found["whole"]))
    table.add_row("processes killed in saves", str(found["kills"]))
    table.add_row("checkpoints lost by that", str(found["checkpoints_lost"]))
    table.add_row("same weights as undisturbed", str(found["same_weights"]))
    Console().print(table)
    raise SystemExit(0 if found["whole"] and found["same_weights"] and not found["checkpoints_lost"] else 1)


if __name__ == "__main__":
    typer.run(main)
