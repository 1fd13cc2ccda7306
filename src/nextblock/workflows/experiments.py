"""Runs every arm of an experiment with every seed: what is finished is skipped, what was stopped goes on.

Each run is a process of its own with one thread, so that a machine runs as many side by side as it has cores, and
so that the figures of a run do not depend on what ran before it. A run ends, and saves where it is, when the process
that started it is gone, however that ended.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nextblock.config.errors import UsageError
from nextblock.config.files import locked, make_folder, write_whole
from nextblock.config.progress import Update
from nextblock.config.run import AdaptConfig, load_config, stage_configs
from nextblock.decoding.lm import BlockDiffusionLM, load
from nextblock.measure.accuracy import score_task
from nextblock.measure.machine import environment
from nextblock.model.loading import usable_device
from nextblock.training.log import read_log
from nextblock.training.run import LOG, RESOLVED_CONFIG
from nextblock.workflows.adapt import adapt
from nextblock.workflows.experiment import Experiment, Score

LAST_SHARE = 4  # the last quarter of a run: its losses are told
STARTER = "NEXTBLOCK_EXPERIMENT_PID"
"""Environment variable of a run: the process that started it."""
LOCKED = 60
"""Seconds in which a run whose starter is gone is sure to have ended."""


@dataclass(frozen=True)
class Place:
    """Where an experiment is kept.

    source: its YAML file.
    runs: folder of checkpoints, logs and what the processes print; of no more use once the figures are there.
    results: folder of one JSON file for each run.
    """

    source: Path
    runs: Path
    results: Path

    def result(self, arm: str, seed: int) -> Path:
        """The figures of one run."""
        return self.results / f"{arm}-{seed}.json"

    def run(self, arm: str, seed: int) -> Path:
        """The folder of one run."""
        return self.runs / f"{arm}-{seed}"

    @property
    def parents(self) -> Path:
        """The folder of the experiment's own parents."""
        return self.runs / "parents"


def place_of(source: Path, runs: Path) -> Place:
    """Runs in a folder of the experiment's name under `runs`; results beside the YAML file, in `results`."""
    return Place(source, runs / source.stem, source.parent / "results" / source.stem)


def fingerprint(experiment: Experiment, arm: str) -> str:
    """What a run's figures depend on, but for its seed, as a short hash."""
    said = [experiment.base, experiment.arms[arm], experiment.parents, experiment.score]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def read_results(experiment: Experiment, place: Place) -> dict[tuple[str, int], dict[str, Any]]:
    """The figures that are there, by arm and seed.

    Raises:
        UsageError: a file that cannot be read, or that belongs to another version of the experiment.
    """
    found = {}
    for arm, seed in wanted_runs(experiment):
        path = place.result(arm, seed)
        if not path.is_file():
            continue
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            same = stored["fingerprint"] == fingerprint(experiment, arm)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} holds no figures ({type(error).__name__}); delete it and run again") from None
        if not same:
            raise UsageError(
                f"{path} was made by another version of {place.source}: base, arm, parents or scores differ; "
                f"move it and the run's folder {place.run(arm, seed)} away and run again, or take the changes back"
            )
        found[arm, seed] = stored
    return found


def wanted_runs(experiment: Experiment) -> list[tuple[str, int]]:
    """All runs, seed by seed, so that after each seed every arm has as many runs."""
    return [(arm, seed) for seed in experiment.seeds for arm in experiment.arms]


def run_experiment(
    experiment: Experiment, place: Place, jobs: int, on_step: Update = lambda done, total, what="": None
) -> None:
    """Run what is missing, `jobs` runs side by side.

    Args:
        on_step: told of the optimizer steps done, those of all that is missing, and the runs at work.
    Raises:
        UsageError: another process runs this experiment, or a run failed; the others have ended, too.
    """
    make_folder(place.results)
    with locked(place.runs):
        make_folder(place.parents)
        folders = {name: experiment.parent_folder(name, place.parents) for name in experiment.parents}
        names = [name for name, folder in folders.items() if not (folder / "config.json").is_file()]
        parents = [(["--parent", name], folders[name]) for name in names]
        done = read_results(experiment, place)
        missing = [one for one in wanted_runs(experiment) if one not in done]
        runs = [(["--arm", arm, "--seed", str(seed)], place.run(arm, seed)) for arm, seed in missing]
        total = sum(_steps(experiment.parent(name, Path("output"))) for name in names)
        total += sum(_steps(experiment.config(arm, seed, Path("o"), Path("p"))) for arm, seed in missing)
        total += len(runs)  # for measuring, which counts as one more step

        def tell(at_work: Sequence[Path]) -> None:
            steps = sum(_steps_done(folder) for _, folder in parents + runs)
            measured = sum(place.result(arm, seed).is_file() for arm, seed in missing)
            on_step(min(steps + measured, total), total, ", ".join(folder.name for folder in at_work))

        with _leaving_on_sigterm():
            for part in (parents, runs):  # an arm may start from any of the parents
                _run_processes(place, part, jobs, tell)


def _steps(config: AdaptConfig) -> int:
    return sum(stage.training.steps for stage in stage_configs(config))


def _steps_done(folder: Path) -> int:
    """Lines of steps in a run's log; a finished run has all."""
    logs = folder.glob(f"**/{LOG}")
    return sum(line.startswith(b'{"step"') for log in logs for line in log.read_bytes().splitlines())


def _run_processes(place: Place, wanted: Sequence[tuple[list[str], Path]], jobs: int, tell: Any) -> None:
    """Run each in a process of its own, at most `jobs` at a time; the first that fails ends the others."""
    waiting, running = list(wanted), {}
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", STARTER: str(os.getpid())}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                arguments, folder = waiting.pop(0)
                command = [sys.executable, "-m", "nextblock", "experiment", str(place.source), *arguments]
                with _printed(folder).open("ab") as out:
                    process = subprocess.Popen(
                        [*command, "--runs", str(place.runs.parent)], stdout=out, stderr=out, env=environ
                    )
                running[process] = folder
            time.sleep(0.5)
            tell(list(running.values()))
            for process in [one for one in running if one.poll() is not None]:
                folder = running.pop(process)
                if process.returncode:
                    said = _printed(folder).read_text(encoding="utf-8", errors="replace").splitlines()
                    reason = next((line for line in reversed(said) if line.strip()), "it said nothing")
                    raise UsageError(f"the run {folder.name} failed ({_printed(folder)}): {reason}")
    finally:
        for process in running:
            process.terminate()  # a run that is told so saves where it is
        for process in running:
            process.wait()


def _printed(folder: Path) -> Path:
    """The file of what a run's process prints."""
    return folder.with_name(f"{folder.name}.out")


@contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that what runs is ended; without it Python would be gone at once."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _begin(folder: Path) -> None:
    """In a run's own process: wait for one before it in this folder, and end with the process that started it."""
    if (starter := os.environ.get(STARTER)) is None:
        return

    def watch() -> None:
        while os.getppid() == int(starter):
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)  # a run that is told so saves where it is

    threading.Thread(target=watch, daemon=True).start()
    for _ in range(2 * LOCKED):
        try:
            with locked(folder):
                return
        except UsageError:
            time.sleep(0.5)


def run_parent(experiment: Experiment, place: Place, name: str) -> None:
    """Train one of the experiment's own parents."""
    folder = experiment.parent_folder(name, place.parents) if name in experiment.parents else place.parents / name
    config = experiment.parent(name, folder)
    _begin(folder)
    _trained(config)


def run_one(experiment: Experiment, place: Place, arm: str, seed: int) -> dict[str, Any]:
    """Train one arm with one seed, measure it, and write its figures.

    Returns:
        What was written: `figures` is name -> number.
    Raises:
        UsageError: the run's folder holds one of another version of the experiment, or its parent is not trained.
    """
    folder = place.run(arm, seed)
    config = experiment.config(arm, seed, folder, place.parents)
    parent = Path(config.model.path)
    if parent.is_relative_to(place.parents) and not (parent / "config.json").is_file():
        name = parent.name.rpartition("-")[0]
        raise UsageError(
            f"the parent '{name}' is not trained yet; run the experiment without --arm, or --parent {name}"
        )
    _begin(folder)
    make_folder(place.results)
    folder, results = _trained_before(place, config) or (folder, None)
    if results is None:
        results = _trained(config)
    stored = {
        "arm": arm,
        "seed": seed,
        "fingerprint": fingerprint(experiment, arm),
        "figures": {**training_figures(folder, results), **score_figures(experiment, load(folder))},
        "training": {name: results["training"][name] for name in ("steps", "tokens", "seconds")},
        "environment": results["environment"],
    }
    write_whole(place.result(arm, seed), (json.dumps(stored, indent=1) + "\n").encode())
    return stored


def _trained(config: AdaptConfig) -> dict[str, Any]:
    """Train a run, or go on with it if it is of this very configuration. Its `results.json`."""
    folder = Path(config.output)
    if (said := folder / RESOLVED_CONFIG).is_file() and load_config(said, {"output": config.output}) != config:
        raise UsageError(f"the run in {folder} was begun by another version of this experiment; delete that folder")
    result = adapt(config, resume=True)
    if not result.finished:
        raise UsageError(f"the run {folder.name} was stopped at step {result.steps}; run the experiment again")
    return result.results


def _trained_before(place: Place, config: AdaptConfig) -> tuple[Path, dict[str, Any]] | None:
    """A finished run of this configuration by these versions, of any experiment, and its `results.json`.

    Experiments have arms in common, which need not be trained twice: a run of one thread comes out the same again.
    """
    here = environment(usable_device(None))
    for said in sorted(place.runs.parent.glob(f"*/*/{RESOLVED_CONFIG}")):
        try:
            same = load_config(said, {"output": config.output}) == config
            found = json.loads(said.with_name("results.json").read_text(encoding="utf-8"))
        except (UsageError, OSError, ValueError):  # of another version, or not finished
            continue
        if same and found["environment"] == here:
            return said.parent, found
    return None


def training_figures(folder: Path, results: dict[str, Any]) -> dict[str, float]:
    """Losses of the last quarter of the steps, how far the diffusion loss swings there, and held-out bits per byte.

    The swing is the standard deviation of the difference of one step's loss and the next one's, over the mean loss:
    a slow change of the loss does not count.
    """
    steps = read_log(folder / LOG)
    found: dict[str, float] = {}
    for name, key in (("diffusion loss", "diffusion_loss"), ("AR loss", "ar_loss")):
        losses = np.array(
            [one[key] for one in steps[-len(steps) // LAST_SHARE :] if one[key] is not None], dtype=float
        )
        if losses.size:
            found[name] = float(losses.mean())
        if name == "diffusion loss" and losses.size > 1:
            found["swing of the diffusion loss"] = float(np.diff(losses).std() / losses.mean())
    for one in results.get("bits_per_byte", ()):
        if one["model"] == "adapted":
            found[f"bits per byte, {one['measure']}"] = one["value"]
    return found


def score_figures(experiment: Experiment, lm: BlockDiffusionLM) -> dict[str, float]:
    """Accuracy and tokens per forward of each score that the experiment names; a model of AR steps has those of ar."""
    return dict(_scores(experiment, lm))


def _scores(experiment: Experiment, lm: BlockDiffusionLM) -> Iterator[tuple[str, float]]:
    for name, options in experiment.score.items():
        task, examples, given = Score.of(options)
        if lm.settings is None and given.get("mode") != "ar":
            continue
        score, _ = score_task(lm, task, examples=examples, **given)
        yield f"{name}: accuracy", score.accuracy
        yield f"{name}: tokens per forward", score.tokens_per_forward
