"""What a benchmark decodes, and how: prompts of a task or a file, and variants of the decoding options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextblock.config.errors import UsageError, nearest
from nextblock.config.files import read_yaml
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.data.prompts import read_prompts as prompt_records
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.decoding.options import MODES, DecodingConfig, resolve_config
from nextblock.decoding.request import make_request
from nextblock.model.decoder import Decoder
from nextblock.tasks import Example, Task, get_task

# Every contestant decodes greedily and to the same length, or their speeds would not be comparable.
FIXED = ("max_new_tokens", "temperature", "top_p", "top_k")

Options = dict[str, Any]


@dataclass(frozen=True)
class Prompts:
    """Prompts, and for a task how to grade the answers.

    source: "task NAME (SPLIT split)" or the file, for titles.
    items: texts or chats (lists of messages).
    task, cases: for a task, else None and empty.
    """

    source: str
    items: list[Any]
    task: Task | None = None
    cases: tuple[Example, ...] = ()

    def encode(self, lm: BlockDiffusionLM) -> list[list[int]]:
        """Token ids of each prompt, checked against the model's context and vocabulary."""
        bare = Decoder(lm.model)  # a draft adapter has no part in reading
        rows = make_request(bare, lm.tokenizer, lm.settings, self.items, {"mode": "ar"}).rows
        return [row.prompt for row in rows]


def task_prompts(name: str, split: str, count: int, first: int = 0) -> Prompts:
    """`count` problems of a built-in task, from `first` on; UsageError for an unknown task or split, or no problem."""
    if count < 1:
        raise UsageError(f"examples={count} must be at least 1")
    task = get_task(name)
    cases = tuple(task.example(split, index) for index in range(first, first + count))
    return Prompts(f"task {name} ({split} split)", [case.prompt for case in cases], task, cases)


def file_prompts(path: Path | str, count: int) -> Prompts:
    """The first `count` prompts of a file, as `data.prompts.read_prompts` reads them. UsageError likewise."""
    return Prompts(str(path), [record.item for record in prompt_records(str(path), count)])


def read_prompts(task: str | None, file: Path | None, count: int, split: str) -> Prompts:
    """The file's prompts if one is given, else the task's (None: word problems). UsageError for both."""
    if task is not None and file is not None:
        raise UsageError(f"task={task} and prompts={file} are both given; leave one of them out")
    return task_prompts(task or "word_problems", split, count) if file is None else file_prompts(file, count)


def parse_variant(text: str) -> Options:
    """`"speculative,draft_length=8"` -> {"mode": "speculative", "draft_length": 8}; values are read as YAML.

    Raises:
        UsageError: unknown mode or option, or an option that all contestants must share.
    """
    mode, *rest = [part.strip() for part in text.split(",")]
    options: Options = {"mode": mode}
    known = [name for name in DecodingConfig.model_fields if name not in (*FIXED, "mode")]
    if mode not in MODES:
        raise UsageError(f"variant '{text}' begins with '{mode}', not a mode{nearest(mode, MODES)}")
    for part in rest:
        name, equals, value = part.partition("=")
        if name in FIXED:
            raise UsageError(f"variant '{text}' sets {name}, which all contestants share (greedy, one length)")
        if name not in known:
            raise UsageError(f"variant '{text}': unknown option '{name}'{nearest(name, known)}")
        if not equals:
            raise UsageError(f"variant '{text}': write {name}=value")
        options[name] = None if value == "none" else read_yaml(value)
    return options


def make_variants(
    settings: BlockDiffusionSettings | None,
    *,
    modes: Sequence[str] = (),
    thresholds: Sequence[float | None] = (),
    block_sizes: Sequence[int] = (),
    extra: Sequence[Options] = (),
) -> list[Options]:
    """Every mode, diffusion once for each threshold, the block modes once for each block size; then `extra`.

    Args:
        settings: None: only ar mode is possible, and the default.
        modes: default: all that the model can do.
        thresholds, block_sizes: default: the checkpoint's.
        extra: from `parse_variant`.
    Raises:
        UsageError: what `generate` would refuse.
    """
    modes = modes or (MODES if settings is not None else ("ar",))
    variants: list[Options] = []
    for mode in modes:
        sizes = [{"block_size": size} for size in block_sizes] if mode != "ar" else []
        levels = [{"threshold": level} for level in thresholds] if mode == "diffusion" else []
        variants += [{"mode": mode, **size, **level} for size in sizes or [{}] for level in levels or [{}]]
    variants += extra
    for options in variants:
        resolve_config(settings, options)
    return [options for index, options in enumerate(variants) if options not in variants[:index]]


def variant_name(options: Mapping[str, Any]) -> str:
    """{"mode": "diffusion", "threshold": None} -> "diffusion, threshold=none"."""
    words = [f"{name}={'none' if value is None else value}" for name, value in options.items() if name != "mode"]
    return ", ".join([str(options["mode"]), *words])
