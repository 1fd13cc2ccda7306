"""`python benchmarks/checkpoints.py`: what a checkpoint costs the step, and what kills cost the run, on two processes.

Side by side in one run: how long a step is held where all wait until a checkpoint is written and hashed, and where a
thread writes it. Then runs under torchrun whose processes are killed one by one: in the middle of saves, and anywhere.
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
from transformers import AutoModelForCausalLM, LlamaConfig

from nextblock.config.files import PARTIAL, to_yaml
from nextblock.training.checkpoint import CHECKPOINTS, CheckpointWriter, list_checkpoints, newest_whole_checkpoint
from nextblock.training.ranks import end_process_group, gather, is_main, process_state

RANKS = 2


def torchrun(*arguments: str, restarts: int = 0) -> list[str]:
    """The command that starts a script or module on all ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    return [*launcher, "--max-restarts", str(restarts), "--monitor-interval", "0.1", *arguments]


def made_model(layers: int, width: int, vocabulary: int, tied: bool = True) -> Any:
    """A Llama with random weights in float32."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=tied,
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

    def save(number: int) -> float:
        gather(0)
        began = time.perf_counter()
        writer.save(output, number, model, optimizer, {}, keep=1)
        return began

    step()
    found: dict[str, list[float]] = {"waiting": [], "held": [], "step": [], "step_beside": []}
    writer = CheckpointWriter()
    began = save(0)
    first = time.perf_counter() - began
    writer.finish()
    for number in range(1, 1 + 2 * rounds, 2):
        began = save(number)
        writer.finish()
        found["waiting"].append(time.perf_counter() - began)
        found["step"] += [step() for _ in range(2)]
        began = save(number + 1)
        found["held"].append(time.perf_counter() - began)
        found["step_beside"].append(step())
        writer.finish()
    writer.close()
    whole = newest_whole_checkpoint(output)[0] is not None  # all ranks together
    parameters = sum(p.numel() for p in model.parameters())
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {"parameters": parameters, "whole": whole, "held_first": first, **medians}


def run_file(folder: Path, name: str, steps: int) -> tuple[Path, Path]:
    """The configuration of a short run with a checkpoint after every step, and its output folder."""
    folder.mkdir(exist_ok=True)
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


def kill(launcher: subprocess.Popen[Any], output: Path, moments: random.Random, dead: set[int], in_save: bool) -> int:
    """Kill a rank some checkpoints on; the step of the last whole checkpoint then.

    Args:
        launcher: torchrun, whose children are the ranks.
        dead: ranks that were killed, which torchrun may not have noticed yet; those of the same start are added.
        in_save: while a checkpoint is half written; else at any moment.
    """
    before, more = list_checkpoints(output), moments.randrange(1, 4)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    while launcher.poll() is None:
        ranks = [int(pid) for pid in children.read_text().split()]
        begun = not in_save or any((output / CHECKPOINTS).glob(f"{PARTIAL}step-*"))
        last = list_checkpoints(output)
        if begun and not dead & set(ranks) and len(ranks) == RANKS and _steps_on(before, last) >= more:
            os.kill(moments.choice(ranks), signal.SIGKILL)
            dead |= set(ranks)
            return _number(last)
        time.sleep(moments.uniform(0, 0.002 if in_save else 0.2))
    raise SystemExit("the run ended before all its kills")


def _number(found: list[Path]) -> int:
    return int(found[-1].name.removeprefix("step-")) if found else 0


def _steps_on(before: list[Path], now: list[Path]) -> int:
    return _number(now) - _number(before)


def kills(folder: Path, count: int, in_saves: bool) -> dict[str, Any]:
    """A run that loses a process `count` times, in saves or anywhere, beside one that loses none."""
    steps = 6 * count + 12
    file, undisturbed = run_file(folder, "undisturbed", steps)
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(torchrun("-m", "nextblock", "adapt", str(file)), check=True, **quiet)
    file, output = run_file(folder, "killed", steps)
    command = torchrun("-m", "nextblock", "adapt", str(file), "--resume", "auto", restarts=count)
    process, lost, dead, moments = subprocess.Popen(command, **quiet), 0, set(), random.Random(0)
    try:
        for _ in range(count):
            reached = kill(process, output, moments, dead, in_saves)
            lost += _number(list_checkpoints(output)) < reached
        status = process.wait()
    finally:
        process.kill()
    same = status == 0 and len({(where / "model.safetensors").read_bytes() for where in (undisturbed, output)}) == 1
    return {"kills": count, "checkpoints_lost": lost, "status": status, "same_weights": same}


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
    in_saves: Annotated[int, typer.Option(help="processes that are killed in saves")] = 20,
    anywhere: Annotated[int, typer.Option(help="processes that are killed at any moment")] = 10,
    small: Annotated[bool, typer.Option("--small", help="save a small model, as kills of any do")] = False,
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
        layers, width, vocabulary = 2, 64, 512
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = [f"--layers={layers}", f"--width={width}", f"--vocabulary={vocabulary}", f"--rounds={rounds}"]
        found = on_ranks("--only", str(folder / "saves"), *shape)
        lost = {
            "in saves": kills(folder / "in-saves", in_saves, True),
            "anywhere": kills(folder / "any", anywhere, False),
        }
    table = Table(title=f"Checkpoints of {found['parameters'] / 1e6:.1f} M parameters on {RANKS} processes")
    table.add_column("measured")
    table.add_column("value", justify="right")
    table.add_row("the step is held, all wait for write and hash", f"{found['waiting']:.3f} s")
    table.add_row("the step is held, a thread writes", f"{found['held']:.3f} s")
    table.add_row("ratio", f"{found['held'] / found['waiting']:.3f}")
    table.add_row("the same, first checkpoint of a run", f"{found['held_first'] / found['waiting']:.3f}")
    table.add_row("a step alone", f"{found['step']:.3f} s")
    table.add_row("a step beside a write", f"{found['step_beside']:.3f} s")
    table.add_row("the last one is whole", str(found["whole"]))
    for where, result in lost.items():
        table.add_row(f"processes killed {where}", str(result["kills"]))
        table.add_row("checkpoints lost by that", str(result["checkpoints_lost"]))
        table.add_row("exit status", str(result["status"]))
        table.add_row("same weights as undisturbed", str(result["same_weights"]))
    Console().print(table)
    well = all(result["same_weights"] and not result["checkpoints_lost"] for result in lost.values())
    raise SystemExit(0 if found["whole"] and well else 1)


if __name__ == "__main__":
    typer.run(main)
