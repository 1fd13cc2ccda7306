"""Documents and prompts -> token ids, by one rule for training and for decoding.

A document is one text, tokenised once, as the tokenizer would in any program; what is generated in it is found by
characters. Contents are texts: where they spell a special token, they get the tokens of its letters. Only the chat
template, the begin and the end of a document mean special tokens.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from nextblock.config.errors import UsageError
from nextblock.data.chat import MARKER, MEANT, PRIVATE, Chat, Pieces, Specials
from nextblock.data.records import Record, Unusable
from nextblock.data.rows import Document

GUARDS = ("\n", "0", "a", ".")


def encode(record: Record | Mapping[str, Any], tokenizer: Any) -> Document:
    """Tokenise one record; see `encode_batch`."""
    return encode_batch([record if isinstance(record, Record) else Record(record, "record")], tokenizer)[0]


def encode_batch(records: Sequence[Record], tokenizer: Any, skip: bool = False) -> list[Document]:
    """Tokenise records, in few calls of the tokenizer.

    - `{"text"}`: [begin token if the tokenizer adds one] text, end token; offset 0..n-1.
    - `{"prompt", "completion"}`: offset -1 in the prompt, 0.. over the completion and its end token.
    - `{"messages"}`: the tokenizer's chat template; each assistant turn with its end-of-turn token is a span
      with offset 0.., all else is context (`chat.Chat.pieces`).

    A record that is not `ended` has no end token; of messages, the last turn then has no end-of-turn token.
    A text that is empty, or nothing but white space, gives an empty document. A record of a token store is tokenised
    already.

    Up to where a span begins, the ids are those of `encode_prompt`.

    Args:
        skip: a record that cannot be used gives an empty document, whose `fault` says why.
    Raises:
        UsageError: the tokenizer has no end token, or no chat template where one is needed.
        Unusable: the chat template fails (file and line named).
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UsageError("the tokenizer has no end token; set eos_token in its tokenizer_config.json")
    if not (fresh := [record for record in records if record.stored is None]):
        return [record.stored.document for record in records if record.stored is not None]
    encoder = _Encoder(tokenizer)
    sources = [encoder.source(record, skip) for record in fresh]
    documents = []
    for record, source, (ids, piece) in zip(fresh, sources, encoder.run(sources), strict=True):
        if "messages" not in record.value and ids:
            ids = [*encoder.begin, *ids, *[end] * record.ended]
            if piece is not None:
                last = [len(source.pieces) - 1] * record.ended
                piece = np.concatenate([[0] * len(encoder.begin), piece, last]).astype(np.int64)
        generated = np.array([generated for _, generated in source.pieces])
        offset = np.arange(len(ids))
        if piece is not None:
            offset = np.where(generated[piece], offset - np.searchsorted(piece, piece), -1)
        elif not generated[0]:
            offset[:] = -1
        documents.append(Document(np.fromiter(ids, np.int64, len(ids)), offset, source.spelled, source.fault))
    made = iter(documents)
    return [next(made) if record.stored is None else record.stored.document for record in records]


def check_usable(records: Iterable[Record], tokenizer: Any) -> None:
    """UsageError as `encode_batch` would raise of all these records; nothing is tokenised."""
    encode_batch([], tokenizer)
    encoder = _Encoder(tokenizer)
    for record in records:
        encoder.source(record)


def encode_prompt(prompt: Any, tokenizer: Any, where: str) -> list[int]:
    """Ids of what decoding starts from: a text, or messages up to where the assistant speaks.

    A text has the begin token that training gives it, and no end token.

    Raises:
        UsageError: messages that are none, or do not fit the chat template; `where` names the prompt.
    """
    encoder = _Encoder(tokenizer)
    if isinstance(prompt, str):
        source = encoder.of_text([(encoder.begun(prompt), False)], where)
        if source.spelled:
            said = "special tokens spelled in a text prompt are read as text; give a chat as messages"
            warnings.warn(f"{where}: {said}", stacklevel=2)
        return [*encoder.begin, *encoder.run([source])[0][0]]
    chat = Chat(tokenizer, encoder.specials, prompt, None, where, dated=True)
    return encoder.run([encoder.of_chat([(chat.prompt(), False)])])[0][0]


def span_ends(tokenizer: Any) -> list[int]:
    """Tokens that end what is generated: the end token, and what ends a turn in the chat template."""
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if getattr(tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": MARKER}]
        specials = Specials(tokenizer)
        try:
            chat = Chat(tokenizer, specials, turns, None, "chat template")
            end = specials.end_of(chat.closing(chat.messages), added=True)
        except UsageError:  # a template for other conversations than this one
            end = None
        ends += [] if end is None or end in ends else [end]
    return ends


@dataclass(frozen=True)
class _Source:
    """One document or prompt before it is tokenised.

    spelled: special tokens that are only spelled. Where there are some, those meant are private characters
        (`Specials.mark`).
    fault: as of `Document`.
    """

    pieces: Pieces
    spelled: int
    fault: str = ""


_SPLITTERS: WeakKeyDictionary[Any, tuple[list[int], Any, dict[int, int]]] = WeakKeyDictionary()


class _Encoder:
    """A tokenizer as it is now; tokens may be added to it later."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.specials = tokenizer, Specials(tokenizer)
        alone, whole = self._ids("a", False), list(tokenizer("a", verbose=False)["input_ids"])
        starts = (at for at in range(len(whole)) if whole[at : at + len(alone)] == alone)
        self.begin: list[int] = whole[: next(starts, 0)]
        """What the tokenizer itself puts in front of a text."""

    def source(self, record: Record, skip: bool = False) -> _Source:
        """A record as pieces of text; none where it cannot be used, if such are to be skipped."""
        try:
            return _Source([("", True)], 0, record.fault) if record.fault else self._pieces(record)
        except Unusable as error:
            if not skip:
                raise
            return _Source([("", True)], 0, str(error))

    def _pieces(self, record: Record) -> _Source:
        value = record.value
        if "text" in value:
            text = self.begun(value["text"]) if value["text"].strip() else ""
            return self.of_text([(self._unended(text, record), True)], record.where)
        if "prompt" in value:
            completion = self._unended(value["completion"], record)
            return self.of_text([(self.begun(value["prompt"]), False), (completion, True)], record.where)
        chat = Chat(self.tokenizer, self.specials, value.get("messages"), value.get("tools"), record.where)
        return self.of_chat(chat.pieces(record.ended))

    def begun(self, text: str) -> str:
        """A text without the begin token that it spells itself, where it is given one."""
        given = self.tokenizer.bos_token_id in self.begin
        return text.removeprefix(self.tokenizer.bos_token) if given else text

    def _unended(self, text: str, record: Record) -> str:
        """A text without the end token that it spells itself, where it is given one."""
        end = self.tokenizer.eos_token
        return text.rstrip().removesuffix(end) if record.ended and text.rstrip().endswith(end) else text

    def of_text(self, pieces: Pieces, where: str) -> _Source:
        """Pieces of text in which no special token is meant."""
        whole = "".join(text for text, _ in pieces)
        spelled = len(self.specials.pattern.findall(whole))
        if spelled:
            self.specials.hide(whole, where)  # refuses what would be taken for a token that is meant
        return _Source(pieces, spelled)

    def of_chat(self, pieces: Pieces) -> _Source:
        """Pieces that a chat template has rendered."""
        spelled = sum(len(PRIVATE.findall(text)) for text, _ in pieces)
        if spelled:
            pieces = [(self.specials.mark(text), generated) for text, generated in pieces]
        return _Source(pieces, spelled)

    def run(self, sources: Sequence[_Source]) -> list[tuple[list[int], np.ndarray | None]]:
        """(ids, the piece that each token belongs to) of every source; None where there is one piece."""
        groups: dict[tuple[bool, bool], list[int]] = {}
        for number, source in enumerate(sources):
            groups.setdefault((source.spelled > 0, len(source.pieces) > 1), []).append(number)
        found: dict[int, tuple[list[int], np.ndarray | None]] = {}
        for (split, divided), numbers in groups.items():
            if divided and not self.tokenizer.is_fast:
                found |= {number: self._by_prefixes(sources[number]) for number in numbers}
                continue
            texts = ["".join(text for text, _ in sources[number].pieces) for number in numbers]
            if not divided:
                ids = self._call(texts, split)[0] if split else self._whole(texts)
                found |= {number: (tokens, None) for number, tokens in zip(numbers, ids, strict=True)}
                continue
            for number, tokens, place in zip(numbers, *self._call(texts, split, places=True), strict=True):
                piece = _pieces_of(place, sources[number].pieces)
                found[number] = self._apart(sources[number]) if piece is None else (tokens, piece)
        return [found[number] for number in range(len(sources))]

    def _whole(self, texts: list[str]) -> list[list[int]]:
        """As `_call` gives; but the tokenizer's own call finds the characters of tokens, which takes as long again.

        What that call sets in the tokenizer's core has been set by `__init__`.
        """
        if getattr(type(self.tokenizer), "_encode_plus", None) is not PreTrainedTokenizerFast._encode_plus:
            return self._call(texts, split=False)[0]
        core = self.tokenizer.backend_tokenizer
        return [encoded.ids for encoded in core.encode_batch_fast(texts, add_special_tokens=False)]

    def _call(self, texts: list[str], split: bool, places: bool = False) -> tuple[list[list[int]], list[Any]]:
        """Ids of each text and, where `places` are wanted, the characters (first, behind the last) of each token."""
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        if not split:
            encoded = self.tokenizer(texts, **options, return_offsets_mapping=places)
            return encoded["input_ids"], encoded["offset_mapping"] if places else [None] * len(texts)
        if not self.tokenizer.is_fast:
            return [self._split_slowly(text) for text in texts], [None] * len(texts)
        tokenizer, meant = self._splitter()
        encoded = tokenizer(texts, **options, return_offsets_mapping=places, split_special_tokens=True)
        ids: Any = [[meant.get(token, token) for token in tokens] for tokens in encoded["input_ids"]]
        return ids, encoded["offset_mapping"] if places else [None] * len(texts)

    def _splitter(self) -> tuple[Any, dict[int, int]]:
        """A copy of the tokenizer that knows the private characters, and which special tokens these are."""
        specials = self.specials.tokens
        kept = _SPLITTERS.get(self.tokenizer)
        if kept is None or kept[0] != list(specials):
            splitter = copy.deepcopy(self.tokenizer)
            names = [chr(MEANT + k) for k in range(len(specials))]
            flags = ("single_word", "lstrip", "rstrip", "normalized")
            splitter.add_tokens(
                [
                    AddedToken(name, special=False, **{flag: getattr(token, flag) for flag in flags})
                    for name, token in zip(names, specials.values(), strict=True)
                ]
            )
            meant = dict(zip(splitter.convert_tokens_to_ids(names), specials, strict=True))
            kept = _SPLITTERS[self.tokenizer] = (list(specials), splitter, meant)
        return kept[1:]

    def _split_slowly(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are private characters, by a tokenizer that splits all or none."""
        space = r"\s*"
        for k, token in enumerate(self.specials.tokens.values()):
            mark = chr(MEANT + k)
            text = re.sub(f"{space * token.lstrip}{mark}{space * token.rstrip}", mark, text)
        ids: list[int] = []
        for part in re.split(f"([{chr(MEANT)}-\U0010fffd])", text):
            if part and chr(MEANT) <= part:
                ids.append(list(self.specials.tokens)[ord(part) - MEANT])
            elif part:
                ids += self.tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _by_prefixes(self, source: _Source) -> tuple[list[int], np.ndarray]:
        """As `run` gives, by a tokenizer that does not tell the places of its tokens."""
        text, ends = "", []
        for piece, _ in source.pieces:
            text += piece
            ends.append(self._ids(text, source.spelled > 0))
        whole = ends[-1]
        if any(whole[: len(ids)] != ids for ids in ends):
            return self._apart(source)
        return whole, np.repeat(np.arange(len(ends)), np.diff([len(ids) for ids in ends], prepend=0))

    def _ids(self, text: str, split: bool) -> list[int]:
        return self._call([text], split)[0][0]

    def _apart(self, source: _Source) -> tuple[list[int], np.ndarray]:
        """As `run` gives, each piece tokenised as the continuation of those before it."""
        ids: list[int] = []
        counts, split = [], source.spelled > 0
        for text, _ in source.pieces:
            piece = self._continued(text, split) if ids else self._ids(text, split)
            ids, counts = ids + piece, [*counts, len(piece)]
        return ids, np.repeat(np.arange(len(counts)), counts)

    def _continued(self, text: str, split: bool) -> list[int]:
        """Ids of a text that does not begin a document: without the space that some tokenizers put in front."""
        for guard in GUARDS:
            before, ids = self._ids(guard, split), self._ids(guard + text, split)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._ids(text, split)


def _pieces_of(places: Sequence[tuple[int, int]], pieces: Pieces) -> np.ndarray | None:
    """The piece in which each token begins; None if a token lies across the beginning of a generated piece."""
    borders = np.cumsum([len(text) for text, _ in pieces])
    first, stop = np.fromiter(chain.from_iterable(places), np.int64, 2 * len(places)).reshape(-1, 2).T
    stop = np.maximum.accumulate(stop)
    # Some tokenizers leave the space before a word out of its place.
    first = np.minimum(first, np.append(0, stop[:-1])) if len(stop) else first
    for number, (_, generated) in enumerate(pieces):
        border = borders[number - 1] if number else 0
        if generated and ((first < border) & (border < stop)).any():
            return None
    return np.minimum(np.searchsorted(borders, first, side="right"), len(pieces) - 1)


def prompts_of_ids(tokens: Any, attention_mask: Any) -> list[tuple[list[int], list[int]]]:
    """Rows of token ids, padded or not, as (left padding, ids); one row may come without its list."""
    rows = _rows("input_ids", tokens)
    if attention_mask is None:
        return [([], ids) for ids in rows]
    masks = _rows("attention_mask", attention_mask)
    if [len(ids) for ids in rows] != [len(mask) for mask in masks]:
        raise UsageError("attention_mask and the prompts have different shapes; they must be equal")
    encoded = []
    for number, (ids, mask) in enumerate(zip(rows, masks, strict=True)):
        low = mask.index(1) if 1 in mask else len(mask)
        high = low + mask.count(1)
        if not all(mask[low:high]):
            raise UsageError(f"attention_mask of prompt {number} has holes; pad on the left or on the right only")
        encoded.append((ids[:low], ids[low:high]))
    return encoded


def _rows(name: str, value: Any) -> list[list[int]]:
    rows = [value] if isinstance(value, list) and value and not isinstance(value[0], list) else value
    if isinstance(rows, list) and all(isinstance(row, list) and all(isinstance(n, int) for n in row) for row in rows):
        return rows
    raise UsageError(f"{name} holds something else than whole numbers; give int64 [B, T]")
