"""One adaptation from configuration to report: train, export, measure, draw."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from nextblock import schedules
from nextblock.config import AdaptConfig, UsageError, load_config, stage_configs
from nextblock.data import Rows, RowStream
from nextblock.evaluate import BitsPerByte, bits_per_byte
from nextblock.model import Decoder, load_model
from nextblock.report import write_report
from nextblock.train import LOG, Run, StepMetrics, train


@dataclass(frozen=True)
class RunResult:
    """What `adapt` leaves.

    output: folder of the checkpoint, `report.html`, `results.json`, the log and the resolved configuration.
    finished: False when a SIGTERM ended the run early; `resume=True` goes on.
    steps: optimizer steps done.
    results: the figures of `results.json`; empty when the run did not finish.
    """

    output: Path
    finished: bool
    steps: int
    results: dict[str, Any]


def adapt(
    config: AdaptConfig | str | Path | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    on_step: Callable[[StepMetrics], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> RunResult:
    """Turn an AR parent into a block-diffusion model.

    Args:
        config: an `AdaptConfig`, a YAML path, or a mapping; with dotted `overrides`.
        resume: go on from the newest whole checkpoint in the output folder, else start.
        on_step: called after every optimizer step, on the main process.
        on_stage: called with a few words when something long begins.
    Returns:
        Where everything is, and the measured figures.
    Raises:
        UsageError: bad input, in one line; nothing is left behind.
    """
    if not isinstance(config, AdaptConfig):
        config = load_config(config, overrides)
    say = on_stage or (lambda words: None)
    say("reading data and model")
    run = train(config, resume=resume, on_step=on_step)
    output = Path(config.output)
    steps = run.first_step + run.step
    if not run.finished or not run.accelerator.is_main_process:
        return RunResult(output, run.finished, steps, {})
    results = describe(run, config)
    if config.training.evaluate_rows:
        say("measuring held-out bits per byte")
        results["bits_per_byte"] = held_out_bits(run)
    write_report(results, output)
    return RunResult(output, True, steps, results)


def describe(run: Run, config: AdaptConfig) -> dict[str, Any]:
    """The part of `results.json` that is known without measuring anything."""
    growth, borders, first = [], [], 0
    for number, stage in enumerate(stage_configs(config)):
        growth += [[first + step, size] for step, size in schedules.growth_steps(stage.growth, stage.training.steps)]
        borders += [[first, named.name] for named in config.stages[number : number + 1]]
        first += stage.training.steps
    lines = (Path(config.output) / LOG).read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    return {
        "title": f"{config.model.path if config.model.scratch is None else 'A model from scratch'}, "
        f"adapted to blocks of {run.config.growth.b_max}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"nextblock adapt {Path(config.output) / 'nextblock.yaml'}",
        "environment": environment(run.accelerator.device),
        "parent": {
            "name": config.model.path if config.model.scratch is None else "random weights",
            "parameters": sum(p.numel() for p in run.decoder.model.parameters()),
        },
        "settings": run.settings.model_dump() if run.settings else None,
        "training": {
            "steps": first,
            "seconds": sum(step["step_seconds"] for step in steps),
            "tokens": sum(step["tokens"] for step in steps),
            "growth": growth,
            "stages": borders,
        },
        "log": LOG,
    }


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, for the report's foot."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {package: metadata.version(package) for package in ("torch", "transformers", "nextblock")}
    return {
        "python": platform.python_version(),
        **versions,
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
    }


def held_out_rows(run: Run) -> Rows | None:
    """The first held-out rows, or None where the data leaves none (a single document, `data.held_out` = 0)."""
    if not run.config.data.held_out:
        return None
    try:
        stream = RowStream(run.config.data, run.tokenizer, seed=run.config.training.seed, held_out=True)
    except UsageError:
        return None
    return stream.next(run.config.training.evaluate_rows)


def held_out_bits(run: Run) -> list[dict[str, Any]]:
    """Bits per byte of the parent (AR) and of the adapted model (AR and the diffusion bound)."""
    rows = held_out_rows(run)
    if rows is None:
        run.accelerator.print("no document is held out, so bits per byte are not measured; raise data.held_out")
        return []
    found: list[tuple[str, BitsPerByte]] = []
    if run.config.model.scratch is None:
        parent = Decoder(load_model(run.config.model.path, dtype=run.decoder.model.dtype, attention="auto"))
        if parent.device == run.decoder.device:
            found += [("parent", measure) for measure in bits_per_byte(parent, run.tokenizer, rows)]
    run.loss.eval()
    decoder = run.decoder
    if run.is_sharded:  # only this rank measures, and it holds a part of the weights
        decoder = Decoder(load_model(run.output, dtype=decoder.model.dtype, attention="auto"))
    found += [("adapted", measure) for measure in bits_per_byte(decoder, run.tokenizer, rows, run.settings)]
    return [{"model": model, **asdict(measure)} for model, measure in found]
