"""Tables and plots of benchmarks and tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from nextblock.measure import words
from nextblock.measure.report.figures import plot_tradeoff
from nextblock.measure.style import BLUE, INK, LABEL, MODE_COLOURS, MUTED, Entry, canvas
from nextblock.training.devices import GIB


def speed_table(entries: Sequence[Entry]) -> Table:
    """What `bench decode` prints: one line for each contestant and batch size."""
    caption = "× generate: tokens per second over transformers' generate, median (lowest to highest round)"
    table = Table(box=SIMPLE_HEAD, caption=caption, caption_justify="left")
    table.add_column("batch", justify="right")
    table.add_column("decoder")
    for heading in ("tokens/s", "× generate", "first token", "ms/forward", "tokens/forward", "equal to AR", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number, entry in enumerate(entries):
        held = entry["peak_memory_gib"]
        table.add_row(
            str(entry["batch"]),
            escape(entry["name"]),
            words.number(entry["tokens_per_second"], 0),
            f"{entry['speedup']:.2f} ({entry['speedup_low']:.2f}–{entry['speedup_high']:.2f})",
            f"{1000 * entry['first_token_seconds']:.1f} ms",
            words.number(entry["forward_ms"]),
            words.number(entry["tokens_per_forward"]),
            words.percent(entry["equal_to_ar"]),
            words.memory(held and held * GIB),
            end_section=number + 1 == len(entries) or entries[number + 1]["batch"] != entry["batch"],
        )
    return table


def forward_table(entries: Sequence[Entry]) -> Table:
    """Milliseconds of one forward pass by its number of positions, and the ratio to one position."""
    caption = f"one forward pass behind {entries[0]['cache_length']} cached tokens"
    table = Table(box=SIMPLE_HEAD, caption=caption, caption_justify="left")
    for heading in ("batch", "positions", "ms", "× one position"):
        table.add_column(heading, justify="right")
    for entry in entries:
        cells = (str(entry[name]) for name in ("batch", "positions"))
        table.add_row(*cells, words.number(entry["milliseconds"]), words.number(entry["ratio"]))
    return table


def plot_bench(results: Mapping[str, Any]) -> Figure:
    """Tokens per second and per forward of each contestant, a row for each batch size; then forward passes.

    Args:
        results: what `bench decode` writes as JSON; `decode` or `forwards` may be empty.
    """
    decode, forwards = results["decode"], results["forwards"]
    batches = sorted({entry["batch"] for entry in decode})
    rows = len(batches) + bool(forwards)
    names = max([1, *(sum(e["batch"] == size for e in decode) for size in batches)])
    figure, axes = canvas(max(1, rows), 2, (9.0, max(2.4, 0.8 + 0.32 * names) * max(1, rows)), layout="constrained")
    for row, size in zip(axes, batches, strict=False):
        entries = [entry for entry in decode if entry["batch"] == size]
        _bars(row[0], entries, "tokens_per_second", [f"{entry['speedup']:.2f} ×" for entry in entries])
        _bars(row[1], entries, "tokens_per_forward", [words.number(e["tokens_per_forward"]) for e in entries])
        row[0].set_xlabel(f"tokens per second, batch {size} (× transformers' generate)", **LABEL)
        row[1].set_xlabel("tokens per forward, all forwards counted", **LABEL)
        row[1].set_yticklabels([])
    if forwards:
        _forward_panels(axes[-1], forwards)
    return figure


def _bars(axes: Axes, entries: Sequence[Entry], field: str, notes: Sequence[str]) -> None:
    """One horizontal bar for each contestant, the first on top, with a note at its end."""
    values = [entry[field] for entry in entries]
    colours = [MODE_COLOURS.get(entry["options"].get("mode"), INK) for entry in entries]  # transformers' own: INK
    bars = axes.barh(range(len(entries)), values, color=colours, height=0.62)
    axes.bar_label(bars, labels=list(notes), padding=3, fontsize=8.5, color=INK)
    axes.set_yticks(range(len(entries)), [entry["name"] for entry in entries], color=INK)
    axes.set_xlim(0, 1.18 * max(values) or 1)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")


def _forward_panels(row: Sequence[Axes], forwards: Sequence[Entry]) -> None:
    """Milliseconds, and times one position, against the positions of a pass; a line for each batch size."""
    widths = sorted({entry["positions"] for entry in forwards})
    for panel, field, label in ((row[0], "milliseconds", "ms per forward"), (row[1], "ratio", "times one position")):
        for size, style in zip(sorted({e["batch"] for e in forwards}), ("-", "--", ":", "-.") * 8, strict=False):
            line = [(e["positions"], e[field]) for e in forwards if e["batch"] == size]
            panel.plot(*zip(*line, strict=True), style, marker="o", markersize=4, color=BLUE, label=f"batch {size}")
        panel.set_xscale("log", base=2)
        panel.set_xticks(widths, [str(width) for width in widths])
        panel.set_ylim(bottom=0)
        panel.set_xlabel("positions in a pass", **LABEL)
        panel.set_ylabel(label, **LABEL)
    row[0].legend(fontsize=8.5, frameon=False)


# ----------------------------------------------------------------------------------------------- tuning


def tuning_table(trials: Sequence[Entry], measure: str) -> Table:
    """The settings measured on all examples, fastest first; those chosen are marked with a star."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("")
    table.add_column("setting")
    for heading in ("× AR", "tokens/s", "tokens/forward", f"{measure} (95 %)", "drop (points)", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for trial in sorted((t for t in trials if t["stage"] == "fine"), key=lambda t: -t["speedup"]):
        table.add_row(
            "★" if trial["chosen"] else "",
            escape(trial["name"]),
            words.number(trial["speedup"]),
            words.number(trial["tokens_per_second"], 0),
            words.number(trial["tokens_per_forward"]),
            words.percent_between(trial["quality"], *trial["interval"]),
            f"{trial['drop']:.1f} ± {trial['drop_error']:.1f}",
            words.number(trial["p_value"]),
            style="bold" if trial["chosen"] else None,
        )
    return table


def plot_tuning(trials: Sequence[Entry], measure: str, max_drop: float) -> Figure:
    """Accuracy (or agreement) over tokens per second and over tokens per forward, as the report has it.

    Ringed, with its name: the choice of each mode. Hollow: the coarse pass, on fewer examples. Dashed: AR mode;
    dotted: the lowest that is allowed. Lines: diffusion at one block size, by threshold. Tokens per second are the
    ratio to AR mode in the same rounds times AR mode's speed, so that what else ran meanwhile moves no point.
    """
    ar = next(trial for trial in trials if trial["mode"] == "ar")
    entries = []
    for trial in trials:
        options, chosen = trial["options"], trial["chosen"]
        entry = {**options, "model": "adapted", "task": measure, "accuracy": trial["quality"]}
        entry["tokens_per_second"] = trial["speedup"] * ar["tokens_per_second"]
        entry["tokens_per_forward"] = trial["tokens_per_forward"]
        entry["joined"] = (options.get("sub_blocks"), options.get("sampler")) == (1, "confidence")
        entry |= {"hollow": trial["stage"] == "coarse", "ringed": chosen}
        entries.append(entry | {"label": trial["name"].replace(", ", "\n") if chosen else ""})
    figure = plot_tradeoff(entries, measure)
    for panel in figure.axes:
        panel.axhline(100 * ar["quality"], color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
        panel.axhline(100 * ar["quality"] - max_drop, color=MUTED, linewidth=0.9, linestyle=":")
    return figure
