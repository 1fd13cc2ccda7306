"""Prompts from a file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nextblock.config.errors import UsageError
from nextblock.config.sections import Source
from nextblock.data.chat import checked
from nextblock.data.files import decode_text, read_bytes
from nextblock.data.formats import read_jsonl
from nextblock.data.records import Record, Records
from nextblock.data.sources import read_source


def read_prompts(path: str, examples: int | None = None) -> list[Record]:
    """Prompts to be answered: {"prompt": text}, or {"messages": chat} up to where the assistant speaks.

    Args:
        path: `task:NAME`: problems of its train split. A .jsonl or .json file: objects with `prompt` or `messages`;
            training data will do, a completion or a last assistant turn is left out. Any other file: one prompt a
            line, taken as it stands; one of several lines needs a .jsonl file. Blank lines are left out.
        examples: the first so many; a task needs it.
    Raises:
        UsageError: no such file, no prompts in it, or a line that holds none (file and line named).
    """
    if examples is not None and examples < 1:
        raise UsageError(f"examples={examples} must be at least 1")
    if path.startswith("task:"):
        task = read_source(Source(path=path))
        assert isinstance(task, Records)
        if examples is None:
            raise UsageError(f"{path} has no end; set the number of problems with examples")
        records = [task.read(index) for index in range(examples)]
        return [Record({"prompt": record.value["prompt"]}, record.where) for record in records]
    file = os.path.expanduser(path)
    if not os.path.isfile(file):
        raise UsageError(
            f"prompts {path} is not a file; give a .jsonl file, a text with a prompt a line, or task:NAME"
        )
    if Path(file).suffix.lower() in (".jsonl", ".json"):
        lines = read_jsonl([file], _prompt)
        found = [lines.read(index) for index in range(min(lines.count or 0, examples or lines.count or 0))]
    else:
        texts = [line.removesuffix("\r") for line in decode_text(read_bytes(file), file).split("\n")]
        numbered = [(number, text) for number, text in enumerate(texts, 1) if text.strip()][:examples]
        found = [Record({"prompt": text}, f"{file}:{number}") for number, text in numbered]
    if not found:
        raise UsageError(f"{path} holds no prompts; write one a line")
    return found


def _prompt(row: Any, where: str) -> Record:
    """The prompt of a row: the field `prompt`, else `messages` without a last assistant turn."""
    row = row if isinstance(row, Mapping) else {}
    prompt, turns = row.get("prompt"), row.get("messages")
    if prompt is None and turns is None:
        raise UsageError(f"{where}: no prompt; each row must be a JSON object with prompt or messages")
    if prompt or turns is None:
        if not isinstance(prompt, str) or not prompt:
            raise UsageError(f"{where}: prompt is {prompt!r}; it must be a text that is not empty")
        return Record({"prompt": prompt}, where)
    if row.get("tools"):
        raise UsageError(f"{where}: tools are not shown to the model when it answers; leave such rows out")
    turns = checked(turns, where)
    turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    if not turns:
        raise UsageError(f"{where}: messages hold nothing to answer; give at least one turn of the user")
    return Record({"messages": turns}, where)
