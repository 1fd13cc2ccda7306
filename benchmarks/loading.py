"""`python benchmarks/loading.py`: host memory of each rank while a sharded run loads its parent, trains and exports.

Side by side in one run, on two processes without a GPU: ranks that read their parts alone, and ranks that load the
whole model and keep their part. Each figure is the peak of resident memory above what the process held before: Python,
libraries and the data.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from checkpoints import made_model
from nextblock.config.files import to_yaml
from nextblock.config.run import load_config
from nextblock.measure.plan import Plan, plan_run
from nextblock.training import setup
from nextblock.training.devices import peak_memory_gib, reset_peak_memory
from nextblock.training.output import export_run
from nextblock.training.ranks import end_process_group, gather, is_main
from nextblock.training.setup import prepare
from nextblock.training.step import train_step

RANKS = 2
CPU = torch.device("cpu")


def run_values(folder: Path, output: str) -> dict[str, Any]:
    """A run on short rows, so that little but weights takes memory."""
    texts = folder / "sums.jsonl"
    texts.write_text("\n".join(json.dumps({"text": f"{n} plus {n} is {2 * n}."}) for n in range(2000)))
    return {
        "model": {"path": str(folder / "parent"), "tokenizer": "bytes"},
        "data": {"sources": [{"path": str(texts)}], "row_length": 16, "held_out": 0.0},
        "growth": {"b_0": 4, "b_max": 4},
        "training": {"steps": 1, "batch_rows": RANKS, "evaluate_rows": 0, "fsdp": True},
        "output": str(folder / output),
    }


def above(work: Any) -> tuple[float, Any]:
    """MiB of the peak over what was held before, and what `work` returns."""
    reset_peak_memory(CPU)
    before = peak_memory_gib(CPU)
    found = work()
    return (peak_memory_gib(CPU) - before) * 2**10, found


def measure(file: Path, whole: bool) -> None:
    """Body of a rank; rank 0 prints the figures of all."""
    if whole:
        setup.bare_parent = lambda *_: None
    config = load_config(file)
    setup.make_accelerator(config)
    reset_peak_memory(CPU)
    found = {"base": peak_memory_gib(CPU) * 2**10}
    found["loading"], run = above(lambda: prepare(config))
    found["a step"], _ = above(lambda: train_step(run, 0))
    run.optimizer.state.clear()
    Path(config.output).mkdir(exist_ok=True)
    found["export"], _ = above(lambda: export_run(run, Path(config.output)))
    run.feed.close()
    ranks = gather(found)
    if is_main():
        print(json.dumps(ranks))
    end_process_group()


def main(
    layers: Annotated[int, typer.Option(help="of the model that is loaded")] = 30,
    width: Annotated[int, typer.Option(help="a multiple of 64")] = 576,
    vocabulary: Annotated[int, typer.Option()] = 49_152,
    tied: Annotated[bool, typer.Option(help="head and embedding are one")] = True,
    small: Annotated[bool, typer.Option("--small", help="a small model, to see that all works")] = False,
    only: Annotated[Path | None, typer.Option(hidden=True)] = None,
    whole: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Print one table."""
    if only is not None:
        measure(only, whole)
        return
    if small:
        layers, width, vocabulary = 2, 64, 512
    with tempfile.TemporaryDirectory() as name:
        folder, ranks = Path(name), {}
        made_model(layers, width, vocabulary, tied).save_pretrained(folder / "parent", max_shard_size="200MB")
        for kind in ("parts", "whole"):
            file = folder / f"{kind}.yaml"
            file.write_text(to_yaml(run_values(folder, kind)))
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
            command = [*launcher, __file__, "--only", str(file), *(["--whole"] if kind == "whole" else [])]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            ranks[kind] = json.loads(done.stdout.splitlines()[-1])
        planned = plan_run(load_config(folder / "parts.yaml"), device="cpu", devices=RANKS)
        assert isinstance(planned, Plan)
    weights = 4 * planned.parameters / 2**20
    table = Table(title=f"MiB of {RANKS} ranks, {planned.parameters / 1e6:.1f} M parameters ({weights:.0f} MiB)")
    table.add_column("peak above what was held")
    for column in ("parts, rank 0", "rank 1", "whole, rank 0", "rank 1", "ratio of the larger"):
        table.add_column(column, justify="right")
    for kind in ("base", "loading", "a step", "export"):
        parts, all_of_it = ([rank[kind] for rank in ranks[how]] for how in ("parts", "whole"))
        figures = [f"{value:.0f}" for value in (*parts, *all_of_it)]
        table.add_row(kind, *figures, f"{max(parts) / max(all_of_it):.2f}" if max(all_of_it) > 0 else "")
    with_base = [max(rank["base"] + rank["loading"] for rank in ranks[how]) for how in ("parts", "whole")]
    table.add_row(
        "base and loading", f"{with_base[0]:.0f}", "", f"{with_base[1]:.0f}", "", f"{with_base[0] / with_base[1]:.2f}"
    )
    Console(width=120).print(table)
    Console(width=120).print(
        f"planned: {json.dumps({k: round(v / 2**20) for k, v in planned.host_memory.items()})} MiB"
    )


if __name__ == "__main__":
    typer.run(main)
