"""A model's own answers as training data: prompts in, rows that `adapt` reads out.

A draft is judged by the taste of the model that checks it, so a draft adapter learns best from what that model
writes itself. A run that was killed goes on behind the last whole line and leaves the file that it would have left.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nextblock.config.errors import UsageError
from nextblock.data.prompts import read_prompts
from nextblock.data.records import Record
from nextblock.decoding.events import Finish
from nextblock.decoding.lm import load
from nextblock.decoding.options import with_stored
from nextblock.decoding.request import make_request
from nextblock.decoding.text import INCOMPLETE
from nextblock.model.draft_adapter import fingerprint
from nextblock.model.loading import GivenSettings, read_config, read_settings, resolve, resolve_adapter, weights_folder


def write_answers(
    model: str | Path,
    source: str,
    output: str | Path,
    *,
    draft_adapter: str | Path | None = None,
    settings: GivenSettings | None = None,
    dtype: torch.dtype | None = None,
    compile: bool | None = None,
    examples: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    stop: Sequence[str] = (),
    on_batch: Callable[[int, int], None] | None = None,
    **options: Any,
) -> int:
    """Answer every prompt of `source` and write prompt and answer to `output`, a row for each, in their order.

    A row is {"prompt", "completion"} or {"messages"}. Where the model did not end the answer itself (it was cut at
    `max_new_tokens`, at the model's context or before a stop string), the row has `"ended": false`: `adapt` then
    learns no end token there.

    Beside `output` stands `output.settings`: what the rows depend on. Called again with the same, it goes on behind
    the last whole row, and ends with the same file; a finished file is left as it is.

    Args:
        model, draft_adapter, settings, dtype, compile: as of `load`.
        source, examples: as of `sources.read_prompts`.
        output: a .jsonl file.
        batch_size: prompts decoded together; no row depends on it.
        seed: of the random draws; row n draws with `seed + n`.
        stop: strings that end an answer.
        on_batch: called with rows done and rows in all, first with those that were there.
        options: of `sampling.DecodingConfig`.
    Returns:
        Number of rows written by this call.
    Raises:
        UsageError: bad input, or an output that was begun with other prompts or settings; nothing is written then.
    """
    output = Path(output).expanduser()
    _check_places(output, source)
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1")
    records = read_prompts(source, examples)
    section = read_settings(read_config(model), settings)
    if section is None and draft_adapter is None:
        options = {"mode": "ar", **options}
    config = with_stored(section, options)
    identity = {
        "model": _identity(model),
        "draft_adapter": draft_adapter and fingerprint(resolve_adapter(draft_adapter)),
        "dtype": str(dtype),
        "prompts": _digest(records),
        "seed": seed if config.temperature else None,
        "stop": list(stop),
        **({"settings": section.model_dump()} if section and settings else {}),
        **config.model_dump(),
    }
    record_of = output.with_name(f"{output.name}.settings")
    done, size = _whole_rows(output)
    begun = _check_settings(output, record_of, identity)
    if done >= len(records):
        return 0

    lm = load(model, draft_adapter=draft_adapter, settings=settings, dtype=dtype, compile=compile)
    if lm.tokenizer is None:
        raise UsageError(f"model {model} has no tokenizer; answers are written as text")
    with warnings.catch_warnings(action="ignore"):  # decoding gives them once more
        common = {**options, "stop": stop, "seed": seed + len(records)}
        for record in records[done:]:  # refuse now, not after hours of decoding
            try:
                make_request(lm.decoder, lm.tokenizer, lm.settings, [record.item], common)
            except UsageError as error:
                raise UsageError(f"{record.where}: {error}".replace(" prompt 0 ", " the prompt ")) from None
    try:
        if not begun:
            part = record_of.with_name(f".{record_of.name}.part")
            part.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
            part.replace(record_of)
        with output.open("ab") as stream:
            stream.truncate(size)
            if on_batch:
                on_batch(done, len(records))
            # Batches begin where those of an undisturbed run do, so that rounding cannot tell the two apart.
            for start in range(done - done % batch_size, len(records), batch_size):
                batch = records[start : start + batch_size]
                seeds = [seed + start + i for i in range(len(batch))]
                out = lm.generate([record.item for record in batch], seed=seeds, stop=stop, **options)
                rows = [_row(*answer) for answer in zip(batch, out.texts, out.finish, strict=True)]
                stream.write("".join(rows[max(0, done - start) :]).encode())
                stream.flush()
                if on_batch:
                    on_batch(start + len(batch), len(records))
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}; the same command goes on from there") from None
    return len(records) - done


def _check_places(output: Path, source: str) -> None:
    if output.suffix != ".jsonl":
        raise UsageError(f"output {output} must end in .jsonl, by which `adapt` knows its format")
    if not output.parent.is_dir():
        raise UsageError(f"output folder {output.parent} does not exist; make it first")
    if output.is_dir():
        raise UsageError(f"output {output} is a folder; give a file")
    if output.exists() and Path(source).expanduser().exists() and output.samefile(Path(source).expanduser()):
        raise UsageError(f"output {output} is the input itself; choose another file")


def _identity(model: str | Path) -> str:
    """A local model by its weights; one of the Hub by its commit, because they need not be here yet."""
    folder = weights_folder(model)
    return fingerprint(folder) if Path(resolve(model)).is_dir() else f"{model} {folder.name}"


def _digest(records: Sequence[Record]) -> str:
    values = json.dumps([record.value for record in records], sort_keys=True)
    return hashlib.blake2b(values.encode(), digest_size=16).hexdigest()


def _whole_rows(output: Path) -> tuple[int, int]:
    """Lines of the file that are whole, and their bytes."""
    done = size = 0
    if output.exists():
        with output.open("rb") as stream:
            for line in stream:
                if line.endswith(b"\n"):
                    done, size = done + 1, size + len(line)
    return done, size


def _check_settings(output: Path, settings: Path, identity: dict[str, Any]) -> bool:
    """Whether the output was begun with these settings; UsageError if it was with others, False for a new one."""
    if not output.exists() or not output.stat().st_size:
        return False
    try:
        before = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(f"output {output} exists and was not begun by this command; choose another") from None
    differing = [key for key in identity if before.get(key) != identity[key]]
    if differing:
        named = "; ".join(f"{key} was {before.get(key)!r}, is {identity[key]!r}" for key in differing)
        raise UsageError(f"output {output} belongs to other settings: {named}; set them back, or choose another")
    return True


def _row(record: Record, text: str, finish: Finish) -> str:
    """One line of the output."""
    ended = finish == "end_token"
    text = text if ended else text.rstrip(INCOMPLETE)  # a character that was cut between its bytes
    if "prompt" in record.value:
        row: dict[str, Any] = {**record.value, "completion": text}
    else:
        row = {"messages": [*record.value["messages"], {"role": "assistant", "content": text}]}
    return json.dumps(row if ended else {**row, "ended": False}, ensure_ascii=False) + "\n"
