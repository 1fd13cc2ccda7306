"""The training loop. One step reads like the paper; state lives at the edges."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from nextblock.config.errors import UsageError
from nextblock.config.files import locked, make_folder
from nextblock.config.run import AdaptConfig, stage_configs
from nextblock.data.stream import RowStream
from nextblock.model.parent import parent_config, parent_tokenizer
from nextblock.model.positions import check_row_length
from nextblock.training.checkpoint import (
    remove_partial,
)
from nextblock.training.launcher import check_batch
from nextblock.training.log import run_log
from nextblock.training.output import check_output, check_space, export_run, nothing_left, rehearse_export, writing
from nextblock.training.ranks import gather, is_main, together
from nextblock.training.resume import (
    LOG,
    RESOLVED_CONFIG,
    _flat,
    carry_over,
    check_finished_stages,
    restore,
    save,
    stage_to_resume,
    trim_log,
)
from nextblock.training.run import Run, StepMetrics
from nextblock.training.setup import check_override, prepare
from nextblock.training.step import train_step


def train(
    config: AdaptConfig,
    *,
    resume: bool = False,
    on_step: Callable[[StepMetrics], None] | None = None,
    evaluate: Callable[[Run], Mapping[str, Any] | None] | None = None,
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
    output, main = Path(config.output), is_main()
    stages = stage_configs(config)
    masks = any(stage.masks for stage in stages)
    with together():
        check_ranks(config, resume)
        if main:
            check_output(output, stages, resume)
        for named, stage in zip(config.stages[1:], stages[1:], strict=False):  # must not stop the run days later
            try:
                check_stage(stage, stages[0])
            except UsageError as error:
                raise UsageError(f"stage {named.name}: {error}") from None
    catching = stop_on_sigterm() if received is None else nullcontext(received)
    with ExitStack() as held:
        signals = held.enter_context(catching)
        held.enter_context(writing(output))
        with together():
            if main:
                held.enter_context(locked(output))
                held.enter_context(nothing_left(output, stages))
        return run_stages(config, stages, masks, resume, signals, on_step, evaluate)


def run_stages(
    config: AdaptConfig,
    stages: list[AdaptConfig],
    masks: bool,
    resume: bool,
    received: list[int],
    on_step: Callable[[StepMetrics], None] | None,
    evaluate: Callable[[Run], Mapping[str, Any] | None] | None,
) -> Run:
    """`train`, with the configuration of each stage.

    Args:
        masks: whether any of them needs the mask token.
        received: from `stop_on_sigterm`.
    """
    output, main = Path(config.output), is_main()
    first, newest, damaged = 0, None, []
    with together():  # or the other ranks would wait for ever
        if main and resume:
            first, newest, damaged = stage_to_resume(stages)
            check_finished_stages(stages[:first])
    first, newest = gather((first, newest))[0]
    for line in damaged:
        print(line)
    run: Any = None
    write: Any = None
    with ExitStack() as until_the_end:
        for number in range(first, len(stages)):
            before = None if number == 0 else Path(stages[number - 1].output)
            ended, seconds = (None, 0.0) if run is None else (run.checkpoint, run.seconds)  # of the stage before
            run = prepare(stages[number], before, ended, masks=masks)
            run.seconds = seconds
            run.output, run.first_step = output, sum(stage.training.steps for stage in stages[:number])
            if config.stages:
                run.stage, run.stage_number = config.stages[number].name, number + 1
            if ended is not None:
                carry_over(run, ended, fresh=config.stages[number].fresh_optimizer, data=stages[number - 1].data)
            if newest is not None:
                restore(run, newest)
                newest = None
            elif number == 0:
                check_space(run, stages)
            rehearse_export(run)
            if main:
                for folder, resolved in ((output, config), (Path(stages[number].output), stages[number])):
                    make_folder(folder)
                    (folder / RESOLVED_CONFIG).write_text(
                        yaml.safe_dump(resolved.model_dump(mode="json"), sort_keys=False), encoding="utf-8"
                    )
                remove_partial(Path(stages[number].output))
            if write is None:  # one log and one run of the trackers for all stages
                if main and (damaged := trim_log(output / LOG, run.first_step + run.step)):
                    run.accelerator.print(f"{output / LOG}: {damaged} damaged lines were dropped")
                flat_config = _flat(config.model_dump(mode="json"))
                write = until_the_end.enter_context(run_log(run.accelerator, output / LOG, flat_config))
            run_stage(run, write, received, on_step, evaluate)
            if any(gather(bool(received))):
                return run
            run.finished = number == len(stages) - 1
            export_run(run, output if run.finished else Path(stages[number].output))
            run.accelerator.free_memory()
    return run


def run_stage(
    run: Run,
    write: Callable[[Mapping[str, Any]], None],
    received: list[int],
    on_step: Callable[[StepMetrics], None] | None,
    evaluate: Callable[[Run], Mapping[str, Any] | None] | None,
) -> None:
    """All steps of a run without stages, or of one stage, with their log (`write`, of `run_log`) and checkpoints."""
    config, due = run.config, run.config.training.evaluate_every
    with closing(run.feed):
        stop = any(gather(bool(received)))
        began = time.perf_counter() - run.seconds
        while run.step < config.training.steps and not stop:
            metrics = train_step(run, run.step)
            run.step += 1
            stop = any(gather(bool(received)))  # a signal to one rank stops all, after the same step
            write(asdict(metrics))
            if on_step and is_main():
                on_step(metrics)
            if run.profile and (profile := run.profile.record(run.accelerator, metrics.step)):
                write(profile)
            if evaluate and due and run.step % due == 0 and (found := evaluate(run)):
                write({"kind": "evaluation", "step": metrics.step, **found})
            run.seconds = time.perf_counter() - began
            if run.step % config.training.checkpoint_every == 0 or run.step == config.training.steps or stop:
                save(run)
                run.seconds = time.perf_counter() - began


def check_stage(config: AdaptConfig, first: AdaptConfig) -> None:
    """UsageError for what is wrong with a later stage's data, row length, batch or model."""
    check_batch(config)
    RowStream(config.data, parent_tokenizer(config.model), seed=config.training.seed)
    check_row_length(config.data.row_length, parent_config(config.model))
    check_override(config.model, first.model)


def check_ranks(config: AdaptConfig, resume: bool) -> None:
    """UsageError if another rank was started with another configuration, or one is to resume and another is not."""
    ours, *others = gather({"resume": resume, **_flat(config.model_dump(mode="json"))})
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
