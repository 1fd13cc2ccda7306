"""What a person watches: frames of a denoising, and the lines of a training where there is no terminal."""

from __future__ import annotations

import io
import math
import re
from itertools import pairwise
from typing import Any

import pytest
from rich.console import Console

from nextblock.cli.live import DenoisingView, TrainingBar, show_denoising
from nextblock.config import progress as progress_module
from nextblock.config.progress import progress
from nextblock.decoding.events import BlockFinished, Committed, Event, Prefilled, Rejected, RowFinished
from nextblock.training.run import StepMetrics


class Letters:
    """A tokenizer whose token is the code of its letter."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [*map(ord, text)]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


EVENTS: list[Event] = [
    Prefilled(0, 3),
    Committed(0, 0, ord("a"), 0.99, 1),
    Committed(0, 2, ord("c"), 0.4, 2),
    Committed(0, 1, ord("b"), 0.7, 3),
    Committed(0, 3, ord("d"), 0.95, 3),
    BlockFinished(0, 0, 4),
    Committed(0, 4, ord("e"), 1.0, 4),
    RowFinished(0, 5, "end_token"),
]


def test_each_pass_is_a_frame_of_whole_blocks_and_the_last_one_the_answer():
    view = show_denoising(EVENTS, Letters(), "Q:", 4, console=Console(file=io.StringIO(), width=60))
    assert view.steps == [
        ["a", None, None, None],
        ["a", None, "c", None],
        ["a", "b", "c", "d"],
        ["a", "b", "c", "d", "e"],
    ]
    assert view.confidence[1] == [0.99, None, 0.4, None]


@pytest.mark.parametrize("terminal", [True, False])
def test_the_text_that_stays_on_the_screen_is_prompt_and_answer(terminal):
    screen = io.StringIO()
    console = Console(file=screen, width=60, force_terminal=terminal, no_color=True)
    show_denoising(EVENTS, Letters(), "Q:", 4, console=console)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    assert "Q:abcde" in shown
    assert [text in shown for text in ("Q:a░░░ ", "Q:a░c░ ", "Q:abcd ")] == [terminal] * 3


def test_a_rejected_draft_was_never_part_of_what_is_shown():
    view = DenoisingView(Letters(), 4)
    for event in (Committed(0, 0, ord("a"), 1.0, 1), Rejected(0, 1, ord("x"), 2), RowFinished(0, 1, "length")):
        view.feed(event)
    assert view.steps[-1] == ["a"]


def metrics(step: int, **values: float) -> StepMetrics:
    common = {"loss": 1.0, "ar_weight": 0.5, "learning_rate": 1e-3, "grad_norm": 1.0, "soft_loss": math.nan}
    return StepMetrics(step=step, block_size=4, tokens=100, step_seconds=0.5, **{**common, **values})  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch):
    """Set `clock.now` (seconds) by hand."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(progress_module, "monotonic", lambda: Clock.now)
    return Clock


def test_without_a_terminal_a_line_comes_now_and_then_and_at_the_end(clock):
    screen = io.StringIO()
    with TrainingBar(5, console=Console(file=screen, width=200)) as bar:
        for step in range(5):
            bar.update(metrics(step, diffusion_loss=math.nan if step == 0 else 0.25, ar_loss=0.125))
            clock.now += 2.5
    lines = screen.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/5", "3/5", "5/5"]
    assert "diffusion loss -  AR loss 0.125  200 tokens/s" in lines[0]
    assert "block 4   diffusion loss 0.250" in lines[1]
    assert lines[1].endswith("0:00:05 left")


@pytest.mark.parametrize(("seconds", "most"), [(10, 3), (100, 21), (1000, 51), (100_000, 1001)])
def test_lines_come_often_enough_to_be_watched_and_rarely_enough_to_be_kept(clock, seconds, most):
    screen, shown = io.StringIO(), [0.0]
    with progress("scoring", Console(file=screen)) as update:
        for done in range(1001):
            clock.now = seconds * done / 1000
            before = screen.tell()
            update(done, 1000, "a [b]")
            if screen.tell() > before:
                shown.append(clock.now)
    lines = screen.getvalue().splitlines()
    assert lines[0] == "scoring 0/1000  a [b]"
    assert lines[-1] == "scoring 1000/1000  a [b]"
    assert len(lines) <= most
    assert max(b - a for a, b in pairwise(shown)) <= max(5, 0.02 * seconds, seconds / 1000) + 1
    assert all(line.endswith(" left") for line in lines[1:-1])


def test_a_bar_on_a_terminal_shows_its_label_whatever_that_holds_and_leaves_nothing_behind():
    screen = io.StringIO()
    with progress("m[/x] {y}", Console(file=screen, force_terminal=True, width=120)) as update:
        update(3, 10, "what")
    assert "m[/x] {y}" in screen.getvalue()
    assert "3/10" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K")
