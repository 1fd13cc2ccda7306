"""Raw documents from files, data sets and tasks, read for ever in an order that resumes exactly."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nextblock.config import Source, UsageError
from nextblock.tasks import get_task

CHECKED_BYTES = 64 * 2**20  # local sources up to this size are read through before training starts
TEXT_SUFFIXES = frozenset(
    [
        ".txt",
        ".text",
        ".md",
        ".rst",
        ".tex",
        ".py",
        ".pyi",
        ".js",
        ".ts",
        ".jsx",
        ".tsx",
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cu",
        ".java",
        ".kt",
        ".go",
        ".rs",
        ".rb",
        ".php",
        ".swift",
        ".scala",
        ".sh",
        ".sql",
        ".html",
        ".css",
        ".xml",
        ".yaml",
        ".yml",
        ".toml",
        ".ini",
        ".cfg",
        ".r",
        ".jl",
        ".lua",
        ".pl",
        ".hs",
        ".ml",
        ".lean",
        ".org",
        ".cs",
        ".dart",
        ".f90",
        ".m",
        ".vue",
        ".zig",
    ]
)
ROW_SUFFIXES = frozenset([".jsonl", ".json", ".parquet"])


@dataclass(frozen=True)
class Record:
    """One raw document: {"text"}, {"prompt", "completion"} or {"messages"}; `where` names it in errors.

    `ended` False: the text breaks off and no end token follows, as in a row with `"ended": false`. So does a part
    of a long text if more follows; its `key` is a digest of the whole text, so that all its parts fall on one side
    of the held-out border.
    """

    value: Mapping[str, Any]
    where: str
    ended: bool = True
    key: str = ""


@dataclass(frozen=True)
class Records:
    """One source with random access: `read(i)` for 0 <= i < count; `count` None is endless."""

    read: Callable[[int], Record]
    count: int | None
    split_by_hash: bool = True  # False: the source has its own held-out split


def source_format(source: Source) -> str:
    """The format of a source: as set, else by its path. UsageError for a local path that is missing."""
    path = os.path.expanduser(source.path)
    if source.format != "auto":
        return source.format
    if path.startswith("task:"):
        return "task"
    suffix = Path(path).suffix
    if path == "python-stdlib" or os.path.exists(path) or glob.has_magic(path):
        if os.path.isdir(path):
            return _folder_format(source.path, path)
        return _format_of(suffix)
    local = path.startswith((".", "/", "~")) or re.fullmatch(r"\.[A-Za-z]\w*", suffix)
    if local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", path):
        raise UsageError(f"data source {source.path} does not exist; give a file, a folder, a glob or a Hub id")
    return "hub"


def _format_of(suffix: str) -> str:
    return {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}.get(suffix.lower(), "text")


def _folder_format(name: str, folder: str) -> str:
    """What a folder holds: text unless there are rows and no text. UsageError for rows of both kinds and no text."""
    suffixes = {Path(file).suffix.lower() for _, _, files in _walk(folder) for file in files}
    kinds = sorted({_format_of(suffix) for suffix in suffixes if suffix in {*TEXT_SUFFIXES, *ROW_SUFFIXES}})
    if kinds == ["jsonl", "parquet"]:
        raise UsageError(f"data source {name} holds JSONL and Parquet files; give a source for each, with its format")
    return kinds[0] if len(kinds) == 1 else "text"


def _walk(folder: str, skipped: Set[str] = frozenset()) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` in order of name, without hidden folders and those of a `skipped` name."""
    for here, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if name not in skipped and not name.startswith("."))
        yield here, inner, sorted(names)


def read_source(
    source: Source, held_out: bool = False, part_bytes: int = 2**20, shard: tuple[int, int] = (0, 1)
) -> Records | HubStream:
    """Open a source and check it: local data up to CHECKED_BYTES is read through, larger data when drawn.

    Args:
        source: where and what; `source.examples` keeps the first documents only.
        held_out: for a built-in task, take its "test" split.
        part_bytes: longer text files are read in parts of about this size.
        shard: (s, S): the part of a streamed data set to read; other sources are shared out by `Cursor`.
    Raises:
        UsageError: missing path, nothing there, a file that is not UTF-8 (byte named), a broken line or
            a missing field (file and line named), an unknown task, an unreadable data set.
    """
    kind = source_format(source)
    if kind == "hub":
        return HubStream(source, shard)
    if kind == "task":
        task, split = get_task(source.path.removeprefix("task:")), "test" if held_out else source.split

        def read_example(index: int) -> Record:
            example = task.example(split, index)
            return Record(
                {"prompt": example.prompt, "completion": example.completion}, f"{source.path} {split} {index}"
            )

        return Records(read_example, source.examples, split_by_hash=False)
    files = _files(source, kind)
    if kind == "parquet":
        records = _parquet(source, files)
    elif kind == "jsonl":
        records = _jsonl(files, lambda row, where: _record(row, source, where))
    else:
        records = _texts(files, part_bytes)
    count = min(records.count or 0, source.examples or records.count or 0)
    if not count:
        raise UsageError(f"data source {source.path} is empty; give at least one document")
    if sum(os.path.getsize(file) for file in files) <= CHECKED_BYTES:
        for index in range(count):
            records.read(index)
    return Records(records.read, count)


def _files(source: Source, kind: str) -> list[str]:
    """The files of a local source, sorted; in folders those whose name (and first bytes) fit the format."""
    suffixes = {"jsonl": {".jsonl", ".json"}, "parquet": {".parquet"}}.get(kind, TEXT_SUFFIXES)
    path = os.path.expanduser(source.path)
    skipped: set[str] = set()
    if path == "python-stdlib":
        path, suffixes = sysconfig.get_paths()["stdlib"], {".py"}
        skipped = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    tops = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]
    files: list[str] = []
    for top in tops:
        if os.path.isfile(top):
            files.append(top)
        elif not os.path.exists(top):
            raise UsageError(f"data source {source.path} does not exist; give a file, a folder or a glob")
        elif top is path:  # a folder; folders that a glob meets are left alone
            for folder, _, names in _walk(top, skipped):
                found = [os.path.join(folder, name) for name in names if Path(name).suffix.lower() in suffixes]
                files += [file for file in found if kind != "text" or not _is_binary(file)]
    if not files:
        raise UsageError(f"data source {source.path} holds no {kind} files; set its path or its format")
    return files


def _is_binary(file: str) -> bool:
    return b"\0" in _read_bytes(file, 0, 8192)


def _read_bytes(file: str, start: int = 0, count: int = -1) -> bytes:
    with _open(file) as stream:
        stream.seek(start)
        return stream.read(count)


def _open(file: str) -> BinaryIO:
    """UsageError if the file cannot be read (any more)."""
    try:
        return open(file, "rb")
    except OSError as error:
        raise UsageError(f"data file {file} cannot be read: {error.strerror or error}; restore it") from None


def _decode(data: bytes, file: str, start: int = 0) -> str:
    """UTF-8 text; UsageError names the file and the offset of the first wrong byte."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"data file {file} is not UTF-8: byte {start + error.start} is 0x{data[error.start]:x}; save it as UTF-8"
        ) from None


def _texts(files: Sequence[str], part_bytes: int) -> Records:
    """Text files; one longer than `part_bytes` is read in parts that end with a line, so that files mix."""
    sizes = [os.path.getsize(file) for file in files]
    parts = [(n, k) for n, size in enumerate(sizes) for k in range(max(1, -(-size // part_bytes)))]

    def border(file: str, at: int, size: int) -> int:
        """The start of the first line at or after byte `at`."""
        while 0 < at < size:
            newline = _read_bytes(file, at - 1, part_bytes).find(b"\n")
            if newline >= 0:
                return at + newline
            at += part_bytes
        return min(at, size)

    def read(index: int) -> Record:
        number, part = parts[index]
        file, size = files[number], sizes[number]
        start, stop = (border(file, k * part_bytes, size) for k in (part, part + 1))
        text = _decode(_read_bytes(file, start, stop - start), file, start)
        if "\0" in text:
            raise UsageError(f"data file {file} is not text: it holds a null byte; remove it")
        if size <= part_bytes:
            return Record({"text": text}, file)
        head = hashlib.blake2b(_read_bytes(file, 0, part_bytes), digest_size=16).hexdigest()
        return Record({"text": text}, file, ended=stop == size, key=f"{head}:{size}")

    return Records(read, len(parts))


def _jsonl(files: Sequence[str], pick: Callable[[Any, str], Record]) -> Records:
    """An index of all lines that are not blank; a line is parsed, and `pick(row, where)` made of it, when read."""
    places: list[tuple[int, int, int, int]] = []  # file, line, first byte, bytes
    for number, file in enumerate(files):
        start = 0
        try:
            with open(file, "rb") as stream:
                for line, data in enumerate(stream, 1):
                    if data.strip():
                        places.append((number, line, start, len(data)))
                    start += len(data)
        except OSError as error:
            raise UsageError(f"data file {file} cannot be read: {error.strerror or error}; restore it") from None
    index = np.array(places, dtype=np.int64).reshape(-1, 4)

    def read(which: int) -> Record:
        number, line, start, count = map(int, index[which])
        file, where = files[number], f"{files[number]}:{line}"
        text = _decode(_read_bytes(file, start, count), file, start)
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(f"{where}: broken JSON line: {error.msg} at column {error.colno}; repair it") from None
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endless nesting
            raise UsageError(f"{where}: unreadable JSON line: {one_line(error)}; repair it") from None
        if "\\u" in text:
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise UsageError(f"{where}: half of a surrogate pair, which is no character; repair it") from None
        return pick(row, where)

    return Records(read, len(index))


def _parquet(source: Source, files: Sequence[str]) -> Records:
    """Memory-mapped Parquet rows."""
    import pyarrow.parquet
    from datasets import Dataset, disable_progress_bars  # slow to import, so only where it is needed

    disable_progress_bars()
    try:
        if not sum(pyarrow.parquet.ParquetFile(file).metadata.num_rows for file in files):
            raise UsageError(f"data source {source.path} is empty; give at least one document")
        table = Dataset.from_parquet(list(files))
    except UsageError:
        raise
    except Exception as error:  # the readers below raise many kinds
        raise UsageError(f"data source {source.path}: not readable as Parquet: {one_line(error)}") from None
    assert isinstance(table, Dataset)
    return Records(lambda index: _record(table[index], source, f"{source.path} row {index}"), len(table))


def _record(row: Any, source: Source, where: str) -> Record:
    """Pick the document out of a row: the text field, else prompt and completion, else messages."""
    if not isinstance(row, Mapping):
        raise UsageError(f"{where}: expected one JSON object a line, found {type(row).__name__}")
    ended = row.get("ended") is not False
    for keys in ((source.text_field,), ("prompt", "completion")):
        if all(key in row for key in keys):
            for key in keys:
                if not isinstance(row[key], str):
                    raise UsageError(f"{where}: field '{key}' holds {type(row[key]).__name__}; it must be a string")
            return Record({key if len(keys) > 1 else "text": row[key] for key in keys}, where, ended)
    if "messages" in row:
        return Record({key: row[key] for key in ("messages", "tools") if row.get(key)}, where, ended)
    raise UsageError(
        f"{where}: no field '{source.text_field}' (nor prompt and completion, nor messages); "
        f"the fields are {', '.join(map(str, row)) or 'none'}; set text_field"
    )


# ---------------------------------------------------------------- prompts: what is yet to be answered


def read_prompts(path: str, examples: int | None = None) -> list[Record]:
    r"""Prompts to be answered: {"prompt": text}, or {"messages": chat} up to where the assistant speaks.

    Args:
        path: `task:NAME`: problems of its train split. A .jsonl or .json file: objects with `prompt` or `messages`;
            training data will do, a completion or a last assistant turn is left out. Any other file: one prompt a
            line, with \n for a line break. Blank lines are left out.
        examples: the first so many; a task needs it.
    Raises:
        UsageError: no such file, no prompts in it, or a line that holds none (file and line named).
    """
    if examples is not None and examples < 1:
        raise UsageError(f"examples={examples} must be at least 1")
    if path.startswith("task:"):
        if examples is None:
            raise UsageError(f"{path} has no end; set the number of problems with examples")
        task = read_source(Source(path=path))
        assert isinstance(task, Records)
        records = [task.read(index) for index in range(examples)]
        return [Record({"prompt": record.value["prompt"]}, record.where) for record in records]
    file = os.path.expanduser(path)
    if not os.path.isfile(file):
        raise UsageError(
            f"prompts {path} is not a file; give a .jsonl file, a text with a prompt a line, or task:NAME"
        )
    if Path(file).suffix in (".jsonl", ".json"):
        lines = _jsonl([file], _prompt)
        found = [lines.read(index) for index in range(min(lines.count or 0, examples or lines.count or 0))]
    else:
        texts = [line.removesuffix("\r") for line in _decode(_read_bytes(file), file).split("\n")]
        numbered = [(number, text) for number, text in enumerate(texts, 1) if text.strip()][:examples]
        found = [Record({"prompt": text.replace("\\n", "\n")}, f"{file}:{number}") for number, text in numbered]
    if not found:
        raise UsageError(f"{path} holds no prompts; write one a line")
    return found


def _prompt(row: Any, where: str) -> Record:
    """The prompt of a row: the field `prompt`, else `messages` without a last assistant turn."""
    if not isinstance(row, Mapping) or not {"prompt", "messages"} & row.keys():
        raise UsageError(f"{where}: no prompt; each line must be a JSON object with prompt or messages")
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"]:
            raise UsageError(f"{where}: prompt is {row['prompt']!r}; it must be a text that is not empty")
        return Record({"prompt": row["prompt"]}, where)
    turns = row["messages"]
    if not isinstance(turns, list) or not all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise UsageError(f"{where}: messages must be a list of objects with role and content, both texts")
    if row.get("tools"):
        raise UsageError(f"{where}: tools are not shown to the model when it answers; leave such rows out")
    turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    if not turns:
        raise UsageError(f"{where}: messages hold nothing to answer; give at least one turn of the user")
    return Record({"messages": turns}, where)


def one_line(error: Exception) -> str:
    """What an exception of another library says, on one line of at most 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


# ---------------------------------------------------------------- cursors: endless reading that resumes


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


class HubStream:
    """Reads a `datasets` id (`owner/name` or `owner/name:configuration`) as a stream, in its own order.

    Shard (s, S) takes whole files where S divides their number, else every S-th row.
    """

    def __init__(self, source: Source, shard: tuple[int, int] = (0, 1)) -> None:
        from datasets import IterableDataset, load_dataset
        from datasets.distributed import split_dataset_by_node

        self._source, self._shard = source, shard
        name, _, configuration = os.path.expanduser(source.path).partition(":")
        try:
            stream = load_dataset(name, configuration or None, split=source.split, streaming=True)
        except Exception as error:  # network, access and format errors of many kinds
            raise UsageError(f"data source {source.path} cannot be read: {one_line(error)}") from None
        assert isinstance(stream, IterableDataset)
        stream = stream if source.examples is None else stream.take(source.examples)
        self._stream = split_dataset_by_node(stream, *shard) if shard[1] > 1 else stream
        self._first = self._stream.state_dict()
        self._rows: Iterator[Any] | None = None
        self.epoch = self.index = 0

    def take(self) -> Record:
        """The next record."""
        for _ in range(2):
            if self._rows is None:
                self._rows = iter(self._stream)
            try:
                row = next(self._rows)
            except StopIteration:
                self._stream.load_state_dict(self._first)
                self._rows, self.epoch, self.index = None, self.epoch + 1, 0
                continue
            except Exception as error:
                raise UsageError(f"data source {self._source.path} stopped: {one_line(error)}") from None
            self.index += 1
            return _record(row, self._source, f"{self._source.path} {self._source.split} row {self.index - 1}")
        s, count = self._shard
        part = "" if count == 1 else f" in shard {s + 1} of {count}; lower data.shards"
        raise UsageError(f"data source {self._source.path} is empty{part or '; give at least one document'}")

    def state(self) -> dict[str, Any]:
        """Where the next record is."""
        return {"epoch": self.epoch, "index": self.index, "stream": self._stream.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to a place that `state` gave."""
        self.epoch, self.index, self._rows = state["epoch"], state["index"], None
        self._stream.load_state_dict(state["stream"])
