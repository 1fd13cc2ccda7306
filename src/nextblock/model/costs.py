"""What a pass of a model costs on this machine, by width and rows, and how many drafts pay by that.

The costs are kept in the user's cache folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, islice, repeat, zip_longest
from math import inf
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator
from rich.console import Console
from torch import nn

from nextblock.config.files import write_whole

LEAST, MOST, ENOUGH = 3, 30, 0.6
"""How often passes of a kind are timed: few times, and more for so many seconds."""

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass
class Share:
    """How many drafts were kept, of those kept or rejected; each time before counts `memory` as much.

    An estimate starts from what is given here.
    """

    kept: float = 0.0
    tried: float = 0.0
    memory: float = 0.9

    def learn(self, kept: float, tried: float) -> None:
        """Take in what became of a draft."""
        self.kept, self.tried = self.memory * self.kept + kept, self.memory * self.tried + tried

    def chance(self, prior: float, weight: float = 4.0) -> float:
        """Of a draft to be kept, if all before it are; with a prior that counts as many drafts as `weight` says."""
        return (self.kept + weight * prior) / (self.tried + weight)


@dataclass
class Places:
    """How many drafts were kept at each place of a draft, of those that were kept or rejected there.

    Each time before counts `memory` as much. A place starts from the one before it, the first from `prior`.
    """

    kept: list[float] = field(default_factory=list)
    tried: list[float] = field(default_factory=list)
    memory: float = 0.97
    prior: float = 0.8

    def learn(self, found: Sequence[tuple[float, float]]) -> None:
        """Take in what became of a draft, from its first place on: from `outcome`."""
        for part, own in ((self.kept, [kept for kept, _ in found]), (self.tried, [tried for _, tried in found])):
            part[:] = [self.memory * old + new for old, new in zip_longest(part, own, fillvalue=0.0)]

    def chances(self, count: int) -> list[float]:
        """Of a draft to be kept at each place, if all before it are."""
        found, chance = [], self.prior
        for kept, tried in islice(chain(zip(self.kept, self.tried, strict=False), repeat((0.0, 0.0))), count):
            chance = (kept + 2 * chance) / (tried + 2)
            found.append(chance)
        return found


def outcome(kept: int, checked: int, beyond: Sequence[float]) -> list[tuple[float, float]]:
    """Of each place of a draft: how much was kept, and how much was tried.

    Where all that was checked was kept, what would have become of the drafts `beyond` counts as far as it is likely,
    by the draft's own chances. Without these only sure drafts would ever count, as others are not checked.
    """
    found, reached = [(float(place < kept), 1.0) for place in range(min(kept + 1, checked))], 1.0
    for chance in beyond if kept == checked else ():
        found.append((reached * chance, reached))
        reached *= chance
    return found


@dataclass
class Pause:
    """When drafting that does not pay is tried again: after `first` cycles, then after 2, 4 and 8 times as many."""

    wait: int = 0
    cycles: int = 0

    def decide(self, best: int, longest: int, first: int) -> int:
        """Drafts of the next cycle, 0 for none: the `best` number while that pays, else now and then the `longest`."""
        if best:
            self.wait = self.cycles = 0
            return best
        self.cycles = self.cycles or first
        self.wait = (self.wait or self.cycles) - 1
        if self.wait:
            return 0
        self.cycles = min(2 * self.cycles, 8 * first)
        return longest


class Costs(BaseModel):
    """Seconds of the passes of speculative decoding; what lies between measured sizes is interpolated.

    of: the model and the machine, from `fingerprint`.
    check: rows -> width -> a causal pass. draft: rows -> the pass that drafts, with the free token.
    alone: rows -> the pass that drafts without it.
    block: tokens of the block for which `draft` and `alone` were measured; None: whichever is asked for.
    share, first, pause: what was kept lately, of drafts behind the free token and of those in its place, and when
        drafting is tried again, in all greedy calls of this process.
    """

    of: dict[str, str] = Field(default_factory=dict)
    check: dict[Count, dict[Count, Seconds]] = Field(default_factory=dict)
    draft: dict[Count, Seconds] = Field(default_factory=dict)
    alone: dict[Count, Seconds] = Field(default_factory=dict)
    block: int | None = Field(default=None, exclude=True)
    share: Places = Field(default_factory=Places, exclude=True)
    first: Share = Field(default_factory=lambda: Share(1.9, 2.0, memory=0.97), exclude=True)
    pause: Pause = Field(default_factory=Pause, exclude=True)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if not self.check.keys() == self.draft.keys() == self.alone.keys() or any(
            1 not in line for line in self.check.values()
        ):
            raise ValueError("some passes are missing")
        return self

    def unlearned(self) -> Costs:
        """The same passes, and nothing kept or lost yet."""
        return Costs(of=self.of, check=self.check, draft=self.draft, alone=self.alone, block=self.block)

    def of_rows(
        self, rows: int, block: int, longest: int, step: int = 1
    ) -> tuple[list[float], list[float], list[float]]:
        """For so many rows: causal passes over 0 ... 1 + `longest` tokens, and passes that make 0, 1, ... drafts.

        Passes over 0 tokens cost nothing. A pass that drafts, with the free token and without, is measured for a whole
        block; over other tokens, a multiple of `step`, it costs as much more or less as a causal one does.
        """
        whole = self.block or block
        check = [
            _between({number: _between(line, width) for number, line in self.check.items()}, rows)
            for width in range(1, max(block, longest, whole) + 2)
        ]
        widths = [min(-(-width // step) * step, block) for width in range(1, block + 1)]
        draft = [_between(self.draft, rows) * check[width] / check[whole] for width in widths[1:]]
        alone = [_between(self.alone, rows) * check[width - 1] / check[whole - 1] for width in widths]
        return [0.0, *check[: max(block, longest) + 1]], draft, alone


NOMINAL = Costs(
    check={1: {1: 1.0, 16: 2.0}, 32: {1: 3.0, 16: 33.0}}, draft={1: 2.0, 32: 33.0}, alone={1: 2.0, 32: 33.0}
)
"""In steps of AR for one row, 16 more tokens of any row as dear as one: for what must not depend on the machine."""


def _between(points: dict[int, float], at: int) -> float:
    """On the line between the two points around `at`; in front of all the first, behind them in proportion."""
    known = sorted(points)
    if at <= known[0]:
        return points[known[0]]
    if at >= known[-1]:
        return points[known[-1]] * at / known[-1]
    high = bisect_left(known, at)
    low, high = known[high - 1], known[high]
    return points[low] + (points[high] - points[low]) * (at - low) / (high - low)


def kept_by(chances: Sequence[float]) -> list[float]:
    """Of the first n drafts, n = 0, 1, ...: how many are kept, expected; each with its chance if all before are."""
    kept, reached = [0.0], 1.0
    for chance in chances:
        reached *= chance
        kept.append(kept[-1] + reached)
    return kept


def best_length(
    kept: Sequence[Sequence[float]], check: Sequence[float], draft: Sequence[float] | float, sure: int = 2
) -> tuple[float, int]:
    """The most tokens that a cycle brings in its time, and the number n of drafts for which it does; 0: none.

    All rows share the two passes of a cycle, so each may have as many drafts as any, up to the end of its list.

    Args:
        kept: of each row, from `kept_by`.
        check: cost of a causal pass over 0, 1, ... tokens.
        draft: cost of the pass that makes 0, 1, ... drafts, where 0 stands for a plain pass; a number: that of the
            pass that has made them already.
        sure: tokens that a cycle brings whatever is kept: 2 with the free token, else 1.
    """

    def speed(n: int) -> float:
        tokens = sum(sure + line[min(n, len(line) - 1)] for line in kept)
        before = draft if isinstance(draft, int | float) else draft[n] if n else check[1]
        return tokens / (check[1 + n] + before)

    best = max(range(max(map(len, kept))), key=speed)
    return speed(best), best


def fingerprint(model: nn.Module, *more: Any) -> dict[str, str]:
    """What the cost of a pass depends on: shapes and dtypes of the model, and what else is told; and the machine."""
    tensors = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    device = next(model.parameters()).device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else _processors()
    return {
        "model": hashlib.sha256(repr((tensors, more, torch.get_num_threads())).encode()).hexdigest()[:16],
        "machine": f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }


@cache
def _processors() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} x {name}"


def busy(device: torch.device) -> bool:
    """Whether other work would spoil the times: of narrow and wide passes not alike."""
    return device.type == "cpu" and hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) + 0.5


def rounded_rows(rows: int) -> int:
    """The next power of two: a batch that shrinks row by row meets few sizes."""
    return 1 << (rows - 1).bit_length()


def rounded_width(width: int) -> int:
    """1, or a multiple of 8 tokens: a draft's pass is one wider than a block."""
    return width if width == 1 else -(-width // 8) * 8


def rounded_capacity(slots: int) -> int:
    """A power of two, 256 or more: each size is compiled for each number of rows and tokens."""
    return max(256, 1 << (slots - 1).bit_length())


def costs_file(of: dict[str, str]) -> Path:
    """Where they are kept: nextblock/ in XDG_CACHE_HOME, or in ~/.cache. OSError where there is no such place."""
    try:
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no HOME, and a user whom the system does not know
        raise FileNotFoundError(errno.ENOENT, "there is no home folder; set XDG_CACHE_HOME") from None
    return Path(folder) / "nextblock" / f"costs-{of['model']}.json"


def first_pause(check: Sequence[float], draft: float) -> int:
    """Cycles after which drafting is tried again, so that all tries take a hundredth of the time; 4 at least.

    A try that ends without a check takes so much more as a pass that drafts costs more than a plain one.
    """
    return max(4, round(50 * (draft / check[1] - 1)))


def read_costs(of: dict[str, str]) -> Costs:
    """What is kept for this model and machine; else empty costs, after a warning if there is something of no use."""
    costs, why = _kept(of)
    if why:
        warnings.warn(f"the costs of passes in {costs_file(of)} {why}; they are measured again", stacklevel=2)
    return costs


def _kept(of: dict[str, str]) -> tuple[Costs, str]:
    """What is kept for this model and machine, else empty costs; and why what is there is of no use."""
    why = ""
    try:
        costs = Costs.model_validate_json(costs_file(of).read_bytes())
        if costs.of == of:
            return costs, ""
        why = f"are of another machine ({costs.of.get('machine', 'unknown')})"
    except FileNotFoundError:
        pass
    except (OSError, ValidationError):
        why = "cannot be read"
    return Costs(of=of), why


def least_times(kinds: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds that each takes: the least of some times each, in turns, after one that warms up."""
    least, number, began = [inf] * len(kinds), 0, time.perf_counter()
    while number <= LEAST or (number <= MOST and time.perf_counter() - began < ENOUGH):
        for index, kind in enumerate(kinds):
            before = time.perf_counter()
            kind()
            least[index] = min(least[index], time.perf_counter() - before)
        if not number:
            left = max(min(ENOUGH, MOST * (time.perf_counter() - began)), LEAST * (time.perf_counter() - began))
            Console(stderr=True).print(f"passes are timed, once for this model and machine: about {left:.1f} s")
        number += 1
    return least


def write_costs(costs: Costs) -> None:
    """Keep them for later processes, where the disk lets us, with what others have kept since they were read."""
    path: Path | str = "the cache folder"
    try:
        path = costs_file(costs.of)
        kept, _ = _kept(costs.of)
        for rows, line in kept.check.items():
            if rows not in costs.check:
                costs.check[rows], costs.draft[rows], costs.alone[rows] = line, kept.draft[rows], kept.alone[rows]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(costs.model_dump(), indent=1).encode())
    except OSError as error:
        warnings.warn(f"the costs of passes could not be kept in {path}: {error.strerror}", stacklevel=2)
