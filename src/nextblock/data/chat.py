"""Messages -> the text that a chat template makes of them, in pieces: what the assistant writes, and all else.

In a message's content a special token is only spelled; in the template it is meant. So before a template is
rendered each such spelling is hidden behind a private character (`Specials.hide`): whatever special token stands in
the rendered text is then the template's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from nextblock.config.errors import UsageError, one_line
from nextblock.data.records import Unusable

Pieces = list[tuple[str, bool]]
"""Consecutive parts of a text: (text, is it generated?)."""

HIDDEN, MEANT = 0x10A000, 0x10D000  # private characters: the k-th special token, spelled or meant, is the k-th behind
PRIVATE = re.compile("[\U0010a000-\U0010fffd]")
MARKER = "\u2060turn\u2060"
TEMPLATE_DATE = datetime(2024, 7, 26)  # Llama's own, for where no date is known


class Specials:
    """The special tokens of a tokenizer.

    Attributes:
        tokens: by id, in the order of their private characters.
        pattern: matches each spelling, longer ones first.
    """

    def __init__(self, tokenizer: Any) -> None:
        own = set(tokenizer.all_special_ids)  # not all tokenizers mark these as special
        self._added = tokenizer.added_tokens_decoder
        self.tokens = {i: token for i, token in self._added.items() if token.special or i in own}
        self._names = [token.content for token in self.tokens.values()]
        by_length = sorted(self._names, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, by_length)) or "(?!)")
        self._meant_or_hidden = re.compile(f"{self.pattern.pattern}|{PRIVATE.pattern}")

    def hide(self, value: Any, name: str) -> Any:
        """A message or what it holds, with one private character for each special token that its texts spell.

        Raises:
            Unusable: a text holds such a character; `name` says where.
        """
        if isinstance(value, str):
            if PRIVATE.search(value):
                raise Unusable(f"{name} holds a private character of Unicode's last plane; leave it out")
            return self.pattern.sub(lambda found: chr(HIDDEN + self._names.index(found[0])), value)
        if isinstance(value, Mapping):
            return {key: self.hide(part, name) for key, part in value.items()}
        return [self.hide(part, name) for part in value] if isinstance(value, list | tuple) else value

    def mark(self, rendered: str) -> str:
        """A rendered text in which hidden spellings are texts again, and what is meant is a private character."""

        def other(found: re.Match[str]) -> str:
            hidden = PRIVATE.match(found[0])
            return self._names[ord(found[0]) - HIDDEN] if hidden else chr(MEANT + self._names.index(found[0]))

        return self._meant_or_hidden.sub(other, rendered)

    def end_of(self, text: str, *, added: bool = False) -> int | None:
        """The id of the special token that a text ends with, but for white space; None if there is none.

        added: any token that was added to the vocabulary will do, since not all tokenizers mark those of turns.
        """
        text, tokens = text.rstrip(), self._added if added else self.tokens
        return next((i for i, token in tokens.items() if text.endswith(token.content)), None)


class Chat:
    """A checked conversation and the template that renders it.

    Args:
        where: names the conversation in errors.
        dated: render the day as it is; else as TEMPLATE_DATE, so that data stay the same from day to day.
    Raises:
        UsageError: no template.
        Unusable: not a list of messages, or a message without a text.
    """

    def __init__(
        self, tokenizer: Any, specials: Specials, messages: Any, tools: Any, where: str, *, dated: bool = False
    ) -> None:
        self._tokenizer, self._specials, self._where = tokenizer, specials, where
        self.messages: list[dict[str, Any]] = specials.hide(checked(messages, where), where)
        self._tools = specials.hide(tools, where) if tools else None
        if not tokenizer.chat_template:
            cure = "put a chat_template.jinja beside it" if dated else "set model.tokenizer to one that has"
            raise UsageError(f"{where}: the tokenizer has no chat template for messages; {cure}, or give plain text")
        try:
            self._template = tokenizer.get_chat_template(tools=self._tools)
        except Exception as error:  # of several templates none is the default
            raise UsageError(f"{where}: the chat template fails: {one_line(error)}") from None
        if not dated and "strftime_now" in self._template:
            self._template = _on_template_date() + self._template

    def render(self, messages: Sequence[Any], prompt: bool = False) -> str:
        """The text of some messages; `prompt`: up to where the assistant speaks."""
        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=self._tools,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except Exception as error:  # templates raise anything
            raise Unusable(f"{self._where}: the chat template fails: {one_line(error)}") from None

    def prompt(self) -> str:
        """The whole conversation, up to where the assistant speaks."""
        return self.render(self.messages, prompt=True)

    def pieces(self, ended: bool = True) -> Pieces:
        """The rendered conversation, divided where assistant turns begin and end.

        A turn begins where the rendering of all before it, with the generation prompt, ends: there decoding starts.
        It ends with its end-of-turn token. A turn of which the rendering shows another beginning than decoding
        would (templates that drop the thoughts of earlier turns) is context.

        Args:
            ended: False: the last turn breaks off, without its end-of-turn token.
        Returns:
            Context alone for a conversation without an assistant turn.
        Raises:
            Unusable: no turn can be told from the rest.
        """
        turns = [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]
        whole = self.render(self.messages)
        before = {turn: self._prompt_of(turn, whole) for turn in turns}
        fitting = [turn for turn in turns if whole.startswith(before[turn])]
        last = len(self.messages) - 1
        if last in turns and last not in fitting:
            return self._last_alone(turns[0], before[last], ended)
        pieces, done = [], 0
        limits = [len(before[turn]) for turn in fitting[1:]] + [len(whole)]
        for turn, limit in zip(fitting, limits, strict=False):  # without a turn that fits, the limit stands alone
            start = len(before[turn])
            stop = self._end_of(turn, whole, start, limit)
            if stop is None or start < done:
                continue
            text = whole[start:stop]
            if self._specials.end_of(text, added=True) is not None:
                text = text.rstrip()  # white space after the end-of-turn token is never generated
            stop = start + len(text)
            if turn == last and not ended:
                text, stop = text.rstrip().removesuffix(self._closing), len(whole)
            pieces += [(whole[done:start], False), (text, True)]
            done = stop
        if turns and not pieces:
            raise self._refusal(turns[0])
        return [*pieces, (whole[done:], False)]

    @cached_property
    def _closing(self) -> str:
        """What the template writes behind the content of a turn."""
        turn = next(number for number, message in enumerate(self.messages) if message["role"] == "assistant")
        return self.closing([*self.messages[:turn], {"role": "assistant", "content": MARKER}])

    def closing(self, messages: Sequence[Any]) -> str:
        """What the template writes behind MARKER, but for white space at the end."""
        return self.render(messages).rpartition(MARKER)[2].rstrip()

    def _prompt_of(self, turn: int, whole: str) -> str:
        """What decoding starts from at a turn."""
        if turn:
            return self.render(self.messages[:turn], prompt=True)
        # Templates refuse an empty conversation: take what they write before the assistant behind some user.
        user = [{"role": "user", "content": "-"}]
        opening = self.render(user, prompt=True).removeprefix(self.render(user))
        at = whole.find(opening) if opening else 0
        if at < 0:
            raise Unusable(
                f"{self._where}: the chat template does not open a conversation with the assistant; put another turn "
                "first"
            )
        return whole[: at + len(opening)]

    def _end_of(self, turn: int, whole: str, start: int, limit: int) -> int | None:
        """Where the turn that starts at `start`, and before `limit`, ends; None if that is unclear."""
        if turn == len(self.messages) - 1:
            return len(whole)
        found = whole.find(self._closing, start, limit) if self._closing else -1
        closed = None if found < 0 else found + len(self._closing)
        # No content holds a special token. But calls of tools may be closed by another one than contents are.
        if closed and self._specials.end_of(self._closing) is not None and not self.messages[turn].get("tool_calls"):
            return closed
        upto = self.render(self.messages[: turn + 1])
        return len(upto) if whole.startswith(upto) and len(upto) >= start else closed

    def _last_alone(self, first: int, before: str, ended: bool) -> Pieces:
        """The last turn behind its own prompt, which the rendering of the whole leaves out or shows otherwise.

        Such a prompt writes the first characters of the content itself ("<think>"), and the template then drops
        from finished turns what they open.
        """
        content = self.messages[-1].get("content") or ""
        for size in range(min(len(content), len(before)), 0, -1):
            head = before[: len(before) - size]
            if before.endswith(content[:size]) and content[:size].strip():
                if head.endswith("\n") or self._specials.end_of(head) is not None:
                    return [(before, False), (content[size:] + self._closing * ended, True)]
                break
        raise self._refusal(first)

    def _refusal(self, turn: int) -> Unusable:
        return Unusable(
            f"{self._where}: the chat template does not render message {turn + 1} as a continuation of those before "
            "it; begin its content as the template's generation prompt ends, use another template, or prompt and "
            "completion fields"
        )


def _on_template_date() -> str:
    """The beginning of a template in which `strftime_now` gives TEMPLATE_DATE, however it is called."""
    parts = [f"-{one}" for one in "dmHI"] + list("aAbBdHIjmMpSyY")
    days = "".join(f"|replace('%{part}', '{TEMPLATE_DATE.strftime('%' + part)}')" for part in parts)
    # Ends with an expression: a line break behind a statement would be dropped.
    return f"{{% macro strftime_now(format) %}}{{{{ format{days} }}}}{{% endmacro %}}{{{{ '' }}}}"


def checked(messages: Any, where: str) -> list[dict[str, Any]]:
    """Messages in the form that templates expect: contents are texts, arguments of tool calls are objects.

    The last turn of an assistant may be empty: a model may say nothing.

    Raises:
        Unusable: something else than messages, or a content that is missing or not a text.
    """
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
        raise Unusable(f"{where}: messages must be a list of objects with role and content")
    found = []
    for number, message in enumerate(messages, 1):
        name, content, calls = f"{where}: message {number}", message.get("content"), message.get("tool_calls")
        if isinstance(content, list | tuple):
            content = "".join(_text_of(part, name) for part in content)
        if content is not None and not isinstance(content, str):
            raise Unusable(f"{name}: content holds {type(content).__name__}; it must be a text")
        speaks = message["role"] == "assistant"
        may_be_empty = not speaks or number == len(messages)
        if not (content or (speaks and calls) or (content is not None and may_be_empty)):
            cure = " and no tool_calls; give one, or leave it out" if speaks else "; give it one, or leave it out"
            raise Unusable(f"{name} has no content{cure}")
        given: dict[str, Any] = {"content": content} if content is not None else {}
        if calls:
            if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
                raise Unusable(f"{name}: tool_calls must be a list of objects, one for each call; not {calls!r:.80}")
            given["tool_calls"] = [_call(call, name) for call in calls]
        found.append({**message, **given})
    return found


def _text_of(part: Any, name: str) -> str:
    """The text of one part of a content."""
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return part["text"]
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind == "text":
        raise Unusable(f"{name}: a part of content has the type 'text' and no text; give it one")
    raise Unusable(f"{name}: content has a part of type {kind!r}; only parts of type 'text' can be used")


def _call(call: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A call of a tool; arguments written as a JSON string, as OpenAI does, become the object that they are."""
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        raise Unusable(f"{name}: arguments of a tool call are not JSON: {function['arguments']!r:.80}") from None
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function
