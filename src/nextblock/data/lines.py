"""The rows of a JSON file, found without keeping the place of each: an index of bounded size."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple, cast

import numpy as np

from nextblock.config.errors import UsageError, one_line
from nextblock.data.files import BYTE_ORDER_MARK, open_file, read_bytes

MARKS = 2**19  # places kept of a source: 8 MiB, whatever the number of its rows
BLOCK_BYTES = 2**20
MARK = BYTE_ORDER_MARK.encode()


class Row(NamedTuple):
    """A row of JSON: its line from 1, the offset of its first byte, and its bytes."""

    line: int
    start: int
    data: bytes


def open_rows(file: str, marks: int) -> Lines | Elements:
    """The rows of a file: of lines that are not blank, or of an array's elements. UsageError if an array is broken."""
    with open_file(file) as stream:
        first = next((row for data in stream if (row := data.removeprefix(MARK).strip())), b"")
    return Elements(file) if first.startswith(b"[") else Lines(file, marks)


class Lines:
    """The lines of a file that are not blank. The place of every k-th is kept, so that there are `marks` at most.

    Opening reads the file once, by blocks. A row is found by reading on from the mark before it.
    """

    def __init__(self, file: str, marks: int) -> None:
        self._file, self.count, self._every, kept = file, 0, 1, 0
        found = np.empty((marks, 2), np.int64)  # (first byte, line)
        for starts, lines in _blocks(file):
            while kept + len(range(-self.count % self._every, len(starts), self._every)) > marks:
                self._every, half = 2 * self._every, found[:kept:2]
                kept = len(half)
                found[:kept] = half.copy()
            chosen = slice(-self.count % self._every, None, self._every)
            more = len(starts[chosen])
            found[kept : kept + more, 0], found[kept : kept + more, 1] = starts[chosen], lines[chosen]
            kept, self.count = kept + more, self.count + len(starts)
        self._marks = found[:kept].copy()

    def read(self, row: int) -> Row:
        """Row 0 <= row < count. UsageError if the file has lost it."""
        left = row % self._every
        start, line = map(int, self._marks[row // self._every])
        with open_file(self._file) as stream:
            stream.seek(start)
            for line, data in enumerate(stream, line):  # noqa: B020  # goes on from the mark
                if not _is_blank(data, start):
                    if not left:
                        return Row(line, start, data)
                    left -= 1
                start += len(data)
        raise UsageError(f"data file {self._file} is shorter than when it was opened; restore it")


def is_between_lines(file: str, at: int) -> bool:
    """Whether no line of a file reaches across byte `at`."""
    return not at or not set(b"\r\n").isdisjoint(read_bytes(file, at - 1, 2))


def _is_blank(data: bytes, start: int) -> bool:
    return not (data if start else data.removeprefix(MARK)).strip()


def _blocks(file: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(first byte, line) of the lines that are not blank, block by block."""
    base, line, begins = 0, 1, True  # does a line begin with the block?
    with open_file(file) as stream, open_file(file) as again:
        while block := stream.read(BLOCK_BYTES):
            codes = np.frombuffer(block, np.uint8)
            ends = np.flatnonzero(codes == ord("\n"))
            starts, begins, opened = np.append([0] * begins, ends + 1), block.endswith(b"\n"), begins
            starts = starts[: len(starts) - begins].astype(np.int64)
            lines = line + (not opened) + np.arange(len(starts))
            first = codes[starts]
            keep = np.ones(len(starts), bool)
            # Few lines begin with white space or a mark: those are read whole, to see whether more follows.
            for at in np.flatnonzero((first <= ord(" ")) | (first == MARK[0])).tolist():
                again.seek(base + int(starts[at]))
                keep[at] = not _is_blank(again.readline(), base + int(starts[at]))
            yield base + starts[keep], lines[keep]
            base, line = base + len(block), line + len(ends)


class Elements:
    """The elements of a file that holds one JSON array, which is read whole. UsageError if it is broken."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._places = np.fromiter(chain.from_iterable(_elements(file)), np.int64).reshape(-1, 3)
        self.count = len(self._places)

    def read(self, row: int) -> Row:
        """Element 0 <= row < count."""
        line, start, size = map(int, self._places[row])
        return Row(line, start, read_bytes(self._file, start, size))


def _elements(file: str) -> Iterator[tuple[int, int, int]]:
    """(line, first byte, bytes) of each element."""
    text = read_bytes(file).decode("latin-1")  # a character for each byte, so that places are offsets of bytes
    space, line, last, end = re.compile(r"[ \t\r\n]*"), 1, 0, text.index("[") + 1

    def behind_space(at: int) -> int:
        return cast(re.Match[str], space.match(text, at)).end()

    at = behind_space(end)
    while not text.startswith("]", at):
        try:
            if last:
                if not text.startswith(",", at):
                    raise ValueError(f"no comma behind the element of line {line}")
                at = behind_space(at + 1)
            _, end = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{file}: broken JSON array: {one_line(error)}; repair it") from None
        line, last = line + text.count("\n", last, at), at
        yield line, at, end - at
        at = behind_space(end)
    if text[at + 1 :].strip():
        raise UsageError(
            f"{file}: more follows behind the JSON array it begins with; give one array, or an object a line"
        )
