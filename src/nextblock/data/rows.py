"""What a row is: tokenised documents side by side; how they are cut and packed into [B, L].

Letters: B rows in a batch, L tokens in a row, n tokens in a document.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from operator import neg

import numpy as np
import torch
from torch import Tensor

from nextblock.config.errors import UsageError


@dataclass(frozen=True)
class Document:
    """One tokenised document.

    tokens: int64 [n].
    offset: int64 [n], offset in the generated span, -1 for context.
    spelled: special tokens that its contents spell, which are read as text.
    fault: why it is empty, if it was made of a record that cannot be used.
    """

    tokens: np.ndarray
    offset: np.ndarray
    spelled: int = 0
    fault: str = ""


@dataclass(frozen=True)
class Rows:
    """Packed rows. int64 [B, L], but `epoch` and `number` [B], which seed the corruption.

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

    def without(self, numbers: Sequence[int]) -> Rows:
        """The same, where rows of these numbers hold nothing but padding: nothing of them is scored."""
        gone = torch.isin(self.number, torch.tensor(numbers, dtype=torch.int64))[:, None]
        blank = {"tokens": 0, "document": -1, "position": 0, "offset": -1}
        return replace(self, **{name: getattr(self, name).masked_fill(gone, value) for name, value in blank.items()})

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        """All rows of all parts."""
        return Rows(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Rows)))


def cut(document: Document, row_length: int) -> list[Document]:
    """Pieces of a document that each fit in a row.

    Plain text longer than a row becomes several documents with offsets from 0. Other documents are
    truncated at the end of the row, because a completion means little without its prompt; what then holds
    no generated token is dropped.
    """
    n = len(document.tokens)
    if n == 0 or document.offset.max() < 0:
        return []
    if n <= row_length:
        return [document]
    if document.offset[-1] == n - 1:  # one span from the first token on: plain text
        bounds = range(0, n, row_length)
        return [Document(document.tokens[i : i + row_length], np.arange(min(row_length, n - i))) for i in bounds]
    head = Document(document.tokens[:row_length], document.offset[:row_length])
    return [head] if head.offset.max() >= 0 else []


def pack(documents: Sequence[Document], row_length: int) -> list[list[Document]]:
    """The pieces (`cut`) of all documents, each whole, in rows of at most `row_length` tokens.

    A row takes the longest piece left, then the subset of the others that fills it best: with only a few
    documents to a row, one by one best-fit-decreasing leaves more of it empty.
    """
    pieces = [piece for document in documents for piece in cut(document, row_length)]
    rows = []
    left = sorted(pieces, key=lambda piece: -len(piece.tokens))
    sizes = [len(piece.tokens) for piece in left]
    while left:
        row, room = [left.pop(0)], row_length - sizes.pop(0)
        chosen = best_subset(sizes, room)
        row += [left[i] for i in chosen]
        for i in chosen:  # the last one first, so that the others stay where they are
            del left[i], sizes[i]
        rows.append(row)
    return rows


def best_subset(sizes: Sequence[int], room: int) -> list[int]:
    """Indices, the last first, of numbers in `sizes` (decreasing) with the largest sum <= room: dynamic programming.

    Bit s of `reach[i]` says that some of the first i of those that fit have the sum s. Where there are many sizes,
    only the first are looked at: at least 256 of them, and enough for twice the room.
    """
    first = bisect_left(sizes, -room, key=neg)
    reach, mask, seen = [1], (1 << (room + 1)) - 1, 0
    for i in range(first, len(sizes)):
        size, sums = sizes[i], reach[-1]
        if sums >> room & 1 or (i >= 256 and seen >= 2 * room):
            break
        reach.append(sums | (sums << size) & mask)
        seen += size
    total, chosen = reach[-1].bit_length() - 1, []
    for i in range(len(reach) - 2, -1, -1):
        if not reach[i] >> total & 1:
            chosen.append(first + i)
            total -= sizes[first + i]
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
