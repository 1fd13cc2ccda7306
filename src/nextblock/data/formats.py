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
from nextblock.config.files import unwritten
from nextblock.config.sections import Source
from nextblock.data.files import check_is_text, decode_text, open_file, read_bytes
from nextblock.data.lines import MARKS, open_rows
from nextblock.data.records import Record, Records, Unusable, check_characters, to_record, without_nulls


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
            check_is_text(file)
            raise Unusable(f"data file {file} is not text: it holds a null byte; remove it")
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
            row = json.loads(text.rstrip("\r\n"))  # with its end, a line that was cut would break behind it
        except json.JSONDecodeError as error:
            cure = "write each object on a line of its own" if text.strip() == "{" else "repair it"
            said = error.msg.removesuffix(" at")
            raise Unusable(f"{where}: broken JSON line: {said} at column {error.colno}; {cure}") from None
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endless nesting
            raise Unusable(f"{where}: unreadable JSON line: {one_line(error)}; repair it") from None
        if "\\u" in text:
            check_characters(row, where)
        return pick(row, where)

    return Records(read, int(ends[-1]))


def read_parquet(source: Source, files: Sequence[str]) -> Records:
    """Memory-mapped rows of a copy in the cache of `datasets`; files may differ in their columns."""
    import pyarrow.parquet
    from datasets import Dataset, config, disable_progress_bars  # slow to import, so only where it is needed

    disable_progress_bars()

    def columns(file: str) -> Any:
        with open_file(file) as stream:
            found = pyarrow.parquet.ParquetFile(stream)
            return found.schema_arrow.remove_metadata() if found.metadata.num_rows else None

    tables: list[Dataset] = []
    try:
        for schema, alike in groupby(files, columns):
            if schema is not None:
                tables.append(cast(Dataset, Dataset.from_parquet(list(alike))))
    except UsageError:
        raise
    except Exception as error:  # the readers raise many kinds
        cause = error.__cause__ or error
        why = (one_line(cause), "free space") if "enough disk space" in str(cause) else unwritten(cause)
        if why is not None:
            raise UsageError(
                f"data source {source.path}: its rows cannot be written to {config.HF_DATASETS_CACHE}: {why[0]}; "
                f"{why[1]}, or set HF_DATASETS_CACHE to another folder"
            ) from None
        raise UsageError(f"data source {source.path}: not readable as Parquet: {one_line(cause)}") from None
    ends = list(accumulate(map(len, tables)))

    def read(index: int) -> Record:
        table = bisect_right(ends, index)
        row = tables[table][index - (ends[table - 1] if table else 0)]
        return to_record(without_nulls(row), source, f"{source.path} row {index}")

    return Records(read, ends[-1] if ends else 0)
