"""This rank's rows of each global batch, read ahead in the background, in an order that no rank count changes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from nextblock.config.sections import DataConfig
from nextblock.data.rows import Rows
from nextblock.data.sources import place_of
from nextblock.data.stream import CHUNK_ROWS, RowStream

State = dict[str, Any]
MOST_SHARDS = 8  # by default; each has a chunk of rows made before the first step


class Feed:
    """Rows of the shards in turn: row i of the run is the next of shard i mod S, whatever the number of ranks.

    Of each global batch, rank r of W takes the rows i with i mod W = r. So it reads the shards that are r modulo
    gcd(S, W): no document twice where W divides S, every document on every rank where S = 1. S is a function of the
    configuration, never of W.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        batch_rows: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Open the sources. UsageError as `RowStream`.

        Args:
            batch_rows: rows in the global batch; a multiple of `ranks`.
        """
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._batch_rows, self._rank, self._ranks = batch_rows, rank, ranks
        self._shards: dict[int, RowStream] = {}
        self._open(config.shards or usual_shards(config, batch_rows))
        self._row = 0  # the first of the next batch to be read
        self._state = self._snapshot()
        self._reader = ThreadPoolExecutor(1)  # a thread: tokenizers release Python's lock while they work
        self._ahead: deque[Future[tuple[Rows, State]]] = deque()

    def _open(self, count: int) -> None:
        """Open this rank's shards of `count`."""
        common, beside = math.gcd(count, self._ranks), next(iter(self._shards.values()), None)
        self._count, self._shards = count, {}
        for s in range(self._rank % common, count, common):
            stream = RowStream(self._config, self._tokenizer, seed=self._seed, shard=(s, count), beside=beside)
            self._shards[s] = beside = stream
        # Rows come a chunk of each shard at a time: as many must be ready as are used while those are made.
        self._depth = 1 + CHUNK_ROWS * count // self._batch_rows

    @property
    def digests(self) -> list[str]:
        """Of the texts of each source: equal on all ranks."""
        return next(iter(self._shards.values())).digests

    def peek(self) -> Rows:
        """This rank's rows of the next global batch, in order. UsageError if its data cannot be read."""
        if not self._ahead:
            self._ahead.append(self._reader.submit(self._read))
        rows = self._ahead[0].result()[0]
        while len(self._ahead) < self._depth:  # after the first: two busy threads of Python hold each other up
            self._ahead.append(self._reader.submit(self._read))
        return rows

    def next(self) -> Rows:
        """As `peek`, and go on to the batch after it."""
        rows = self.peek()
        self._state = self._ahead.popleft().result()[1]
        return rows

    def state(self) -> State:
        """Where the next batch starts: JSON-serialisable; this rank's shards only (see `merged`)."""
        return self._state

    def load_state(self, state: Mapping[str, Any]) -> list[str]:
        """Go on where `merged` was taken, on any number of ranks.

        Returns:
            In words, the sources to which documents were added since (`Mixture.counts_since`).
        Raises:
            UsageError: it belongs to other sources.
        """
        self._forget()
        self._row = state["row"]
        if len(state["shards"]) != self._count:  # the usual number for another stage's batch: a run keeps its first
            self._open(len(state["shards"]))
        counts, added = next(iter(self._shards.values())).counts_since(list(state["shards"].values()))
        for s, stream in self._shards.items():
            stream.load_state(state["shards"][str(s)], counts)
        self._state = self._snapshot()
        return added

    def close(self) -> None:
        """Stop reading ahead."""
        self._forget()
        self._reader.shutdown()

    def _read(self) -> tuple[Rows, State]:
        """This rank's rows of one batch, and the state after it."""
        first, self._row = self._row, self._row + self._batch_rows
        parts = []
        for s, stream in self._shards.items():
            if count := len(range(first + (s - first) % self._count, self._row, self._count)):
                rows = stream.next(count)
                parts.append(replace(rows, number=rows.number * self._count + s))
        whole = Rows.cat(parts)
        order = whole.number.argsort()
        mine = order[whole.number[order] % self._ranks == self._rank]
        return whole.take(mine), self._snapshot()

    def _snapshot(self) -> State:
        return {"row": self._row, "shards": {str(s): stream.state() for s, stream in self._shards.items()}}

    def _forget(self) -> None:
        """Drop what was read ahead. The streams then stand anywhere."""
        for future in self._ahead:
            future.cancel()
        while self._ahead:
            if not (future := self._ahead.popleft()).cancelled():
                future.exception()  # waits


def usual_shards(config: DataConfig, batch_rows: int) -> int:
    """Where `data.shards` is not set: the largest divisor of `batch_rows` up to MOST_SHARDS; 1 with a Hub data set.

    The number of processes divides `batch_rows` too, so up to MOST_SHARDS of them mostly read a part of their own. A
    Hub data set may consist of few files, and is then read whole for each shard.
    """
    if any(place_of(source) == "hub" for source in config.sources):
        return 1
    return max(count for count in range(1, MOST_SHARDS + 1) if batch_rows % count == 0)


def merged(states: list[State]) -> State:
    """The states of all ranks as one, which a run on any number of ranks can load."""
    return {"row": states[0]["row"], "shards": {s: place for state in states for s, place in state["shards"].items()}}
