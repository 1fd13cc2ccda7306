"""How fast rows are read, tokenised and packed when nothing trains, beside what a training step takes of them.

Letters: B rows of a batch, L tokens of a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from statistics import median

from transformers import PreTrainedTokenizerBase

from nextblock.config import DataConfig, Source
from nextblock.data import CHUNK_ROWS
from nextblock.feed import Feed

PACKER_DATA = {
    "the demo's documents": ("task:word_problems",),
    "mixed lengths": ("task:word_problems", "task:algebra", "task:functions", "python-stdlib"),
}
"""Name -> sources, in equal shares of the text."""
ROUND_TOKENS = 2**18
"""A round drains at least so many, in whole chunks of the packer."""


@dataclass(frozen=True)
class PackerSpeed:
    """What a run's feed gives when it is only drained; medians over rounds.

    tokens_per_second: tokens of documents, without padding.
    density: share of the rows' B * L places that hold a document's token, over all rounds.
    batches_per_step: batches made in the time of one training step.
    """

    data: str
    tokens_per_second: float
    density: float
    batches_per_step: float


def time_packer(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_rows: int,
    row_length: int,
    step_seconds: float,
    rounds: int,
    on_round: Callable[[], None] = lambda: None,
) -> PackerSpeed:
    """Drain the feed of a run on one process, its background reader included.

    Args:
        name: of the data, in `PACKER_DATA`.
        batch_rows: rows that a step takes.
        step_seconds: time of the step that the packer is compared with.
        rounds: after a chunk that warms up.
    Raises:
        UsageError: no document of the data fits in a row.
    """
    data = DataConfig(sources=tuple(Source(path=path) for path in PACKER_DATA[name]), row_length=row_length)
    chunks = max(2, -(-ROUND_TOKENS // (CHUNK_ROWS * row_length)))
    batches = -(-chunks * CHUNK_ROWS // batch_rows)
    speeds, steps, held, places = [], [], 0, 0
    with closing(Feed(data, tokenizer, seed=0, batch_rows=batch_rows)) as feed:
        for _ in range(-(-CHUNK_ROWS // batch_rows)):
            feed.next()
        for _ in range(rounds):
            tokens, began = 0, time.perf_counter()
            for _ in range(batches):
                tokens += int((feed.next().document >= 0).sum())
            seconds = time.perf_counter() - began
            speeds.append(tokens / seconds)
            steps.append(batches * step_seconds / seconds)
            held, places = held + tokens, places + batches * batch_rows * row_length
            on_round()
    return PackerSpeed(name, median(speeds), held / places, median(steps))
