"""What a client sends: the bodies of OpenAI's two endpoints, with the decoding options beside their fields.

A field that OpenAI has and this server has not is refused, as is a name that neither knows. Some are accepted where
their value asks for nothing (NEUTRAL) and some because they never change an answer (IGNORED).
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import Field, model_validator

from nextblock.config.errors import UsageError
from nextblock.config.sections import Section, type_in_words, validate
from nextblock.decoding.options import DecodingConfig

IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
}
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
DEEPEST = 64
"""Levels of lists and objects in a body."""


class StreamOptions(Section):
    """How a stream is told."""

    include_usage: bool = Field(default=False, description="a last chunk with the usage")
    include_obfuscation: bool = Field(default=False, description="OpenAI's padding against eavesdroppers: none here")


class Body(DecodingConfig):
    """What both endpoints take: OpenAI's fields, and the options of `generate`.

    events: beside the text of a stream, each token as it is decided, with its place, confidence and pass.
    """

    kind: ClassVar[str]

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(default=1, ge=1, le=128)
    stop: Any = ()
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    events: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or len(stop) > 16 or not all(isinstance(s, str) and s for s in stop):
            raise UsageError("stop must be a text that is not empty, or a list of at most 16 of these")
        if self.stream_options is not None and not self.stream:
            raise UsageError("stream_options goes with stream=true alone; leave it out")
        if self.events and not self.stream:
            raise UsageError("events goes with stream=true alone; leave it out")
        limits = {name: getattr(self, name) for name in LIMITS if name in self.model_fields_set}
        if len(set(limits.values())) > 1:
            raise UsageError(f"{' and '.join(limits)} are different; give one of them")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer, if the client says."""
        return next((getattr(self, name) for name in LIMITS if name in self.model_fields_set), None)

    @property
    def options(self) -> dict[str, Any]:
        """The options of `generate` that the client gave."""
        given = {name: getattr(self, name) for name in DecodingConfig.model_fields if name in self.model_fields_set}
        stop = [self.stop] if isinstance(self.stop, str) else list(self.stop)
        limit = {} if self.limit is None else {"max_new_tokens": self.limit}
        return {**given, **limit, "seed": self.seed, "stop": stop}

    @property
    @abstractmethod
    def top(self) -> int | None:
        """How many likely tokens are told beside the log-probability of each token; None: not even that."""

    @property
    @abstractmethod
    def prompts(self) -> Any:
        """As `make_request` takes it: each answered `n` times."""


LIMITS = ("max_completion_tokens", "max_tokens", "max_new_tokens")


class ChatBody(Body):
    """Of `/v1/chat/completions`."""

    kind = "chat.completion"

    messages: list[dict[str, Any]]
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _asked_for(self) -> Self:
        if not self.messages:
            raise UsageError("messages is empty; give at least one")
        if unknown := [role for message in self.messages if (role := message.get("role")) not in ROLES]:
            raise UsageError(f"role={unknown[0]!r:.80} is unknown; choose from {', '.join(ROLES)}")
        if self.top_logprobs is not None and not self.logprobs:
            raise UsageError(f"top_logprobs={self.top_logprobs} goes with logprobs=true alone; leave it out")
        return self

    @property
    def top(self) -> int | None:
        """As above."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def prompts(self) -> Any:
        """As above."""
        return [self.messages] * self.n


class TextBody(Body):
    """Of `/v1/completions`: a text, a list of texts, token ids, or a list of these."""

    kind = "text_completion"

    prompt: Any
    logprobs: int | None = Field(default=None, ge=0, le=20)

    @model_validator(mode="after")
    def _readable(self) -> Self:
        parts = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        if not parts or len({_kind(part) for part in parts}) != 1 or _kind(parts[0]) is None:
            raise UsageError("prompt must be a text, a list of texts, a list of token ids, or a list of such lists")
        return self

    @property
    def top(self) -> int | None:
        """As above."""
        return self.logprobs

    @property
    def prompts(self) -> Any:
        """As above."""
        parts = self.prompt if isinstance(self.prompt, list) and _kind(self.prompt[0]) != "id" else [self.prompt]
        repeated = [part for part in parts for _ in range(self.n)]
        return repeated if isinstance(parts[0], str) else {"input_ids": repeated}


def _kind(part: Any) -> str | None:
    if isinstance(part, str):
        return "text"
    if isinstance(part, int) and not isinstance(part, bool):
        return "id"
    return "ids" if isinstance(part, list) and part and all(_kind(inner) == "id" for inner in part) else None


def read_body(kind: type[Body], content: bytes) -> Body:
    """A body, checked.

    Raises:
        UsageError: not JSON, a field that is unknown or not supported, or a value out of its limits; in one line.
    """
    try:
        values = json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise UsageError("the body is not JSON; send one JSON object, encoded as UTF-8") from None
    if not isinstance(values, dict):
        raise UsageError(f"the body is a JSON {type(values).__name__}; it must be an object")
    if _depth(values) > DEEPEST:
        raise UsageError(f"the body has more than {DEEPEST} levels of lists and objects")
    given = {}
    for name, value in values.items():
        # null is OpenAI's way to leave a field out; a threshold of null is one token a step
        if name in IGNORED or (value is None and name not in ("threshold", "prompt", "messages")):
            continue
        if name not in NEUTRAL:
            given[name] = value
        elif value not in NEUTRAL[name]:
            what = f"{name}={json.dumps(value)}"
            raise UsageError(f"{what:.80} is not supported here; leave {name} out")
    for name, value in given.items():  # which pydantic would read as a number
        field = kind.model_fields.get(name)
        if field is not None and isinstance(value, str) and not _takes_text(field.annotation):
            raise UsageError(f"{name}={json.dumps(value)[:80]} is not {type_in_words(field.annotation)}")
    return validate(kind, given)


def _takes_text(annotation: Any) -> bool:
    return annotation in (str, Any) or get_origin(annotation) is Literal or any(map(_takes_text, get_args(annotation)))


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


def _depth(value: Any) -> int:
    deepest, level = 0, [value]
    while level:
        deepest += 1
        inner = [
            item.values() if isinstance(item, Mapping) else item for item in level if isinstance(item, dict | list)
        ]
        level = [thing for items in inner for thing in items]
    return deepest
