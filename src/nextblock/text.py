"""Token ids of one answer -> text that can be shown while it grows, and is never taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

INCOMPLETE = "\ufffd"


class TextStream:
    """Decode an answer token by token.

    A character whose bytes are not all there yet is held back, and so is a tail that may be the beginning of a
    stop string. What `put` and `end` return, joined, is the text of the answer, cut before the first stop
    string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), skip_special_tokens: bool = True) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.skip = skip_special_tokens
        self.tokens: list[int] = []
        self.stopped = False
        self._window = 0  # first token of the stretch that is decoded again
        self._read = 0  # tokens before this one are in `_held` or were returned
        self._held = ""

    def put(self, token: int) -> str:
        """Append one token; the text that can be shown now, often "". `stopped` tells of a stop string."""
        if self.stopped:
            return ""
        self.tokens.append(token)
        before = self._decode(self.tokens[self._window : self._read])
        now = self._decode(self.tokens[self._window :])
        if now.endswith(INCOMPLETE) or len(now) <= len(before):
            return ""
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
            shown, self._held = shown + self._held, ""
        return shown

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=self.skip, clean_up_tokenization_spaces=False)

    def _release(self, text: str) -> str:
        """Cut at a stop string, or hold back a tail that may become one."""
        text = self._held + text
        found = [at for s in self.stop if (at := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = max(
            (n for s in self.stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])), default=0
        )
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]
