"""Endless rows: documents drawn from the sources, held out, packed, resumed."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from nextblock.config.errors import UsageError
from nextblock.config.sections import DataConfig
from nextblock.data.encode import Document, encode_batch
from nextblock.data.rows import Rows, collate, cut, pack
from nextblock.data.sources import HubStream, Record, Records, read_source


def is_held_out(record: Record, share: float) -> bool:
    """A stable choice by content, so that equal documents never stand on both sides."""
    content = (record.key or json.dumps(record.value, sort_keys=True, default=str)).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") < share * 2**64


class Cursor:
    """Reads a random-access source for ever; a finite one is shuffled anew each epoch by (seed, epoch).

    Of all epochs laid end to end, shard (s, S) takes the records s, s + S, s + 2S, ...
    """

    def __init__(self, records: Records, seed: Sequence[int], shard: tuple[int, int] = (0, 1)) -> None:
        self._records, self._seed = records, list(seed)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))
        self.epoch, (self.index, self._stride) = 0, shard

    def take(self) -> Record:
        """The next record."""
        count = self._records.count
        if count is None:
            which = self.index
        else:
            self.epoch, self.index = self.epoch + self.index // count, self.index % count
            if self._order[0] != self.epoch:
                order = np.random.default_rng([*self._seed, self.epoch]).permutation(count)
                self._order = (self.epoch, order)
            which = int(self._order[1][self.index])
        self.index += self._stride
        return self._records.read(which)

    def state(self) -> dict[str, Any]:
        """Where the next record is."""
        return {"epoch": self.epoch, "index": self.index}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state` gave."""
        self.epoch, self.index = state["epoch"], state["index"]


CHUNK_ROWS = 64  # rows packed together at first: little to make again after a resume
FULL, WORTH = 0.985, 0.25  # rows less full are packed with more, while that brings so much of what is missing
MOST_ROWS, MOST_TOKENS = 512, 2**21  # of a chunk
BATCH_DOCUMENTS, BATCH_BYTES = 256, 2**20  # one call of the tokenizer ends at either
USUAL_BYTES = 1000  # of a document of a source that has not been read yet
IDLE_BATCHES = 8  # batches without one usable document after which the data counts as empty


class NoDocument(UsageError):
    """A stream without one document that could be used."""


Read = tuple[list[Document], dict[str, Any]]
"""A document as pieces that fit in a row, and the stream's position before it."""


def _density(packed: Sequence[Sequence[Document]], row_length: int) -> float:
    return sum(len(piece.tokens) for row in packed for piece in row) / (len(packed) * row_length)


class RowStream:
    """Endless rows of one shard of the data, in an order that depends on (config, seed, shard) only.

    Shard s of S reads the documents s, s + S, s + 2S, ... of every source, all epochs laid end to end.
    Documents are drawn from the sources so that weights are shares of the text (`_choose`), and packed in
    chunks of about CHUNK_ROWS rows or more (`_make_chunk`). `state` names the start of the chunk and how many
    of its rows are used; resuming makes the chunk again.

    Attributes:
        truncated: documents cut short at the end of a row so far (prompt or chat documents only).
        skipped: documents so far with nothing to generate (empty, or a prompt that fills the row).
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        held_out: bool = False,
        shard: int | None = None,
        beside: RowStream | None = None,
    ) -> None:
        """Open all sources, read the first documents. UsageError as `read_source`, or if there are none.

        Args:
            shard: one of `config.shards`; None: all data as one stream.
            beside: another shard of the same data; its files need not be opened and checked again.
        """
        self._config, self._tokenizer, self._held_out = config, tokenizer, held_out
        self._part = (0, 1) if shard is None else (shard, config.shards)
        self._seed = [seed] if self._part == (0, 1) else [seed, *self._part]
        self._cursors: list[Cursor | HubStream] = []
        self._split: list[bool] = []
        self._opened: list[Records | HubStream] = []
        for k, source in enumerate(config.sources):
            opened = None if beside is None else beside._opened[k]
            if not isinstance(opened, Records):
                opened = read_source(source, held_out, max(8192, 16 * config.row_length), self._part)
            self._opened.append(opened)
            self._cursors.append(Cursor(opened, [seed, k], self._part) if isinstance(opened, Records) else opened)
            self._split.append(not isinstance(opened, Records) or opened.split_by_hash)
        self._counts = [opened.count if isinstance(opened, Records) else None for opened in self._opened]
        self._digests = [opened.digest if isinstance(opened, Records) else "" for opened in self._opened]
        self._weights = np.array([source.weight for source in config.sources])
        self._drawn = [0] * len(config.sources)  # documents of each source so far
        self._bytes = [0] * len(config.sources)  # and how long they were together
        self._queue: deque[Read] = deque()
        self.truncated = self.skipped = 0
        self._first = self._taken = 0  # number of the chunk's first row; its rows used so far
        self._chunk: Rows | None = None
        self._lost = {"truncated": 0, "skipped": 0}
        self._fill()
        self._start = self._queue[0][1]  # position of the chunk's first document

    def next(self, rows: int) -> Rows:
        """The next `rows` rows: the next global batch."""
        parts, missing = [], rows
        while missing:
            if self._chunk is None:
                self._chunk = self._make_chunk()
            part = self._chunk.slice(self._taken, min(self._taken + missing, len(self._chunk)))
            self._taken, missing = self._taken + len(part), missing - len(part)
            parts.append(part)
            if self._taken == len(self._chunk):
                self._first, self._taken, self._chunk = self._first + self._taken, 0, None
                self._start = self._peek()[1]
        return Rows.cat(parts)

    def state(self) -> dict[str, Any]:
        """Small and JSON-serialisable: what `load_state` needs to give exactly the next rows.

        `lost` counts the documents that were `truncated` and `skipped` up to the end of the chunk.
        """
        place = {"start": self._start, "first": self._first, "taken": self._taken, "lost": self._lost}
        return {**place, "digests": self._digests}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. UsageError if it belongs to other sources."""
        start = state["start"]
        if len(start["sources"]) != len(self._cursors):
            raise UsageError(
                f"the saved data position has {len(start['sources'])} sources, data.sources has "
                f"{len(self._cursors)}; resume with the configuration of the run"
            )
        for cursor, place in zip(self._cursors, start["sources"], strict=True):
            cursor.load_state(place)
        for source, before, now in zip(self._config.sources, start["counts"], self._counts, strict=True):
            if before != now:
                raise UsageError(
                    f"data source {source.path} had {before} documents and has {now}, so its order would be another; "
                    "put it back, or start in a new --output"
                )
        digests = state.get("digests", self._digests)  # positions saved by older versions have none
        for source, before, now in zip(self._config.sources, digests, self._digests, strict=True):
            if before != now:
                raise UsageError(
                    f"data source {source.path} holds other text than when the run was stopped; put it back, or start "
                    "in a new --output"
                )
        self._drawn, self._bytes = list(start["drawn"]), list(start["bytes"])
        self.truncated, self.skipped = start["truncated"], start["skipped"]
        self._queue.clear()
        self._start, self._first, self._taken, self._chunk = start, state["first"], state["taken"], None
        self._lost = state["lost"]

    def _make_chunk(self) -> Rows:
        """Pack the next documents: into about CHUNK_ROWS rows, or twice as many for as long as that fills them better.

        What is left of a chunk packs badly, the less so the more documents there are to choose from.
        """
        length, size = self._config.row_length, CHUNK_ROWS
        read, packed = self._pack_on([], size)
        while (full := _density(packed, length)) < FULL and 2 * size <= min(MOST_ROWS, MOST_TOKENS // length):
            size *= 2
            more, wider = self._pack_on(read, size)
            if _density(wider, length) < full + WORTH * (FULL - full):
                self._queue.extendleft(reversed(more[len(read) :]))
                break
            read, packed = more, wider
        self._lost = {name: self._peek()[1][name] for name in ("truncated", "skipped")}
        order = np.random.default_rng([*self._seed, self._first]).permutation(len(packed))
        pad: Any = self._tokenizer.pad_token_id
        pad = self._tokenizer.eos_token_id if pad is None else pad
        epoch = self._start["sources"][0]["epoch"]
        return collate([packed[i] for i in order], length, pad, epoch, self._first)

    def _pack_on(self, read: list[Read], size: int) -> tuple[list[Read], list[list[Document]]]:
        """`read` and the next documents, for `size` rows or more; and these in rows, where the next fits in none."""
        length, read = self._config.row_length, list(read)
        tokens = sum(len(piece.tokens) for document, _ in read for piece in document)
        while tokens < size * length:
            self._peek()
            read.append(self._queue.popleft())
            tokens += sum(len(piece.tokens) for piece in read[-1][0])
        packed = pack([piece for document, _ in read for piece in document], length)
        room = [length - sum(len(piece.tokens) for piece in row) for row in packed]
        while (last := len((document := self._peek()[0])[-1].tokens)) <= max(room):
            read.append(self._queue.popleft())
            best = min((free, row) for row, free in enumerate(room) if free >= last)[1]
            packed[best].append(document[-1])
            room[best] -= last
            packed += [[piece] for piece in document[:-1]]  # these fill a row each
            room += [0] * len(document[:-1])
        return read, packed

    def _peek(self) -> Read:
        """The next document, as pieces that fit in a row, and the position before it."""
        if not self._queue:
            self._fill()
        return self._queue[0]

    def _fill(self) -> None:
        """Read and tokenise the next documents and queue those that have something to generate."""
        length = self._config.row_length
        for _ in range(IDLE_BATCHES):
            records: list[Record] = []
            places: list[dict[str, Any]] = []
            end = sum(self._bytes) + BATCH_BYTES
            while len(records) < BATCH_DOCUMENTS and sum(self._bytes) < end:
                sources = [cursor.state() for cursor in self._cursors]
                read = {"drawn": list(self._drawn), "bytes": list(self._bytes), "counts": self._counts}
                places.append({**read, "sources": sources})
                records.append(self._draw())
            for document, place in zip(encode_batch(records, self._tokenizer), places, strict=True):
                place.update(truncated=self.truncated, skipped=self.skipped)
                pieces = cut(document, length)
                self.skipped += not pieces
                if pieces:
                    self.truncated += sum(len(piece.tokens) for piece in pieces) < len(document.tokens)
                    self._queue.append((pieces, place))
            if self._queue:
                return
        raise NoDocument(
            f"data: no document has anything to generate within data.row_length={length}; "
            "use longer rows or other data"
        )

    def _draw(self) -> Record:
        """The next record on this side of the held-out border."""
        k = self._choose()
        cursor, share, epoch = self._cursors[k], self._config.held_out, self._cursors[k].epoch
        shards = self._part[1]
        # One whole epoch at least; a shard meets few documents of each, so it must look through more.
        while cursor.epoch <= epoch + (1 if shards == 1 else 20 * shards):
            record = cursor.take()
            if not self._split[k] or is_held_out(record, share) == self._held_out:
                self._drawn[k] += 1
                self._bytes[k] += sum(len(str(value).encode()) for value in record.value.values())
                return record
        side = "is held out" if self._held_out else "is left for training"
        raise NoDocument(
            f"data source {self._config.sources[k].path}: no document {side} with data.held_out={share}; "
            "change data.held_out or give more documents"
        )

    def _choose(self) -> int:
        """The source of the next document: a function of (seed, shard) and the documents before it.

        Its odds are its weight over the mean length of its documents so far, so that weights are shares of the
        text: else a source of long documents would take far more of the training than its weight says.
        """
        if len(self._cursors) == 1:
            return 0
        # As if one document of USUAL_BYTES had come before: the first ones say little about the others.
        length = (np.array(self._bytes) + USUAL_BYTES) / (np.array(self._drawn) + 1)
        borders = np.cumsum(self._weights / length)
        point = np.random.default_rng([*self._seed, sum(self._drawn)]).random() * borders[-1]
        return int(np.searchsorted(borders[:-1], point, side="right"))
