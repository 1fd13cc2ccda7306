"""From a batch to its events: the mode's loop over passes, run step by step under one clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator

import torch

from nextblock.decoding.batch import Batch
from nextblock.decoding.diffusion import diffusion
from nextblock.decoding.events import Committed, Event, RowFinished, Stats
from nextblock.decoding.speculative import speculative


def decode(batch: Batch) -> Iterator[list[Event]]:
    """Decode all rows of a batch that has begun, in the mode that `batch.config` names; then each holds its answer.

    Yields the events of each pass.
    """
    modes = {"ar": autoregressive, "diffusion": diffusion, "speculative": speculative}
    return modes[batch.config.mode](batch)


def autoregressive(batch: Batch) -> Iterator[list[Event]]:
    """One causal pass per token."""
    while rows := batch.admit():
        yield batch.decide(batch.forward(*batch.known(), [True] * len(rows)))
        batch.leave()


def run(make_batch: Callable[[], Batch], stats: Stats, began: float) -> Generator[Event]:
    """Decode a batch, which is made at the first event, and keep its `stats`.

    Args:
        began: `time.perf_counter()` when the clock started.
    """
    batch = steps = None
    counted: dict[int, int] = {}
    try:
        while True:
            # Entered anew for each step: an iterator must not leave a global switch on between two events.
            with torch.inference_mode():
                if batch is None or steps is None:
                    batch = make_batch()
                    steps, events = decode(batch), batch.begin()
                else:
                    events = next(steps, None)
            stats.seconds = time.perf_counter() - began
            if events is None:
                return
            for event in events:
                if isinstance(event, Committed):
                    stats.first_token_seconds = stats.first_token_seconds or stats.seconds
                    counted[event.row] = counted.get(event.row, 0) + 1
                    stats.new_tokens += 1
                elif isinstance(event, RowFinished):  # without what was decided behind an end token
                    stats.new_tokens += event.tokens - counted.get(event.row, 0)
                yield event
    finally:
        if batch is not None:
            batch.close()  # now, and not when the last who keeps an exception lets go of it
