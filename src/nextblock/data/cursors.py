"""Sources read for ever, in an order that resumes exactly: those with random access, and streams of the Hub."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from time import sleep
from typing import Any

import numpy as np

from nextblock.config.errors import UsageError, one_line
from nextblock.config.sections import Source
from nextblock.data.records import Record, Records, or_fault, to_record, without_nulls


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


Counts = list[list[Any]]
"""[first epoch, records of each from there on], ...: a source that has grown was shorter before. None: endless."""


class Cursor:
    """Reads a random-access source for ever; a finite one is shuffled anew each epoch by (seed, epoch).

    Of all epochs laid end to end, shard (s, S) takes the records s, s + S, s + 2S, ... Of a source that has grown an
    epoch has the first records alone, as many as `counts` says.
    """

    def __init__(self, records: Records, seed: Sequence[int], shard: tuple[int, int] = (0, 1)) -> None:
        self._records, self._seed = records, list(seed)
        self.counts: Counts = [[0, records.count]]
        self._order: tuple[tuple[int, int], Shuffle] | None = None
        self.epoch, (self.index, self._stride) = 0, shard

    def take(self) -> Record:
        """The next record."""
        which = self.index
        if self._records.count is not None:
            while self.index >= (count := self._count()):
                self.epoch, self.index = self.epoch + 1, self.index - count
            if self._order is None or self._order[0] != (self.epoch, count):
                self._order = ((self.epoch, count), Shuffle(count, [*self._seed, self.epoch]))
            which = self._order[1][self.index]
        self.index += self._stride
        return self._records.read(which)

    def _count(self) -> int:
        """Records of the epoch."""
        return next(count for first, count in reversed(self.counts) if first <= self.epoch)

    def state(self) -> dict[str, Any]:
        """Where the next record is."""
        return {"epoch": self.epoch, "index": self.index}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state` gave."""
        self.epoch, self.index = state["epoch"], state["index"]


RETRY_SECONDS = (1, 4, 15, 60, 120)
"""Before each further attempt to read on in a streamed data set: networks come back."""
SHUFFLED_ROWS, SHUFFLED_BYTES = 1000, 2**25
"""A streamed data set is shuffled in groups of rows that end at either."""


class HubStream:
    """Reads a `datasets` id (`owner/name` or `owner/name:configuration`) as a stream, for ever.

    Shard (s, S) takes whole files where S divides their number, else every S-th row. Rows come in groups of
    neighbours, each shuffled by (seed, epoch, its first row): a group is made again from its beginning, so a resume is
    exact and the rows themselves need not be saved. (The buffer of `datasets` is lost with its rows.)

    Args:
        seed: None: in the order of the stream, each row read when it is asked for.
        skip: rows that cannot be used give a `Record` that says so.
    """

    # As those of `Records`.
    count, split_by_hash, digest, size = None, True, "", (0, 0)

    def __init__(
        self,
        source: Source,
        shard: tuple[int, int] = (0, 1),
        seed: Sequence[int] | None = None,
        skip: bool = False,
    ) -> None:
        from datasets import IterableDataset, load_dataset
        from datasets.distributed import split_dataset_by_node

        self._source, self._shard, self._seed, self._skip = source, shard, seed, skip
        name, _, configuration = os.path.expanduser(source.path).partition(":")
        try:
            stream = load_dataset(name, configuration or None, split=source.split, streaming=True)
        except Exception as error:  # network, access and format errors of many kinds
            raise UsageError(
                f"data source {source.path} is no file or folder here, nor can the Hub be read: {one_line(error)}"
            ) from None
        assert isinstance(stream, IterableDataset)
        stream = stream if source.examples is None else stream.take(source.examples)
        self._stream = split_dataset_by_node(stream, *shard) if shard[1] > 1 else stream
        self._first = self._place = self._stream.state_dict()  # of the data set, and of the group
        self._rows: Iterator[Any] | None = None
        self._group: list[Record] = []
        self.epoch = self.index = self._taken = 0  # `index`: of the group's first row

    def take(self) -> Record:
        """The next record. UsageError if it cannot be read, also after all RETRY_SECONDS; it can be tried again."""
        if self._group and self._taken == len(self._group):
            self.index, self._taken, self._group = self.index + len(self._group), 0, []
            self._place = self._stream.state_dict()
        if not self._group:
            self._group = self._read_group()
        self._taken += 1
        return self._group[self._taken - 1]

    def _read_group(self) -> list[Record]:
        """The rows of a group, shuffled; at the end of the data set the first group of the next epoch."""
        failed, furthest, began = 0, 0, self.epoch
        while True:
            group: list[Record] = []
            try:
                self._fill(group)
            except UsageError:  # of a row, not of the network
                self._go_to(self._place)
                raise
            except Exception as error:
                self._go_to(self._place)
                if len(group) > furthest:
                    failed, furthest = 0, len(group)
                if failed == len(RETRY_SECONDS):
                    raise UsageError(f"data source {self._source.path} stopped: {one_line(error)}") from None
                sleep(RETRY_SECONDS[failed])
                failed += 1
                continue
            if group:
                if self._seed is not None:
                    order = np.random.default_rng([*self._seed, self.epoch, self.index]).permutation(len(group))
                    group = [group[k] for k in order]
                return group
            if self.index == 0 and self.epoch > began:
                s, count = self._shard
                part = "" if count == 1 else f" in shard {s + 1} of {count}; lower data.shards"
                raise UsageError(f"data source {self._source.path} is empty{part or '; give at least one document'}")
            self._place, self.epoch, self.index = self._first, self.epoch + 1, 0
            self._go_to(self._place)

    def _fill(self, group: list[Record]) -> None:
        """Read the next rows, until the group is full or the data set ends."""
        if self._rows is None:
            self._rows = iter(self._stream)
        size, most = 0, 1 if self._seed is None else SHUFFLED_ROWS
        while len(group) < most and size < SHUFFLED_BYTES and (row := next(self._rows, None)) is not None:
            where = f"{self._source.path} {self._source.split} row {self.index + len(group)}"
            given = without_nulls(row), self._source, where
            group.append(or_fault(to_record, *given) if self._skip else to_record(*given))
            size += group[-1].bytes

    def _go_to(self, place: dict[str, Any]) -> None:
        self._stream.load_state_dict(place)
        self._rows = None

    def state(self) -> dict[str, Any]:
        """Where the next record is."""
        return {"epoch": self.epoch, "index": self.index, "taken": self._taken, "stream": self._place}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state` gave."""
        self.epoch, self.index, self._place = state["epoch"], state["index"], state["stream"]
        self._go_to(self._place)
        self._group, self._taken = [], 0
        if state["taken"]:
            self._group, self._taken = self._read_group(), state["taken"]
