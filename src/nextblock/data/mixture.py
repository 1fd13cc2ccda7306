"""Documents drawn from all sources of a configuration, in shares of the text that their weights say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nextblock.config.errors import UsageError
from nextblock.config.sections import DataConfig
from nextblock.data.cursors import Counts, Cursor, HubStream
from nextblock.data.records import Record, Records, naming_the_way_on
from nextblock.data.sources import read_source

USUAL_BYTES = 1000  # of a document of a source that has not been read yet
ORDER, ORDER_WITH_STREAMS = 2, 3  # count the rules by which documents have been ordered


class NoDocument(UsageError):
    """A stream without one document that could be used."""


def part_bytes(row_length: int) -> int:
    """Longer text files are read in parts of about this size."""
    return max(8192, 16 * row_length)


def is_held_out(record: Record, share: float) -> bool:
    """A stable choice by content, so that equal documents never stand on both sides."""
    return record.digest < share * 2**64


@dataclass
class _Part:
    """One source of the mixture: how it was opened, where it is read, documents drawn so far and their bytes."""

    path: str
    weight: float
    opened: Records | HubStream
    cursor: Cursor | HubStream
    drawn: int = 0
    bytes: int = 0
    usable: bool = False  # whether one of its documents was


class Mixture:
    """Endless documents of one side of the held-out border: a function of (config, seed, shard) only.

    Args:
        shard: (s, S): of every source the documents s, s + S, s + 2S, ..., all epochs laid end to end.
        beside: another mixture of these sources; its files need not be opened and checked again.
        weights: those that the first sources had when they were all; default: as the configuration says.
    Raises:
        UsageError: as `read_source`.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        held_out: bool,
        shard: tuple[int, int],
        beside: Mixture | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self._share, self._held_out, self._shard = config.held_out, held_out, shard
        self.seed = [seed] if shard == (0, 1) else [seed, *shard]
        self.skip_unusable, self.without = config.skip_unusable, list[str]()
        self._parts: list[_Part] = []
        self.weights = [source.weight for source in config.sources] if weights is None else list(weights)
        for k, (source, weight) in enumerate(zip(config.sources, self.weights, strict=False)):
            opened = None if beside is None else beside._parts[k].opened
            if not isinstance(opened, Records):
                size, skip = part_bytes(config.row_length), config.skip_unusable
                opened = read_source(source, held_out, size, shard, seed=[seed, k], skip=skip)
            cursor = Cursor(opened, [seed, k], shard) if isinstance(opened, Records) else opened
            self._parts.append(_Part(source.path, weight, opened, cursor))
        self.counts: list[Counts] = [[[0, part.opened.count]] for part in self._parts]
        self._begin = [part.cursor.state() for part in self._parts]

    def check(self, tokenizer: Any) -> None:
        """UsageError for what `Records.check` finds."""
        with naming_the_way_on():
            for part in self._parts:
                if isinstance(part.opened, Records):
                    part.opened.check(tokenizer)

    @property
    def digests(self) -> list[str]:
        """Of the texts of each source."""
        return [part.opened.digest for part in self._parts]

    @property
    def epochs(self) -> list[int]:
        """The epoch of each source from which the last document came."""
        return [part.cursor.epoch for part in self._parts]

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all documents drawn so far."""
        return sum(part.bytes for part in self._parts)

    def draw(self) -> Record:
        """The next document. NoDocument if a source has none for training, or none has any that is held out.

        A source without held-out documents joins `without`, and is drawn from no more.
        """
        while (record := self._next_of(part := self._choose())) is None:
            self.without.append(part.path)
            part.weight = 0.0
            if not self._held_out or not any(one.weight for one in self._parts):
                side = "is held out" if self._held_out else "is left for training"
                raise NoDocument(
                    f"data source {', '.join(self.without)}: no document {side} with data.held_out={self._share}; "
                    "change data.held_out or give more documents"
                )
        return record

    def _next_of(self, part: _Part) -> Record | None:
        """The next document of a source; None if it has none on this side of the held-out border."""
        cursor, epoch, shards = part.cursor, part.cursor.epoch, self._shard[1]
        # One whole epoch at least; a shard meets few documents of each, so it must look through more.
        while cursor.epoch <= epoch + (1 if shards == 1 else 20 * shards):
            record = cursor.take()
            if not part.opened.split_by_hash or is_held_out(record, self._share) == self._held_out:
                part.drawn += 1
                part.bytes += USUAL_BYTES if record.fault else record.bytes
                part.usable |= not record.fault
                if not part.usable and cursor.epoch:
                    raise UsageError(f"data source {part.path} has no document that can be used: {record.fault}")
                return record
        return None

    def _choose(self) -> _Part:
        """The source of the next document: a function of (seed, shard) and the documents before it.

        Its odds are its weight over the mean length of its documents so far, so that weights are shares of the
        text; otherwise a source of long documents would take far more of the training than its weight says.
        """
        if len(self._parts) == 1:
            return self._parts[0]
        # As if one document of USUAL_BYTES had come before: the first ones say little about the others.
        odds = [part.weight / ((part.bytes + USUAL_BYTES) / (part.drawn + 1)) for part in self._parts]
        borders = np.cumsum(odds)
        point = np.random.default_rng([*self.seed, sum(part.drawn for part in self._parts)]).random() * borders[-1]
        return self._parts[int(np.searchsorted(borders[:-1], point, side="right"))]

    def _order(self, sources: int) -> int:
        """The rules by which the first sources are ordered."""
        streamed = any(isinstance(part.opened, HubStream) for part in self._parts[:sources])
        return ORDER_WITH_STREAMS if streamed else ORDER

    def state(self) -> dict[str, Any]:
        """Where the next document is: JSON-serialisable."""
        return {
            "order": self._order(len(self._parts)),
            "drawn": [part.drawn for part in self._parts],
            "bytes": [part.bytes for part in self._parts],
            "sources": [part.cursor.state() for part in self._parts],
        }

    def identity(self) -> dict[str, Any]:
        """By what `counts_since` knows the sources again: JSON-serialisable."""
        opened = [part.opened for part in self._parts]
        return {"digests": self.digests, "sizes": [one.size for one in opened], "counts": self.counts}

    def counts_since(self, saved: Mapping[str, Any], reached: Sequence[int]) -> tuple[list[Counts], list[str]]:
        """How many documents the epochs of each source have from a saved position on, and in words what was added.

        What was added comes in with the first epoch that no shard has begun, so all that was read stays as it was, and
        all shards together still read each document once an epoch.

        Args:
            saved: `identity` when the position was saved, and its "start"; of the first sources alone, where others
                have been added since.
            reached: the last epoch of each source of which a shard has read.
        Raises:
            UsageError: it is a position of other sources, or of other text.
        """
        start = saved["start"]
        for part, place in zip(self._parts, start["sources"], strict=False):
            if ("stream" in place) != isinstance(part.opened, HubStream):
                kinds = ("a streamed data set", "read from files")
                was, now = kinds if "stream" in place else reversed(kinds)
                raise UsageError(
                    f"data source {part.path} was {was} when the run was stopped, and is {now} now, in another order; "
                    "put it back, or start in a new --output"
                )
        if start.get("order") != self._order(len(start["sources"])):
            raise UsageError(
                "the saved data position is of another version of nextblock, which read documents in another order; "
                "resume with that version, or start in a new --output"
            )
        if len(start["sources"]) > len(self._parts):
            raise UsageError(
                f"the saved data position has {len(start['sources'])} sources, data.sources has "
                f"{len(self._parts)}; resume with the configuration of the run"
            )
        # Positions saved by older versions have counts of one epoch like another, and perhaps no digests.
        counts = saved.get("counts") or [[[0, count]] for count in start["counts"]]
        digests, sizes = (saved.get(key, now) for key, now in self.identity().items() if key != "counts")
        counts, words = [*counts, *self.counts[len(counts) :]], []
        for k, (part, digest, size) in enumerate(zip(self._parts, digests, sizes, strict=False)):
            one, was, first = part.opened, counts[k][-1][1], reached[k] + 1
            if isinstance(one, HubStream) or digest == one.digest:
                other = was != one.count
            else:
                other = digest != one.digest_at(size)
            if other:
                raise UsageError(
                    f"data source {part.path} holds other text than when the run was stopped; put it back (documents "
                    "may be added, at its end; data.skip_unusable=true leaves out those that cannot be used), or "
                    "start in a new --output"
                )
            if was != one.count:
                counts[k] = [*(count for count in counts[k] if count[0] < first), [first, one.count]]
                words.append(
                    f"data.sources.{k} had {was} documents, has {one.count}: those added come in with its epoch "
                    f"{first + 1}"
                )
        return counts, words

    def load_state(self, state: Mapping[str, Any], counts: Sequence[Counts]) -> None:
        """Go to a place that `state` gave, where the epochs of each source have so many documents.

        It may be one of the first sources alone: the others have been added since, and are read from their beginning.
        """
        self.counts = list(counts[: len(self._parts)])
        known = zip(state["sources"], state["drawn"], state["bytes"], strict=True)
        for part, begin, its in zip(self._parts, self._begin, self.counts, strict=True):
            place, part.drawn, part.bytes = next(known, (begin, 0, 0))
            part.cursor.load_state(place)
            part.usable = part.cursor.epoch > 0
            if isinstance(part.cursor, Cursor):
                part.cursor.counts = its
