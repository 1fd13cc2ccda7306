"""Token ids of one answer -> text that can be shown while it grows, and is never taken back.

An answer goes on from its prompt. Decoders of SentencePiece take the space of a text's first word away, which an
answer's first word keeps: so tokens are decoded behind a guard, and its text is cut off.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

from nextblock.config.errors import UsageError
from nextblock.data.chat import MARKER, Chat, Specials

INCOMPLETE = "\ufffd"
GUARDS = ("a", "0", ".")
_GUARDS: WeakKeyDictionary[Any, tuple[list[int], int]] = WeakKeyDictionary()


def decode(tokenizer: Any, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
    """The text of tokens that go on from others: what they add to the text of those."""
    guard, length = _guard(tokenizer)
    text = tokenizer.decode(
        [*guard, *tokens], skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
    return text[length:]


def _guard(tokenizer: Any) -> tuple[list[int], int]:
    """Ids to decode behind, and the characters of their text; none where the vocabulary knows no guard."""
    if tokenizer not in _GUARDS:
        found: tuple[list[int], int] = [], 0
        for guard in GUARDS:
            ids = list(tokenizer(guard, add_special_tokens=False)["input_ids"])
            texts = {tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False)}
            if texts == {guard}:
                found = ids, len(guard)
                break
        _GUARDS[tokenizer] = found
    return _GUARDS[tokenizer]


def opening(tokenizer: Any) -> str:
    """The space that the chat template itself writes in front of an assistant's content; "" if it writes none.

    A model writes that space, since decoding starts before it; but it is no part of the content.
    """
    turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": MARKER}]
    try:
        chat = Chat(tokenizer, Specials(tokenizer), turns, None, "chat template")
        prompt, whole = chat.render(chat.messages[:1], prompt=True), chat.render(chat.messages)
    except UsageError:  # a template for other conversations than this one
        return ""
    return " " if whole.startswith(f"{prompt} {MARKER}") else ""


class TextStream:
    """Decode an answer token by token.

    A character whose bytes are not all there yet is held back, and so is a tail that may be the beginning of a
    stop string. What `put` and `end` return, joined, is the text of the answer, cut before the first stop
    string. A stop string may hold special tokens, also where these are not shown.

    opening: as of `opening`, in an answer to a chat; where the answer begins with it, it is not shown.

    offset: characters in front of the token that was put last, in the text before it is cut. Tokens of an unfinished
        character stand where that character does.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), opening: str = "", skip_special_tokens: bool = True
    ) -> None:
        self.tokenizer, self.opening = tokenizer, opening
        self.stop = tuple(stop)
        self.skip = skip_special_tokens
        self.tokens: list[int] = []
        self.stopped = False
        self.offset = 0
        self._characters = 0
        self._window = 0  # first token of the stretch that is decoded again
        self._read = 0  # tokens before this one are in `_held` or were returned
        self._held = ""
        self._hidden: list[bool] = []  # for each character of `_held`: it is a special token's, or the opening

    def put(self, token: int) -> str:
        """Append one token; the text that can be shown now, often "". `stopped` tells of a stop string."""
        if self.stopped:
            return ""
        self.tokens.append(token)
        self.offset = self._characters
        before = self._decode(self.tokens[self._window : self._read])
        now = self._decode(self.tokens[self._window :])
        pending = now[len(before) :]
        if self.stop and self.skip and not pending.strip(INCOMPLETE) and not self._decode([token]):
            special = self.tokenizer.decode([token])
            if not pending:
                return self._release(special, hidden=True)
            if any(one in self._held + pending + special for one in self.stop):
                self._window = self._read = len(self.tokens)  # what was no whole character will not become one
                return self._release(pending) + ("" if self.stopped else self._release(special, hidden=True))
        if now.endswith(INCOMPLETE) or len(now) <= len(before):
            return ""
        if self._read < len(self.tokens) - 1:  # bytes in front of it may have been no character after all
            unsure = self._decode(self.tokens[self._window : -1])
            stays = takewhile(lambda pair: pair[0] == pair[1], zip(unsure, now, strict=False))
            self.offset += sum(1 for _ in stays) - len(before)
        self._window, self._read = self._read, len(self.tokens)
        return self._release(now[len(before) :])

    def end(self) -> str:
        """What was still held back, once no token follows."""
        if self.stopped:
            return ""
        before = self._decode(self.tokens[self._window : self._read])
        rest = self._decode(self.tokens[self._window :])[len(before) :]
        self._window = self._read = len(self.tokens)
        shown = self._release(rest)
        if not self.stopped:
            self.stop = ()  # what may become a stop string never will
            shown += self._release("")
        return shown

    def _decode(self, tokens: list[int]) -> str:
        return decode(self.tokenizer, tokens, self.skip)

    def _release(self, text: str, hidden: bool = False) -> str:
        """Cut at a stop string, or hold back a tail that may become one."""
        opens = bool(self.opening) and not self._characters and not hidden and text.startswith(self.opening)
        self._characters += 0 if hidden else len(text)
        self._hidden += [hidden or (opens and at < len(self.opening)) for at in range(len(text))]
        text = self._held + text
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        hold = max(
            (n for s in self.stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])), default=0
        )
        self.stopped, end = bool(found), min(found, default=len(text) - hold)
        shown = "".join(c for c, h in zip(text[:end], self._hidden, strict=False) if not h)
        self._held, self._hidden = text[end:], self._hidden[end:]
        return shown
