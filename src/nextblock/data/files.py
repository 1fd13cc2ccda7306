"""Files of this machine: which of them belong to a source, and their bytes and text."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import BinaryIO

from nextblock.config.errors import UsageError
from nextblock.config.sections import Source
from nextblock.data.records import Unusable

CHECKED_BYTES, CHECKED_DOCUMENTS = 64 * 2**20, 10_000
"""Local sources up to this size are read through before training starts."""
TEXT_NAMES = (
    ".txt .text .md .rst .tex .org .py .pyi .js .ts .jsx .tsx .c .h .cc .cpp .hpp .cu .java .kt .go .rs .rb .php "
    ".swift .scala .sh .sql .html .css .xml .yaml .yml .toml .ini .cfg .r .jl .lua .pl .hs .ml .lean .cs .dart .f90 "
    ".m .vue .zig"
)
TEXT_SUFFIXES = frozenset(TEXT_NAMES.split())
ROW_SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
PACKED = {b"\x1f\x8b": "gzip", b"(\xb5/\xfd": "zstd", b"\xfd7zX": "xz", b"BZh": "bzip2", b"PK\3\4": "zip"}
PACKED_SUFFIXES = (".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz")
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=[-_.\d]|$)", re.IGNORECASE)
SAVED = ({"dataset_dict.json"}, {"dataset_info.json", "state.json"})  # files that `save_to_disk` of datasets writes
BYTE_ORDER_MARK = "\ufeff"


def find_files(source: Source, usual_split: str = "train") -> tuple[str, list[str]]:
    """The format of a local source, and its files, sorted.

    A file that is named, itself or by a glob, is read whatever its suffix. Of a folder the files whose suffix (and
    first bytes) fit; with `format: text` those without a suffix too; and of files that are all named by split those
    of one split.

    Args:
        usual_split: where `source.split` is None.
    Raises:
        UsageError: nothing there, files of several formats and none chosen, packed files in a folder, or an option
            that these files do not have.
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
        if any(names <= set(os.listdir(path)) for names in SAVED):
            raise UsageError(
                f"data source {source.path} was saved by datasets (save_to_disk); give Parquet or JSONL, as "
                "Dataset.to_parquet writes it"
            )
    if skipped:
        found = [file for file in found if file.endswith(".py")]
    kinds: dict[str, list[str]] = {}
    for file in found:
        suffix = Path(file).suffix.lower()
        packed = not named and suffix in PACKED_SUFFIXES
        suffix = Path(Path(file).stem).suffix.lower() if packed else suffix
        kind = source.format if named and source.format != "auto" else ROW_SUFFIXES.get(suffix, "text")
        fits = (
            named or kind != "text" or suffix in TEXT_SUFFIXES or (source.format == "text" and not (suffix or packed))
        )
        if fits and (named or packed or kind != "text" or not _is_binary(file)):
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
    if not named and (packed := [file for file in kinds[kind] if file.lower().endswith(PACKED_SUFFIXES)]):
        raise UsageError(f"data file {packed[0]} is packed; unpack it first, or move it out of the folder")
    rows = not named and kind != "text"  # text and source code may be named test_ or train_ for other reasons
    files = _of_split(kinds[kind], source, usual_split) if rows else kinds[kind]
    check_options(source, fields=kind != "text", splits=files is not kinds[kind])
    return kind, files


def _of_split(files: list[str], source: Source, usual: str) -> list[str]:
    """Those of one split, where all are named by split and not all by the same; else the files themselves."""
    splits = [match[1].lower() if (match := SPLIT.match(os.path.basename(file))) else "" for file in files]
    wanted = source.split or usual
    if "" in splits or len(set(splits)) == 1:
        return files
    if wanted not in splits:
        there = ", ".join(sorted(set(splits)))
        raise UsageError(f"data source {source.path} has no split {wanted}; set split to one of its own: {there}")
    return [file for file, split in zip(files, splits, strict=True) if split == wanted]


def check_options(source: Source, *, fields: bool = False, splits: bool = False) -> None:
    """UsageError for options that were given to a source that has no fields or no splits."""
    if not splits and source.split not in (None, "train"):
        raise UsageError(
            f"data source {source.path} has no splits, so split={source.split} chooses nothing; leave it out, or name "
            "the files of that split"
        )
    if not fields and source.text_field != "text":
        raise UsageError(
            f"data source {source.path} has no fields, so text_field={source.text_field} names nothing; leave it out"
        )


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
    if suffix in PACKED_SUFFIXES:
        cure = "unpack them first"
    return f"data source {source.path} holds no {wanted} files, but {count} {suffix or 'without a suffix'}; {cure}"


def digest_of(files: Sequence[str], limit: int = CHECKED_BYTES, last: int | None = None) -> str:
    """Of the sizes and the contents of files, of large ones the beginning and the end: about `limit` bytes in all.

    Not of their names: data may be moved while a run is stopped.

    Args:
        last: bytes of the last file that count, if not all.
    """
    half = max(4096, limit // len(files)) // 2
    found = hashlib.blake2b(digest_size=16)
    for number, file in enumerate(files, 1):
        size = os.path.getsize(file) if last is None or number < len(files) else last
        found.update(b"%d\n" % size)
        with open_file(file) as stream:
            for start, stop in ((0, min(half, size)), (max(half, size - half), size)):
                stream.seek(start)
                while start < stop and (block := stream.read(min(2**20, stop - start))):
                    found.update(block)
                    start += len(block)
    return found.hexdigest()


def _is_binary(file: str) -> bool:
    return b"\0" in read_bytes(file, 0, 8192)


def read_bytes(file: str, start: int = 0, count: int = -1) -> bytes:
    """`count` bytes of a file from byte `start` on, by default all."""
    with open_file(file) as stream:
        stream.seek(start)
        return stream.read(count)


def open_file(file: str) -> BinaryIO:
    """UsageError if the file cannot be read (any more)."""
    try:
        return open(file, "rb")
    except OSError as error:
        raise UsageError(f"data file {file} cannot be read: {error.strerror or error}; restore it") from None


def decode_text(data: bytes, file: str, start: int = 0) -> str:
    """UTF-8 text, without a byte order mark; Unusable names the file and the offset of the first wrong byte."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        check_is_text(file)
        raise Unusable(
            f"data file {file} is not UTF-8: byte {start + error.start} is 0x{data[error.start]:x}; save it as UTF-8"
        ) from None
    return text if start else text.removeprefix(BYTE_ORDER_MARK)


def check_is_text(file: str) -> None:
    """UsageError for a file that begins as one of another kind."""
    head = read_bytes(file, 0, 4)
    if head == b"PAR1":
        raise UsageError(f"data file {file} is Parquet and is read as text; set its format to parquet") from None
    for mark, name in PACKED.items():
        if head.startswith(mark):
            raise UsageError(f"data file {file} is packed with {name}; unpack it first") from None
