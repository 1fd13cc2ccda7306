"""Endless packed rows: documents of the mixture, tokenised, packed in chunks, resumed.

Letters: B rows, L tokens in a row.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from nextblock.config.sections import DataConfig
from nextblock.data.cursors import Counts
from nextblock.data.encode import encode_batch
from nextblock.data.mixture import Mixture, NoDocument
from nextblock.data.records import naming_the_way_on
from nextblock.data.rows import Document, Rows, collate, cut, pack

CHUNK_ROWS = 64  # rows packed together at first: little to make again after a resume
FULL, WORTH = 0.985, 0.25  # rows less full are packed with more, while that brings so much of what is missing
MOST_ROWS, MOST_TOKENS = 512, 2**21  # of a chunk
BATCH_DOCUMENTS, BATCH_BYTES = 256, 2**20  # one call of the tokenizer ends at either
IDLE_BATCHES = 8  # batches without one usable document after which the data counts as empty

NOTHING: dict[str, Any] = {
    "truncated": 0,
    "skipped": 0,
    "spelled": 0,
    "spelled_at": "",
    "unusable": 0,
    "unusable_at": "",
}
"""What is counted of documents: those cut short at the end of a row (prompt or chat documents only), those with
nothing to generate (empty, unusable, or a prompt that fills the row), special tokens that contents spell, and the
first place of these; the unusable ones, and what is wrong with the first."""


class Cut(NamedTuple):
    """A document as pieces that fit in a row, the position before it, for a resume, and the epochs with it."""

    pieces: list[Document]
    place: dict[str, Any]
    epochs: list[int]

    @property
    def tokens(self) -> int:
        """Tokens of all pieces."""
        return sum(len(piece.tokens) for piece in self.pieces)


class Documents:
    """The documents of a mixture, tokenised in batches and cut to rows of L tokens; see NOTHING for what it counts."""

    def __init__(self, mixture: Mixture, tokenizer: PreTrainedTokenizerBase, row_length: int) -> None:
        self._mixture, self._tokenizer, self._length = mixture, tokenizer, row_length
        self._queue: deque[Cut] = deque()
        self._counts = dict(NOTHING)

    def peek(self) -> Cut:
        """The next document. NoDocument if there is none that could be used."""
        if not self._queue:
            self._fill()
        return self._queue[0]

    def take(self) -> Cut:
        """As `peek`, and go on to the one after it."""
        self.peek()
        return self._queue.popleft()

    def give_back(self, documents: Sequence[Cut]) -> None:
        """Put the last documents that were taken back in front."""
        self._queue.extendleft(reversed(documents))

    def load_state(self, place: Mapping[str, Any], counts: Sequence[Counts]) -> None:
        """Go to the position before a document, as `Mixture.load_state`."""
        self._mixture.load_state(place, counts)
        self._counts = {name: place.get(name, nothing) for name, nothing in NOTHING.items()}
        self._queue.clear()

    def _fill(self) -> None:
        """Read and tokenise the next documents and queue those that have something to generate."""
        longest = 0
        for _ in range(IDLE_BATCHES):
            records, places, epochs, end = [], [], [], self._mixture.bytes + BATCH_BYTES
            with naming_the_way_on():
                while len(records) < BATCH_DOCUMENTS and self._mixture.bytes < end:
                    places.append(self._mixture.state())
                    records.append(self._mixture.draw())
                    epochs.append(self._mixture.epochs)
                documents = encode_batch(records, self._tokenizer, self._mixture.skip_unusable)
            for record, document, place, its in zip(records, documents, places, epochs, strict=True):
                found, counts = Cut(cut(document, self._length), {**place, **self._counts}, its), self._counts
                if document.spelled:
                    counts["spelled"] += document.spelled
                    counts["spelled_at"] = counts["spelled_at"] or record.where
                if document.fault:
                    counts["unusable"] += 1
                    if not counts["unusable_at"]:
                        counts["unusable_at"] = document.fault
                        warnings.warn(f"{document.fault}; left out, as all that cannot be used", stacklevel=2)
                longest = max(longest, len(document.tokens))
                if found.pieces:
                    counts["truncated"] += found.tokens < len(document.tokens)
                    self._queue.append(found)
                else:
                    counts["skipped"] += 1
            if self._queue:
                return
        if not longest:
            first = f"; {self._counts['unusable_at']}" * (self._counts["unusable"] > 0)
            raise NoDocument(f"data: no document has anything to generate, for all are empty{first}; use other data")
        raise NoDocument(
            f"data: no document has anything to generate within data.row_length={self._length}; "
            "use longer rows or other data"
        )


class RowStream:
    """Endless rows of one shard of the data, in an order that depends on (config, seed, shard) only.

    Documents (`Mixture`, `Documents`) are packed in chunks of about CHUNK_ROWS rows or more (`_make_chunk`).
    `state` names the start of the chunk and how many of its rows are used; resuming makes the chunk again.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        held_out: bool = False,
        shard: tuple[int, int] = (0, 1),
        beside: RowStream | None = None,
    ) -> None:
        """Open all sources, read the first documents. UsageError as `read_source`, or if there are none.

        Args:
            shard: (s, S): shard s of S.
            beside: another shard of the same data; its files need not be opened and checked again.
            held_out: likewise nothing is checked, for what is left for training has been.
        """
        self._open = partial(Mixture, config, seed, held_out, shard)
        self._mixture = self._open(None if beside is None else beside._mixture)
        if beside is None and not held_out:
            self._mixture.check(tokenizer)
        self._tokenizer, self._weights = tokenizer, self._mixture.weights  # of the sources, in the chunk in work
        self._documents = Documents(self._mixture, tokenizer, config.row_length)
        self._length = config.row_length
        self._pad: Any = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._first = self._taken = 0  # number of the chunk's first row; its rows used so far
        self._chunk: Rows | None = None
        self._lost = dict(NOTHING)
        self._start = self._documents.peek().place  # before the chunk's first document
        self._reached: list[int] = []  # epochs that were looked into to make the chunk

    @property
    def digests(self) -> list[str]:
        """Of the texts of each source."""
        return self._mixture.digests

    @property
    def without(self) -> list[str]:
        """Paths of the sources in which `Mixture.draw` has found nothing held out."""
        return self._mixture.without

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
                self._start, self._weights = self._documents.peek().place, self._mixture.weights
        return Rows.cat(parts)

    def state(self) -> dict[str, Any]:
        """Small and JSON-serialisable: what `load_state` needs to give exactly the next rows.

        `lost` counts what NOTHING names, up to the end of the chunk.
        """
        place = {"start": self._start, "first": self._first, "taken": self._taken, "lost": self._lost}
        reached = self._reached if self._taken else [source["epoch"] for source in self._start["sources"]]
        return {**place, "reached": reached, **self._mixture.identity(), "weights": self._weights}

    def counts_since(self, states: Sequence[Mapping[str, Any]]) -> tuple[list[Counts], list[str]]:
        """As `Mixture.counts_since`, of the states of all shards."""
        # Older versions have not saved it, nor how much text there was, so nothing can have been added since.
        reached = zip_longest(*(state.get("reached", ()) for state in states), [0] * len(self.digests), fillvalue=0)
        return self._mixture.counts_since(states[0], [max(epochs) for epochs in reached])

    def load_state(self, state: Mapping[str, Any], counts: Sequence[Counts] | None = None) -> None:
        """Go on where `state` was taken.

        Sources that were added or weighted anew since then count from the next chunk on: the one in work is made again
        of the documents that it was made of.

        Args:
            counts: of `counts_since`; by default that of this state alone.
        Raises:
            UsageError: `state` belongs to other sources.
        """
        counts = self.counts_since([state])[0] if counts is None else counts
        self._start, self._lost, self._chunk = state["start"], state["lost"], None
        self._first, self._taken, self._reached = state["first"], state["taken"], state.get("reached", [])
        before = state.get("weights", self._mixture.weights)  # positions saved by older versions have none
        self._weights = before if self._taken else self._mixture.weights
        if self._weights == self._mixture.weights:
            self._documents.load_state(self._start, counts)
            return
        own, self._documents = (
            self._documents,
            Documents(self._open(self._mixture, before), self._tokenizer, self._length),
        )
        self._documents.load_state(self._start, counts)
        self._chunk = self._make_chunk()
        own.load_state(self._documents.peek().place, counts)
        self._documents = own

    def _make_chunk(self) -> Rows:
        """Pack the next documents: into about CHUNK_ROWS rows, or twice as many for as long as that fills them better.

        What is left of a chunk packs badly, the less so the more documents there are to choose from.
        """
        size, most = CHUNK_ROWS, min(MOST_ROWS, MOST_TOKENS // self._length)
        read, packed = self._pack_on([], size)
        self._reached = self._documents.peek().epochs
        while (full := self._density(packed)) < FULL and 2 * size <= most:
            size *= 2
            more, wider = self._pack_on(read, size)
            self._reached = self._documents.peek().epochs
            if self._density(wider) < full + WORTH * (FULL - full):
                self._documents.give_back(more[len(read) :])
                break
            read, packed = more, wider
        self._lost = {name: self._documents.peek().place[name] for name in NOTHING}
        order = np.random.default_rng([*self._mixture.seed, self._first]).permutation(len(packed))
        epoch = self._start["sources"][0]["epoch"]
        return collate([packed[i] for i in order], self._length, self._pad, epoch, self._first)

    def _pack_on(self, read: list[Cut], size: int) -> tuple[list[Cut], list[list[Document]]]:
        """`read` and the next documents, for `size` rows or more; and these in rows, where the next fits in none."""
        read = list(read)
        tokens = sum(document.tokens for document in read)
        while tokens < size * self._length:
            read.append(self._documents.take())
            tokens += read[-1].tokens
        packed = pack([piece for document in read for piece in document.pieces], self._length)
        room = [self._length - sum(len(piece.tokens) for piece in row) for row in packed]
        while (last := len((pieces := self._documents.peek().pieces)[-1].tokens)) <= max(room):
            read.append(self._documents.take())
            best = min((free, row) for row, free in enumerate(room) if free >= last)[1]
            packed[best].append(pieces[-1])
            room[best] -= last
            packed += [[piece] for piece in pieces[:-1]]  # these fill a row each
            room += [0] * len(pieces[:-1])
        return read, packed

    def _density(self, packed: Sequence[Sequence[Document]]) -> float:
        """The share of the rows that documents fill."""
        return sum(len(piece.tokens) for row in packed for piece in row) / (len(packed) * self._length)
