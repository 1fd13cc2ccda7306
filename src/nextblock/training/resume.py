"""Saving a run and going on from what was saved, in the same stage or from one stage to the next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nextblock.config.errors import UsageError
from nextblock.config.files import read_yaml
from nextblock.config.run import AdaptConfig
from nextblock.config.sections import DataConfig
from nextblock.data.feed import merged
from nextblock.training.changes import check_differences
from nextblock.training.checkpoint import (
    STATE,
    load_checkpoint,
    load_optimizer,
    newest_whole_checkpoint,
)
from nextblock.training.ranks import errors_on_all_ranks, gather, is_main
from nextblock.training.run import RESOLVED_CONFIG, Run


def checkpoint_to_resume(stages: list[AdaptConfig]) -> tuple[int, Path | None]:
    """The number of the last stage with a checkpoint, and its newest whole one. Without any, 0 and None.

    All ranks call it together; rank 0 names damaged checkpoints.

    Raises:
        UsageError: of that stage, no checkpoint is whole: to start over must be asked for. Or a stage that is done
            was run under another configuration than it has now.
    """
    first, newest = 0, None
    for number in reversed(range(len(stages))):
        newest, passed = newest_whole_checkpoint(Path(stages[number].output))
        if newest is not None:
            first = number
            for line in passed if is_main() else []:
                print(line)
            break
        if passed:
            raise UsageError(
                f"{'; '.join(passed)}; no other is left: delete what is damaged to start over, or choose another "
                "--output"
            )
    with errors_on_all_ranks():  # or the other ranks would wait for ever
        for stage in stages[:first] if is_main() else []:
            check_finished_stage(stage)
    return first, newest


def carry_over(run: Run, folder: Path, *, fresh: bool, data: DataConfig) -> None:
    """Take the optimizer's moments (unless `fresh`) and the position in equal `data` from a last checkpoint."""
    if not fresh:
        own = [{key: value for key, value in group.items() if key != "params"} for group in run.optimizer.param_groups]
        load_optimizer(folder, run.trained, run.optimizer)
        for group, options in zip(run.optimizer.param_groups, own, strict=True):
            group.update(options)
    if run.config.data == data:
        run.changes = run.feed.load_state(json.loads((folder / STATE).read_text(encoding="utf-8"))["stream"])


def save(run: Run) -> None:
    """Begin to save a resumable checkpoint at the run's step; `run.writer.finish` waits for it."""
    state = {
        "stream": merged(gather(run.feed.state())),
        "config": run.config.model_dump(mode="json"),
        "seconds": run.seconds,
        "processes": run.accelerator.num_processes,
    }
    options = run.config.training
    run.checkpoint = run.writer.save(
        Path(run.config.output),
        run.step,
        run.trained,
        run.optimizer,
        state,
        options.keep_last,
        keep_every=options.keep_every and options.keep_every * options.checkpoint_every,
    )


def restore(run: Run, folder: Path) -> None:
    """Go on from a checkpoint. What has changed since is left in `run.changes`.

    Raises:
        UsageError: it was made under a configuration that would break the run.
    """
    saved = json.loads((folder / STATE).read_text(encoding="utf-8"))
    row, failure = saved["stream"]["row"], f"cannot resume from {folder}"
    run.changes = check_differences(saved["config"], run.config, failure, step=saved["step"], row=row)
    ranks = run.accelerator.num_processes
    if (before := saved.get("processes", ranks)) != ranks:
        run.changes.append(f"processes was {before}, is {ranks}")
    state = load_checkpoint(folder, run.trained, run.optimizer)
    run.changes += run.feed.load_state(state["stream"])
    for change in run.changes:
        run.accelerator.print(f"resuming: {change}")
    run.step, run.seconds, run.checkpoint = state["step"], state.get("seconds", 0.0), folder


def check_finished_stage(stage: AdaptConfig) -> None:
    """UsageError where a stage that is done was run under another configuration than it has now."""
    resolved = Path(stage.output) / RESOLVED_CONFIG
    saved = read_yaml(resolved.read_text(encoding="utf-8")) if resolved.is_file() else None
    if saved:
        check_differences(saved, stage, f"cannot resume: {stage.output} is finished", step=0, row=0, done=True)


def dotted_keys(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(values, dict):
        return {prefix: values}
    flat = {}
    for key, value in values.items():
        flat |= dotted_keys(value, f"{prefix}.{key}" if prefix else key)
    return flat
