"""Token ids of one answer -> text that can be shown while it grows, and is never taken back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

INCOMPLETE = "\ufffd"


class TextStream:
    """Decode an answer token by token.

    A character whose bytes are not all there yet is held back, and so is a tail that may be the beginning of a
    stop string. What `put` and `end` return, joined, is the text of the answer, cut before the first stop
    string. A stop string may hold special tokens, also where these are not shown.

    offset: characters in front of the token that was put last, in the text before it is cut. Tokens of an unfinished
        character stand where that character does.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), skip_special_tokens: bool = True) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.skip = skip_special_tokens
        self.tokens: list[int] = []
        self.stopped = False
        self.offset = 0
        self._characters = 0
        self._window = 0  # first token of the stretch that is decoded again
        self._read = 0  # tokens before this one are in `_held` or were returned
        self._held = ""
        self._hidden: list[bool] = []  # for each character of `_held`: it is a special token's

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
        return self.tokenizer.decode(tokens, skip_special_tokens=self.skip, clean_up_tokenization_spaces=False)

    def _release(self, text: str, hidden: bool = False) -> str:
        """Cut at a stop string, or hold back a tail that may become one."""
        self._characters += 0 if hidden else len(text)
        text = self._held + text
        self._hidden += [hidden] * (len(text) - len(self._held))
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        hold = max(
            (n for s in self.stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])), default=0
        )
        self.stopped, end = bool(found), min(found, default=len(text) - hold)
        shown = "".join(c for c, h in zip(text[:end], self._hidden, strict=False) if not h)
        self._held, self._hidden = text[end:], self._hidden[end:]
        return shown
