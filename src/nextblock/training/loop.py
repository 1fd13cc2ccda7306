"""The training loop: the stages of a run one after another, each a loop of `train_step` with log and checkpoints."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nextblock.config.errors import UsageError
from nextblock.config.run import AdaptConfig, stage_configs
from nextblock.training.checkpoint import CheckpointWriter, remove_partial
from nextblock.training.log import run_log
from nextblock.training.output import check_output, check_space, export_run, rehearse_export, run_folder, write_config
from nextblock.training.ranks import errors_on_all_ranks, gather, is_main
from nextblock.training.resume import carry_over, checkpoint_to_resume, dotted_keys, restore, save
from nextblock.training.run import LOG, Run, StepMetrics
from nextblock.training.setup import check_stage, prepare
from nextblock.training.step import train_step

Evaluate = Callable[[Run], Mapping[str, Any] | None]


def train(
    config: AdaptConfig,
    *,
    resume: bool = False,
    on_step: Callable[[StepMetrics], None] | None = None,
    evaluate: Evaluate | None = None,
    received: list[int] | None = None,
) -> Run:
    """Adapt the parent and leave a Hugging Face folder in `config.output`.

    Stages run one after another, each in a folder of its own in `config.output`; the last one's export is the run's.

    Args:
        config: checked configuration.
        resume: go on from the newest whole checkpoint in the output folder, if there is one.
        on_step: called on the main process after each step.
        evaluate: called on every process each `training.evaluate_every` steps; what it returns is logged.
        received: of the caller's `stop_on_sigterm`, where that outlasts the training.
    Returns:
        The run (of the last stage reached), with the trained model in memory. `run.finished` is False when a
        SIGTERM ended it early (a checkpoint was saved).
    Raises:
        UsageError: bad input, before anything is written.
    """
    stages = stage_configs(config)
    check_run(config, stages, resume)
    run: Any = None
    write: Any = None  # one log and one run of the trackers for all stages
    with ExitStack() as until_the_end:
        catching = stop_on_sigterm() if received is None else nullcontext(received)
        signals = until_the_end.enter_context(catching)
        until_the_end.enter_context(run_folder(Path(config.output), stages))
        writer = until_the_end.enter_context(closing(CheckpointWriter()))
        first, checkpoint = checkpoint_to_resume(stages) if resume else (0, None)
        for number in range(first, len(stages)):
            run = begin_stage(config, stages, number, run, checkpoint if number == first else None, writer)
            write = write or until_the_end.enter_context(open_log(config, run))
            if run.changes:
                write({"kind": "resume", "step": run.first_step + run.step, "changes": run.changes})
            with closing(run.feed):
                began, stop = time.perf_counter() - run.seconds, on_any_rank(bool(signals))
                while run.step < run.config.training.steps and not stop:
                    metrics = train_step(run, run.step)
                    run.step += 1
                    stop = on_any_rank(bool(signals) or writer.failed)
                    report(run, metrics, write, on_step, evaluate)
                    run.seconds = time.perf_counter() - began
                    if stop or run.is_checkpoint_due:
                        save(run)
                        run.seconds = time.perf_counter() - began
                writer.finish()
                run.seconds = time.perf_counter() - began
            if on_any_rank(bool(signals)):
                return run
            run.finished = number == len(stages) - 1
            export_run(run, Path((config if run.finished else stages[number]).output))
            run.accelerator.free_memory()
    return run


def on_any_rank(found: bool) -> bool:
    """Whether any rank has found what all must act on after the same step. All ranks call it together."""
    return any(gather(found))


def begin_stage(
    config: AdaptConfig,
    stages: list[AdaptConfig],
    number: int,
    last: Run | None,
    checkpoint: Path | None,
    writer: CheckpointWriter,
) -> Run:
    """A stage that is ready for its next step, with its folder and resolved configuration.

    Args:
        number: of the stage, from 0.
        last: the stage before, as it ended just now; None where the run begins here.
        checkpoint: of this stage, to go on from.
    """
    ended = None if last is None else last.checkpoint
    before = Path(stages[number - 1].output) if number else None
    run = prepare(stages[number], before, ended, masks=any(stage.masks for stage in stages))
    run.writer, run.output = writer, Path(config.output)
    run.first_step = sum(stage.training.steps for stage in stages[:number])
    if config.stages:
        run.stage, run.stage_number = config.stages[number].name, number + 1
    if last is not None and ended is not None:
        run.seconds = last.seconds
        carry_over(run, ended, fresh=config.stages[number].fresh_optimizer, data=stages[number - 1].data)
    if checkpoint is not None:
        restore(run, checkpoint)
    elif number == 0:
        check_space(run, stages)
    rehearse_export(run)
    if is_main():
        write_config(config)
        write_config(stages[number])
        remove_partial(Path(stages[number].output))
    return run


def open_log(config: AdaptConfig, run: Run) -> Any:
    """`run_log` of the run that stands where `run` does."""
    values = dotted_keys(config.model_dump(mode="json"))
    return run_log(run.accelerator, run.output / LOG, values, run.first_step + run.step)


def report(
    run: Run,
    metrics: StepMetrics,
    write: Callable[[Mapping[str, Any]], None],
    on_step: Callable[[StepMetrics], None] | None,
    evaluate: Evaluate | None,
) -> None:
    """Tell the log and the caller of the step just done, with the profile and the evaluation that are due after it."""
    write(asdict(metrics))
    if on_step and is_main():
        on_step(metrics)
    if run.profile and (profile := run.profile.record(run.accelerator, metrics.step)):
        write(profile)
    due = run.config.training.evaluate_every
    if evaluate and due and run.step % due == 0 and (found := evaluate(run)):
        write({"kind": "evaluation", "step": metrics.step, **found})


def check_run(config: AdaptConfig, stages: list[AdaptConfig], resume: bool) -> None:
    """UsageError for what can be known to be wrong before the first stage is prepared. All ranks together."""
    with errors_on_all_ranks():
        check_ranks_agree(config, resume)
        if is_main():
            check_output(Path(config.output), stages, resume)
        for named, stage in zip(config.stages[1:], stages[1:], strict=False):  # must not stop the run days later
            try:
                check_stage(stage, stages[0])
            except UsageError as error:
                raise UsageError(f"stage {named.name}: {error}") from None


def check_ranks_agree(config: AdaptConfig, resume: bool) -> None:
    """UsageError if another rank was started with another configuration, or one is to resume and another is not."""
    ours, *others = gather({"resume": resume, **dotted_keys(config.model_dump(mode="json"))})
    for rank, theirs in enumerate(others, 1):
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise UsageError(
                    f"{key} is {ours.get(key)!r} on rank 0 and {theirs.get(key)!r} on rank {rank}; "
                    "start all processes with the same configuration"
                )


@contextmanager
def stop_on_sigterm() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM comes; the loop then saves and ends."""
    received: list[int] = []
    try:
        previous = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:  # not the main thread: the caller owns the signals
        yield received
        return
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
