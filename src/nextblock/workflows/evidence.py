"""What the runs of an experiment say together: means with intervals over seeds, as a table and as a plot."""

from __future__ import annotations

import math
import re
import statistics
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from nextblock.config.errors import UsageError, nearest
from nextblock.measure.style import BLUE, LABEL, MUTED, ORANGE, canvas
from nextblock.measure.words import DASH
from nextblock.workflows.experiment import Experiment

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""0.975 quantiles of Student's t with 1, 2, ... degrees of freedom."""

TITLE_WIDTH = 24  # characters of a line
NOTE = "small dot: one seed; large dot and bar: mean and 95 % interval (an accuracy's ends at 0 and 1); n: seeds"

Results = Mapping[tuple[str, int], Mapping[str, Any]]  # of `read_results`


class Estimate(NamedTuple):
    """Mean over seeds, half the width of its 95 % interval (nan for one seed), and the number of seeds."""

    mean: float
    half: float
    seeds: int

    def apart(self, other: Estimate) -> bool:
        """Whether the two intervals have nothing in common."""
        return abs(self.mean - other.mean) > self.half + other.half

    def __str__(self) -> str:
        digits = 2 if abs(self.mean) >= 1 else 3
        return f"{self.mean:.{digits}f}" + ("" if math.isnan(self.half) else f" ± {self.half:.{digits}f}")


def estimate(values: list[float]) -> Estimate:
    """Mean and 95 % interval by Student's t, the runs taken as independent and their figures as normal."""
    count = len(values)
    if count < 2:
        return Estimate(values[0], math.nan, count)
    return Estimate(statistics.mean(values), student(count - 1) * statistics.stdev(values) / math.sqrt(count), count)


def student(freedom: int) -> float:
    """The 0.975 quantile of Student's t; beyond the table the Cornish-Fisher expansion, right to 1e-3 there."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = statistics.NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def estimates(experiment: Experiment, results: Results) -> dict[str, dict[str, Estimate]]:
    """For each figure, in the order to be shown, the estimate of each arm that has it."""
    names = list(dict.fromkeys(name for one in results.values() for name in one["figures"]))
    found = {}
    for name in experiment.figures if {arm for arm, _ in results} == {*experiment.arms} else ():
        if name not in names:
            raise UsageError(f"figures: no run has '{name}'{nearest(name, names)}")
    for name in experiment.figures or names:
        values: dict[str, list[float]] = {arm: [] for arm in experiment.arms}
        for (arm, _), one in results.items():
            if name in one["figures"]:
                values[arm].append(one["figures"][name])
        found[name] = {arm: estimate(some) for arm, some in values.items() if some}
    return found


def difference(experiment: Experiment, results: Results, name: str, arm: str, other: str) -> Estimate | None:
    """A figure of one arm less that of another, paired by seed; None where no seed has both."""

    def value(arm: str, seed: int) -> float | None:
        return results.get((arm, seed), {"figures": {}})["figures"].get(name)

    pairs = [(value(arm, seed), value(other, seed)) for seed in experiment.seeds]
    gaps = [one - two for one, two in pairs if one is not None and two is not None]
    return estimate(gaps) if gaps else None


def filled(text: str, experiment: Experiment, results: Results) -> str:
    """A text with the mean and interval of a figure in place of each `{figure|arm}`, and those of a difference, paired
    by seed, in place of each `{figure|arm less other}`.

    Raises:
        UsageError: no such figure or arm has a number.
    """
    shown = estimates(experiment.model_copy(update={"figures": ()}), results)

    def number(match: re.Match[str]) -> str:
        name, arm = match.groups()
        if arm in shown.get(name, {}):
            return str(shown[name][arm])
        one, less, other = arm.partition(" less ")
        gap = difference(experiment, results, name, one, other) if less else None
        if gap is None:
            raise UsageError(f"there is no number for {match.group()}; name a figure and an arm that has run")
        return _signed(gap)

    return re.sub(r"\{([^|{}]+)\|([^{}]+)\}", number, text)


def markdown_table(experiment: Experiment, results: Results) -> str:
    """A row for each arm, a column for each figure: mean ± half of the 95 % interval, and below it the paired
    difference from the first arm."""
    shown = estimates(experiment, results)
    lines = ["| arm | seeds | " + " | ".join(shown) + " |", "|---|---|" + "---|" * len(shown)]
    for arm in experiment.arms:
        count = sum(one == arm for one, _ in results)
        cells = [str(by_arm.get(arm, DASH)) for by_arm in shown.values()]
        lines.append(f"| {arm} | {count} | " + " | ".join(cells) + " |")
    first, *others = experiment.arms
    for arm in others:
        gaps = [difference(experiment, results, name, arm, first) for name in shown]
        cells = [_signed(gap) if gap else DASH for gap in gaps]
        lines.append(f"| *{arm} less {first}* | | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _signed(gap: Estimate) -> str:
    return f"{gap.mean:+.3f}" + ("" if math.isnan(gap.half) else f" ± {gap.half:.3f}")


def plot(experiment: Experiment, results: Results) -> Figure:
    """A panel for each figure: a dot for each seed, and the mean with its 95 % interval. Arms that are numbers are
    drawn against these."""
    shown = estimates(experiment, results)
    arms = list(experiment.arms)
    numeric = all(_is_number(arm) for arm in arms)
    columns = 2 if len(shown) == 4 else min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    width = columns * (3.4 if numeric else 2.6 + 0.07 * max(map(len, arms)))  # titles fit beside the names of arms
    height = rows * (2.6 if numeric else 0.9 + 0.32 * len(arms))
    figure, axes = canvas(rows, columns, (width, height + 0.3), layout="constrained")
    for panel, (name, by_arm) in zip(axes.flat, shown.items(), strict=False):
        at = {arm: float(arm) if numeric else -arms.index(arm) for arm in by_arm}
        seeds = [(at[arm], one["figures"][name]) for (arm, _), one in results.items() if name in one["figures"]]
        places, values = list(at.values()), [found.mean for found in by_arm.values()]
        bars = list(zip(*(_bar(found, share=name.endswith("accuracy")) for found in by_arm.values()), strict=True))
        style: dict[str, Any] = {"color": BLUE, "marker": "o", "markersize": 5, "capsize": 3, "linewidth": 1.4}
        dots: dict[str, Any] = {"color": ORANGE, "alpha": 0.6, "markersize": 4, "zorder": 3}
        if numeric:
            panel.plot(*zip(*seeds, strict=True), ".", **dots)
            panel.errorbar(places, values, yerr=bars, **style)
            panel.set_xscale("log", base=2)
            panel.set_xticks(places, [f"{arm}\nn = {found.seeds}" for arm, found in by_arm.items()])
            panel.minorticks_off()
        else:
            panel.plot(*zip(*[(value, place) for place, value in seeds], strict=True), ".", **dots)
            panel.errorbar(values, places, xerr=bars, linestyle="", **style)
            panel.set_yticks(places, [f"{arm} (n = {found.seeds})" for arm, found in by_arm.items()], color=MUTED)
            panel.set_ylim(-len(arms) + 0.4, 0.6)
        panel.set_title(textwrap.fill(name, TITLE_WIDTH), **LABEL)
    for panel in list(axes.flat)[len(shown) :]:
        panel.remove()
    figure.supxlabel(textwrap.fill(NOTE, int(15 * width)), fontsize=8, color=MUTED)
    return figure


def _bar(found: Estimate, *, share: bool) -> tuple[float, float]:
    """How far an interval reaches below and above its mean: that of a share within 0 and 1, of one seed nowhere."""
    if math.isnan(found.half):
        return 0.0, 0.0
    return (min(found.half, found.mean), min(found.half, 1 - found.mean)) if share else (found.half, found.half)


def _is_number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False
