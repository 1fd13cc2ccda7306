"""What a person watches in the terminal: the training bar, and a text coming out of the noise."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from nextblock.config.progress import progress
from nextblock.data.text import TextStream
from nextblock.decoding.events import Committed, Event, RowFinished
from nextblock.training.run import StepMetrics

MASK_CELL = "░"


class TrainingBar(AbstractContextManager["TrainingBar"]):
    """A progress bar with step, block size, both losses, tokens per second and the time left.

    Where the console is no terminal, a line now and then instead.
    """

    def __init__(self, steps: int, *, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.steps, self.speed = steps, math.nan
        self._bar = progress("step", self.console, transient=False)

    def __enter__(self) -> TrainingBar:
        self._show = self._bar.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.__exit__(kind, error, trace)

    def update(self, metrics: StepMetrics) -> None:
        """Show one finished step."""
        new = metrics.tokens_per_second
        self.speed = new if math.isnan(self.speed) else 0.9 * self.speed + 0.1 * new
        diffusion = "-" if math.isnan(metrics.diffusion_loss) else f"{metrics.diffusion_loss:.3f}"
        ar = "-" if math.isnan(metrics.ar_loss) else f"{metrics.ar_loss:.3f}"
        status = f"block {metrics.block_size:<3d} diffusion loss {diffusion}  AR loss {ar}  {self.speed:,.0f} tokens/s"
        self._show(metrics.step + 1, self.steps, status)

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Print a held-out evaluation and its sample, above the bar."""
        losses = (("diffusion loss", record["diffusion_loss"]), ("AR loss", record["ar_loss"]))
        known = "  ".join(f"{name} {value:.3f}" for name, value in losses if not math.isnan(value))
        self.console.print(f"held out, block {record['block_size']}: {known}", soft_wrap=True)
        text = Text(record["prompt"], style="dim").append(record["sample"], style="not dim")
        self.console.print(Panel(text, title="sample", title_align="left"))


class DenoisingView:
    """Builds up what one row looks like from its events, and every frame of it for the report."""

    def __init__(self, tokenizer: Any, block_size: int) -> None:
        self.tokenizer, self.block_size = tokenizer, block_size
        self.tokens: dict[int, tuple[int, float, int]] = {}
        self.steps: list[list[str | None]] = []
        self.confidence: list[list[float | None]] = []
        self.step, self.end = 0, None

    def feed(self, event: Event) -> None:
        """Take in an event of row 0."""
        if isinstance(event, Committed):
            if event.step != self.step:
                self._keep()
            self.step = event.step
            self.tokens[event.offset] = (event.token, event.confidence, event.step)
        elif isinstance(event, RowFinished):
            self.end = event.tokens
            self._keep()

    def _keep(self) -> None:
        if self.tokens:
            self.steps.append(self.pieces())
            offsets = range(self.width())
            self.confidence.append([self.tokens[i][1] if i in self.tokens else None for i in offsets])

    def width(self) -> int:
        """Slots shown: whole blocks up to the last decided token, cut at the end once it is known."""
        if self.end is not None:
            return self.end
        return (max(self.tokens) // self.block_size + 1) * self.block_size if self.tokens else self.block_size

    def pieces(self) -> list[str | None]:
        """The text of each slot, None where nothing is decided; a character of several tokens stands at its last."""
        found: list[str | None] = [None] * self.width()
        stream, last = TextStream(self.tokenizer, skip_special_tokens=False), -1
        for offset in range(len(found) + 1):
            if offset < len(found) and offset in self.tokens:
                found[offset], last = stream.put(self.tokens[offset][0]), offset
            elif last == offset - 1 and last >= 0:  # a run of decided tokens ends
                found[last] = (found[last] or "") + stream.end()
                stream = TextStream(self.tokenizer, skip_special_tokens=False)
        return found

    def render(self, prompt: str) -> Group:
        """Prompt and answer; masks as shaded cells, the newest tokens bright, sure ones green."""
        text = Text(prompt, style="dim")
        for offset, piece in enumerate(self.pieces()):
            if piece is None:
                text.append(MASK_CELL, style="grey50")
                continue
            _, confidence, step = self.tokens[offset]
            colour = "green" if confidence > 0.9 else "yellow" if confidence > 0.5 else "red"
            text.append(piece, style=f"bold {colour}" if step == self.step else colour)
        return Group(Panel(text, title=f"forward {self.step}", title_align="left"))


def show_denoising(
    events: Iterable[Event], tokenizer: Any, prompt: str, block_size: int, *, console: Console, seconds: float = 0.0
) -> DenoisingView:
    """Show one row's events live, each frame for at least `seconds`; without a terminal only its end."""
    view = DenoisingView(tokenizer, block_size)
    if not console.is_terminal:
        for event in events:
            view.feed(event)
        console.print(view.render(prompt))
        return view
    with Live(console=console, refresh_per_second=30, transient=False) as live:
        for event in events:
            next_pass = isinstance(event, Committed) and event.step != view.step  # so the last one is whole
            if next_pass and view.tokens:
                live.update(view.render(prompt), refresh=True)
                time.sleep(seconds)
            view.feed(event)
        live.update(view.render(prompt), refresh=True)
    return view
