"""Laws of chats: which part of the rendered text is generated, and what is refused."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AddedToken

from nextblock.config.errors import UsageError
from nextblock.data.encode import encode, encode_prompt, span_ends
from nextblock.data.records import Record
from nextblock.model.parent import byte_tokenizer
from samples import (
    CHAT,
    CHATML,
    TALK,
    TOKENIZER,
    assistant,
    jsonl,
    marked_bytes,
    span_texts,
    spans,
    stream,
    user,
    words,
)

# The last assistant turn is shown with an empty thought, earlier ones without, as Qwen3 does.
THINKING_CHAT = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


LONG_TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2 or II"},
]


# The generation prompt opens a thought, which finished turns are shown without.
THOUGHTFUL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}"
    "{% else %}<|im_start|>{{ m['content'].split('</think>')[-1] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)


# The same, but for the last turn, of which the thought is shown.
LAST_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_each_assistant_turn_with_its_end_token_is_a_span() -> None:
    document = encode({"messages": LONG_TALK}, TOKENIZER)
    assert span_texts(document) == ["1<|end|>", "2 or II<|end|>"]
    assert TOKENIZER.decode(document.tokens) == TOKENIZER.apply_chat_template(LONG_TALK, tokenize=False)


def test_a_template_that_shows_earlier_turns_otherwise_still_gives_exact_spans() -> None:
    document = encode({"messages": LONG_TALK}, marked_bytes(template=THINKING_CHAT))
    assert span_texts(document) == ["1<|end|>", "<think></think>2 or II<|end|>"]


def test_what_precedes_a_span_is_the_prompt_that_decoding_starts_from() -> None:
    document = encode({"messages": LONG_TALK}, TOKENIZER)
    for start, turn in zip(np.flatnonzero(document.offset == 0), (2, 4), strict=True):
        prompt = TOKENIZER.apply_chat_template(LONG_TALK[:turn], tokenize=False, add_generation_prompt=True)
        assert TOKENIZER.decode(document.tokens[:start]) == prompt


def test_a_template_that_fails_is_named_with_file_and_line(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"messages": LONG_TALK}])
    failing = marked_bytes(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match=r"a\.jsonl:1.*roles must alternate"):
        stream(source, tokenizer=failing)


def test_a_template_that_rewrites_history_is_refused_with_file_and_line(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"messages": LONG_TALK}])
    rewriting = marked_bytes(template="{{ messages | length }}" + CHAT)
    with pytest.raises(UsageError, match=r"a\.jsonl:1.*message 3"):
        stream(source, tokenizer=rewriting)


def test_a_chat_may_begin_with_the_assistant(tmp_path: Path) -> None:
    talk = [{"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "one?"}]
    talk += [{"role": "assistant", "content": "1"}]
    assert span_texts(encode({"messages": talk}, TOKENIZER)) == ["Hi!<|end|>", "1<|end|>"]


@pytest.mark.parametrize("turns", [[user("hi")], [user("a"), user("b")]])
def test_a_chat_without_an_assistant_turn_is_context(turns: list[Any], tokenizer: Any) -> None:
    document = encode({"messages": turns}, tokenizer)
    assert len(document.tokens)
    assert (document.offset == -1).all()


def test_a_chat_whose_turns_all_begin_otherwise_is_refused() -> None:
    with pytest.raises(UsageError, match="does not render message 2 as a continuation"):
        encode({"messages": [user("a"), assistant("b"), user("c")]}, words(THOUGHTFUL))


def test_text_parts_of_a_content_are_its_text() -> None:
    tokenizer = words()
    parts = [user([{"type": "text", "text": "what "}, {"type": "text", "text": "is up"}]), assistant("not much")]
    whole = [user("what is up"), assistant([{"type": "text", "text": "not much"}])]
    ids = [encode({"messages": talk}, tokenizer).tokens.tolist() for talk in (parts, whole)]
    assert (
        ids[0]
        == ids[1]
        == encode({"messages": [user("what is up"), assistant("not much")]}, tokenizer).tokens.tolist()
    )


def test_the_last_turn_may_be_empty() -> None:
    """Its end-of-turn token is all that is generated, or nothing where the turn was cut off."""
    talk, tokenizer = [user("A?"), assistant("")], words()
    document = encode({"messages": talk}, tokenizer)
    assert spans(document, tokenizer) == [["<|im_end|>"]]
    cut = encode(Record({"messages": talk}, "a.jsonl:1", ended=False), tokenizer)
    assert cut.tokens[cut.offset >= 0].tolist() == []
    with pytest.raises(UsageError, match="message 2 has no content and no tool_calls"):
        encode({"messages": [*talk, user("B?"), assistant("b")]}, tokenizer)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([user([{"type": "image", "url": "x"}]), assistant("a")], r"message 1: content has a part of type 'image'"),
        ([user(None), assistant("a")], r"message 1 has no content"),
        ([{"role": "user"}, assistant("a")], r"message 1 has no content"),
        ([user("a"), assistant(None)], r"message 2 has no content and no tool_calls"),
        ([user("\U0010a000"), assistant("a")], r"a private character"),
        ([user(3), assistant("a")], r"message 1: content holds int"),
        ([user("a"), assistant("", tool_calls=[{"function": {"name": "w", "arguments": "{"}}])], r"not JSON"),
        *(
            ([user("a"), assistant("", tool_calls=calls)], r"message 2: tool_calls must be a list of objects")
            for calls in ({"function": {"name": "w"}}, "w()", 7, True, ["w()"], [None])
        ),
    ],
)
def test_a_content_that_is_no_text_is_refused_by_name(messages: list[Any], said: str) -> None:
    for call in (
        lambda: encode(Record({"messages": messages}, "a.jsonl:7"), words()),
        lambda: encode_prompt(messages, words(), "a.jsonl:7"),
    ):
        with pytest.raises(UsageError, match=rf"^a\.jsonl:7(?=.*{said})") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_arguments_of_a_tool_call_written_as_json_are_the_object() -> None:
    tokenizer = words()
    documents = [
        encode(
            {"messages": [user("a"), assistant("", tool_calls=[{"type": "function", "function": function}])]},
            tokenizer,
        )
        for function in ({"name": "w", "arguments": '{"city": "Rome"}'}, {"name": "w", "arguments": {"city": "Rome"}})
    ]
    assert documents[0].tokens.tolist() == documents[1].tokens.tolist()
    assert '"arguments": {"city": "Rome"}' in tokenizer.decode(documents[0].tokens)


def test_a_prompt_that_opens_a_thought_is_followed_by_the_rest_of_it() -> None:
    tokenizer = words(THOUGHTFUL)
    talk = [user("a"), assistant("<think>\nx\n</think>\nb"), user("c"), assistant("<think>\ny\n</think>\nd")]
    document = encode({"messages": talk}, tokenizer)
    assert ["".join(span) for span in spans(document, tokenizer)] == ["yĊ</think>Ċd<|im_end|>"]
    start = int(np.flatnonzero(document.offset == 0)[0])
    assert document.tokens[:start].tolist() == encode_prompt(talk[:3], tokenizer, "prompt")
    with pytest.raises(UsageError, match=r"message 2 as a continuation .* generation prompt"):
        encode({"messages": [user("a"), assistant("b")]}, tokenizer)


def test_turns_that_are_shown_otherwise_than_decoding_would_begin_them_are_context() -> None:
    tokenizer = words(LAST_THOUGHT)
    talk = [user("a"), assistant("<think>\nx\n</think>\nb"), user("c"), assistant("<think>\ny\n</think>\nd")]
    document = encode({"messages": talk}, tokenizer)
    assert ["".join(span) for span in spans(document, tokenizer)] == ["yĊ</think>Ċd<|im_end|>"]


def test_a_chat_is_the_same_on_every_day() -> None:
    tokenizer = words("{{ strftime_now('%d %b %Y') if strftime_now is defined }}\n" + CHATML)
    text = str(tokenizer.decode(encode({"messages": TALK}, tokenizer).tokens))
    assert text.startswith("26 Jul 2024\n")
    prompt = str(tokenizer.decode(encode_prompt(TALK[:1], tokenizer, "prompt")))
    assert prompt.startswith(datetime.now().strftime("%d %b %Y"))


def test_a_chat_is_rendered_about_once_for_each_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, calls = words(), []
    render = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: calls.append(a) or render(*a, **k))
    encode({"messages": TALK * 10}, tokenizer)
    assert len(calls) <= 20 + 2


def test_the_end_of_a_turn_need_not_be_a_special_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=False) for name in ("<|im_start|>", "<|im_end|>")])
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert span_ends(tokenizer) == [256, end]
    document = encode({"messages": TALK}, tokenizer)
    assert all(span[-1] == "<|im_end|>" for span in spans(document, tokenizer))
