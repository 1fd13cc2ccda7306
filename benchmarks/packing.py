"""`python benchmarks/packing.py`: how fast rows are read, tokenised and packed when nothing trains.

Letters: B rows of a batch, L tokens of a row.
"""

from __future__ import annotations

import time
from contextlib import closing
from statistics import median
from typing import Annotated, Any

import typer

from nextblock.config.sections import DataConfig, ModelConfig, Source
from nextblock.data.feed import Feed
from nextblock.data.stream import CHUNK_ROWS
from nextblock.model.parent import parent_tokenizer

DATA = {
    "the demo's documents": ("task:word_problems",),
    "mixed lengths": ("task:word_problems", "task:algebra", "task:functions", "python-stdlib"),
}
"""Name -> sources, in equal shares of the text."""


def drain(
    paths: tuple[str, ...], tokenizer: Any, *, rows: int, row_length: int, rounds: int, round_tokens: int = 2**18
) -> tuple[float, float]:
    """Drain the feed of a run on one process, its background reader included.

    Args:
        rows: of a batch (B).
        rounds: after a chunk that warms up.
        round_tokens: a round drains at least so many, in whole chunks of the packer.
    Returns:
        Tokens of documents per second, without padding, as a median over rounds; and the share of the rows' B * L
        places that hold one, over all rounds.
    """
    data = DataConfig(sources=tuple(Source(path=path) for path in paths), row_length=row_length)
    chunks = max(2, -(-round_tokens // (CHUNK_ROWS * row_length)))
    batches = -(-chunks * CHUNK_ROWS // rows)
    speeds, held = [], 0
    with closing(Feed(data, tokenizer, seed=0, batch_rows=rows)) as feed:
        for _ in range(-(-CHUNK_ROWS // rows)):
            feed.next()
        for _ in range(rounds):
            began = time.perf_counter()
            tokens = sum(int((feed.next().document >= 0).sum()) for _ in range(batches))
            speeds.append(tokens / (time.perf_counter() - began))
            held += tokens
    return median(speeds), held / (rounds * batches * rows * row_length)


def main(
    model: Annotated[str, typer.Argument(help="whose tokenizer reads")] = "tiny-ar",
    row_length: Annotated[int, typer.Option(help="tokens in a row")] = 256,
    rows: Annotated[int, typer.Option(min=1, help="rows that a step takes")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="medians are taken over them")] = 5,
    round_tokens: Annotated[int, typer.Option(help="tokens of a round, at least")] = 2**18,
    step_seconds: Annotated[
        float | None, typer.Option(help="of a training step to compare with, as benchmarks/training.py prints it")
    ] = None,
) -> None:
    """Drain the feed of a run, and say how full rows are and how far it is ahead of a training step."""
    tokenizer = parent_tokenizer(ModelConfig(path=model))
    for name, paths in DATA.items():
        speed, full = drain(
            paths, tokenizer, rows=rows, row_length=row_length, rounds=rounds, round_tokens=round_tokens
        )
        ahead = "" if step_seconds is None else f"{speed / full / (rows * row_length) * step_seconds:.1f} × a step's, "
        print(f"{name}: {speed:,.0f} tokens per second, {ahead}rows {100 * full:.1f} % full")


if __name__ == "__main__":
    typer.run(main)
