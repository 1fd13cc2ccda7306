"""Laws of the way from documents and prompts to token ids: content is text, and one rule serves both."""

from __future__ import annotations

import string
import warnings
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from nextblock.config.errors import UsageError
from nextblock.data.encode import Document, encode, encode_prompt, span_ends
from nextblock.data.sources import Record
from nextblock.model.parent import byte_tokenizer

ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
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


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TALK = [user("What is the capital of France?"), assistant("Paris"), user("A?"), assistant("5")]


def sentencepiece(kind: str, template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """Bytes and a few words; a space is put in front of each part, as Llama-2 does, or in front of a text alone."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [f"<0x{byte:02X}>" for byte in range(256)] + [
        "▁",
        *string.ascii_letters,
        *string.digits,
        *"?:.<>/|_[]",
    ]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges: list[tuple[str, str]] = []
    for word in ("▁Paris", "▁5", "▁The", "▁What", "Paris"):
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            merges += [] if pair in merges else [pair]
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=ZEPHYR
    )


def words(template: str = CHATML) -> PreTrainedTokenizerFast:
    """Bytes and a few words; the places of its tokens leave out the space before a word, as those of Llama 3 do."""
    alphabet = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ċ", "Ċ"), ("Ġ", "P"), ("ĠP", "a"), ("1", "2")]
    core = Tokenizer(models.BPE(alphabet | {a + b: 256 + n for n, (a, b) in enumerate(merges)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
    )


TOKENIZERS = {
    "prepend": lambda: sentencepiece("prepend"),
    "first": lambda: sentencepiece("first"),
    "words": words,
    "bytes": byte_tokenizer,
    "slow": lambda: ByT5Tokenizer(extra_ids=0, chat_template=ZEPHYR),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def spans(document: Document, tokenizer: Any) -> list[list[str]]:
    """The tokens of each generated span."""
    found = []
    for start in np.flatnonzero(document.offset == 0):
        stop = start + 1
        while stop < len(document.offset) and document.offset[stop] == stop - start:
            stop += 1
        found.append(tokenizer.convert_ids_to_tokens(document.tokens[start:stop].tolist()))
    return found


# ---------------------------------------------------------------- one tokenisation


def test_a_chat_has_the_ids_of_its_rendered_text(tokenizer: Any) -> None:
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert encode({"messages": TALK}, tokenizer).tokens.tolist() == plain_ids(tokenizer, rendered)


@pytest.mark.parametrize("kind", ["prepend", "first"])
def test_a_turn_has_no_space_that_its_text_has_not(kind: str) -> None:
    tokenizer = sentencepiece(kind)
    assert spans(encode({"messages": TALK}, tokenizer), tokenizer) == [["Paris", "</s>"], ["5", "</s>"]]


BORDERS = [("Q: What?\nA:", " Paris"), ("Q: What?\nA: ", "Paris"), ("A\n", "\n5"), ("1", "2"), ("é", "é"), ("", "5")]


@pytest.mark.parametrize(("prompt", "completion"), BORDERS)
def test_what_precedes_a_span_is_what_decoding_is_prompted_with(tokenizer: Any, prompt: str, completion: str) -> None:
    document = encode({"prompt": prompt, "completion": completion}, tokenizer)
    start = int(np.flatnonzero(document.offset == 0)[0])
    assert document.tokens[:start].tolist() == encode_prompt(prompt, tokenizer, "prompt")
    text = tokenizer.decode(document.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text == prompt + completion
    messages = [user(prompt + "?"), assistant(completion)]
    document = encode({"messages": messages}, tokenizer)
    start = int(np.flatnonzero(document.offset == 0)[0])
    assert document.tokens[:start].tolist() == encode_prompt(messages[:1], tokenizer, "prompt")


def test_a_completion_that_no_token_joins_to_its_prompt_has_the_ids_of_the_whole_text(tokenizer: Any) -> None:
    document = encode({"prompt": "Q: What?\nA:", "completion": " Paris"}, tokenizer)
    ids = plain_ids(tokenizer, "Q: What?\nA: Paris")
    assert document.tokens[-len(ids) - 1 : -1].tolist() == ids


@pytest.mark.parametrize("kind", ["prepend", "first"])
def test_a_tokenizer_that_ends_texts_gives_prompts_no_end_token(kind: str) -> None:
    ending = sentencepiece(kind, "<s> $A </s>")
    assert encode_prompt("Q: What?", ending, "prompt") == encode_prompt("Q: What?", sentencepiece(kind), "prompt")
    assert encode({"text": "Q"}, ending).tokens.tolist() == [*encode_prompt("Q", ending, "prompt"), 2]


@pytest.mark.parametrize("kind", ["prepend", "first"])
def test_a_text_that_spells_its_begin_and_end_has_one_of_each(kind: str) -> None:
    tokenizer = sentencepiece(kind)
    ids = encode({"text": "<s>[INST] Q [/INST] A </s>"}, tokenizer).tokens.tolist()
    assert ids == [1, *plain_ids(tokenizer, "[INST] Q [/INST] A "), 2]
    assert encode_prompt("<s>Q", tokenizer, "prompt") == encode_prompt("Q", tokenizer, "prompt")
    tokenizer = byte_tokenizer()
    assert (
        encode({"text": "ab<|end|>"}, tokenizer).tokens.tolist() == encode({"text": "ab"}, tokenizer).tokens.tolist()
    )


# ---------------------------------------------------------------- content is text


def test_a_special_token_spelled_in_a_text_is_text_and_is_told_of() -> None:
    tokenizer = byte_tokenizer()
    with pytest.warns(UserWarning, match=r"<\|end\|> in a text is read as text"):
        ids = encode({"text": "a<|end|>b"}, tokenizer).tokens.tolist()
    assert 256 not in ids[:-1]
    assert tokenizer.decode(ids[:-1]) == "a<|end|>b"


def test_a_special_token_spelled_in_a_content_is_text(tokenizer: Any) -> None:
    end = tokenizer.eos_token
    messages = [user(f"What {end}? {end}"), assistant(f"x{end}Paris")]
    document, clean = (
        encode({"messages": part}, tokenizer) for part in (messages, [user("What ? "), assistant("xParis")])
    )
    assert (document.tokens == tokenizer.eos_token_id).sum() == (clean.tokens == tokenizer.eos_token_id).sum()
    assert len(spans(document, tokenizer)) == 1
    text = tokenizer.decode(document.tokens)
    assert f"What {end}? {end}" in text
    assert f"x{end}Paris" in text
    start = int(np.flatnonzero(document.offset == 0)[0])
    assert document.tokens[:start].tolist() == encode_prompt(messages[:1], tokenizer, "prompt")


def test_documents_have_the_same_ids_before_and_after_the_mask_token_is_added() -> None:
    tokenizer = byte_tokenizer()
    rows = [
        {"text": "the <|mask|> token"},
        {"prompt": "the <|mask|>", "completion": "<|mask|>"},
        {"messages": [user("<|mask|><|end|>"), assistant("a <|mask|>")]},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = [encode(row, tokenizer).tokens.tolist() for row in rows]
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
        after = [encode(row, tokenizer).tokens.tolist() for row in rows]
    assert before == after
    assert all(tokenizer.mask_token_id not in ids for ids in after)


# ---------------------------------------------------------------- chats


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


@pytest.mark.parametrize(
    "day",
    [
        "{{ strftime_now('%d %b %Y') if strftime_now is defined }}\n",
        "{%- set form = '%d %b %Y' %}{{ strftime_now(form) }}\n\n",
        '{{ strftime_now(format="%d %b %Y") }}\n\n',
    ],
)
def test_a_chat_is_the_same_on_every_day(day: str) -> None:
    tokenizer = words(day + CHATML)
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


def test_a_chat_in_which_the_assistant_never_speaks_is_context() -> None:
    document = encode({"messages": TALK[:1]}, words())
    assert len(document.tokens)
    assert (document.offset == -1).all()


def test_the_end_of_a_turn_need_not_be_a_special_token() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=False) for name in ("<|im_start|>", "<|im_end|>")])
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert span_ends(tokenizer) == [256, end]
    document = encode({"messages": TALK}, tokenizer)
    assert all(span[-1] == "<|im_end|>" for span in spans(document, tokenizer))


def test_the_end_token_and_the_end_of_a_turn_end_spans() -> None:
    assert span_ends(words()) == [260, 262]
    assert span_ends(byte_tokenizer()) == [256]
    assert span_ends(words("{{ raise_exception('no') }}")) == [260]
    talk = {"messages": TALK}
    assert all(span[-1] == "<|im_end|>" for span in spans(encode(talk, words()), words()))
    broken = encode(Record(talk, "record", ended=False), words())
    assert spans(broken, words())[-1] == ["5"]
