"""Raw documents from files, data sets and tasks, read for ever in an order that resumes exactly."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sysconfig
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from nextblock.config.errors import UsageError, one_line
from nextblock.config.sections import Source
from nextblock.data.tasks import get_task

CHECKED_BYTES = 64 * 2**20  # local sources up to this size are read through before training starts
TEXT_NAMES = (
    ".txt .text .md .rst .tex .org .py .pyi .js .ts .jsx .tsx .c .h .cc .cpp .hpp .cu .java .kt .go .rs .rb .php "
    ".swift .scala .sh .sql .html .css .xml .yaml .yml .toml .ini .cfg .r .jl .lua .pl .hs .ml .lean .cs .dart .f90 "
    ".m .vue .zig"
)
TEXT_SUFFIXES = frozenset(TEXT_NAMES.split())
ROW_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
PACKED = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"\xfd7zX": "xz", b"BZh": "bzip2", b"PK\3\4": "zip"}
BYTE_ORDER_MARK = "\ufeff"


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

    @property
    def item(self) -> Any:
        """What `generate` takes of a prompt of `read_prompts`: a text or a chat."""
        return self.value.get("prompt") or self.value["messages"]


@dataclass(frozen=True)
class Records:
    """One source with random access: `read(i)` for 0 <= i < count; `count` None is endless.

    digest: of local files, to notice on resume that they were replaced (`_digest`); else "".
    """

    read: Callable[[int], Record]
    count: int | None
    split_by_hash: bool = True  # False: the source has its own held-out split
    digest: str = ""


def _place(source: Source) -> str:
    """Where a source is: "task", "hub" or "files" of this machine. UsageError for a path that is missing."""
    path = os.path.expanduser(source.path)
    if source.format != "auto":
        return source.format if source.format in ("task", "hub") else "files"
    if path == "python-stdlib" or os.path.exists(path):
        return "files"
    if path.startswith("task:"):
        return "task"
    if glob.has_magic(path):
        return "files"
    local = path.startswith((".", "/", "~")) or re.fullmatch(r"\.[A-Za-z]\w*", Path(path).suffix)
    if local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", path):
        raise UsageError(f"data source {source.path} does not exist; give a file, a folder, a glob or a Hub id")
    return "hub"


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
    place = _place(source)
    if place == "hub":
        return HubStream(source, shard)
    if place == "task":
        task, split = get_task(source.path.removeprefix("task:")), "test" if held_out else source.split

        def read_example(index: int) -> Record:
            example = task.example(split, index)
            return Record(
                {"prompt": example.prompt, "completion": example.completion}, f"{source.path} {split} {index}"
            )

        return Records(read_example, source.examples, split_by_hash=False)
    kind, files = _files(source)
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
    return Records(records.read, count, digest=_digest(files))


def _files(source: Source) -> tuple[str, list[str]]:
    """The format of a local source, and its files, sorted.

    A file that is named, itself or by a glob, is read whatever its suffix. Of a folder the files whose suffix (and
    first bytes) fit; with `format: text` those without a suffix too.

    Raises:
        UsageError: nothing there, or files of several formats and none chosen.
    """
    path = os.path.expanduser(source.path)
    skipped: set[str] = set()
    if path == "python-stdlib":
        path, skipped = sysconfig.get_paths()["stdlib"], {"site-packages", "dist-packages", "test", "tests"}
    named = not os.path.isdir(path)
    if os.path.isfile(path):
        found = [path]
    elif named and not glob.has_magic(path):
        raise UsageError(f"data source {source.path} does not exist; give a file, a folder or a glob")
    elif named:
        found = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
    else:
        found = list(_walk(path, skipped))
    if skipped:
        found = [file for file in found if file.endswith(".py")]
    kinds: dict[str, list[str]] = {}
    for file in found:
        suffix = Path(file).suffix.lower()
        kind = source.format if named and source.format != "auto" else ROW_SUFFIXES.get(suffix, "text")
        fits = named or kind != "text" or suffix in TEXT_SUFFIXES or (source.format == "text" and not suffix)
        if fits and (named or kind != "text" or not _is_binary(file)):
            kinds.setdefault(kind, []).append(file)
    if source.format == "auto" and len(kinds) > 1:
        held = ", ".join(f"{len(files)} {kind} ({files[0]})" for kind, files in kinds.items())
        raise UsageError(
            f"data source {source.path} holds files of several formats: {held}; set its format to the one to read, or "
            "give a source for each"
        )
    kind = source.format if source.format != "auto" else next(iter(kinds), "text")
    if kind not in kinds:
        raise UsageError(_nothing_there(source, path, found))
    return kind, kinds[kind]


def _walk(folder: str, skipped: Set[str] = frozenset()) -> Iterator[str]:
    """The files of a folder in order of name, without hidden ones and folders of a `skipped` name."""
    for here, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if name not in skipped and not name.startswith("."))
        yield from (os.path.join(here, name) for name in sorted(names) if not name.startswith("."))


def _nothing_there(source: Source, path: str, found: Sequence[str]) -> str:
    """Why a folder or a glob gives no file to read, and what to do."""
    wanted = "text, JSONL or Parquet" if source.format == "auto" else source.format
    if not found:
        return f"data source {source.path} holds no {wanted} files, nor any others; set its path"
    suffix, count = Counter(Path(file).suffix for file in found).most_common(1)[0]
    cure = f"give the path {glob.escape(path.rstrip('/'))}/**/*{suffix} and set its format, to read those"
    if suffix in (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz"):
        cure = "unpack them first"
    return f"data source {source.path} holds no {wanted} files, but {count} {suffix or 'without a suffix'}; {cure}"


def _digest(files: Sequence[str]) -> str:
    """Of the sizes and the contents of files, of large ones the beginning and the end.

    Not of their names: data may be moved while a run is stopped.
    """
    half = max(4096, CHECKED_BYTES // len(files)) // 2
    found = hashlib.blake2b(digest_size=16)
    for file in files:
        size = os.path.getsize(file)
        found.update(b"%d\n" % size + _read_bytes(file, 0, half) + _read_bytes(file, max(half, size - half)))
    return found.hexdigest()


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
    """UTF-8 text, without a byte order mark; UsageError names the file and the offset of the first wrong byte."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        head = _read_bytes(file, 0, 4)
        for mark, name in PACKED.items():
            if head.startswith(mark):
                raise UsageError(f"data file {file} is packed with {name}; unpack it first") from None
        raise UsageError(
            f"data file {file} is not UTF-8: byte {start + error.start} is 0x{data[error.start]:x}; save it as UTF-8"
        ) from None
    return text if start else text.removeprefix(BYTE_ORDER_MARK)


def _texts(files: Sequence[str], part_bytes: int) -> Records:
    """Text files; one longer than `part_bytes` is read in parts of about that size, so that files mix."""
    sizes = [os.path.getsize(file) for file in files]
    parts = [(n, k) for n, size in enumerate(sizes) for k in range(max(1, -(-size // part_bytes)))]

    def border(file: str, at: int, size: int) -> int:
        """Where to cut near byte `at`: at the first line that starts in the next `part_bytes`, else before the first
        space there, else between two characters."""
        if not 0 < at < size:
            return min(at, size)
        ahead = _read_bytes(file, at - 1, part_bytes)
        if (newline := ahead.find(b"\n")) >= 0:
            return at + newline
        if (space := ahead.find(b" ", 1)) >= 0:
            return at - 1 + space
        return at + next((n for n, byte in enumerate(ahead[1:5]) if byte & 0xC0 != 0x80), 0)

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


def _rows(file: str) -> Iterator[tuple[int, int, int]]:
    """(line, first byte, bytes) of each JSON row: of the lines that are not blank, or of an array's elements."""
    start, first = 0, True
    with _open(file) as stream:
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
    text = _read_bytes(file).decode("latin-1")  # a character for each byte, so that places are offsets of bytes
    gap, line, last, end = re.compile(r"[ \t\r\n,]*"), 1, 0, text.index("[") + 1
    while True:
        at = cast(re.Match[str], gap.match(text, end)).end()
        if text.startswith("]", at):
            break
        try:
            _, end = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{file}: broken JSON array: {one_line(error)}; repair it") from None
        line, last = line + text.count("\n", last, at), at
        yield line, at, end - at
    if text[at + 1 :].strip():
        raise UsageError(
            f"{file}: more follows behind the JSON array it begins with; give one array, or an object a line"
        )


def _jsonl(files: Sequence[str], pick: Callable[[Any, str], Record]) -> Records:
    """An index of all rows; one is parsed, and `pick(row, where)` made of it, when read."""
    places = [(number, *row) for number, file in enumerate(files) for row in _rows(file)]
    index = np.array(places, dtype=np.int64).reshape(-1, 4)

    def read(which: int) -> Record:
        number, line, start, count = map(int, index[which])
        file, where = files[number], f"{files[number]}:{line}"
        text = _decode(_read_bytes(file, start, count), file, start)
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


def check_characters(value: Any, where: str) -> None:
    """UsageError if a text, or one inside of lists and objects, holds half of a surrogate pair.

    Python stands such halves in for bytes of an argument or of standard input that are not UTF-8.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{where}: half of a surrogate pair, or a byte that is not UTF-8, which is no character; repair it"
        ) from None


def _parquet(source: Source, files: Sequence[str]) -> Records:
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
        return _record(_as_written(row), source, f"{source.path} row {index}")

    return Records(read, ends[-1] if ends else 0)


def _as_written(value: Any) -> Any:
    """An Arrow row without the keys that hold null.

    Arrow gives all objects of a column the keys of each: `{"city": "Rome"}` comes back with `"amount": null` if
    another row has an amount.
    """
    if isinstance(value, Mapping):
        return {key: _as_written(part) for key, part in value.items() if part is not None}
    return [_as_written(part) for part in value] if isinstance(value, list) else value


def _record(row: Any, source: Source, where: str) -> Record:
    """Pick the document out of a row: the text field, else prompt and completion, else messages.

    A field that is null counts as missing, and so does what is empty where there is something else.
    """
    if not isinstance(row, Mapping):
        raise UsageError(f"{where}: expected a JSON object, found {type(row).__name__}")
    ended = row.get("ended") is not False
    kinds = [(source.text_field,), ("prompt", "completion"), ("messages",)]
    found = [keys for keys in kinds if all(row.get(key) is not None for key in keys)]
    if not found:
        fields = (f"{key} (null)" if value is None else str(key) for key, value in row.items())
        raise UsageError(
            f"{where}: no field '{source.text_field}' (nor prompt and completion, nor messages); "
            f"the fields are {', '.join(fields) or 'none'}; set text_field"
        )
    keys = next((keys for keys in found if not all(_is_blank(row[key]) for key in keys)), found[0])
    if keys == ("messages",):
        return Record({key: row[key] for key in ("messages", "tools") if row.get(key)}, where, ended)
    for key in keys:
        if not isinstance(row[key], str):
            raise UsageError(f"{where}: field '{key}' holds {type(row[key]).__name__}; it must be a string")
    return Record({key if len(keys) > 1 else "text": row[key] for key in keys}, where, ended)


def _is_blank(value: Any) -> bool:
    return not (value.strip() if isinstance(value, str) else value)


# ---------------------------------------------------------------- cursors: endless reading that resumes


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
            return _record(
                _as_written(row), self._source, f"{self._source.path} {self._source.split} row {self.index - 1}"
            )
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
