"""The look of all figures. They touch no global state of matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

INK, MUTED, LINE, BLUE, ORANGE, GREEN = "#1f2328", "#626b77", "#dfe3e8", "#0072b2", "#d55e00", "#00875f"
MODE_COLOURS = {"ar": BLUE, "diffusion": ORANGE, "speculative": GREEN}
LABEL: dict[str, Any] = {"fontsize": 9, "color": MUTED}  # of axes

Entry = Mapping[str, Any]  # a record of a log or of results, as JSON has it


def canvas(rows: int, columns: int, size: tuple[float, float], **layout: Any) -> tuple[Figure, Any]:
    """A figure of `size` inches and its axes [rows, columns]. `layout`: of the figure, or options of `subplots`."""
    figure = Figure(figsize=size, dpi=150, layout=layout.pop("layout", None))
    axes = figure.subplots(rows, columns, squeeze=False, **layout)
    for panel in axes.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(MUTED)
        panel.tick_params(colors=MUTED, labelsize=8.5)
        panel.grid(color=LINE, linewidth=0.7)
        panel.set_axisbelow(True)
    return figure, axes
