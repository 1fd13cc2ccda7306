"""What is read from files: each row as it was written, or one line that names the cause and a cure that works."""

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
from nextblock.data.sources import Record, Records, check_characters, read_source
from nextblock.data.stream import RowStream
from nextblock.model.parent import byte_tokenizer


def read(path: Path | str, part_bytes: int = 8192, **options: Any) -> list[Record]:
    """All records of a local source."""
    records = cast(Records, read_source(Source(path=str(path), **options), part_bytes=part_bytes))
    return [records.read(index) for index in range(records.count or 0)]


def values(path: Path | str, **options: Any) -> list[Any]:
    return [record.value for record in read(path, **options)]


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, *rows: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def call(**arguments: Any) -> dict[str, Any]:
    """A conversation in which the assistant calls a tool, with the tool's schema."""
    function = {"name": "f", "arguments": arguments}
    kinds = {name: {"type": "string"} for name in arguments}
    return {
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": kinds}}}],
    }


# ---------------------------------------------------------------- rows as written


def test_a_parquet_row_has_the_keys_that_it_was_written_with(tmp_path):
    rows = [call(city="Rome"), call(amount="3"), call(city="Oslo", amount="4")]
    assert values(parquet(tmp_path / "a.parquet", *rows)) == rows
    assert values(jsonl(tmp_path / "a.jsonl", *rows)) == rows


def test_a_streamed_row_has_the_keys_that_it_was_written_with(tmp_path):
    rows = [call(city="Rome"), call(amount="3")]
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "train.parquet", *rows)
    stream = cast(Any, read_source(Source(path=str(tmp_path / "data"), format="hub")))
    assert [stream.take().value for _ in rows] == rows


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
    path = {"jsonl": jsonl, "parquet": parquet}[kind](tmp_path / f"a.{kind}", *rows)
    assert values(path) == [{"messages": chat}, {"prompt": "p", "completion": "c"}, {"text": "t"}]


def test_a_field_of_white_space_counts_as_empty(tmp_path):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = {"text": " \n", "messages": chat}, {"text": " ", "prompt": "", "completion": "c"}
    assert values(jsonl(tmp_path / "a.jsonl", *rows)) == [{"messages": chat}, {"prompt": "", "completion": "c"}]


def test_one_object_over_several_lines_is_named(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "b"}, indent=1))
    with pytest.raises(UsageError, match=r"a\.json:1: broken JSON line: .*write each object on a line of its own"):
        read(tmp_path / "a.json")


def test_a_row_whose_fields_are_null_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"a\.jsonl:1: no field 'text' .* the fields are text \(null\), id;"):
        read(jsonl(tmp_path / "a.jsonl", {"text": None, "id": 3}))


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


# ---------------------------------------------------------------- which files


def test_files_of_several_formats_are_never_chosen_from_in_silence(tmp_path):
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / "data").mkdir()
    jsonl(tmp_path / "data" / "train.jsonl", {"text": "a"})
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
    jsonl(file, {"text": "a"})
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
    with pytest.raises(UsageError, match=r"but 1 \.gz; unpack them first"):
        read(tmp_path)


# ---------------------------------------------------------------- long texts, replaced texts


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
        with open(file, "rb") as stream:
            stream.seek(start)
            data = stream.read(count)
        taken.append(len(data))
        return data

    monkeypatch.setattr("nextblock.data.sources._read_bytes", counted)
    for index in (0, 1, 100, (records.count or 0) - 1):
        taken.clear()
        assert records.read(index).value["text"]
        assert sum(taken) <= 5 * 8192 < whole


def stream(path: Path) -> RowStream:
    config = DataConfig(sources=(Source(path=str(path)),), row_length=32, held_out=0.0)
    return RowStream(config, byte_tokenizer(), seed=0)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_data_that_was_replaced_while_a_run_was_stopped_is_named_but_may_be_moved(tmp_path, kind):
    def write(folder: Path, word: str) -> None:
        folder.mkdir(exist_ok=True)
        for part in range(2):
            rows = [{"text": f"{word} {part} {number}"} for number in range(20)]
            write_rows = {"jsonl": jsonl, "parquet": parquet}.get(kind)
            if write_rows:
                write_rows(folder / f"{part}.{kind}", *rows)
            else:
                (folder / f"{part}.txt").write_text("\n".join(row["text"] for row in rows))

    write(tmp_path / "data", "one")
    before = stream(tmp_path / "data")
    before.next(2)
    state = json.loads(json.dumps(before.state()))
    shutil.move(tmp_path / "data", tmp_path / "moved")
    again = stream(tmp_path / "moved")
    again.load_state(state)
    assert again.next(2).tokens.equal(before.next(2).tokens)
    write(tmp_path / "moved", "two")
    with pytest.raises(UsageError, match="moved holds other text than when the run was stopped; put it back"):
        stream(tmp_path / "moved").load_state(state)


# ---------------------------------------------------------------- prompts


def test_a_prompt_of_a_file_is_taken_as_it_stands(tmp_path):
    (tmp_path / "a.txt").write_text("Compute \\nabla f and \\neq\n\n \nthree \r\n", encoding="utf-8")
    records = read_prompts(str(tmp_path / "a.txt"))
    assert [record.item for record in records] == ["Compute \\nabla f and \\neq", "three "]
    assert [record.where.rpartition(":")[2] for record in records] == ["1", "4"]


def test_a_prompt_row_gives_the_field_that_holds_something(tmp_path):
    chat = [{"role": "user", "content": "a"}]
    path = jsonl(tmp_path / "a.jsonl", {"prompt": None, "messages": chat}, {"prompt": "", "messages": chat})
    assert [record.item for record in read_prompts(str(path))] == [chat, chat]


@pytest.mark.parametrize("value", ["caf\udce9", [{"role": "user", "content": "\ud83d"}], {"a": ["\udc00"]}])
def test_what_is_no_character_is_refused_wherever_it_stands(value):
    with pytest.raises(UsageError, match="prompt 3: half of a surrogate pair, or a byte that is not UTF-8"):
        check_characters(value, "prompt 3")
    check_characters([{"role": "user", "content": "café 😀 \ufeff"}], "prompt 3")
