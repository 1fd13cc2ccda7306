"""Sources read for ever, in an order that resumes exactly: those with random access, and streams of the Hub."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from time import sleep
from typing import Any

from nextblock.config.errors import UsageError, one_line
from nextblock.config.sections import Source
from nextblock.data.records import Record, Records, to_record, without_nulls


class Shuffle:
    """A random order of 0..count-1 that is computed, not kept: memory and time of a place do not grow with `count`.

    A Feistel network on the places (l, r) of an a x b grid with a * b >= count: each round adds a random function of
    one coordinate to the other, which can be undone, so no two places meet. Where a place falls outside of 0..count-1
    it is sent on, until it is inside (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains").
    """

    def __init__(self, count: int, seed: Sequence[int]) -> None:
        self._count = count
        self._sides = (math.isqrt(count - 1) + 1, -(-count // (math.isqrt(count - 1) + 1)))
        said = hashlib.blake2b(",".join(map(str, seed)).encode(), digest_size=8 * ROUNDS).digest()
        self._keys = struct.unpack(f"<{ROUNDS}Q", said)

    def __getitem__(self, place: int) -> int:
        """What stands at a place, 0 <= place < count."""
        a, b = self._sides
        while True:
            one, other, size, width = *divmod(place, b), a, b
            for key in self._keys:  # `one` is below `size`, `other` below `width`
                one, other, size, width = other, (one + _scramble(other ^ key)) % size, width, size
            place = one * b + other
            if place < self._count:
                return place


ROUNDS = 8
"""Of `Shuffle`; an even number, so that the coordinates end where they began."""


def _scramble(value: int) -> int:
    """The finaliser of splitmix64: 64 bits in, 64 bits out, each of which depends on all."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


class Cursor:
    """Reads a random-access source for ever; a finite one is shuffled anew each epoch by (seed, epoch).

    Of all epochs laid end to end, shard (s, S) takes the records s, s + S, s + 2S, ...
    """

    def __init__(self, records: Records, seed: Sequence[int], shard: tuple[int, int] = (0, 1)) -> None:
        self._records, self._seed = records, list(seed)
        self._order: tuple[int, Shuffle] | None = None
        self.epoch, (self.index, self._stride) = 0, shard

    def take(self) -> Record:
        """The next record."""
        count = self._records.count
        if count is None:
            which = self.index
        else:
            self.epoch, self.index = self.epoch + self.index // count, self.index % count
            if self._order is None or self._order[0] != self.epoch:
                self._order = (self.epoch, Shuffle(count, [*self._seed, self.epoch]))
            which = self._order[1][self.index]
        self.index += self._stride
        return self._records.read(which)

    def state(self) -> dict[str, Any]:
        """Where the next record is."""
        return {"epoch": self.epoch, "index": self.index}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state` gave."""
        self.epoch, self.index = state["epoch"], state["index"]


RETRY_SECONDS = (1, 4, 15, 60, 120)
"""Before each further attempt at a row of a streamed data set: networks come back."""


class HubStream:
    """Reads a `datasets` id (`owner/name` or `owner/name:configuration`) as a stream, in its own order.

    Shard (s, S) takes whole files where S divides their number, else every S-th row.
    """

    # As those of `Records`.
    count, split_by_hash, digest = None, True, ""

    def __init__(self, source: Source, shard: tuple[int, int] = (0, 1)) -> None:
        from datasets import IterableDataset, load_dataset
        from datasets.distributed import split_dataset_by_node

        self._source, self._shard = source, shard
        name, _, configuration = os.path.expanduser(source.path).partition(":")
        try:
            stream = load_dataset(name, configuration or None, split=source.split, streaming=True)
        except Exception as error:  # network, access and format errors of many kinds
            raise UsageError(f"data source {source.path} cannot be read: {one_line(error)}") from None
        assert isinstance(stream, IterableDataset)
        stream = stream if source.examples is None else stream.take(source.examples)
        self._stream = split_dataset_by_node(stream, *shard) if shard[1] > 1 else stream
        self._first = self._place = self._stream.state_dict()
        self._rows: Iterator[Any] | None = None
        self.epoch = self.index = self._failed = 0  # attempts at the next row

    def take(self) -> Record:
        """The next record. UsageError if it cannot be read, also after all RETRY_SECONDS."""
        for _ in range(2):
            if self._rows is None:
                self._rows = iter(self._stream)
            try:
                row = next(self._rows)
            except StopIteration:
                self._stream.load_state_dict(self._first)
                self._rows, self._place, self.epoch, self.index = None, self._first, self.epoch + 1, 0
                continue
            except Exception as error:
                if self._failed == len(RETRY_SECONDS):
                    raise UsageError(f"data source {self._source.path} stopped: {one_line(error)}") from None
                sleep(RETRY_SECONDS[self._failed])
                self._failed += 1
                self._stream.load_state_dict(self._place)
                self._rows = None
                return self.take()
            self.index, self._failed, self._place = self.index + 1, 0, self._stream.state_dict()
            return to_record(
                without_nulls(row), self._source, f"{self._source.path} {self._source.split} row {self.index - 1}"
            )
        s, count = self._shard
        part = "" if count == 1 else f" in shard {s + 1} of {count}; lower data.shards"
        raise UsageError(f"data source {self._source.path} is empty{part or '; give at least one document'}")

    def state(self) -> dict[str, Any]:
        """Where the next record is."""
        return {"epoch": self.epoch, "index": self.index, "stream": self._place}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state` gave."""
        self.epoch, self.index, self._rows = state["epoch"], state["index"], None
        self._place = state["stream"]
        self._stream.load_state_dict(self._place)
