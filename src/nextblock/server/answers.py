"""What a client gets: OpenAI's objects and chunks, made from the progress of rows."""

from __future__ import annotations

import json
import math
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from nextblock.data.text import INCOMPLETE, TextStream, decode
from nextblock.decoding.events import Committed, Finish, Rejected, RowFinished
from nextblock.server.batching import Progress
from nextblock.server.bodies import Body, ChatBody

FINISH: dict[Finish, str] = {"end_token": "stop", "stop_string": "stop", "length": "length"}
LEAST = -9999.0
"""In place of the logarithm of zero, as OpenAI writes it."""


def as_json(value: Any) -> bytes:
    """JSON in ASCII, so that no text can break it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


class Choice:
    """One answer as it grows: text that can be shown, log-probabilities, events."""

    def __init__(self, index: int, tokenizer: Any, stop: Sequence[str], body: Body, opening: str = "") -> None:
        self.index, self.tokenizer, self.body = index, tokenizer, body
        self.text, self.piece, self.finish = "", "", None
        self.tokens = self.forwards = 0
        self.logprobs: list[tuple[dict[str, Any], int]] = []  # of each token, and its place in the text
        self._new: list[tuple[dict[str, Any], int]] = []
        self._events: list[dict[str, Any]] = []
        self._stream = TextStream(tokenizer, stop, opening)

    def take(self, progress: Progress) -> None:
        """Take in what a step brought."""
        self.tokens += len(progress.tokens)
        self.forwards = progress.forwards
        piece, offsets = "", list[int]()
        for token in progress.tokens:
            piece += self._stream.put(token)
            offsets.append(self._stream.offset)
        if progress.finish is not None:
            piece += self._stream.end()
            self.finish = FINISH.get(progress.finish, "stop")
        self.piece += piece
        self.text += piece
        if self.body.top is not None:
            decided = (self._logprob(event) for event in progress.events if isinstance(event, Committed))
            new = [*zip(decided, offsets, strict=True)]
            self.logprobs += new
            self._new += new
        if self.body.events:
            self._events += [told for event in progress.events if (told := self._event(event)) is not None]

    def _logprob(self, event: Committed) -> dict[str, Any]:
        value = math.log(event.confidence) if event.confidence > 0 else LEAST
        top = [self._token(token, max(other, LEAST)) for token, other in event.top]
        return self._token(event.token, value) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = decode(self.tokenizer, [token], skip_special_tokens=False)
        return {"token": text, "logprob": logprob, "bytes": [*token_bytes(self.tokenizer, token, text)]}

    def _event(self, event: Any) -> dict[str, Any] | None:
        if isinstance(event, RowFinished):
            return {"type": "finished", "index": self.index, "tokens": event.tokens}
        if not isinstance(event, Committed | Rejected):
            return None
        told = {"type": "committed", "index": self.index, "offset": event.offset, "step": event.step}
        told["text"] = decode(self.tokenizer, [event.token], skip_special_tokens=False)
        if isinstance(event, Rejected):
            return told | {"type": "rejected"}
        return told | {"confidence": round(event.confidence, 4)}

    def chunk(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """What is new since the last call: the choice of a chunk, None if there is nothing to show, and events."""
        piece, self.piece = self.piece, ""
        new, self._new = self._new, []
        events, self._events = self._events, []
        if not piece and not new and self.finish is None:
            return None, events
        found = {"index": self.index, "logprobs": self._told(new), "finish_reason": self.finish}
        chat = isinstance(self.body, ChatBody)
        return found | ({"delta": {"content": piece}} if chat else {"text": piece}), events

    def whole(self) -> dict[str, Any]:
        """The choice of an answer that is not a stream."""
        found = {"index": self.index, "logprobs": self._told(self.logprobs), "finish_reason": self.finish}
        if isinstance(self.body, ChatBody):
            return found | {"message": {"role": "assistant", "content": self.text, "refusal": None}}
        return found | {"text": self.text}

    def _told(self, told: list[tuple[dict[str, Any], int]]) -> dict[str, Any] | None:
        if self.body.top is None:
            return None
        tokens = [token for token, _ in told]
        if isinstance(self.body, ChatBody):
            return {"content": tokens, "refusal": None}
        # As OpenAI has it: a mapping for each token, which holds the chosen one in any case.
        beside = [{_name(t): t["logprob"] for t in (*token["top_logprobs"], token)} for token in tokens]
        return {
            "tokens": [_name(token) for token in tokens],
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": beside if self.body.top else None,
            "text_offset": [offset for _, offset in told],
        }


def token_bytes(tokenizer: Any, token: int, text: str) -> bytes:
    """The bytes that a token stands for; its `text` shows where they are no whole characters."""
    if INCOMPLETE in text:
        piece = tokenizer.convert_ids_to_tokens(token)
        if found := re.fullmatch("<0x([0-9A-F]{2})>", piece):  # of SentencePiece
            return bytes.fromhex(found[1])
        of = {character: byte for byte, character in bytes_to_unicode().items()}  # byte-level BPE
        if all(character in of for character in piece):
            return bytes(of[character] for character in piece)
    return text.encode("utf-8", "replace")


def _name(token: dict[str, Any]) -> str:
    """A token in the lists of /v1/completions, where a part of a character needs a name of its own."""
    escaped = "".join(f"\\x{byte:02x}" for byte in token["bytes"])
    return f"bytes:{escaped}" if INCOMPLETE in token["token"] else token["token"]


class Answer:
    """The answer to one request: `n` choices for each prompt, and what they cost.

    prompt_tokens: each prompt counts once, however many choices it has.
    """

    def __init__(self, model: str, body: Body, choices: list[Choice], prompt_tokens: int) -> None:
        prefix = "chatcmpl" if isinstance(body, ChatBody) else "cmpl"
        self.body, self.choices, self.prompt_tokens = body, choices, prompt_tokens
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    @property
    def done(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish is not None for choice in self.choices)

    @property
    def usage(self) -> dict[str, Any]:
        """OpenAI's counts; `forwards`: passes that the rows took part in, and tokens for each of them."""
        tokens, forwards = (sum(getattr(c, name) for c in self.choices) for name in ("tokens", "forwards"))
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
            "forwards": forwards,
            "tokens_per_forward": round(tokens / forwards, 4) if forwards else 0.0,
        }

    def whole(self) -> dict[str, Any]:
        """The answer as one object."""
        choices = [choice.whole() for choice in self.choices]
        return {**self.head, "object": self.body.kind, "choices": choices, "usage": self.usage}

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        """One event of a stream."""
        kind = f"{self.body.kind}.chunk" if isinstance(self.body, ChatBody) else self.body.kind
        return b"data: " + as_json({**self.head, "object": kind, "choices": choices, **more}) + b"\n\n"

    def first(self) -> bytes:
        """What a stream of a chat begins with: who speaks."""
        if not isinstance(self.body, ChatBody):
            return b""
        delta = {"role": "assistant", "content": ""}
        empty: dict[str, Any] = {"delta": delta, "logprobs": None, "finish_reason": None}
        return b"".join(self.chunk([{"index": choice.index, **empty}]) for choice in self.choices)

    def news(self) -> bytes:
        """The chunks of what is new."""
        chunks = []
        for choice in self.choices:
            found, events = choice.chunk()
            more = {"events": events, "forwards": choice.forwards} if self.body.events else {}
            if found is not None or events:
                chunks.append(self.chunk([] if found is None else [found], **more))
        return b"".join(chunks)

    def last(self) -> bytes:
        """The end of a stream."""
        options = self.body.stream_options
        usage = self.chunk([], usage=self.usage) if options is not None and options.include_usage else b""
        return usage + b"data: [DONE]\n\n"
