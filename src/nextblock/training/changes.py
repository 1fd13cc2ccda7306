"""What may change in a run that is resumed: one table, which decides and from which docs/distributed.md is made.

Steps that are done stay done. A change is taken if the steps before it would have been the same under it, or if it is
meant for the steps to come alone; all others would leave weights that no configuration describes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

from nextblock.config.errors import UsageError
from nextblock.config.run import AdaptConfig
from nextblock.config.sections import validate
from nextblock.data.sources import place_of
from nextblock.recipe.schedules import scheduled

SAME = "the weights stay the same, bit for bit"
ROUNDED = "the weights differ by rounding"
AS_BEGUN = "the weights are those of a run that began with it"
ONWARD = "holds for the steps to come"


class Difference(NamedTuple):
    """A dotted key of the configuration and its values: when the checkpoint was saved, and now."""

    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} was {self.was!r}, is {self.now!r}"


@dataclass(frozen=True)
class Resumed:
    """A run that goes on: its configurations before and now, the steps that its stage has done, and its next row."""

    before: AdaptConfig
    now: AdaptConfig
    step: int
    row: int


Rule = Callable[[Difference, Resumed], str | None]
"""Why a change is not taken, in words; None where it is."""


@dataclass(frozen=True)
class Change:
    """Keys that may change together.

    keys: dotted, with N for a number in a list.
    condition: of the rule, in words.
    effect: SAME, ROUNDED, AS_BEGUN or ONWARD. A stage that is done takes the first two only.
    """

    keys: tuple[str, ...]
    effect: str
    condition: str = ""
    rule: Rule = lambda difference, run: None


def same_past(difference: Difference, run: Resumed) -> str | None:
    """Whether every step done would have had the same learning rate (and all else that is scheduled)."""
    if run.now.training.steps < run.step:
        return f"{run.step} steps are done"
    lr = {"lr": run.before.optimizer.lr}  # it has a rule of its own
    now = run.now.model_copy(update={"optimizer": run.now.optimizer.model_copy(update=lr)})
    for step in range(run.step):
        if scheduled(step, run.before) != scheduled(step, now):
            return f"step {step}, which is done, would have had another learning rate"
    return None


def lower(difference: Difference, run: Resumed) -> str | None:
    """Whether a number became smaller."""
    return None if difference.now < difference.was else "it may only become lower"


def same_text(difference: Difference, run: Resumed) -> str | None:
    """Whether the place of a source can hold the same text; `Mixture.counts_since` compares the text itself."""
    place = place_of(run.now.data.sources[int(difference.key.split(".")[2])])
    return None if place in ("files", "store") else "only files and token stores are recognised by their text"


def rows_to_come(difference: Difference, run: Resumed) -> str | None:
    """Whether only rows are skipped, or no longer skipped, that no step has had."""
    past = sorted(row for row in set(difference.was) ^ set(difference.now) if row < run.row)
    return f"the rows before {run.row} are done" if past else None


def added(difference: Difference, run: Resumed) -> str | None:
    """Whether a source was added, rather than taken away."""
    return "a source that was read cannot be left out" if difference.now is None else None


CHANGES = (
    Change(
        ("training.steps", "optimizer.schedule", "optimizer.decay_share", "optimizer.min_lr_ratio"),
        AS_BEGUN,
        "every step done would have had the same learning rate: with `constant`, always; with `wsd`, until its decay "
        "begins, before or after the change; with `cosine`, during warmup. Not below the steps done",
        same_past,
    ),
    Change(("optimizer.lr",), ONWARD, "lower", lower),
    Change(("data.sources.N.path",), SAME, "the same text in another place (files and token stores)", same_text),
    Change(("data.sources.N",), ONWARD, "sources added at the end; from the next chunk of rows of a shard on", added),
    Change(
        ("documents",),
        ONWARD,
        "added at the end of a local source: lines of its last JSONL file, files whose names sort behind all others, "
        "parts of a store (`--append`); they are read from the first epoch that no shard has begun",
    ),
    Change(("data.sources.N.weight",), ONWARD, "from the next chunk of rows of a shard on"),
    Change(("training.skip_rows",), AS_BEGUN, "rows that no step has had", rows_to_come),
    Change(("training.micro_batch_rows",), ROUNDED, "`training.batch_rows` stays"),
    Change(
        ("training.fsdp", "machine.shard_over", "machine.hold_gradients", "processes"),
        ROUNDED,
        "the number of processes must divide `training.batch_rows`",
    ),
    Change(("training.compile", "training.gradient_checkpointing", "model.attention"), ROUNDED),
    Change(
        (
            "data.skip_unusable",
            "training.checkpoint_every",
            "training.keep_last",
            "training.keep_every",
            "training.evaluate_rows",
            "training.evaluate_every",
            "training.profile_every",
            "training.trackers",
            "model.export_dtype",
            "decoding",
            "machine.gpu",
            "machine.gpus",
        ),
        SAME,
    ),
)

NO_KEYS = {"documents": "more documents", "processes": "the number of processes"}
"""How the table names what is no key of the configuration: documents of a source, and the processes that torchrun or
accelerate start."""
MAY_CHANGE = {key: change for change in CHANGES for key in change.keys}


def table() -> str:
    """CHANGES as Markdown."""
    rows = [
        (", ".join(NO_KEYS.get(key, f"`{key}`") for key in c.keys), c.condition or "always", c.effect) for c in CHANGES
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in (("what", "when", "effect"), ("---",) * 3, *rows)) + "\n"


def check_differences(
    saved: Mapping[str, Any], config: AdaptConfig, failure: str, *, step: int, row: int, done: bool = False
) -> list[str]:
    """In words, what differs from the configuration that a run was saved with and may differ.

    Args:
        saved: that configuration.
        step, row: the steps that the stage has done, and the number of its next row.
        done: the stage has come to its end.
    Raises:
        UsageError: what may not.
    """
    taken: list[str] = []
    refused: list[str] = []
    training = {key: value for key, value in saved["training"].items() if key != "checkpoint"}  # of older versions
    before = validate(AdaptConfig, {**saved, "training": training})  # keys that are new since have their defaults
    run = Resumed(before, config, step, row)
    for difference in differences(run.before.model_dump(mode="json"), config.model_dump(mode="json")):
        key = re.sub(r"\.\d+", ".N", difference.key)
        change = MAY_CHANGE.get("decoding" if key.startswith("decoding.") else key)
        if change is None:
            refused.append(str(difference))
        elif done and change.effect in (AS_BEGUN, ONWARD):
            refused.append(f"{difference} (set it in a stage to come)")
        elif why := change.rule(difference, run):
            refused.append(f"{difference} ({why})")
        else:
            taken.append(str(difference))
    if refused:
        raise UsageError(
            f"{failure}: {'; '.join(refused)}; set them back, or start in a new --output. What may change is a table "
            "in docs/distributed.md"
        )
    return taken


def differences(was: Any, now: Any, key: str = "") -> Iterator[Difference]:
    """Where two configurations of plain values differ, key by key; `output` may."""
    pairs: Iterator[tuple[Any, Any, Any]] = iter(())
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        pairs = ((name, was.get(name), now.get(name)) for name in sorted(was.keys() | now.keys()) if name != "output")
    elif isinstance(was, list) and isinstance(now, list) and any(isinstance(value, dict) for value in (*was, *now)):
        pairs = ((number, one, other) for number, (one, other) in enumerate(zip_longest(was, now)))
    elif was != now:
        yield Difference(key, was, now)
    for name, one, other in pairs:
        yield from differences(one, other, f"{key}.{name}" if key else str(name))
