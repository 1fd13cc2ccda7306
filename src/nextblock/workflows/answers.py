"""A model's own answers as training data: prompts in, rows that `adapt` reads out.

The model that checks a draft accepts what it would write itself, so a draft adapter learns best from its parent's own
answers. A run that was killed goes on behind the last whole line and leaves the file that it would have left.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, starmap
from pathlib import Path
from typing import Any

import torch

from nextblock.config.errors import UsageError
from nextblock.config.files import LOCK, locked, user_path, write_whole
from nextblock.data.encode import encode_prompt
from nextblock.data.prompts import read_prompts
from nextblock.data.records import Record
from nextblock.data.text import INCOMPLETE
from nextblock.decoding.events import Finish
from nextblock.decoding.lm import BlockDiffusionLM, load
from nextblock.decoding.options import DecodingConfig, with_stored
from nextblock.decoding.request import make_request
from nextblock.model.adapter_files import fingerprint
from nextblock.model.loading import (
    GivenSettings,
    no_tokenizer,
    read_config,
    read_settings,
    resolve,
    resolve_adapter,
    weights_folder,
)
from nextblock.workflows.cluster import absolute, answered_on_cluster


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
    ray: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    **options: Any,
) -> int:
    """Answer every prompt of `source` and write prompt and answer to `output`, a row for each, in their order.

    A row is {"prompt", "completion"} or {"messages"}, with `"ended": false` where the model did not end the answer
    itself: `adapt` then learns no end token there. What the rows depend on stands in `output.settings`; called again
    with the same, it goes on behind the last whole row, to the same file.

    Args:
        model, draft_adapter, settings, dtype, compile: as of `decoding.lm.load`.
        source, examples: as of `data.prompts.read_prompts`.
        output: a .jsonl file.
        batch_size: prompts decoded together; no row depends on it.
        seed: of the random draws; row n draws with `seed + n`.
        stop: strings that end an answer.
        ray: copies of the model on a Ray cluster (`workflows.cluster`); None: one, in this process.
        on_batch: called with rows done and rows in all, first with those that were there.
        options: of `decoding.options.DecodingConfig`.
    Returns:
        Number of rows written by this call.
    Raises:
        UsageError: bad input, or an output that was begun with other prompts or settings; nothing is written then.
    """
    output = user_path(output, "output")
    _check_places(output, source, batch_size, ray)
    records = read_prompts(source, examples)
    section = read_settings(read_config(model), settings)
    if section is None and draft_adapter is None:
        options = {"mode": "ar", **options}
    identity = _identity(model, draft_adapter, dtype, records, with_stored(section, options), seed)
    identity |= {"stop": list(stop), **({"settings": section.model_dump()} if section and settings else {})}
    given = {"path": model, "draft_adapter": draft_adapter, "settings": settings, "dtype": dtype, "compile": compile}
    options["stop"] = stop

    def answered(done: int) -> Iterator[tuple[int, str]]:
        return _answered(given, records, done, batch_size, seed, options, ray)

    try:
        with locked(output.parent, f".{output.name}{LOCK}", f"output {output}"):
            return _write(output, identity, len(records), answered, on_batch)
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}; the same command goes on from there") from None


def _write(
    output: Path,
    identity: dict[str, Any],
    count: int,
    answered: Callable[[int], Iterator[tuple[int, str]]],
    on_batch: Callable[[int, int], None] | None,
) -> int:
    """Bring the output to `count` rows; how many were missing. `answered`: the lines behind so many rows."""
    (done, size), begun = _whole_rows(output), _check_settings(output, identity)
    if done > count:
        raise UsageError(f"output {output} has {done} rows for {count} prompts, so others were put there; remove it")
    if done == count:
        return 0
    batches = answered(done)
    if not begun:
        write_whole(_settings_of(output), (json.dumps(identity, indent=2) + "\n").encode())
    for number in _append(output, size, batches):
        if on_batch:
            on_batch(number, count)
    return count - done


def _check_prompts(lm: BlockDiffusionLM, records: Sequence[Record], options: dict[str, Any]) -> None:
    """Refuse a bad prompt now, not after hours of decoding."""
    if lm.tokenizer is None:
        raise UsageError(f"{no_tokenizer(lm.model.name_or_path or '')}; answers are written as text")
    with warnings.catch_warnings(action="ignore"):  # decoding gives them once more
        for record in records:
            try:
                make_request(lm.decoder, lm.tokenizer, lm.settings, [record.item], options)
            except UsageError as error:
                raise UsageError(f"{record.where}: {error}".replace(" prompt 0 ", " the prompt ")) from None


def _answered(
    given: dict[str, Any],
    records: Sequence[Record],
    done: int,
    batch_size: int,
    seed: int,
    options: dict[str, Any],
    copies: int | None,
) -> Iterator[tuple[int, str]]:
    """Rows done so far and the lines of the last ones; first of all those that were there, and no lines.

    The model is loaded and all prompts are checked at once, before the first is asked for.
    """
    lm = load(**given)
    _check_prompts(lm, records[done:], {**options, "seed": seed + len(records)})
    batches, answer = _batches(records, done, batch_size), partial(_answer, seed=seed, options=options)
    if copies is None:
        outputs = starmap(partial(answer, lm), batches)
    else:
        del lm  # the copies need its room
        given = {**given, **{name: absolute(given[name]) for name in ("path", "draft_adapter")}}
        outputs = answered_on_cluster(load, given, answer, batches, copies)
    told = zip(batches, outputs, strict=True)
    lines = ((start + len(batch), "".join(rows[max(0, done - start) :])) for (start, batch), rows in told)
    return chain([(done, "")], lines)


def _batches(records: Sequence[Record], done: int, size: int) -> list[tuple[int, Sequence[Record]]]:
    """What is left, with the number of each batch's first record.

    Batches begin where those of an undisturbed run do, so that rounding cannot tell the two apart.
    """
    return [(start, records[start : start + size]) for start in range(done - done % size, len(records), size)]


def _answer(
    lm: BlockDiffusionLM, start: int, batch: Sequence[Record], seed: int, options: dict[str, Any]
) -> list[str]:
    """The lines of a batch, decoded apart where prompts have other contexts than the rest (longrope)."""
    together: dict[int | None, list[int]] = {}
    with warnings.catch_warnings(action="ignore"):
        lengths = [len(encode_prompt(record.item, lm.tokenizer, record.where)) for record in batch]
    for number, length in enumerate(lengths):
        together.setdefault(lm.decoder.context(length), []).append(number)
    lines = [""] * len(batch)
    for numbers in together.values():
        seeds = [seed + start + number for number in numbers]
        out = lm.generate([batch[number].item for number in numbers], **options, seed=seeds)
        for number, text, finish in zip(numbers, out.texts, out.finish, strict=True):
            lines[number] = _row(batch[number], text, finish)
    return lines


def _append(output: Path, size: int, batches: Iterable[tuple[int, str]]) -> Iterator[int]:
    """Write lines behind the first `size` bytes of a file; after each batch its number."""
    with output.open("ab") as stream:
        stream.truncate(size)
        for number, lines in batches:
            stream.write(lines.encode())
            stream.flush()
            yield number


def _check_places(output: Path, source: str, batch_size: int, ray: int | None) -> None:
    if output.suffix != ".jsonl":
        raise UsageError(f"output {output} must end in .jsonl, by which `adapt` knows its format")
    if not output.parent.is_dir():
        raise UsageError(f"output folder {output.parent} does not exist; make it first")
    if output.is_dir():
        raise UsageError(f"output {output} is a folder; give a file")
    given = user_path(source, "prompts")
    if output.exists() and given.exists() and output.samefile(given):
        raise UsageError(f"output {output} is the input itself; choose another file")
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1")
    if ray is not None and ray < 1:
        raise UsageError(f"ray={ray} copies of the model answer nothing; give 1 or more")


def _identity(
    model: str | Path,
    draft_adapter: str | Path | None,
    dtype: torch.dtype | None,
    records: Sequence[Record],
    config: DecodingConfig,
    seed: int,
) -> dict[str, Any]:
    """What rows depend on; a local model by its weights, one of the Hub by its commit."""
    folder = weights_folder(model)
    values = json.dumps([record.value for record in records], sort_keys=True)
    local = folder.is_file() or Path(resolve(model)).is_dir()
    return {
        "model": fingerprint(folder) if local else f"{model} {folder.name}",
        "draft_adapter": draft_adapter and fingerprint(resolve_adapter(draft_adapter)),
        "dtype": str(dtype),
        "prompts": hashlib.blake2b(values.encode(), digest_size=16).hexdigest(),
        "seed": seed if config.temperature else None,
        **config.model_dump(),
    }


def _whole_rows(output: Path) -> tuple[int, int]:
    """Lines of the file that are whole, and their bytes."""
    if not output.exists():
        return 0, 0
    with output.open("rb") as stream:
        lengths = [len(line) for line in stream if line.endswith(b"\n")]
    return len(lengths), sum(lengths)


def _settings_of(output: Path) -> Path:
    """The file beside the output that says what its rows depend on."""
    return output.with_name(f"{output.name}.settings")


def _check_settings(output: Path, identity: dict[str, Any]) -> bool:
    """Whether the output was begun with these settings; UsageError if it was with others, False for a new one."""
    if not output.exists() or not output.stat().st_size:
        return False
    try:
        before = dict(json.loads(_settings_of(output).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
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
