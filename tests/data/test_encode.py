"""Laws of the way from documents and prompts to token ids: content is text, and one rule serves both."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nextblock.config.errors import UsageError
from nextblock.data.encode import encode, encode_prompt, span_ends
from nextblock.data.records import Record
from nextblock.model.parent import byte_tokenizer
from samples import (
    TALK,
    TOKENIZER,
    assistant,
    marked_bytes,
    sentencepiece,
    span_texts,
    spans,
    user,
    words,
)

END = 256


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


BORDERS = [("Q: What?\nA:", " Paris"), ("Q: What?\nA: ", "Paris"), ("A\n", "\n5"), ("1", "2"), ("é", "é"), ("", "5")]


@given(st.text(min_size=1, max_size=50))
def test_plain_text_is_generated_whole_and_ends_with_the_end_token(text: str) -> None:
    document = encode({"text": text}, TOKENIZER)
    if not text.strip():
        assert document.tokens.size == 0
        return
    assert TOKENIZER.decode(document.tokens[:-1]) == text
    assert document.tokens[-1] == END
    assert document.offset.tolist() == list(range(len(document.tokens)))


def test_a_begin_token_that_the_tokenizer_adds_is_an_ordinary_first_token() -> None:
    tokenizer = marked_bytes(begin=True)
    document = encode({"text": "ab"}, tokenizer)
    assert document.tokens.tolist() == [257, *encode({"text": "ab"}, TOKENIZER).tokens.tolist()]
    assert document.offset.tolist() == [0, 1, 2, 3]


def test_a_prompt_is_context_and_its_completion_the_span() -> None:
    document = encode({"prompt": "2+2=", "completion": "4"}, marked_bytes(begin=True))
    assert document.offset.tolist() == [-1, -1, -1, -1, -1, 0, 1]
    assert span_texts(document) == ["4<|end|>"]


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = marked_bytes()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="end token"):
        encode({"text": "x"}, tokenizer)


def test_a_chat_has_the_ids_of_its_rendered_text(tokenizer: Any) -> None:
    rendered = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert encode({"messages": TALK}, tokenizer).tokens.tolist() == plain_ids(tokenizer, rendered)


@pytest.mark.parametrize("kind", ["prepend", "first"])
def test_a_turn_has_no_space_that_its_text_has_not(kind: str) -> None:
    tokenizer = sentencepiece(kind)
    assert spans(encode({"messages": TALK}, tokenizer), tokenizer) == [["Paris", "</s>"], ["5", "</s>"]]


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


def test_a_special_token_spelled_in_a_text_is_text_and_is_told_of() -> None:
    tokenizer = byte_tokenizer()
    document = encode({"text": "a<|end|>b"}, tokenizer)
    ids = document.tokens.tolist()
    assert document.spelled == 1
    assert 256 not in ids[:-1]
    assert tokenizer.decode(ids[:-1]) == "a<|end|>b"
    with pytest.warns(UserWarning, match=r"request 1: special tokens spelled in a text prompt are read as text"):
        assert encode_prompt("a<|end|>b", tokenizer, "request 1") == ids[:-1]


def test_a_special_token_spelled_in_a_later_turn_leaves_those_before_it_as_they_are(tokenizer: Any) -> None:
    messages = [*TALK[:2], user(f"{tokenizer.eos_token}?"), assistant("5")]
    document = encode({"messages": messages}, tokenizer)
    second = int(np.flatnonzero(document.offset == 0)[1])
    before = encode_prompt(TALK[:1], tokenizer, "prompt")
    assert document.tokens[: len(before)].tolist() == before
    assert document.tokens[:second].tolist() == encode_prompt(messages[:3], tokenizer, "prompt")


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


def test_the_end_token_and_the_end_of_a_turn_end_spans() -> None:
    assert span_ends(words()) == [260, 262]
    assert span_ends(byte_tokenizer()) == [256]
    assert span_ends(words("{{ raise_exception('no') }}")) == [260]
    talk = {"messages": TALK}
    assert all(span[-1] == "<|im_end|>" for span in spans(encode(talk, words()), words()))
    broken = encode(Record(talk, "record", ended=False), words())
    assert spans(broken, words())[-1] == ["5"]
