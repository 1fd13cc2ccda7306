"""A token store: the documents of one source as token ids, read through memory-mapped files.

A folder with `store.json` (the manifest, written last) and a folder for each part, which one process has written:

    tokens.bin      uint16 or uint32 [T]: all documents one after another
    documents.bin   DOCUMENT [D]: where each document ends, and what the mixture must know of it
    spans.bin       uint32 [S, 2]: the generated spans of each document, (first token, behind the last)

Little-endian, without headers. The documents stand in the order of the source, so rows are those of the source.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from nextblock.config.errors import UsageError
from nextblock.data.chat import Specials
from nextblock.data.encode import encode
from nextblock.data.files import digest_of
from nextblock.data.records import Record, Records, Stored
from nextblock.data.rows import Document

MANIFEST, PART, FORMAT = "store.json", "store-part.json", 1
DOCUMENT = np.dtype(
    [("tokens", "<u8"), ("spans", "<u8"), ("digest", "<u8"), ("bytes", "<u4"), ("spelled", "<u4")]  # 32 bytes
)
"""Of a document: where its tokens and its spans end in the part; digest and bytes of its text; `Document.spelled`."""
FILES = {"tokens": "tokens.bin", "documents": "documents.bin", "spans": "spans.bin"}
HASHED_BYTES = 2**18  # of a part: enough to notice a file of another run, and little to read on opening
PROBE = 'A naïve "test": 3.14 > 2,\n\n\tdef f(x):\n        return x**12  # 日本語, Ελλάς, \U0001f642\r\n  End.'

_IDENTITIES: WeakKeyDictionary[Any, tuple[int, dict[str, Any]]] = WeakKeyDictionary()


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """By what a tokenizer and its chat template are known again.

    vocabulary: hash of all tokens but special ones, with their ids, and of the tokens of PROBE as a document.
    special: ids of the special tokens. More of them may be added later: contents never get them.
    template: hash of the chat template.
    """
    known = _IDENTITIES.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        special = {token.content: number for number, token in Specials(tokenizer).tokens.items()}
        plain = sorted((token, number) for token, number in tokenizer.get_vocab().items() if token not in special)
        probe = encode({"text": PROBE}, tokenizer).tokens.tolist()
        found = {
            "vocabulary": _hash([plain, probe]),
            "special": special,
            "template": _hash(tokenizer.chat_template),
            "name": tokenizer.name_or_path,
        }
        known = _IDENTITIES[tokenizer] = (len(tokenizer), found)
    return known[1]


def difference(made: dict[str, Any], now: dict[str, Any], chats: bool) -> str:
    """What makes documents of one tokenizer (`made`) wrong for another (`now`), in words; nothing if all is well.

    chats: whether there are chats among them, for which alone the template matters.
    """
    if made["vocabulary"] != now["vocabulary"]:
        return f"tokenizer, {made['name'] or 'without a name'}"
    if moved := [name for name, number in made["special"].items() if now["special"].get(name, -1) != number]:
        return f"tokenizer, whose {moved[0]} is token {made['special'][moved[0]]}"
    return "chat template" if chats and made["template"] != now["template"] else ""


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


class Arrays(NamedTuple):
    """The files of a part."""

    tokens: np.ndarray
    documents: np.ndarray
    spans: np.ndarray


def sizes_of(part: dict[str, Any], dtype: str) -> dict[str, int]:
    """Bytes of each file of a part, by what is counted of it."""
    return {
        "tokens": part["tokens"] * np.dtype(dtype).itemsize,
        "documents": part["documents"] * DOCUMENT.itemsize,
        "spans": part["spans"] * 8,
    }


def check_part(folder: Path, part: dict[str, Any], dtype: str, cure: str) -> None:
    """UsageError for a part of which a file is missing, or not as long as it was written."""
    for name, size in sizes_of(part, dtype).items():
        file = folder / FILES[name]
        if not file.is_file():
            raise UsageError(f"token store: {file} is missing; {cure}")
        if (found := file.stat().st_size) != size:
            raise UsageError(f"token store: {file} has {found} bytes and should have {size}; {cure}")


def part_digest(folder: Path) -> str:
    """Of the files of a part, of large ones the beginning and the end."""
    return digest_of([str(folder / file) for file in FILES.values()], HASHED_BYTES)


def open_part(folder: Path, part: dict[str, Any], dtype: str) -> Arrays:
    """Memory-mapped; nothing is read yet."""

    def mapped(file: str, kind: Any, *shape: int) -> np.ndarray:
        if not shape[0]:  # an empty file cannot be mapped
            return np.empty(shape, kind)
        with (folder / file).open("rb") as opened:
            pages = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(pages, "madvise"):  # documents are asked for in a shuffled order: what lies around is not wanted
            pages.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(pages, kind).reshape(shape)

    return Arrays(
        mapped(FILES["tokens"], dtype, part["tokens"]),
        mapped(FILES["documents"], DOCUMENT, part["documents"]),
        mapped(FILES["spans"], "<u4", part["spans"], 2),
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a token store. UsageError if it cannot be read or is of a later format."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if found["format"] == FORMAT:
            return found
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(f"token store {folder}: {MANIFEST} cannot be read; restore it, or prepare again") from None
    raise UsageError(f"token store {folder} has format {found['format']}, this version reads {FORMAT}; prepare again")


def is_store(folder: Path) -> bool:
    """Whether this is a finished token store.

    Raises:
        UsageError: it is not finished, or a folder of stores.
    """
    if (folder / MANIFEST).is_file():
        return True
    if next(folder.glob(f"*/{PART}"), None):
        raise UsageError(
            f"data source {folder} is a token store that is not finished; start nextblock prepare again, or --merge it"
        )
    if stores := sorted(str(path.parent) for path in folder.glob(f"*/{MANIFEST}")):
        raise UsageError(f"data source {folder} holds token stores; give each as a source: {', '.join(stores)}")
    return False


def read_store(folder: Path) -> Records:
    """Open a token store: files are mapped, and read where a document is asked for.

    Raises:
        UsageError: a file is missing, cut or of another run.
    """
    manifest = read_manifest(folder)
    parts: list[dict[str, Any]] = manifest["parts"]
    cure = "restore it, or prepare the store again"
    for part in parts:
        check_part(folder / part["folder"], part, manifest["dtype"], cure)
        if part_digest(folder / part["folder"]) != part["digest"]:
            raise UsageError(f"token store: the files of {folder / part['folder']} are of another run; {cure}")
    arrays = [open_part(folder / part["folder"], part, manifest["dtype"]) for part in parts]
    ends = list(accumulate(part["documents"] for part in parts))

    def read(index: int) -> Record:
        number = bisect_right(ends, index)
        return read_document(arrays[number], index - (ends[number - 1] if number else 0), f"{folder} document {index}")

    def check(tokenizer: Any) -> None:
        if said := difference(manifest["tokenizer"], tokenizer_identity(tokenizer), manifest["chats"]):
            raise UsageError(
                f"token store {folder} was made with another {said}; prepare it again, or use that one in the run"
            )

    def digest_at(size: Sequence[int]) -> str:
        return _hash([part["digest"] for part in parts[: size[0]]])

    size, count = (len(parts), 0), ends[-1] if ends else 0
    return Records(read, count, digest=digest_at(size), size=size, digest_at=digest_at, check=check)


def read_document(part: Arrays, index: int, where: str) -> Record:
    """One document of a part."""
    before, last = ([(0, 0)] * (not index) + part.documents[max(0, index - 1) : index + 1].tolist())[:2]
    tokens = part.tokens[before[0] : last[0]].astype(np.int64)
    offset = np.full(len(tokens), -1, np.int64)
    for start, stop in part.spans[before[1] : last[1]].tolist():
        offset[start:stop] = np.arange(stop - start)
    _, _, digest, size, spelled = last
    return Record({}, where, stored=Stored(Document(tokens, offset, spelled), digest, size))


def spans_of(documents: Sequence[Document]) -> list[np.ndarray]:
    """The generated spans of each document, int64 [S, 2]: (first token, behind the last)."""
    found = []
    for document in documents:
        if len(document.offset) and document.offset[-1] == len(document.offset) - 1:  # one span: plain text
            found.append(np.array([[0, len(document.offset)]]))
            continue
        offset = np.concatenate([document.offset, [-1]])
        # A span ends where the next token has not the next offset.
        starts, ends = np.flatnonzero(offset == 0), np.flatnonzero((offset[:-1] >= 0) & (np.diff(offset) != 1)) + 1
        found.append(np.stack([starts, ends], axis=1))
    return found
