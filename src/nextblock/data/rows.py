"""Documents -> packed rows [B, L], in an order that resumes exactly.

Letters: B rows in a batch, L tokens in a row, n tokens in a document.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nextblock.config.errors import UsageError
from nextblock.config.sections import DataConfig
from nextblock.data.encode import Document, encode_batch
from nextblock.data.sources import Cursor, HubStream, Record, Records, is_held_out, read_source

CHUNK_ROWS = 64  # rows packed together at first: little to make again after a resume
FULL, WORTH = 0.985, 0.25  # rows less full are packed with more, while that brings so much of what is missing
MOST_ROWS, MOST_TOKENS = 512, 2**21  # of a chunk
BATCH_DOCUMENTS, BATCH_BYTES = 256, 2**20  # one call of the tokenizer ends at either
USUAL_BYTES = 1000  # of a document of a source that has not been read yet
IDLE_BATCHES = 8  # batches without one usable document after which the data counts as empty


class NoDocument(UsageError):
    """A stream without one document that could be used."""


@dataclass(frozen=True)
class Rows:
    """Packed rows (DESIGN section 2). int64 [B, L], but `epoch` and `number` [B], which seed the corruption.

    `document` counts from 0 in each row, -1 is padding; `position` restarts in each document; `offset`
    restarts in each generated span, -1 is context or padding.
    """

    tokens: Tensor
    document: Tensor
    position: Tensor
    offset: Tensor
    epoch: Tensor
    number: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def slice(self, start: int, stop: int) -> Rows:
        """Rows start..stop-1, sharing memory."""
        return Rows(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    def take(self, rows: Tensor) -> Rows:
        """The rows of these indices, copied."""
        return Rows(*(getattr(self, field.name)[rows] for field in fields(self)))

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """All rows of all parts."""
        return Rows(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Rows)))

    def to(self, device: torch.device | str) -> Rows:
        """The same rows on a device."""
        return Rows(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


# ---------------------------------------------------------------- rows: documents -> [B, L]


def cut(document: Document, row_length: int) -> list[Document]:
    """Pieces of a document that each fit in a row.

    Plain text longer than a row becomes several documents with offsets from 0. Other documents are
    truncated at the end of the row, because a completion means little without its prompt; what then holds
    no generated token is dropped.
    """
    n = len(document.tokens)
    if n == 0 or not (document.offset >= 0).any():
        return []
    if document.offset[-1] == n - 1:  # one span from the first token on: plain text
        bounds = range(0, n, row_length)
        return [Document(document.tokens[i : i + row_length], np.arange(min(row_length, n - i))) for i in bounds]
    head = Document(document.tokens[:row_length], document.offset[:row_length])
    return [head] if (head.offset >= 0).any() else []


def pack(documents: Sequence[Document], row_length: int) -> list[list[Document]]:
    """The pieces (`cut`) of all documents, each whole, in rows of at most `row_length` tokens.

    A row takes the longest piece left, then the subset of the others that fills it best: with only a few
    documents to a row, one by one best-fit-decreasing leaves more of it empty.
    """
    pieces = [piece for document in documents for piece in cut(document, row_length)]
    rows = []
    left = sorted(pieces, key=lambda piece: -len(piece.tokens))
    while left:
        longest, left = left[0], left[1:]
        chosen = best_subset([len(piece.tokens) for piece in left], row_length - len(longest.tokens))
        rows.append([longest, *(left[i] for i in chosen)])
        taken = set(chosen)
        left = [piece for i, piece in enumerate(left) if i not in taken]
    return rows


def best_subset(sizes: Sequence[int], room: int) -> list[int]:
    """Indices of numbers in `sizes` (decreasing) with the largest sum <= room: dynamic programming on bits.

    Bit s of `reach[i]` says that some of the first i sizes have the sum s. Where there are many sizes,
    only the first are looked at: at least 256 of them, and enough for twice the room.
    """
    reach, mask, seen = [1], (1 << (room + 1)) - 1, 0
    for i, size in enumerate(sizes):
        if reach[-1] >> room & 1 or (i >= 256 and seen >= 2 * room):
            break
        reach.append(reach[-1] | (reach[-1] << size) & mask if size <= room else reach[-1])
        seen += size if size <= room else 0
    total, chosen = reach[-1].bit_length() - 1, []
    for i in range(len(reach) - 2, -1, -1):
        if not reach[i] >> total & 1:
            chosen.append(i)
            total -= sizes[i]
    return chosen


def collate(packed: Sequence[Sequence[Document]], row_length: int, pad: int, epoch: int, number: int) -> Rows:
    """Rows from packed documents; `number` is that of the first row, `pad` the token of padding."""
    shape = (len(packed), row_length)
    tokens, position = np.full(shape, pad, np.int64), np.zeros(shape, np.int64)
    document, offset = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    for r, row in enumerate(packed):
        start = 0
        for d, piece in enumerate(row):
            stop = start + len(piece.tokens)
            tokens[r, start:stop], offset[r, start:stop] = piece.tokens, piece.offset
            document[r, start:stop], position[r, start:stop] = d, np.arange(stop - start)
            start = stop
    numbers = torch.arange(number, number + len(packed))
    parts = [torch.from_numpy(array) for array in (tokens, document, position, offset)]
    return Rows(*parts, epoch=torch.full_like(numbers, epoch), number=numbers)


def check_tokens(rows: Rows, vocab_size: int, mask_token_id: int | None) -> None:
    """UsageError if a token lies outside the model's vocabulary, or the data uses the mask token."""
    highest = int(rows.tokens.max()) if rows.tokens.numel() else 0
    if highest >= vocab_size:
        raise UsageError(
            f"token id {highest} is outside the model's vocabulary of {vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    if mask_token_id is not None and bool(((rows.tokens == mask_token_id) & (rows.document >= 0)).any()):
        raise UsageError(f"mask token id {mask_token_id} is used in the data; set model.mask_token to an unused token")


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
