"""Text that grows and is never taken back."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from nextblock.data.text import TextStream, decode, opening
from samples import CHATML, ZEPHYR, byte_level, sentencepiece


def metaspace():
    """Words with a leading space, which decoding strips at the beginning of a text."""
    words = ["▁" + w for w in ("a", "cat", "is", "here")] + ["s", ".", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def shown(tokenizer, tokens, stop=()):
    """The pieces that a viewer sees, and whether a stop string ended them."""
    stream = TextStream(tokenizer, stop)
    pieces = [stream.put(token) for token in tokens]
    return [*pieces, stream.end()], stream.stopped


BYTES = byte_level()


@given(st.text(max_size=20))
@settings(deadline=None, max_examples=60)
def test_the_pieces_join_to_the_text_and_split_no_character(text):
    pieces, _ = shown(BYTES, BYTES(text)["input_ids"])
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_shown_at_the_end():
    tokens = BYTES("né")["input_ids"][:-1]
    pieces, _ = shown(BYTES, tokens)
    assert "".join(pieces) == BYTES.decode(tokens) == "n\ufffd"


def test_words_with_leading_spaces_keep_them_from_the_first_on():
    tokenizer = metaspace()
    tokens = [0, 1, 4, 2, 3, 5]
    pieces, _ = shown(tokenizer, tokens)
    assert "".join(pieces) == f" {tokenizer.decode(tokens)}" == " a cats is here."


@pytest.mark.parametrize("kind", ["prepend", "first"])
def test_an_answer_is_what_its_tokens_add_to_the_text_of_the_prompt(kind):
    tokenizer: Any = sentencepiece(kind)
    prompt, draw = tokenizer("The Paris")["input_ids"], random.Random(0)
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    word = tokenizer.convert_tokens_to_ids("▁Paris")
    answers = [[word], [word] * 2, *(draw.sample(range(259, len(tokenizer)), 6) for _ in range(30))]
    for answer in answers:
        wanted = tokenizer.decode([*prompt, *answer], skip_special_tokens=True).removeprefix(before)
        assert decode(tokenizer, answer) == wanted
        assert "".join(shown(tokenizer, answer)[0]) == wanted
    assert decode(tokenizer, answers[0]) == " Paris"
    assert [decode(tokenizer, [tokenizer.convert_tokens_to_ids(piece)]) for piece in ("▁5", "5")] == [" 5", "5"]


def test_a_space_that_the_template_writes_is_no_part_of_what_the_assistant_says():
    """A template that writes the space: the content without it is rendered as what the model wrote."""
    spaced = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    spaced += "{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer: Any = sentencepiece("prepend")
    found = []
    for template in (CHATML, ZEPHYR, spaced):
        tokenizer.chat_template = template
        found.append(opening(tokenizer))
    assert found == ["", "", " "]
    answer = tokenizer.convert_tokens_to_ids(["▁Paris", "▁5"])
    for stop in ((), ("x",)):
        stream = TextStream(tokenizer, stop, found[2])
        said = "".join([*map(stream.put, answer), stream.end()])
        assert said == "Paris 5"
    talk = [{"role": "user", "content": "A?"}]
    prompt = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*talk, {"role": "assistant", "content": said}], tokenize=False)
    assert whole.startswith(prompt + decode(tokenizer, answer))


@given(st.text(alphabet="ab\n", max_size=25), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3))
@settings(deadline=None, max_examples=200)
def test_text_is_cut_before_the_first_stop_string_and_shows_none_of_it(text, stop):
    pieces, stopped = shown(BYTES, BYTES(text)["input_ids"], stop)
    # Token by token: the answer ends as soon as some stop string is complete.
    ends = [n for n in range(len(text) + 1) if any(s in text[:n] for s in stop)]
    if ends:
        head = text[: ends[0]]
        assert "".join(pieces) == head[: min(head.find(s) for s in stop if s in head)]
        assert stopped
    else:
        assert "".join(pieces) == text
        assert not stopped


@pytest.mark.parametrize("stop", [["STOP"], ["xST", "STOP"]])
def test_the_beginning_of_a_stop_string_is_held_back_only_while_it_may_become_one(stop):
    stream = TextStream(BYTES, stop)
    tokens = BYTES("aSTobSTOP")["input_ids"]
    pieces = [stream.put(token) for token in tokens]
    assert pieces == ["a", "", "", "STo", "b", "", "", "", ""]
    assert stream.stopped


@pytest.mark.parametrize(
    ("stop", "text"), [("<t>", "abc"), ("c<t>", "ab"), ("<t>d", "abc"), ("bc<t>de", "a"), ("<t><t>", "abcdefgh")]
)
def test_a_stop_string_sees_special_tokens_which_the_text_does_not_show(stop, text):
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<t>"]})
    pieces, stopped = shown(tokenizer, tokenizer("abc<t>def<t>gh")["input_ids"], [stop])
    assert "".join(pieces) == text
    assert stopped == (text != "abcdefgh")


@pytest.mark.parametrize(
    ("stop", "text"), [("<t>", "ab\ufffd"), ("b\ufffd<t>", "a"), ("<t>x", "ab\ufffdcd"), ("é", "ab\ufffdcd")]
)
def test_a_special_token_ends_a_text_whose_last_character_is_not_whole(stop, text):
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<t>"]})
    begin, special, rest = (tokenizer(part)["input_ids"] for part in ("abé", "<t>", "cd"))
    pieces, stopped = shown(tokenizer, begin[:-1] + special + rest, [stop])
    assert "".join(pieces) == text
    assert stopped == (text != "ab\ufffdcd")
