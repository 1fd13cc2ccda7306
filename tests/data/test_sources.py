"""Laws of sources: files, folders, formats, the Hub, tasks, and what is refused by name."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest

from nextblock.config.errors import UsageError
from nextblock.config.sections import DataConfig, Source
from nextblock.data.prompts import read_prompts
from nextblock.data.records import Record, Records
from nextblock.data.sources import read_source
from nextblock.data.stream import RowStream
from nextblock.model.parent import byte_tokenizer
from samples import TOKENIZER, call, documents_of, json_lines, jsonl, refusal, same, stream, texts


def rows_of(path: Path, **options: object) -> RowStream:
    source = {"path": str(path), **options}
    return RowStream(DataConfig(sources=[source], row_length=64, held_out=0.0), TOKENIZER, seed=0)  # type: ignore[list-item]


def read(path: Path | str, part_bytes: int = 8192, **options: Any) -> list[Record]:
    """All records of a local source."""
    records = cast(Records, read_source(Source(path=str(path), **options), part_bytes=part_bytes))
    return [records.read(index) for index in range(records.count or 0)]


def values(path: Path | str, **options: Any) -> list[Any]:
    return [record.value for record in read(path, **options)]


def parquet(path: Path, *rows: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def stream_of(path: Path) -> RowStream:
    config = DataConfig(sources=(Source(path=str(path)),), row_length=32, held_out=0.0)
    return RowStream(config, byte_tokenizer(), seed=0)


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
    from nextblock.tasks import get_task

    task = get_task("algebra")
    for held_out, split in ((False, "train"), (True, "test")):
        rows = stream("task:algebra", row_length=256, share=0.5, held_out=held_out).next(4)
        examples = [task.example(split, i) for i in range(3000)]
        texts_of_split = {e.prompt + e.completion + "<|end|>" for e in examples}
        assert set(documents_of(rows)) <= texts_of_split


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


def test_a_parquet_row_has_the_keys_that_it_was_written_with(tmp_path):
    rows = [call(city="Rome"), call(amount="3"), call(city="Oslo", amount="4")]
    assert values(parquet(tmp_path / "a.parquet", *rows)) == rows
    assert values(json_lines(tmp_path / "a.jsonl", *rows)) == rows


def test_a_streamed_row_has_the_keys_that_it_was_written_with(tmp_path):
    rows = [call(city="Rome"), call(amount="3")]
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "train.parquet", *rows)
    stream_of = cast(Any, read_source(Source(path=str(tmp_path / "data"), format="hub")))
    assert [stream_of.take().value for _ in rows] == rows


def test_parquet_files_may_differ_in_their_columns(tmp_path):
    parquet(tmp_path / "a.parquet", {"text": "one"}, {"text": "two"})
    parquet(tmp_path / "b.parquet", {"text": "three", "source": "web"})
    parquet(tmp_path / "c.parquet", {"text": "four"})
    assert [value["text"] for value in values(tmp_path)] == ["one", "two", "three", "four"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("absent", [None, ""])
def test_of_several_fields_the_one_that_holds_something_is_read(tmp_path, kind, absent):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [
        {"text": absent, "messages": chat, "prompt": None, "completion": None},
        {"text": absent, "messages": None, "prompt": "p", "completion": "c"},
        {"text": "t", "messages": chat, "prompt": "p", "completion": "c"},
    ]
    path = {"jsonl": json_lines, "parquet": parquet}[kind](tmp_path / f"a.{kind}", *rows)
    assert values(path) == [{"messages": chat}, {"prompt": "p", "completion": "c"}, {"text": "t"}]


def test_a_field_of_white_space_counts_as_empty(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = {"text": " \n", "messages": chat}, {"text": " ", "prompt": "", "completion": "c"}
    assert values(jsonl(tmp_path / "a.jsonl", list(rows))) == [{"messages": chat}, {"prompt": "", "completion": "c"}]


def test_one_object_over_several_lines_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "b"}, indent=1))
    with pytest.raises(UsageError, match=r"a\.json:1: broken JSON line: .*write each object on a line of its own"):
        read(tmp_path / "a.json")


def test_a_row_whose_fields_are_null_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"a\.jsonl:1: no field 'text' .* the fields are text \(null\), id;"):
        read(json_lines(tmp_path / "a.jsonl", {"text": None, "id": 3}))


def test_a_json_array_gives_its_elements_and_names_their_lines(tmp_path):
    rows = [{"text": "Zoë [1], {2}"}, {"text": "b"}, {"text": "π", "messages": None}]
    (tmp_path / "one_line.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("\ufeff\n" + json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    for name in ("one_line.json", "lines.json"):
        assert [value["text"] for value in values(tmp_path / name)] == [row["text"] for row in rows]
    assert [record.where.rpartition(":")[2] for record in read(tmp_path / "lines.json")] == ["3", "6", "9"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[\n {"text": "a"},\n {"text": \n]', r"a\.json: broken JSON array: Expecting value: line 4"),
        ('[{"text": "a"}', r"a\.json: broken JSON array"),
        ('["a"]', r"a\.json:1: expected a JSON object, found str"),
        ('[{"text": "a"}\n{"text": "b"}]', r"a\.json: broken JSON array: no comma behind the element of line 1"),
        ('[{"text": "a"},, {"text": "b"}]', r"a\.json: broken JSON array"),
        ('[, {"text": "a"}]', r"a\.json: broken JSON array"),
        ('[{"text": "a"},\n]', r"a\.json: broken JSON array"),
        ("[1]\n[2]\n", r"a\.json: more follows behind the JSON array"),
    ],
)
def test_a_broken_json_array_is_named(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=words):
        read(tmp_path / "a.json")


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name in ("a.txt", "prompts.txt"):
        (tmp_path / name).write_text("\ufeffone\ntwo\ufeff", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "one"}\n{"text": "\ufefftwo"}\n', encoding="utf-8")
    assert values(tmp_path / "a.txt") == [{"text": "one\ntwo\ufeff"}]
    assert values(tmp_path / "a.jsonl") == [{"text": "one"}, {"text": "\ufefftwo"}]
    assert [record.item for record in read_prompts(str(tmp_path / "prompts.txt"))] == ["one", "two\ufeff"]


def test_files_of_several_formats_are_never_chosen_from_in_silence(tmp_path):
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / "data").mkdir()
    json_lines(tmp_path / "data" / "train.jsonl", {"text": "a"})
    for path in (tmp_path, tmp_path / "**"):
        with pytest.raises(UsageError, match=r"several formats: 1 text \(.*README\.md\), 1 jsonl \(.*train\.jsonl\)"):
            read(path)
    assert values(tmp_path, format="jsonl") == [{"text": "a"}]
    assert values(tmp_path, format="text") == [{"text": "about the data"}]
    assert values(tmp_path / "data" / "*") == [{"text": "a"}]


@pytest.mark.parametrize("name", ["[D_DATA]/a.jsonl", "notes [draft]*.jsonl", "[D_DATA]"])
def test_a_path_that_exists_is_no_pattern(tmp_path, name):
    file = tmp_path / name / "b.jsonl" if name == "[D_DATA]" else tmp_path / name
    file.parent.mkdir(exist_ok=True)
    json_lines(file, {"text": "a"})
    assert values(tmp_path / name) == [{"text": "a"}]


def test_the_cure_for_a_folder_without_known_suffixes_works(tmp_path):
    folder = tmp_path / "wiki [en]"
    (folder / "AA").mkdir(parents=True)
    (folder / "AA" / "wiki_00").write_text("some text")
    (folder / ".hidden").write_text("no text")
    with pytest.raises(UsageError, match="but 1 without a suffix; give the path ") as error:
        read(folder)
    cure = str(error.value).split("give the path ")[1].split(" and set its format")[0]
    for path, options in ((folder, {"format": "text"}), (cure, {}), (cure, {"format": "text"})):
        assert values(path, **options) == [{"text": "some text"}]


def test_a_packed_file_is_called_so(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    with pytest.raises(UsageError, match=r"a\.jsonl\.gz is packed with gzip; unpack it first"):
        read(tmp_path / "a.jsonl.gz")
    with pytest.raises(UsageError, match=r"a\.jsonl\.gz is packed; unpack it first"):
        read(tmp_path)


@pytest.mark.parametrize("unit", ["words and ", "é", "line\n", "ab 日本\n" * 3 + "x" * 20_000 + " "])
def test_the_parts_of_a_long_text_are_the_text_and_of_about_the_size_that_was_asked_for(tmp_path, unit):
    text = unit * (200_000 // len(unit.encode()))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    records = read(tmp_path / "a.txt")
    parts = [record.value["text"] for record in records]
    assert "".join(parts) == text
    assert max(len(part.encode()) for part in parts) <= 2 * 8192
    assert [record.ended for record in records] == [False] * (len(parts) - 1) + [True]


def test_a_part_of_a_text_without_line_breaks_costs_the_same_wherever_it_is(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("word " * 400_000)
    monkeypatch.setattr("nextblock.data.sources.CHECKED_BYTES", 0)  # drawn, not read through
    records = cast(Records, read_source(Source(path=str(tmp_path / "a.txt")), part_bytes=8192))
    taken: list[int] = []
    whole = Path.stat(tmp_path / "a.txt").st_size

    def counted(file: str, start: int = 0, count: int = -1) -> bytes:
        with open(file, "rb") as stream_of:
            stream_of.seek(start)
            data = stream_of.read(count)
        taken.append(len(data))
        return data

    monkeypatch.setattr("nextblock.data.formats.read_bytes", counted)
    for index in (0, 1, 100, (records.count or 0) - 1):
        taken.clear()
        assert records.read(index).value["text"]
        assert sum(taken) <= 5 * 8192 < whole


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_data_that_was_replaced_while_a_run_was_stopped_is_named_but_may_be_moved(tmp_path, kind):
    def write(folder: Path, word: str) -> None:
        folder.mkdir(exist_ok=True)
        for part in range(2):
            rows = [{"text": f"{word} {part} {number}"} for number in range(20)]
            write_rows = {"jsonl": json_lines, "parquet": parquet}.get(kind)
            if write_rows:
                write_rows(folder / f"{part}.{kind}", *rows)
            else:
                (folder / f"{part}.txt").write_text("\n".join(row["text"] for row in rows))

    write(tmp_path / "data", "one")
    before = stream_of(tmp_path / "data")
    before.next(2)
    state = json.loads(json.dumps(before.state()))
    shutil.move(tmp_path / "data", tmp_path / "moved")
    again = stream_of(tmp_path / "moved")
    again.load_state(state)
    assert again.next(2).tokens.equal(before.next(2).tokens)
    write(tmp_path / "moved", "two")
    with pytest.raises(UsageError, match="moved holds other text than when the run was stopped; put it back"):
        stream_of(tmp_path / "moved").load_state(state)


def test_a_folder_whose_files_are_named_by_split_gives_one_split(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "Dev"):
        json_lines(tmp_path / "data" / f"{name}.jsonl", {"text": name})
    assert [value["text"][:5] for value in values(tmp_path)] == ["train", "train"]
    assert values(tmp_path, split=None) == values(tmp_path)
    assert [value["text"] for value in values(tmp_path, split="test")] == ["test-00000-of-00001"]
    assert [value["text"] for value in values(tmp_path, split="dev")] == ["Dev"]
    chosen = cast(Records, read_source(Source(path=str(tmp_path), split=None), usual_split="test"))
    assert chosen.count == 1
    with pytest.raises(UsageError, match="has no split valid; set split to one of its own: dev, test, train"):
        read(tmp_path, split="valid")


@pytest.mark.parametrize("names", [("train.jsonl", "train_2.jsonl"), ("train.jsonl", "testing.jsonl"), ("a.jsonl",)])
def test_a_split_is_refused_where_there_are_none(tmp_path, names):
    for name in names:
        json_lines(tmp_path / name, {"text": name})
    assert len(read(tmp_path)) == len(read(tmp_path, split=None)) == len(names)
    for path in (tmp_path, tmp_path / "*", tmp_path / names[0]):
        with pytest.raises(UsageError, match="has no splits, so split=test chooses nothing; leave it out"):
            read(path, split="test")
    assert cast(Records, read_source(Source(path=str(tmp_path), split=None), usual_split="test")).count == len(names)


@pytest.mark.parametrize("name", ["a.txt", "a.py"])
def test_a_text_has_no_fields(tmp_path, name):
    (tmp_path / name).write_text("a")
    with pytest.raises(UsageError, match="has no fields, so text_field=body names nothing; leave it out"):
        read(tmp_path, text_field="body")


def test_a_folder_that_datasets_saved_is_called_so(tmp_path):
    import datasets

    one = datasets.Dataset.from_list([{"text": "a"}])
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one}).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        with pytest.raises(UsageError, match=r"was saved by datasets \(save_to_disk\); give Parquet or JSONL"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_an_empty_file_is_called_empty(tmp_path, name):
    (tmp_path / name).write_text("")
    assert "is empty; give at least one document" in refusal(str(tmp_path / name))


def test_a_line_that_was_cut_names_the_column_where_it_breaks(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "abc"\n')
    with pytest.raises(UsageError, match=r"a\.jsonl:2: broken JSON line: .* at column 15;"):
        read(tmp_path / "a.jsonl")


def test_parquet_that_is_read_as_text_is_called_so(tmp_path):
    path = parquet(tmp_path / "x.pq", *texts(20))
    for kind in ("auto", "text"):
        with pytest.raises(UsageError, match=r"x\.pq is Parquet and is read as text; set its format to parquet"):
            read(path, format=kind)
    assert len(read(path, format="parquet")) == 20


@pytest.mark.parametrize("packed", ["x.jsonl.gz", "x.parquet.zst", "x.md.xz"])
def test_a_packed_file_beside_others_is_never_left_out_in_silence(tmp_path, packed):
    (tmp_path / packed).write_bytes(gzip.compress(b"a"))
    (tmp_path / "pictures.zip").write_bytes(b"PK")
    json_lines(tmp_path / "y.jsonl", {"text": "a"})
    with pytest.raises(UsageError, match=packed):
        read(tmp_path)
    (tmp_path / packed).unlink()
    assert values(tmp_path) == [{"text": "a"}]


def test_a_full_cache_is_no_broken_file(tmp_path, monkeypatch):
    import errno
    import os

    import datasets
    from datasets.exceptions import DatasetGenerationError

    path = parquet(tmp_path / "a.parquet", {"text": "a"})

    def full(*_: Any, **__: Any) -> None:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets.Dataset, "from_parquet", full)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("/the/cache"))
    with pytest.raises(UsageError, match="cannot be written to /the/cache: No space left on device; free space, or"):
        read(path)


def test_a_streamed_data_set_and_its_files_are_told_apart(tmp_path):
    (tmp_path / "set").mkdir()
    path = jsonl(tmp_path / "set" / "train.jsonl", texts(20))
    hub = {"path": str(tmp_path / "set"), "format": "hub"}
    for was, now, words in ((hub, path, "was a streamed data set"), (path, hub, "was read from files")):
        with pytest.raises(UsageError, match=f"{words} when the run was stopped, and is .* now, in another order"):
            stream(now).load_state(stream(was).state())
