"""The documents of text, JSONL and Parquet files, each read when it is asked for."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, groupby
from typing import Any, cast

import numpy as np

from nextblock.config.errors import UsageError, one_line
from nextblock.config.sections import Source
from nextblock.data.files import decode_text, read_bytes
from nextblock.data.lines import MARKS, open_rows
from nextblock.data.records import Record, Records, check_characters, to_record, without_nulls


def read_texts(files: Sequence[str], part_bytes: int) -> Records:
    """Text files; one longer than `part_bytes` is read in parts of about that size, so that files mix."""
    sizes = np.array([os.path.getsize(file) for file in files])
    ends = np.cumsum(np.maximum(1, -(-sizes // part_bytes)))  # of the parts of each file

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
        number = int(np.searchsorted(ends, index, side="right"))
        part, file, size = index - int(ends[number - 1] if number else 0), files[number], int(sizes[number])
        start, stop = (border(file, k * part_bytes, size) for k in (part, part + 1))
        text = decode_text(read_bytes(file, start, stop - start), file, start)
        if "\0" in text:
            raise UsageError(f"data file {file} is not text: it holds a null byte; remove it")
        if size <= part_bytes:
            return Record({"text": text}, file)
        head = hashlib.blake2b(read_bytes(file, 0, part_bytes), digest_size=16).hexdigest()
        return Record({"text": text}, file, ended=stop == size, key=f"{head}:{size}")

    return Records(read, int(ends[-1]))


def read_jsonl(files: Sequence[str], pick: Callable[[Any, str], Record]) -> Records:
    """An index of the rows; one is parsed, and `pick(row, where)` made of it, when read."""
    opened = [open_rows(file, max(1, MARKS // len(files))) for file in files]
    ends = np.cumsum([one.count for one in opened])

    def read(which: int) -> Record:
        number = int(np.searchsorted(ends, which, side="right"))
        line, start, data = opened[number].read(which - int(ends[number - 1] if number else 0))
        file, where = files[number], f"{files[number]}:{line}"
        text = decode_text(data, file, start)
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            cure = "write each object on a line of its own" if text.strip() == "{" else "repair it"
            said = error.msg.removesuffix(" at")
            raise UsageError(f"{where}: broken JSON line: {said} at column {error.colno}; {cure}") from None
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endless nesting
            raise UsageError(f"{where}: unreadable JSON line: {one_line(error)}; repair it") from None
        if "\\u" in text:
            check_characters(row, where)
        return pick(row, where)

    return Records(read, int(ends[-1]))


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
