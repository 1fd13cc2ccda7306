"""What a source gives: raw documents, before they are tokenised."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nextblock.config.errors import UsageError
from nextblock.config.sections import Source

if TYPE_CHECKING:
    from nextblock.data.rows import Document


class Unusable(UsageError):
    """A record that cannot become a document, whatever the others are."""


@contextmanager
def naming_the_way_on() -> Iterator[None]:
    """Who may leave out records that cannot be used is told of it."""
    try:
        yield
    except Unusable as error:
        raise UsageError(f"{error}; data.skip_unusable=true leaves such documents out") from None


@dataclass(frozen=True)
class Stored:
    """A document of a token store: its tokens, and what is known of the text that they were made from."""

    document: Document
    digest: int
    bytes: int


@dataclass(frozen=True)
class Record:
    """One raw document: {"text"}, {"prompt", "completion"} or {"messages"}; `where` names it in errors.

    `ended` False: the text breaks off and no end token follows, as in a row with `"ended": false`. So does a part
    of a long text if more follows; its `key` is a digest of the whole text, so that all its parts fall on one side
    of the held-out border. `stored`: it comes from a token store, and `value` is empty. `fault`: why it cannot be
    used, where such records are left out; `value` is empty.
    """

    value: Mapping[str, Any]
    where: str
    ended: bool = True
    key: str = ""
    stored: Stored | None = None
    fault: str = ""

    @property
    def digest(self) -> int:
        """Of the contents, or of the whole text of which this is a part: 64 bits."""
        if self.stored is not None:
            return self.stored.digest
        if self.fault:  # never held out, so that training counts them all
            return 2**64 - 1
        content = (self.key or json.dumps(self.value, sort_keys=True, default=str)).encode()
        return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of its texts."""
        if self.stored is not None:
            return self.stored.bytes
        return sum(len(str(value).encode()) for value in self.value.values())

    @property
    def item(self) -> Any:
        """What `generate` takes of a prompt of `read_prompts`: a text or a chat."""
        return self.value.get("prompt") or self.value["messages"]


@dataclass(frozen=True)
class Records:
    """One source with random access: `read(i)` for 0 <= i < count; `count` None is endless.

    digest: of local files, to notice on resume that they were replaced (`digest_of`); else "".
    size: of local files, for `digest_at`: how many, and bytes of the last. Of a token store: its parts, and 0.
    digest_at: the digest that the source had when it had a given size; "" if nothing can have been added to that.
    check: UsageError for a token store that was made with another tokenizer than the one given, and for files that are
        small enough to be read through, if a record is none that it can tokenise.
    """

    read: Callable[[int], Record]
    count: int | None
    split_by_hash: bool = True  # False: the source has its own held-out split
    digest: str = ""
    size: tuple[int, int] = (0, 0)
    digest_at: Callable[[Sequence[int]], str] = lambda size: ""
    check: Callable[[Any], None] = lambda tokenizer: None


def or_fault(read: Callable[..., Record], *given: Any) -> Record:
    """What `read` gives, or a record that says why it cannot be used."""
    try:
        return read(*given)
    except Unusable as error:
        return Record({}, "", fault=str(error))


def to_record(row: Any, source: Source, where: str) -> Record:
    """Pick the document out of a row: the text field, else prompt and completion, else messages.

    A field that is null counts as missing, and so does what is empty where there is something else.
    """
    if not isinstance(row, Mapping):
        raise Unusable(f"{where}: expected a JSON object, found {type(row).__name__}")
    ended = row.get("ended") is not False
    kinds = [(source.text_field,), ("prompt", "completion"), ("messages",)]
    found = [keys for keys in kinds if all(row.get(key) is not None for key in keys)]
    if not found:
        fields = (f"{key} (null)" if value is None else str(key) for key, value in row.items())
        raise Unusable(
            f"{where}: no field '{source.text_field}' (nor prompt and completion, nor messages); "
            f"the fields are {', '.join(fields) or 'none'}; set text_field"
        )
    keys = next((keys for keys in found if not all(_is_blank(row[key]) for key in keys)), found[0])
    if keys == ("messages",):
        return Record({key: row[key] for key in ("messages", "tools") if row.get(key)}, where, ended)
    for key in keys:
        if not isinstance(row[key], str):
            raise Unusable(f"{where}: field '{key}' holds {type(row[key]).__name__}; it must be a string")
    return Record({key if len(keys) > 1 else "text": row[key] for key in keys}, where, ended)


def _is_blank(value: Any) -> bool:
    return not (value.strip() if isinstance(value, str) else value)


def without_nulls(value: Any) -> Any:
    """An Arrow row without the keys that hold null.

    Arrow gives all objects of a column the keys of each: `{"city": "Rome"}` comes back with `"amount": null` if
    another row has an amount.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def check_characters(value: Any, where: str) -> None:
    """Unusable if a text, or one inside of lists and objects, holds half of a surrogate pair.

    Python stands such halves in for bytes of an argument or of standard input that are not UTF-8.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str, skipkeys=True).encode()
    except UnicodeEncodeError:
        raise Unusable(
            f"{where}: half of a surrogate pair, or a byte that is not UTF-8, which is no character; repair it"
        ) from None
