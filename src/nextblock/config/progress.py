"""How far a long piece of work is, and the time left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_SECONDS = 5.0  # between two lines about some work, at least

Update = Callable[..., None]  # update(done, total, what="")


class Pace:
    """When the next line about some work is due where there is no terminal, and how long the rest will take."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None
        self._last = (-math.inf, 0)

    def due(self, done: int, total: int) -> bool:
        """At first and at the end; between them 5 s after the last line, if 2 % more is done or a minute over."""
        now = monotonic()
        self._start = self._start or (now, done)
        waited, more = now - self._last[0], done - self._last[1]
        due = waited >= LINE_SECONDS and (more >= total / 50 or waited >= 60)
        if due or done == total:
            self._last = (now, done)
        return due or done == total

    def left(self, done: int, total: int) -> str:
        """`0:03:20 left`, at the speed so far; nothing where that is unknown."""
        start, first = self._start or (0.0, done)
        if done <= first or done == total:
            return ""
        return f"{timedelta(seconds=round((monotonic() - start) * (total - done) / (done - first)))} left"


@contextmanager
def progress(label: str, console: Console | None = None, *, transient: bool = True) -> Iterator[Update]:
    """How far some work is: a bar; where there is no terminal, a line now and then (`Pace`).

    Args:
        label: what is done.
        console: default: standard error.
        transient: whether the bar vanishes at the end.
    Yields:
        update(done, total, what=""): call it as the work goes on.
    """
    console = console or Console(stderr=True)
    if console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        name, what = (TextColumn(f"{{task.{own}}}", markup=False) for own in ("description", "fields[what]"))
        with Progress(name, *columns, what, console=console, transient=transient) as bar:
            task = bar.add_task(label, total=None, what="")
            yield lambda done, total, what="": bar.update(task, completed=done, total=total, what=what)
        return
    pace = Pace()

    def update(done: int, total: int, what: str = "") -> None:
        if pace.due(done, total):
            words = (f"{label} {done}/{total}", what, pace.left(done, total))
            console.print("  ".join(filter(None, words)), soft_wrap=True, highlight=False, markup=False)

    yield update


def counter(update: Update, total: int) -> Callable[..., None]:
    """A function that counts, one or `more` at each call, and tells `update` what is done of `total`."""
    done = 0

    def advance(more: int = 1) -> None:
        nonlocal done
        done += more
        update(done, total)

    return advance
