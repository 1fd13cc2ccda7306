"""The report's figures: loss curves, and accuracy against speed."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from html import escape
from itertools import pairwise, product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from nextblock.measure import words
from nextblock.measure.style import BLUE, GREEN, INK, LABEL, LINE, MUTED, ORANGE, Entry, canvas

WIDTH = 7.4  # inches
CSS_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", BLUE: "blue", ORANGE: "orange", GREEN: "green"}
"""What replaces the colours on the page, which has a light and a dark look."""
KINDS = {  # (model, mode): legend, colour, marker
    ("parent", "ar"): ("parent, AR", INK, "D"),
    ("adapted", "ar"): ("adapted, AR", BLUE, "s"),
    ("adapted", "diffusion"): ("adapted, diffusion", ORANGE, "o"),
    ("adapted", "speculative"): ("adapted, speculative", GREEN, "^"),
}


def tasks_of(decoding: Sequence[Entry]) -> list[str]:
    """The tasks of the entries, each once, in their order."""
    return list(dict.fromkeys(entry["task"] for entry in decoding))


def of_kind(entries: Sequence[Entry], model: str, mode: str) -> list[Entry]:
    """The entries of one model in one mode."""
    return [entry for entry in entries if entry["model"] == model and entry["mode"] == mode]


def plot_losses(
    log: Sequence[Entry],
    growth: Sequence[Sequence[int]] | None = None,
    stages: Sequence[tuple[int, str]] | None = None,
) -> Figure:
    """Diffusion and AR loss against the step, in nats per scored token.

    Thin: each step. Thick: the mean of the last n steps at the same block size, n stated in the figure; it
    starts anew where the block grows, so no mean mixes two block sizes.

    Args:
        log: steps, as `training.run.StepMetrics` writes them; a loss may be NaN or null (nothing was scored).
        growth: (step, block size) of each growth; default: as the log has it.
        stages: (first step, name) of each stage.
    """
    step = np.array([entry["step"] for entry in log], dtype=float)
    sizes = [entry["block_size"] for entry in log]
    changes = [0, *(i for i in range(1, len(log)) if sizes[i] != sizes[i - 1]), len(log)]
    window = max(1, len(log) // 50)
    figure, axes = canvas(1, 1, (WIDTH, 3.3))
    top = 0.0
    for field, name, colour in (("diffusion_loss", "diffusion loss", ORANGE), ("ar_loss", "AR loss", BLUE)):
        values = np.array([math.nan if entry[field] is None else entry[field] for entry in log], dtype=float)
        if np.isnan(values).all():
            continue
        mean = np.full(len(log), math.nan)
        for start, end in pairwise(changes):
            mean[start:end] = _trailing_mean(values[start:end], window)
        many = len(log) > 4000  # as a picture, or the page would grow by megabytes
        axes[0, 0].plot(step, values, color=colour, alpha=0.25, linewidth=0.7, rasterized=many)
        broken = (np.insert(line, changes[1:-1], math.nan) for line in (step, mean))
        axes[0, 0].plot(*broken, color=colour, linewidth=1.8, label=name)
        top = max(top, float(np.nanmax(mean)), float(np.nanquantile(values, 0.99)))
    axes[0, 0].set(xlim=(0, step[-1] + 1 if len(log) else 1), ylim=(0, top * 1.08 or 1))
    axes[0, 0].set_xlabel("step", **LABEL)
    axes[0, 0].set_ylabel("loss (nats per scored token)", **LABEL)
    if len(log):
        _mark_growth(axes[0, 0], growth or [(log[i]["step"], sizes[i]) for i in changes[:-1]])
        _mark_stages(axes[0, 0], stages or ())
    figure.subplots_adjust(left=0.075, right=0.97, top=0.82, bottom=0.14)
    _legend(figure, axes[0, 0].get_legend_handles_labels()[0], left=0.06)
    if window > 1:
        note = f"thick: mean of the last {window} steps at one block size"
        figure.text(0.97, 0.955, note, fontsize=8.5, color=MUTED, ha="right", va="center")
    return figure


def plot_profile(profiles: Sequence[Entry]) -> Figure:
    """Diffusion loss by masked share of the block and by place in it: a line for each block size, its last profile.

    Args:
        profiles: records of `training.log.LossProfile`; a bin without tokens is null.
    """
    last = {entry["block_size"]: entry for entry in profiles}
    figure, axes = canvas(1, 2, (WIDTH, 3.0), sharey="row")
    handles = []
    for rank, size in enumerate(sorted(last), 1):
        noise, offset = last[size]["loss_by_noise"], last[size]["loss_by_offset"]
        style: dict[str, Any] = {
            "color": ORANGE, "alpha": 0.25 + 0.75 * rank / len(last), "linewidth": 0.8 + 1.2 * rank / len(last),
            "marker": "o", "markersize": 3,
        }  # fmt: skip
        # Only bins that had tokens, joined: small blocks can be masked in few ways.
        shares = [(100 * (k + 0.5) / len(noise), loss) for k, loss in enumerate(noise) if loss is not None]
        offsets = [(k * size / len(offset), loss) for k, loss in enumerate(offset) if loss is not None]
        axes[0, 0].plot(*zip(*shares, strict=True), **style)
        handles += axes[0, 1].plot(*zip(*offsets, strict=True), label=f"b = {size}", **style)
    axes[0, 0].set_xlabel("masked share of the block (%)", **LABEL)
    axes[0, 0].set_ylabel("diffusion loss (nats)", **LABEL)
    axes[0, 0].set(xlim=(0, 100))
    axes[0, 1].set_xlabel("offset in the block (tokens)", **LABEL)
    axes[0, 1].set(xlim=(0, max(last, default=1)), ylim=(0, None))
    axes[0, 1].tick_params(labelleft=False)
    figure.subplots_adjust(left=0.075, right=0.985, wspace=0.1, top=0.87, bottom=0.16)
    _legend(figure, handles, left=0.06, columns=8)
    return figure


def _legend(figure: Figure, handles: Sequence[Any], left: float, columns: int = 4) -> None:
    """The figure's legend, in one line along its upper edge."""
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(left, 1.0), ncols=columns, fontsize=9, frameon=False,
        labelcolor=INK, handletextpad=0.4, columnspacing=1.4, borderaxespad=0.1,
    )  # fmt: skip


def _mark_stages(axes: Axes, stages: Sequence[tuple[int, str]]) -> None:
    """A line where a stage begins, with its name."""
    for step, name in stages:
        axes.axvline(step, color=INK, linewidth=1.0)
        axes.text(step, 0.02, f" {name}", transform=axes.get_xaxis_transform(), fontsize=8.5, color=INK, rotation=90)


def _mark_growth(axes: Axes, growth: Sequence[Sequence[int]]) -> None:
    """A vertical line where the block grows, labelled with its new size where there is room."""
    last = axes.get_xlim()[1]
    free_from = -math.inf
    for number, (step, size) in enumerate(growth):
        if step > last:
            break
        axes.axvline(step, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
        if step >= free_from:
            text = f"b = {size}" if number == 0 else str(size)
            axes.text(step, 1.02, text, transform=axes.get_xaxis_transform(), fontsize=8.5, color=INK)
            free_from = step + (0.075 if number == 0 else 0.035) * last


def _trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values at each place, fewer at the start; NaN values do not count."""
    known, ones = ~np.isnan(values), np.ones(window)
    total = np.convolve(np.where(known, values, 0.0), ones)[: len(values)]
    count = np.convolve(known, ones)[: len(values)].round()
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def plot_tradeoff(decoding: Sequence[Entry], measure: str = "accuracy") -> Figure:
    """Accuracy against tokens per forward and tokens per second; a row of panels for each task.

    Diffusion settings of one block size are joined in the order of their threshold and labelled with their
    threshold ("1/step" is one token per denoising step); the dashed line is the parent's accuracy.

    Args:
        decoding: as `results.json` has it. An entry may say that its point is `hollow` or `ringed`, is not `joined`
            with the others, or has a `label` of its own.
        measure: what is called accuracy.
    """
    tasks = tasks_of(decoding)
    figure, axes = canvas(max(1, len(tasks)), 2, (WIDTH, 3.5 if len(tasks) < 2 else 3.1 * len(tasks)), sharey="row")
    figure.subplots_adjust(
        left=0.085, right=0.985, wspace=0.12, hspace=0.42, top=1 - 0.42 / figure.get_figheight(),
        bottom=0.48 / figure.get_figheight(),
    )  # fmt: skip
    fields = (("tokens_per_forward", "tokens per forward"), ("tokens_per_second", "tokens per second"))
    for row, task in zip(axes, tasks, strict=False):
        entries = [entry for entry in decoding if entry["task"] == task]
        for panel, (field, label) in zip(row, fields, strict=True):
            _tradeoff_panel(panel, entries, field)
            panel.set_xlabel(label, **LABEL)
        row[0].set_ylabel(f"{measure} (%)", **LABEL)
        row[1].tick_params(labelleft=False)
        if len(tasks) > 1:
            row[0].set_title(words.spaced(task), loc="left", fontsize=9.5, color=INK, parse_math=False)
    shown = {(entry["model"], entry["mode"]) for entry in decoding}
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=6, linestyle="", label=name,
               markerfacecolor="none" if kind[0] == "parent" else colour)
        for kind, (name, colour, marker) in KINDS.items() if kind in shown
    ]  # fmt: skip
    _legend(figure, handles, left=0.07)
    return figure


def _tradeoff_panel(axes: Axes, entries: Sequence[Entry], field: str) -> None:
    """Points, lines and labels of one task against one measure of speed."""
    points = [e for e in entries if (e["model"], e["mode"]) in KINDS and e[field] is not None]
    accuracy = [100 * e["accuracy"] for e in entries]
    margin = 0.16 * max(max(accuracy) - min(accuracy), 5.0)
    axes.set_ylim(min(accuracy) - margin, max(accuracy) + margin)
    axes.set_xlim(0, 1.12 * max([e[field] for e in points], default=1.0))
    for entry in of_kind(points, "parent", "ar"):
        axes.axhline(100 * entry["accuracy"], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    diffusion = sorted(of_kind(points, "adapted", "diffusion"), key=lambda e: -(e["threshold"] or 2.0))
    curves = []
    joined = [e for e in diffusion if e.get("joined", True)]
    for size in sorted({e["block_size"] for e in joined}):
        curves.append([(e[field], 100 * e["accuracy"]) for e in joined if e["block_size"] == size])
        axes.plot(*zip(*curves[-1], strict=True), color=ORANGE, linewidth=1.1, alpha=0.6)
    labels = []
    for entry in points:
        model, mode = entry["model"], entry["mode"]
        _, colour, marker = KINDS[model, mode]
        x, y, face = (
            entry[field],
            100 * entry["accuracy"],
            "none" if entry.get("hollow", model == "parent") else colour,
        )
        size = 9 if model == "parent" else 6
        axes.plot([x], [y], marker, color=colour, markersize=size, zorder=3, markerfacecolor=face)
        if entry.get("ringed"):
            axes.plot([x], [y], "o", color=INK, markerfacecolor="none", markersize=12, markeredgewidth=1.4)
        said = []
        if mode == "diffusion":
            said.append("1/step" if entry.get("threshold") is None else f"{entry['threshold']:g}")
        if mode != "ar" and len({e["block_size"] for e in of_kind(points, model, mode)}) > 1:
            said.append(f"b={entry['block_size']}")
        labels.append((x, y, entry.get("label", " ".join(said)), colour))
    _place_labels(axes, labels, curves)


def _place_labels(
    axes: Axes,
    points: Sequence[tuple[float, float, str, str]],
    curves: Sequence[Sequence[tuple[float, float]]],
) -> None:
    """Write each point's label as near as can be where it covers no marker, no curve and no other label.

    Args:
        axes: panel whose limits and place in the figure are final.
        points: x, y in data units, text ("" for none), colour.
        curves: polylines in data units.
    """
    drawing = FigureCanvasAgg(axes.get_figure(root=True))  # type: ignore[arg-type]
    renderer, frame, scale = drawing.get_renderer(), axes.get_window_extent(), drawing.figure.dpi / 72
    centres = [axes.transData.transform((x, y)) for x, y, _, _ in points]
    taken = [_box(x, y, 10 * scale, 10 * scale) for x, y in centres]
    for curve in curves:
        for start, end in pairwise(axes.transData.transform(curve)):
            taken += [_box(x, y, scale, scale) for x, y in np.linspace(start, end, 40)]
    around = [(math.cos(a), math.sin(a)) for a in np.deg2rad([90, 270, 45, 135, 315, 225, 0, 180])]
    for (x, y, text, colour), (px, py) in zip(points, centres, strict=True):
        if not text:
            continue
        note = axes.annotate(
            text, (x, y), xytext=(0, 0), textcoords="offset points", ha="center", va="center", fontsize=8,
            color=colour, parse_math=False, arrowprops={"arrowstyle": "-", "linewidth": 0.6, "color": colour},
        )  # fmt: skip
        size = Text.get_window_extent(note, renderer)
        half = 0.5 * size.width / scale  # of the text, in points
        box, distance = size, 0
        for distance, (across, up) in product((9, 14, 20, 27, 35, 44, 54, 65), around):
            note.xyann = ((distance + half) * across, distance * up)
            box = _box(px + note.xyann[0] * scale, py + note.xyann[1] * scale, size.width + 2, size.height + 2)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        if distance <= 14 and note.arrow_patch:
            note.arrow_patch.set_visible(False)  # so near that no line is needed
        taken.append(box)


def _box(x: float, y: float, width: float, height: float) -> Bbox:
    """A box by its centre and size."""
    return Bbox.from_bounds(x - width / 2, y - height / 2, width, height)


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """A figure as an SVG element: colours follow the page's, ids are its own, no metadata."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    unused = r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->"
    svg = re.sub(unused, "", svg[svg.index("<svg") :], flags=re.S)
    box = re.search(r'viewBox="([^"]*)"', svg)
    opening = f'<svg viewBox="{box[1] if box else ""}" role="img" aria-label="{escape(description)}">'
    svg = opening + svg[svg.index(">") + 1 :]
    ids = {old: f"{name}-{number}" for number, old in enumerate(re.findall(r'\bid="([^"]+)"', svg))}
    svg = re.sub(
        r'(?<=\bid=")[^"]+|(?<=href="#)[^"]+|(?<=url\(#)[^)]+', lambda found: ids.get(found[0], found[0]), svg
    )
    for colour, variable in CSS_VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg
