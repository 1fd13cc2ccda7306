"""Writing a token store: part by part, each by one process, which goes on where it was stopped; then merged."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

import numpy as np

from nextblock.config.errors import UsageError
from nextblock.config.files import locked, unwritten, write_whole
from nextblock.config.sections import Source
from nextblock.data.cursors import HubStream
from nextblock.data.encode import encode_batch
from nextblock.data.records import Record, Records, naming_the_way_on
from nextblock.data.rows import Document
from nextblock.data.sources import read_source
from nextblock.data.store import (
    DOCUMENT,
    FILES,
    FORMAT,
    MANIFEST,
    PART,
    check_part,
    difference,
    part_digest,
    read_manifest,
    sizes_of,
    spans_of,
    tokenizer_identity,
)
from nextblock.data.stream import BATCH_BYTES, BATCH_DOCUMENTS

COMMIT_SECONDS = 30.0  # at most so much work is done again after a kill
COUNTS = ("documents", "tokens", "generated", "spans", "bytes")
UNUSABLE = {"unusable": 0, "unusable_at": ""}
"""Documents that were left empty, because they cannot be used, and what is wrong with the first."""
SAME = {
    "source": "with other options of the source",
    "texts": "from another source, or from other text",
    "count": "from another number of documents",
    "part_bytes": "with another data.row_length, by which long texts are divided",
}
"""Parts of an identity, and what is wrong where they differ."""


def identity_of(source: Source, opened: Records | HubStream, part_bytes: int, tokenizer: Any) -> dict[str, Any]:
    """What all parts of one run have in common: the documents and the tokenizer."""
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    return {
        "source": source.model_dump(exclude={"weight", "path"}) | {"split": source.split or "train"},
        "texts": opened.digest or source.path,
        "count": opened.count,
        "part_bytes": part_bytes,
        "dtype": "<u2" if vocabulary <= 2**16 else "<u4",
        "tokenizer": tokenizer_identity(tokenizer),
    }


def part_name(run: int, part: int, parts: int) -> str:
    """Folder of part 0 <= part < parts of a store's run-th preparation."""
    return f"{run:02d}-{part:05d}-of-{parts:05d}"


def parts_begun(store: Path, run: int) -> int | None:
    """In how many parts a preparation was begun; None if it was not. UsageError if that is not one number."""
    found = {int(name[1]) for path in store.glob(f"{run:02d}-*") if (name := re.search(r"-of-(\d+)$", path.name))}
    if len(found) > 1:
        said = " and ".join(map(str, sorted(found)))
        raise UsageError(f"token store {store} was begun in {said} parts; delete the folders of one division")
    return found.pop() if found else None


def write_part(
    folder: Path,
    source: Source,
    tokenizer: Any,
    *,
    part: tuple[int, int],
    part_bytes: int,
    skip: bool = False,
    tell: Callable[[int, int], None] = lambda documents, tokens: None,
) -> None:
    """Write part (i, n) of a source, or go on with it. Does nothing where it is done.

    Args:
        folder: of the part.
        part_bytes, skip: as for `read_source`.
        tell: called with the documents and tokens so far.
    Raises:
        UsageError: as `read_source` and `encode_batch`; another process writes here; what is here is of another
            source, tokenizer or division, or was cut; the disk is full.
    """
    with disk_errors(folder), locked(folder), naming_the_way_on():
        opened = read_source(source, part_bytes=part_bytes, shard=part, skip=skip)
        identity = identity_of(source, opened, part_bytes, tokenizer)
        state = _begun(folder, identity)
        if state["done"]:
            tell(state["documents"], state["tokens"])
            return
        with _Writer(folder, state) as writer:
            tell(state["documents"], state["tokens"])
            for records, place in _batches(opened, part, state["place"]):
                writer.add(records, encode_batch(records, tokenizer, skip), place)
                tell(state["documents"], state["tokens"])
            writer.commit(done=True)


def _begun(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The state of a part as it was last committed, or as it begins. UsageError if it is one of something else."""
    path = folder / PART
    if not path.exists():
        counts = {**dict.fromkeys(COUNTS, 0), **UNUSABLE}
        return {**counts, "chats": False, "place": None, "done": False, "identity": identity}
    state = read_part(folder)
    check_same(state["identity"], identity, folder)
    for name, size in sizes_of(state, identity["dtype"]).items():
        file = folder / FILES[name]
        if not file.exists() or file.stat().st_size < size:
            raise UsageError(f"token store: {file} is missing or was cut; delete {folder} and prepare it again")
    return state


def read_part(folder: Path) -> dict[str, Any]:
    """The state of a part. UsageError if it cannot be read."""
    try:
        return json.loads((folder / PART).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(
            f"token store: {folder / PART} cannot be read; delete {folder} and prepare it again"
        ) from None


def check_same(there: dict[str, Any], now: dict[str, Any], folder: Path, same_texts: bool = True) -> None:
    """UsageError if what was written in a folder has another identity than what is to be written."""
    if said := difference(there["tokenizer"], now["tokenizer"], chats=True):
        raise UsageError(f"token store: {folder} was made with another {said}; choose another --output")
    for name, words in SAME.items():
        if same_texts and there[name] != now[name]:
            cure = "choose another --output, or --append to a finished store"
            if name in ("texts", "count"):
                cure = f"put it back (data.skip_unusable=true leaves out documents that cannot be used), {cure}"
            raise UsageError(f"token store: {folder} was made {words}; {cure}")


def _batches(opened: Records | HubStream, part: tuple[int, int], place: Any) -> Iterator[tuple[list[Record], Any]]:
    """The records of a part in batches from a place on, each with the place behind it."""
    reader = _of_records(opened, part, place) if isinstance(opened, Records) else _of_stream(opened, place)
    records: list[Record] = []
    size, behind = 0, None
    for record, behind in reader:
        records.append(record)
        size += record.bytes
        if len(records) == BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield records, behind()
            records, size = [], 0
    if records and behind is not None:
        yield records, behind()


def _of_records(
    opened: Records, part: tuple[int, int], place: int | None
) -> Iterator[tuple[Record, Callable[[], int]]]:
    """Documents i * D / n .. (i + 1) * D / n - 1 of D, from a place on."""
    count, (i, n) = opened.count or 0, part
    for index in range(place or i * count // n, (i + 1) * count // n):
        yield opened.read(index), lambda index=index: index + 1


def _of_stream(opened: HubStream, place: Any) -> Iterator[tuple[Record, Callable[[], Any]]]:
    """One epoch of a streamed data set, or of its shard."""
    if place is not None:
        opened.load_state(place)
    while True:
        record = opened.take()
        if opened.epoch:
            return
        yield record, opened.state


class _Writer:
    """The files of a part, behind what `state` counts: what follows there was never committed, and is dropped."""

    def __init__(self, folder: Path, state: dict[str, Any]) -> None:
        self._folder, self._state, self._dtype = folder, state, state["identity"]["dtype"]
        self._files: dict[str, BinaryIO] = {}
        self._place = state["place"]
        self._committed = monotonic()

    def __enter__(self) -> _Writer:
        with ExitStack() as opened:
            for name, size in sizes_of(self._state, self._dtype).items():
                file = opened.enter_context((self._folder / FILES[name]).open("ab"))
                file.truncate(size)
                self._files[name] = file
            self.commit()
            self._close = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # a full disk has been told
            self._close.close()

    def add(self, records: Sequence[Record], documents: Sequence[Document], place: Any) -> None:
        """Write documents; `place` is behind them."""
        state, spans = self._state, spans_of(documents)
        borders, table = np.concatenate(spans), np.zeros(len(documents), DOCUMENT)
        table["tokens"] = state["tokens"] + np.cumsum([len(document.tokens) for document in documents])
        table["spans"] = state["spans"] + np.cumsum([len(span) for span in spans])
        table["digest"] = [record.digest for record in records]
        table["bytes"] = [record.bytes for record in records]
        table["spelled"] = [document.spelled for document in documents]
        for name, content in {
            "tokens": np.concatenate([document.tokens for document in documents]).astype(self._dtype),
            "documents": table,
            "spans": borders.astype("<u4"),
        }.items():
            self._files[name].write(content.tobytes())
        state["documents"] += len(documents)
        state["tokens"], state["spans"] = int(table["tokens"][-1]), int(table["spans"][-1])
        state["generated"] += int(np.diff(borders).sum())
        state["bytes"] += int(table["bytes"].sum())
        state["chats"] = state["chats"] or any("messages" in record.value for record in records)
        faults = [document.fault for document in documents if document.fault]
        state["unusable"] = state.get("unusable", 0) + len(faults)
        state["unusable_at"] = state.get("unusable_at") or next(iter(faults), "")
        self._place = place
        if monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()

    def commit(self, done: bool = False) -> None:
        """Bring all to the disk, then say so: from there a restart goes on."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._state.update(place=self._place, done=done)
        write_whole(self._folder / PART, json.dumps(self._state).encode())
        self._committed = monotonic()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A disk that does not take a file becomes one line."""
    try:
        yield
    except OSError as error:
        if (why := unwritten(error)) is None:
            raise
        raise UsageError(f"cannot write {folder}: {why[0]}; {why[1]}, then start again: it goes on") from None


def merge(store: Path, run: int) -> dict[str, Any]:
    """Make the parts of a preparation a store, or add them to the one that is there. Returns the manifest.

    Raises:
        UsageError: a part is missing, unfinished, cut, or of another run.
    """
    parts = parts_begun(store, run)
    if parts is None:
        raise UsageError(f"token store {store} has no parts to merge; run nextblock prepare with --part first")
    manifest = read_manifest(store) if run else None
    found, first = [], None
    for number in range(parts):
        name = part_name(run, number, parts)
        folder, again = store / name, f"run nextblock prepare --part {number + 1}/{parts}"
        if not (folder / PART).exists():
            raise UsageError(f"token store: part {folder} is missing; {again}")
        state = read_part(folder)
        first = first or state["identity"]
        if not state["done"]:
            raise UsageError(f"token store: part {folder} is not finished; {again}")
        check_same(state["identity"], first, folder)
        check_part(folder, state, first["dtype"], f"delete {folder} and {again}")
        counts = UNUSABLE | {key: state[key] for key in (*COUNTS, "chats", *UNUSABLE) if key in state}
        found.append({"folder": name, **counts, "digest": part_digest(folder)})
    assert first is not None
    manifest = manifest or {"format": FORMAT, "dtype": first["dtype"], "tokenizer": first["tokenizer"]}
    manifest["parts"] = [*manifest.get("parts", []), *found]
    manifest["runs"] = [*manifest.get("runs", []), first]
    manifest |= {key: sum(part[key] for part in manifest["parts"]) for key in COUNTS}
    manifest["chats"] = any(part["chats"] for part in manifest["parts"])
    manifest["unusable"] = sum(part.get("unusable", 0) for part in manifest["parts"])
    manifest["unusable_at"] = next((said for part in manifest["parts"] if (said := part.get("unusable_at"))), "")
    with disk_errors(store):
        write_whole(store / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest
