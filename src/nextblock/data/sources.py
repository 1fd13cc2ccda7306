"""A source of the configuration, opened and checked: files, a token store, a data set of the Hub, a built-in task."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from nextblock.config.errors import UsageError
from nextblock.config.sections import Source
from nextblock.data.cursors import HubStream
from nextblock.data.encode import check_usable
from nextblock.data.files import CHECKED_BYTES, CHECKED_DOCUMENTS, check_options, digest_of, find_files
from nextblock.data.formats import read_jsonl, read_parquet, read_texts
from nextblock.data.lines import is_between_lines
from nextblock.data.records import Record, Records, or_fault, to_record
from nextblock.data.store import is_store, read_store
from nextblock.tasks import get_task


def read_source(
    source: Source,
    held_out: bool = False,
    part_bytes: int = 2**20,
    shard: tuple[int, int] = (0, 1),
    seed: Sequence[int] | None = None,
    skip: bool = False,
    usual_split: str = "train",
) -> Records | HubStream:
    """Open a source. `Records.check` reads local data through, up to CHECKED_BYTES and CHECKED_DOCUMENTS.

    Args:
        source: where and what; `source.examples` keeps the first documents only.
        held_out: for a built-in task, take its "test" split.
        part_bytes: longer text files are read in parts of about this size.
        shard: (s, S): the part of a streamed data set to read; other sources are shared out by `Cursor`.
        seed: of the order in which a streamed data set is read; None: its own. `Cursor` shuffles other sources.
        skip: a record that cannot be used is read as one whose `fault` says why.
        usual_split: where the place has splits and `source.split` is None.
    Raises:
        UsageError: missing path, nothing there, an option of other places, an unknown task, an unreadable data set.
        Unusable: in reading a record: a file that is not UTF-8 (byte named), a broken line or a missing field (file
            and line named).
    """
    place, given = place_of(source), source
    source = source.model_copy(update={"split": source.split or usual_split})
    if place == "hub":
        return HubStream(source, shard, seed, skip)
    if place == "task":
        task, split = get_task(source.path.removeprefix("task:")), "test" if held_out else str(source.split)

        def read_example(index: int) -> Record:
            example, where = task.example(split, index), f"{source.path} {split} {index}"
            return Record({"prompt": example.prompt, "completion": example.completion}, where)

        return Records(read_example, source.examples, split_by_hash=False)
    if place == "store":
        check_options(given)
        stored = read_store(Path(source.path).expanduser())
        return replace(stored, count=min(stored.count or 0, source.examples or stored.count or 0))
    kind, files = find_files(given, usual_split)
    size = (len(files), os.path.getsize(files[-1]))
    with ThreadPoolExecutor(1) as beside:  # the rows are found while it hashes
        digest = beside.submit(_digest_at, kind, files, size)
        if kind == "parquet":
            records = read_parquet(source, files)
        elif kind == "jsonl":
            records = read_jsonl(files, lambda row, where: to_record(row, source, where))
        else:
            records = read_texts(files, part_bytes)
    count = min(records.count or 0, source.examples or records.count or 0)
    total, read = sum(os.path.getsize(file) for file in files), records.read
    if not count or not total:
        raise UsageError(f"data source {source.path} is empty; give at least one document")
    found = Records(read, count, digest=digest.result(), size=size, digest_at=partial(_digest_at, kind, files))
    if skip:
        return replace(found, read=partial(or_fault, read))
    if count <= CHECKED_DOCUMENTS and total <= CHECKED_BYTES:
        return replace(found, check=lambda tokenizer: check_usable(map(read, range(count)), tokenizer))
    return found


def _digest_at(kind: str, files: Sequence[str], size: Sequence[int]) -> str:
    """As `Records.digest_at`. Files may have been added behind the others, and lines to the last file of JSON."""
    number, last = size
    if number > len(files):
        return ""
    grown = os.path.getsize(files[number - 1]) != last
    if grown and not (kind == "jsonl" and is_between_lines(files[number - 1], last)):
        return ""
    return digest_of(files[:number], last=last)


def place_of(source: Source) -> str:
    """Where a source is: "task", "hub", "store" or "files" of this machine. UsageError for a path that is missing."""
    path = os.path.expanduser(source.path)
    if source.format != "auto":
        return source.format if source.format in ("task", "hub") else "files"
    if path.startswith("task:") and not os.path.exists(path):
        return "task"
    if os.path.isdir(path) and is_store(Path(path)):
        return "store"
    if path == "python-stdlib" or os.path.exists(path) or glob.has_magic(path):
        return "files"
    local = path.startswith((".", "/", "~")) or re.fullmatch(r"\.[A-Za-z]\w*", Path(path).suffix)
    if local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", path):
        raise UsageError(f"data source {source.path} does not exist; give a file, a folder, a glob or a Hub id")
    return "hub"
