"""The documents of text, JSONL and Parquet files, each read when it is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any, cast

import numpy as np

from nextblock.config.errors import UsageError, one_line
from nextblock.config.sections import Source
from nextblock.data.files import BYTE_ORDER_MARK, decode_text, open_file, read_bytes
from nextblock.data.records import Record, Records, check_characters, to_record, without_nulls


def read_texts(files: Sequence[str], part_bytes: int) -> Records:
    """Text files; one longer than `part_bytes` is read in parts of about that size, so that files mix."""
    sizes = [os.path.getsize(file) for file in files]
    parts = [(n, k) for n, size in enumerate(sizes) for k in range(max(1, -(-size // part_bytes)))]

    def border(file: str, at: int, size: int) -> int:
        """Where to cut near byte `at`: at the first line that starts in the next `part_bytes`, else before the first
        space there, else between two characters."""
        if not 0 < at < size:
            return min(at, size)
        ahead = read_bytes(file, at - 1, part_bytes)
        if (newline := ahead.find(b"\n")) >= 0:
            return at + newline
        if (space := ahead.find(b" ", 1)) >= 0:
            return at - 1 + space
        return at + next((n for n, byte in enumerate(ahead[1:5]) if byte & 0xC0 != 0x80), 0)

    def read(index: int) -> Record:
        number, part = parts[index]
        file, size = files[number], sizes[number]
        start, stop = (border(file, k * part_bytes, size) for k in (part, part + 1))
        text = decode_text(read_bytes(file, start, stop - start), file, start)
        if "\0" in text:
            raise UsageError(f"data file {file} is not text: it holds a null byte; remove it")
        if size <= part_bytes:
            return Record({"text": text}, file)
        head = hashlib.blake2b(read_bytes(file, 0, part_bytes), digest_size=16).hexdigest()
        return Record({"text": text}, file, ended=stop == size, key=f"{head}:{size}")

    return Records(read, len(parts))


def _rows(file: str) -> Iterator[tuple[int, int, int]]:
    """(line, first byte, bytes) of each JSON row: of the lines that are not blank, or of an array's elements."""
    start, first = 0, True
    with open_file(file) as stream:
        for line, data in enumerate(stream, 1):
            if row := (data if start else data.removeprefix(BYTE_ORDER_MARK.encode())).strip():
                if first and row.startswith(b"["):
                    yield from _elements(file)
                    return
                yield line, start, len(data)
                first = False
            start += len(data)


def _elements(file: str) -> Iterator[tuple[int, int, int]]:
    """`_rows` of a file that holds one JSON array. UsageError if it is broken."""
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


def read_jsonl(files: Sequence[str], pick: Callable[[Any, str], Record]) -> Records:
    """An index of all rows; one is parsed, and `pick(row, where)` made of it, when read."""
    places = [(number, *row) for number, file in enumerate(files) for row in _rows(file)]
    index = np.array(places, dtype=np.int64).reshape(-1, 4)

    def read(which: int) -> Record:
        number, line, start, count = map(int, index[which])
        file, where = files[number], f"{files[number]}:{line}"
        text = decode_text(read_bytes(file, start, count), file, start)
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            cure = "write each object on a line of its own" if text.strip() == "{" else "repair it"
            raise UsageError(f"{where}: broken JSON line: {error.msg} at column {error.colno}; {cure}") from None
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endless nesting
            raise UsageError(f"{where}: unreadable JSON line: {one_line(error)}; repair it") from None
        if "\\u" in text:
            check_characters(row, where)
        return pick(row, where)

    return Records(read, len(index))


def read_parquet(source: Source, files: Sequence[str]) -> Records:
    """Memory-mapped Parquet rows; files may differ in their columns."""
    import pyarrow.parquet
    from datasets import Dataset, disable_progress_bars  # slow to import, so only where it is needed

    disable_progress_bars()

    def columns(file: str) -> Any:
        found = pyarrow.parquet.ParquetFile(file)
        return found.schema_arrow.remove_metadata() if found.metadata.num_rows else None

    tables: list[Dataset] = []
    try:
        for schema, alike in groupby(files, columns):
            if schema is not None:
                tables.append(cast(Dataset, Dataset.from_parquet(list(alike))))
    except Exception as error:  # the readers raise many kinds
        cause = one_line(error.__cause__ or error)
        raise UsageError(f"data source {source.path}: not readable as Parquet: {cause}") from None
    ends = list(accumulate(map(len, tables)))

    def read(index: int) -> Record:
        table = bisect_right(ends, index)
        row = tables[table][index - (ends[table - 1] if table else 0)]
        return to_record(without_nulls(row), source, f"{source.path} row {index}")

    return Records(read, ends[-1] if ends else 0)
