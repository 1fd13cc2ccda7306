"""One adaptation from configuration to report: train, export, measure, draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nextblock.config.errors import UsageError
from nextblock.config.files import locked
from nextblock.config.run import AdaptConfig, load_config, stage_configs
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.data.feed import merged
from nextblock.decoding.options import resolve_config
from nextblock.measure.machine import environment
from nextblock.measure.report import write_report
from nextblock.recipe import schedules
from nextblock.training.log import read_log
from nextblock.training.loop import stop_on_sigterm, train
from nextblock.training.output import writing
from nextblock.training.ranks import gather
from nextblock.training.run import LOG, Run, StepMetrics
from nextblock.workflows.held_out import SigtermReceived, evaluate_midway, held_out_bits


@dataclass(frozen=True)
class RunResult:
    """What `adapt` leaves.

    output: folder of the checkpoint, `report.html`, `results.json`, the log and the resolved configuration.
    finished: False when a SIGTERM ended the run early; `resume=True` goes on. One that came during the export has
        left the trained model and its last checkpoint, but no figures.
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
    on_evaluation: Callable[[Mapping[str, Any]], None] | None = None,
) -> RunResult:
    """Turn an AR parent into a block-diffusion model.

    Args:
        config: an `AdaptConfig`, a YAML path, or a mapping; with dotted `overrides`.
        resume: go on from the newest whole checkpoint in the output folder, else start.
        on_step: called after every optimizer step, on the main process.
        on_stage: called with a few words when something long begins.
        on_evaluation: called with each record of `evaluate_midway`, on the main process.
    Returns:
        Where everything is, and the measured figures.
    Raises:
        UsageError: bad input, in one line; nothing is left behind.
    """
    if overrides or not isinstance(config, AdaptConfig):
        config = load_config(config.model_dump() if isinstance(config, AdaptConfig) else config, overrides)
    check_decoding(config)
    say = on_stage or (lambda words: None)
    say("reading data and model")

    def evaluate(run: Run) -> Mapping[str, Any] | None:
        rows = gather(run.held_out)[0]  # one rank has read them, so that all take part or none
        record = None if rows is None else evaluate_midway(run, rows)
        if record and on_evaluation and run.accelerator.is_main_process:
            on_evaluation(record)
        return record

    with stop_on_sigterm() as received:
        run = train(config, resume=resume, on_step=on_step, evaluate=evaluate, received=received)
        output = Path(config.output)
        steps = run.first_step + run.step
        lost = cut_documents(run)
        if not run.finished or not run.accelerator.is_main_process:
            return RunResult(output, run.finished, steps, {})
        results = describe(run, config, lost)
        with writing(output), locked(output):
            if config.training.evaluate_rows:
                say("measuring held-out bits per byte")
                try:
                    results["bits_per_byte"] = held_out_bits(run, received)
                except SigtermReceived:
                    return RunResult(output, False, steps, {})
            write_report(results, output)
        return RunResult(output, True, steps, results)


def check_decoding(config: AdaptConfig) -> None:
    """Refuse a `decoding` section that no call of `generate` could begin with."""
    if not config.decoding:
        return
    last = stage_configs(config)[-1]
    if not last.masks:
        raise UsageError("decoding: the result decodes in ar mode alone and stores no defaults; leave the section out")
    settings = BlockDiffusionSettings(
        block_size=last.growth.b_max, mask_token_id=0, prediction=last.recipe.prediction, decoding=config.decoding
    )
    try:
        resolve_config(settings, {}, drafted=config.draft_adapter is not None)
    except UsageError as error:
        raise UsageError(f"decoding: {error}") from None


def describe(run: Run, config: AdaptConfig, lost: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `results.json` that is known without measuring anything. `lost`: of `cut_documents`."""
    growth, borders, first = [], [], 0
    for number, stage in enumerate(stage_configs(config)):
        growth += [[first + step, size] for step, size in schedules.growth_steps(stage.growth, stage.training.steps)]
        borders += [[first, named.name] for named in config.stages[number : number + 1]]
        first += stage.training.steps
    steps = read_log(Path(config.output) / LOG)
    return {
        "title": f"{config.model.path if config.model.scratch is None else 'A model from scratch'}, "
        f"adapted to blocks of {run.config.growth.b_max}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"nextblock adapt {Path(config.output) / 'nextblock.yaml'} --output NEW",
        "environment": environment(run.accelerator.device),
        "parent": {
            "name": config.model.path if config.model.scratch is None else "random weights",
            "parameters": sum(p.numel() for p in run.decoder.model.parameters()),
        },
        "settings": run.settings.model_dump() if run.settings else None,
        "training": {
            "steps": first,
            "seconds": run.seconds,
            "tokens": sum(step["tokens"] for step in steps),
            "growth": growth,
            "stages": borders,
            **lost,
        },
        "log": LOG,
    }


def cut_documents(run: Run) -> dict[str, Any]:
    """What the data lost on the way to rows, on all ranks together; see `nextblock.data.stream.NOTHING`."""
    lost = [shard["lost"] for shard in merged(gather(run.feed.state()))["shards"].values()]
    found: dict[str, Any] = {
        name: sum(one.get(name, 0) for one in lost) for name in ("truncated", "skipped", "spelled", "unusable")
    }
    for name in ("spelled_at", "unusable_at"):
        found[name] = next((one[name] for one in lost if one.get(name)), "")
    return found
