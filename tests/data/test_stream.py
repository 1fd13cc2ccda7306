"""Laws of documents, packing and the row stream (DESIGN section 2)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nextblock.config.errors import UsageError
from nextblock.config.sections import DataConfig
from nextblock.data.encode import encode
from nextblock.data.rows import Document, Rows, best_subset, check_tokens, collate, cut, pack
from nextblock.data.stream import RowStream

SPECIAL = ["<|end|>", "<|begin|>", "<|turn|>"]
CHAT = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
# The last assistant turn is shown with an empty thought, earlier ones without, as Qwen3 does.
THINKING_CHAT = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2 or II"},
]


def byte_tokenizer(begin: bool = False, template: str | None = CHAT) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, *SPECIAL])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 257)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        bos_token="<|begin|>" if begin else None,
        additional_special_tokens=["<|turn|>"],
        chat_template=template,
    )


TOKENIZER = byte_tokenizer()
END = 256


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(count: int, seed: int = 0, longest: int = 300) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    return [{"text": f"{i} " + "ab cd\n" * int(rng.integers(1, longest // 6))} for i in range(count)]


def stream(
    *sources: dict | str,
    row_length: int = 64,
    share: float = 0.0,
    seed: int = 0,
    held_out: bool = False,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
) -> RowStream:
    listed = [{"path": source} if isinstance(source, str) else source for source in sources]
    config = DataConfig.model_validate({"sources": listed, "row_length": row_length, "held_out": share})
    return RowStream(config, tokenizer, seed=seed, held_out=held_out)


def same(a: Rows, b: Rows) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(Rows))


def documents_of(rows: Rows) -> list[str]:
    """The documents of rows as text, end tokens kept."""
    found = []
    for tokens, document in zip(rows.tokens, rows.document, strict=True):
        found += [str(TOKENIZER.decode(tokens[document == d])) for d in range(int(document.max()) + 1)]
    return found


def spans(document: Document) -> list[str]:
    """The generated spans of a document as text."""
    found: list[list[int]] = []
    for token, offset in zip(document.tokens.tolist(), document.offset.tolist(), strict=True):
        if offset == 0:
            found.append([])
        if offset >= 0:
            assert len(found[-1]) == offset
            found[-1].append(token)
    return [str(TOKENIZER.decode(span)) for span in found]


# ---------------------------------------------------------------- documents


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
    tokenizer = byte_tokenizer(begin=True)
    document = encode({"text": "ab"}, tokenizer)
    assert document.tokens.tolist() == [257, *encode({"text": "ab"}, TOKENIZER).tokens.tolist()]
    assert document.offset.tolist() == [0, 1, 2, 3]


def test_a_prompt_is_context_and_its_completion_the_span() -> None:
    document = encode({"prompt": "2+2=", "completion": "4"}, byte_tokenizer(begin=True))
    assert document.offset.tolist() == [-1, -1, -1, -1, -1, 0, 1]
    assert spans(document) == ["4<|end|>"]


def test_each_assistant_turn_with_its_end_token_is_a_span() -> None:
    document = encode({"messages": TALK}, TOKENIZER)
    assert spans(document) == ["1<|end|>", "2 or II<|end|>"]
    assert TOKENIZER.decode(document.tokens) == TOKENIZER.apply_chat_template(TALK, tokenize=False)


def test_a_template_that_shows_earlier_turns_otherwise_still_gives_exact_spans() -> None:
    document = encode({"messages": TALK}, byte_tokenizer(template=THINKING_CHAT))
    assert spans(document) == ["1<|end|>", "<think></think>2 or II<|end|>"]


def test_what_precedes_a_span_is_the_prompt_that_decoding_starts_from() -> None:
    document = encode({"messages": TALK}, TOKENIZER)
    for start, turn in zip(np.flatnonzero(document.offset == 0), (2, 4), strict=True):
        prompt = TOKENIZER.apply_chat_template(TALK[:turn], tokenize=False, add_generation_prompt=True)
        assert TOKENIZER.decode(document.tokens[:start]) == prompt


# ---------------------------------------------------------------- packing


def numbered(lengths: list[int]) -> list[Document]:
    """Documents whose tokens tell document and place."""
    return [Document(np.arange(n) + 1000 * i, np.arange(n)) for i, n in enumerate(lengths)]


LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=40)


@given(LENGTHS, st.integers(2, 40))
def test_packing_keeps_every_token_in_order(lengths: list[int], row_length: int) -> None:
    documents = numbered(lengths)
    pieces = sorted((p for row in pack(documents, row_length) for p in row), key=lambda p: int(p.tokens[0]))
    assert np.concatenate([p.tokens for p in pieces]).tolist() == [t for d in documents for t in d.tokens.tolist()]


@given(LENGTHS, st.integers(2, 40))
def test_row_fields_obey_their_laws(lengths: list[int], row_length: int) -> None:
    rows = collate(pack(numbered(lengths), row_length), row_length, pad=-7, epoch=3, number=5)
    assert rows.number.tolist() == list(range(5, 5 + len(rows)))
    assert set(rows.epoch.tolist()) == {3}
    for tokens, document, position, offset in zip(rows.tokens, rows.document, rows.position, rows.offset, strict=True):
        padding = document == -1
        assert set(tokens[padding].tolist()) <= {-7}
        assert set(offset[padding].tolist()) <= {-1}
        assert set(position[padding].tolist()) <= {0}
        real = document[~padding]
        assert torch.equal(real, real.sort().values)  # padding last, documents one after the other
        assert sorted(set(real.tolist())) == list(range(int(real.max()) + 1))
        for d in range(int(real.max()) + 1):
            inside = document == d
            assert position[inside].tolist() == list(range(int(inside.sum())))
            assert len(set((tokens[inside] // 1000).tolist())) == 1
            assert torch.equal(offset[inside], position[inside])  # plain text


@given(LENGTHS, st.integers(2, 40))
def test_only_documents_longer_than_a_row_are_cut(lengths: list[int], row_length: int) -> None:
    for document in numbered(lengths):
        assert len(cut(document, row_length)) == -(-len(document.tokens) // row_length)


def test_a_completion_longer_than_the_row_is_truncated_and_a_prompt_that_fills_it_dropped() -> None:
    document = encode({"prompt": "abc", "completion": "defgh"}, TOKENIZER)
    (head,) = cut(document, 6)
    assert spans(head) == ["def"]
    assert cut(document, 3) == []


@given(st.lists(st.integers(1, 12), max_size=9), st.integers(0, 40))
def test_best_subset_reaches_the_largest_sum_that_fits(sizes: list[int], room: int) -> None:
    sizes = sorted(sizes, reverse=True)
    sums = {0}
    for size in sizes:
        sums |= {total + size for total in sums if total + size <= room}
    chosen = best_subset(sizes, room)
    assert len(set(chosen)) == len(chosen)
    assert sum(sizes[i] for i in chosen) == max(sums)


MIXTURES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "many short ones": lambda rng: rng.lognormal(4.8, 1.0, 3000),
    "long ones": lambda rng: rng.lognormal(6.0, 0.7, 3000),
    "up to half a row": lambda rng: rng.uniform(50, 500, 3000),
    "around half a row": lambda rng: rng.uniform(100, 600, 3000),
}


@pytest.mark.parametrize("lengths", MIXTURES)
@pytest.mark.parametrize("row_length", [1024, 2048])
def test_mixed_lengths_fill_98_percent_of_the_rows(tmp_path: Path, row_length: int, lengths: str) -> None:
    sizes = MIXTURES[lengths](np.random.default_rng(1)).astype(int) + 1
    source = jsonl(tmp_path / "a.jsonl", [{"text": "x" * int(n)} for n in sizes])
    rows = stream(source, row_length=row_length).next(260)
    assert (rows.document >= 0).float().mean() >= 0.98


# ---------------------------------------------------------------- the stream


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 250), st.integers(1, 90))
def test_resuming_at_any_row_gives_exactly_the_next_rows(done: int, rows: int) -> None:
    sources = ({"path": "task:algebra", "weight": 2}, {"path": "task:word_problems", "examples": 40})
    first, second = (stream(*sources, row_length=256, seed=4) for _ in range(2))
    if done:
        first.next(done)
    state = json.loads(json.dumps(first.state()))
    expected = first.next(rows)
    second.load_state(state)
    assert same(second.next(rows), expected)
    assert second.state() == first.state()


def test_rows_do_not_depend_on_how_they_are_asked_for(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts(50))
    one, many = stream(source), stream(source)
    parts = [many.next(n) for n in (1, 70, 3, 126)]
    joined = Rows(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Rows)))
    assert same(one.next(200), joined)
    assert joined.number.tolist() == list(range(200))


def test_another_seed_gives_another_order(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts(300))
    assert not same(stream(source, seed=0).next(8), stream(source, seed=1).next(8))


def test_every_epoch_gives_every_document_once(tmp_path: Path) -> None:
    rows = [{"text": f"{i:02d}"} for i in range(40)]
    many = stream(jsonl(tmp_path / "a.jsonl", rows), row_length=60)
    # A chunk is 64 rows of 20 documents, which is 32 epochs of 40.
    found = Counter(documents_of(many.next(64)))
    assert found == {f"{i:02d}<|end|>": 32 for i in range(40)}


def test_a_document_shorter_than_a_block_alone_fills_rows(tmp_path: Path) -> None:
    rows = stream(jsonl(tmp_path / "a.jsonl", [{"text": "x"}]), row_length=32).next(3)
    assert set(documents_of(rows)) == {"x<|end|>"}


@pytest.mark.parametrize("times", [1, 40])
def test_weights_are_shares_of_the_text_however_long_the_documents_are(times: int, tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", [{"text": f"a{i:03d}" * times} for i in range(300)])
    b = jsonl(tmp_path / "b.jsonl", [{"text": f"b{i:03d}"} for i in range(300)])
    rows = stream({"path": a, "weight": 3}, {"path": b, "weight": 1}, row_length=512).next(512)
    text = "".join(documents_of(rows))
    assert text.count("a") / (text.count("a") + text.count("b")) == pytest.approx(0.75, abs=0.03)


def test_held_out_and_training_documents_share_out_the_data(tmp_path: Path) -> None:
    rows = texts(300, longest=60)
    source = jsonl(tmp_path / "a.jsonl", rows)
    train, held = (set(documents_of(stream(source, share=0.2, held_out=side).next(1024))) for side in (False, True))
    assert not train & held
    assert train | held == {row["text"] + "<|end|>" for row in rows}
    assert 0.1 < len(held) / len(rows) < 0.3


def test_truncated_and_skipped_documents_are_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b" * 99},
        {"prompt": "a" * 99, "completion": "b"},
    ]
    many = stream(jsonl(tmp_path / "a.jsonl", rows), row_length=16)
    first = documents_of(many.next(64))
    lost = many.state()["lost"]
    # Each epoch has one that is cut and one that is left out, whatever their order.
    assert lost["truncated"] == pytest.approx(lost["skipped"], abs=1)
    assert lost["truncated"] >= sum("b" * 9 in text for text in first) > 10
    assert not any(text.startswith("a" * 9) for text in documents_of(many.next(64)))


# ---------------------------------------------------------------- sources


def test_a_folder_gives_its_text_files_in_sorted_order_without_binary_ones(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("bee")
    (tmp_path / "sub" / "c.py").write_text("sea")
    (tmp_path / "a.md").write_bytes(b"\0\1")
    (tmp_path / "d.bin").write_text("dee")
    assert set(documents_of(stream(str(tmp_path)).next(4))) == {"bee<|end|>", "sea<|end|>"}


def test_a_glob_gives_the_files_that_it_matches(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    found = set(documents_of(stream(str(tmp_path / "*.txt")).next(4)))
    assert found == {"a.txt<|end|>", "b.txt<|end|>"}


def test_parquet_gives_what_jsonl_gives(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = texts(40)
    parquet.write_table(pa.table({"body": [row["text"] for row in rows]}), tmp_path / "a.parquet")
    source = {"path": str(tmp_path / "a.parquet"), "text_field": "body"}
    assert same(stream(source).next(70), stream(jsonl(tmp_path / "a.jsonl", rows)).next(70))


def test_a_streamed_data_set_resumes_exactly(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    jsonl(tmp_path / "set" / "train.jsonl", texts(60, longest=80))
    source = {"path": str(tmp_path / "set"), "format": "hub"}
    first, second = stream(source), stream(source)
    first.next(90)
    state = json.loads(json.dumps(first.state()))
    expected = first.next(150)  # crosses epochs
    second.load_state(state)
    assert same(second.next(150), expected)


def test_a_task_gives_train_examples_for_training_and_test_examples_held_out() -> None:
    from nextblock.data.tasks import get_task

    task = get_task("algebra")
    for held_out, split in ((False, "train"), (True, "test")):
        rows = stream("task:algebra", row_length=256, share=0.5, held_out=held_out).next(4)
        examples = [task.example(split, i) for i in range(3000)]
        texts_of_split = {e.prompt + e.completion + "<|end|>" for e in examples}
        assert set(documents_of(rows)) <= texts_of_split


# ---------------------------------------------------------------- bad input: one line each


def refusal(*sources: dict | str, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        stream(*sources, **kwargs).next(1)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", ["./none.txt", "/none/at/all", "~/none", "none.jsonl"])
def test_a_path_that_is_missing_is_named(path: str) -> None:
    assert path in refusal(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_empty_data_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    assert "data" in refusal(str(tmp_path / name))


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(str(tmp_path))


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\xff")
    message = refusal(str(tmp_path))
    assert "a.txt" in message
    assert "byte 4" in message


def test_a_broken_line_is_named_with_file_and_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": \n')
    assert "a.jsonl:3" in refusal(str(tmp_path / "a.jsonl"))


def test_a_missing_field_is_named_with_the_fields_that_there_are(tmp_path: Path) -> None:
    message = refusal(jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"body": "x", "id": 1}]))
    assert "a.jsonl:2" in message
    assert "'text'" in message
    assert "body, id" in message


def test_a_field_that_is_not_a_string_is_named(tmp_path: Path) -> None:
    assert "a.jsonl:1" in refusal(jsonl(tmp_path / "a.jsonl", [{"text": 3}]))


def test_a_template_that_fails_is_named_with_file_and_line(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"messages": TALK}])
    failing = byte_tokenizer(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match=r"a\.jsonl:1.*roles must alternate"):
        stream(source, tokenizer=failing)


def test_a_template_that_rewrites_history_is_refused_with_file_and_line(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"messages": TALK}])
    rewriting = byte_tokenizer(template="{{ messages | length }}" + CHAT)
    with pytest.raises(UsageError, match=r"a\.jsonl:1.*message 3"):
        stream(source, tokenizer=rewriting)


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="end token"):
        encode({"text": "x"}, tokenizer)


def test_nothing_held_out_is_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    assert "data.held_out" in refusal(source, share=0.0, held_out=True)


def test_prompts_that_fill_every_row_are_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", [{"prompt": "a" * 99, "completion": "b"}])
    assert "row_length=16" in refusal(source, row_length=16)


def test_a_file_that_vanishes_mid_run_is_named(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts(20))
    many = stream(source)
    Path(source).unlink()
    with pytest.raises(UsageError, match=r"a\.jsonl"):
        many.next(5000)


def test_a_position_of_other_sources_is_refused() -> None:
    state = stream("task:algebra").state()
    with pytest.raises(UsageError, match=r"data\.sources"):
        stream("task:algebra", "task:word_problems").load_state(state)


def test_a_token_outside_the_vocabulary_or_a_mask_token_in_the_data_is_refused() -> None:
    rows = collate([[Document(np.array([5, 9]), np.arange(2))]], 4, pad=3, epoch=0, number=0)
    check_tokens(rows, 10, 3)  # padding may be anything
    with pytest.raises(UsageError, match="token id 9"):
        check_tokens(rows, 9, None)
    with pytest.raises(UsageError, match="mask token id 5"):
        check_tokens(rows, 10, 5)
    check_tokens(replace(rows, tokens=rows.tokens.clamp(max=8)), 9, None)


# ---------------------------------------------------------------- sources


def rows_of(path: Path, **options: object) -> RowStream:
    source = {"path": str(path), **options}
    return RowStream(DataConfig(sources=[source], row_length=64, held_out=0.0), TOKENIZER, seed=0)  # type: ignore[list-item]


def test_a_folder_is_read_as_what_it_holds(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.JSONL").write_text('{"prompt": "a", "completion": "bcd"}\n')
    (tmp_path / "picture.png").write_bytes(b"\0")
    rows = rows_of(tmp_path).next(1)
    assert (rows.offset == 0).sum() > 1  # completions behind prompts, not lines of text
    (tmp_path / "notes.TXT").write_text("words " * 9)
    with pytest.raises(UsageError, match=r"several formats: 3 jsonl .* 1 text .*give a source for each"):
        rows_of(tmp_path)
    assert "words" in str(TOKENIZER.decode(rows_of(tmp_path, format="text").next(1).tokens[0]))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "\\ud800 abc"}', r"bad\.jsonl:2: half of a surrogate pair"),
        ('{"messages": [{"role": "assistant", "content": "\\udc00"}]}', r"bad\.jsonl:2: half of a surrogate pair"),
        ('{"text": ' + "[" * 100_000, r"bad\.jsonl:2: (unreadable|broken) JSON line"),
        ('{"text": ' + "9" * 5000 + "}", r"bad\.jsonl:2: unreadable JSON line"),
    ],
    ids=["text", "chat", "nesting", "digits"],
)
def test_hostile_json_is_named_by_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine \\ud83d\\ude00"}\n' + line + "\n")
    with pytest.raises(UsageError, match=words):
        rows_of(tmp_path / "bad.jsonl")


def test_nothing_but_white_space_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("  \n\n\t\n")
    with pytest.raises(UsageError, match="no document has anything to generate"):
        rows_of(tmp_path / "blank.txt").next(1)


def test_parquet_without_rows_is_empty(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "none.parquet"
    )
    with pytest.raises(UsageError, match="is empty"):
        rows_of(tmp_path / "none.parquet")


def test_a_chat_may_begin_with_the_assistant(tmp_path: Path) -> None:
    talk = [{"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "one?"}]
    talk += [{"role": "assistant", "content": "1"}]
    assert spans(encode({"messages": talk}, TOKENIZER)) == ["Hi!<|end|>", "1<|end|>"]
