"""An experiment: arms that differ in what is named and share the rest, each run with several seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from nextblock.config.errors import UsageError, nearest
from nextblock.config.files import read_yaml, user_path
from nextblock.config.run import AdaptConfig, load_config
from nextblock.config.sections import Section, validate
from nextblock.decoding.options import DecodingConfig
from nextblock.tasks import Task, get_task

PARENT = "parent:"
"""In front of the name of one of the experiment's own parents, in `model.path`."""

SET_FOR_EACH_RUN = ("training.seed", "output")
"""Keys that no arm can change."""


class Score(DecodingConfig):
    """What a score asks for: greedy answers to the first held-out problems of a task."""

    task: str = Field(default="word_problems", description="built-in task")
    examples: int = Field(default=200, ge=1, description="held-out prompts")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> tuple[Task, int, dict[str, Any]]:
        """The task, the number of prompts, and the options of `generate` that are given.

        Raises:
            UsageError: an unknown task or option.
        """
        score = validate(cls, options)
        given = {name: getattr(score, name) for name in options if name in DecodingConfig.model_fields}
        return get_task(score.task), score.examples, given


class Experiment(Section):
    """One file of `experiments/`."""

    question: str = Field(description="what the arms are to tell")
    paper: str = Field(default="", description="what the paper says to it, and where")
    headline: str = Field(default="", description="what came out in a sentence; {figure|arm} stands for a number")
    finding: str = Field(default="", description="more of it, and what a user should choose; numbers likewise")
    seeds: tuple[int, ...] = Field(default=(0, 1, 2, 3, 4), min_length=1, description="of data, noise and weights")
    base: dict[str, Any] = Field(description="the configuration that all arms share")
    parents: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="configurations of parents that are trained first; `model.path: parent:NAME`"
    )
    arms: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="for each arm, the keys (`growth.b_max`) in which it differs; the first is compared to",
    )
    score: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="what each trained model is asked, as `Score` has it"
    )
    figures: tuple[str, ...] = Field(default=(), description="which figures are shown, in this order; default: all")

    @field_validator("arms", mode="before")
    @classmethod
    def _arms(cls, arms: Any) -> Any:
        """An arm that differs in nothing is written as a name alone; a section in it leaves the base's other keys."""
        if not isinstance(arms, Mapping):
            return arms
        flat = {str(name): _dotted(keys) if isinstance(keys, Mapping) else keys or {} for name, keys in arms.items()}
        for name, keys in flat.items():
            for key in SET_FOR_EACH_RUN:
                if key in keys:
                    raise UsageError(f"arm {name}: {key} is set for each run, by seeds and --runs; leave it out")
        return flat

    @field_validator("arms", "parents")
    @classmethod
    def _names(cls, named: dict[str, Any]) -> dict[str, Any]:
        """Names are those of folders."""
        for name in named:
            if not name.strip() or "/" in name or name.startswith(".") or "\0" in name:
                raise UsageError(f"'{name}' cannot be the name of a folder; give it one without / and a dot in front")
        return named

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise UsageError(f"seeds={list(seeds)}: one comes twice, and would count as two runs")
        return seeds

    def config(self, arm: str, seed: int, output: Path, parents: Path) -> AdaptConfig:
        """The run of one arm with one seed. `parents`: the folder that holds the experiment's own parents.

        Raises:
            UsageError: an unknown arm, or a configuration that is refused; both are named.
        """
        if arm not in self.arms:
            raise UsageError(f"there is no arm '{arm}'{nearest(arm, list(self.arms))}")
        keys = {**self.arms[arm], "training.seed": seed, "output": str(output)}
        try:
            config = load_config(self.base, keys)
        except UsageError as error:
            raise UsageError(f"arm {arm}: {error}") from None
        path = config.model.path or ""
        if not path.startswith(PARENT):
            return config
        name = path.removeprefix(PARENT)
        if name not in self.parents:
            raise UsageError(f"arm {arm}: there is no parent '{name}'{nearest(name, [*self.parents])}")
        return load_config(self.base, {**keys, "model.path": str(self.parent_folder(name, parents))})

    def parent_folder(self, name: str, parents: Path) -> Path:
        """Where a parent is: one of another configuration has another folder, so no run mistakes it for its own."""
        said = json.dumps(self.parents[name], sort_keys=True, default=str)
        return parents / f"{name}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"

    def parent(self, name: str, output: Path) -> AdaptConfig:
        """The run that trains one of the experiment's own parents."""
        if name not in self.parents:
            raise UsageError(f"there is no parent '{name}'{nearest(name, [*self.parents])}")
        try:
            return load_config(self.parents[name], {"output": str(output)})
        except UsageError as error:
            raise UsageError(f"parent {name}: {error}") from None


def _dotted(keys: Mapping[str, Any]) -> dict[str, Any]:
    """`{optimizer: {lr: 1}}` -> `{"optimizer.lr": 1}`; an empty section, and what stands below a dotted key, stay."""
    flat: dict[str, Any] = {}
    for key, value in keys.items():
        if isinstance(value, Mapping) and value and "." not in str(key):
            flat |= {f"{key}.{inner}": below for inner, below in value.items()}
        else:
            flat[str(key)] = value
    return flat


def find_experiment(argument: str) -> Path:
    """A YAML path as given, or the experiment of that name in the folder `experiments`."""
    path = user_path(argument, "experiment")
    if path.is_file():
        return path
    names = sorted(one.stem for one in Path("experiments").glob("*.yaml"))
    if argument not in names:
        cure = nearest(argument, names) if names else "; give a YAML file, or run this beside the folder experiments/"
        raise UsageError(f"there is no experiment '{argument}'{cure}")
    return Path("experiments") / f"{argument}.yaml"


def load_experiment(path: Path) -> Experiment:
    """Read an experiment and check every arm of it.

    Raises:
        UsageError: an unreadable file, an unknown key, or an arm that is refused.
    """
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the experiment {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UsageError(f"experiment {path}: expected a mapping with question, base and arms")
    experiment = validate(Experiment, values)
    for arm in experiment.arms:
        experiment.config(arm, experiment.seeds[0], Path("output"), Path("parents"))
    for name in experiment.parents:
        experiment.parent(name, Path("output"))
    for name, options in experiment.score.items():
        try:
            Score.of(options)
        except UsageError as error:
            raise UsageError(f"score {name}: {error}") from None
    return experiment
