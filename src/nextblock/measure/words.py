"""Numbers in words, the same in every table, on every plot and in the report."""

from __future__ import annotations

from nextblock.training.devices import GIB

DASH = "–"  # for what is not known


def number(value: float | None, digits: int = 2) -> str:
    """1234.567 -> 1,234.57."""
    return DASH if value is None else f"{value:,.{digits}f}"


def percent(share: float | None) -> str:
    """0.995 -> 99.5 %."""
    return DASH if share is None else f"{100 * share:.1f} %"


def percent_between(share: float, low: float, high: float) -> str:
    """0.965, 0.93, 0.98 -> 96.5 % (93–98): a share and its interval."""
    return f"{percent(share)} ({100 * low:.0f}–{100 * high:.0f})"


def count(value: float, digits: int = 1) -> str:
    """2014208 -> 2.0 M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.{digits}f} {unit}"
    return f"{value:.0f}"


def memory(size: float | None) -> str:
    """Bytes, as GiB or MiB."""
    if size is None:
        return DASH
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    """305 -> 5 min 5 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def spaced(name: str) -> str:
    """word_problems -> word problems."""
    return name.replace("_", " ")
