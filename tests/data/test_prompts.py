"""Laws of prompts from a file."""

from __future__ import annotations

from nextblock.data.prompts import read_prompts
from samples import (
    json_lines,
)


def test_a_prompt_of_a_file_is_taken_as_it_stands(tmp_path):
    (tmp_path / "a.txt").write_text("Compute \\nabla f and \\neq\n\n \nthree \r\n", encoding="utf-8")
    records = read_prompts(str(tmp_path / "a.txt"))
    assert [record.item for record in records] == ["Compute \\nabla f and \\neq", "three "]
    assert [record.where.rpartition(":")[2] for record in records] == ["1", "4"]


def test_a_prompt_row_gives_the_field_that_holds_something(tmp_path):
    chat = [{"role": "user", "content": "a"}]
    path = json_lines(tmp_path / "a.jsonl", {"prompt": None, "messages": chat}, {"prompt": "", "messages": chat})
    assert [record.item for record in read_prompts(str(path))] == [chat, chat]
