"""From a configuration's sources to token stores: in processes of this machine, or a part at a time on many."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from nextblock.config.errors import UsageError
from nextblock.config.files import make_folder, write_whole
from nextblock.config.progress import progress
from nextblock.config.run import AdaptConfig
from nextblock.config.sections import ModelConfig, Source
from nextblock.data.mixture import part_bytes
from nextblock.data.sources import place_of, read_source
from nextblock.data.store import MANIFEST, read_manifest
from nextblock.data.store_writer import check_same, identity_of, merge, part_name, parts_begun, write_part
from nextblock.model.parent import parent_tokenizer

CONFIG = "nextblock.yaml"
"""File in the output folder: the configuration with its stores in place of the sources."""


@dataclass(frozen=True)
class Prepared:
    """One source and its store. `manifest` is None until all parts are merged."""

    source: Source
    store: Path
    run: int = 0
    manifest: dict[str, Any] | None = None
    documents: int = 0


def prepare(
    config: AdaptConfig,
    output: Path,
    *,
    processes: int | None = None,
    part: tuple[int, int] | None = None,
    merge_parts: bool = False,
    append: bool = False,
) -> list[Prepared]:
    """Tokenise every source of a configuration once. Started again after a kill, it goes on.

    Args:
        output: gets a store for each source, and a configuration that reads them. Built-in tasks and sources that
            are stores stay as they are.
        processes: of this machine; default: one for each core that this process may use.
        part: (i, n), from 0: write this part of each source alone, and do not merge.
        merge_parts: merge parts that were written, and write none.
        append: add the sources to the stores that are there.
    Returns:
        What was prepared, in the order of the sources.
    Raises:
        UsageError: as `write_part` and `merge`.
    """
    tokenizer = parent_tokenizer(config.model)
    stores = {k: _begin(config, k, output, tokenizer, append) for k in _unprepared(config, output)}
    if not merge_parts:
        make_folder(output)
    left = {k: one for k, one in stores.items() if one.manifest is None}
    if part is not None:
        _write(config, [_Task(one, part) for one in left.values()], 1)
        return list(stores.values())
    if not merge_parts:
        count = processes or _cores()
        divided = [(one, parts_begun(one.store, one.run) or count) for one in left.values()]
        _write(config, [_Task(one, (i, n)) for one, n in divided for i in range(n)], count)
    done = {**stores, **{k: replace(one, manifest=merge(one.store, one.run)) for k, one in left.items()}}
    values = config.model_dump(mode="json", exclude_defaults=True)
    for k, one in done.items():
        values["data"]["sources"][k] = {"path": str(one.store.absolute()), "weight": one.source.weight}
    write_whole(output / CONFIG, yaml.safe_dump(values, sort_keys=False).encode())
    return list(done.values())


def _cores() -> int:
    """Of this machine, as many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unprepared(config: AdaptConfig, output: Path) -> list[int]:
    """Numbers of the sources that get a store. UsageError if none does."""
    places = [place_of(source) for source in config.data.sources]
    found = [k for k, place in enumerate(places) if place not in ("task", "store")]
    if not found:
        raise UsageError(
            f"data.sources: nothing to prepare for {output}: built-in tasks and token stores are read as they are; "
            "give a source of text"
        )
    return found


def _begin(config: AdaptConfig, k: int, output: Path, tokenizer: Any, append: bool) -> Prepared:
    """Source number k, opened and checked, and where its store stands."""
    source = config.data.sources[k]
    name = re.sub(r"[^\w-]+", "-", Path(source.path.rstrip("/")).stem).strip("-") or "source"
    store = next(iter(sorted(output.glob(f"{k}-*/"))), output / f"{k}-{name}")
    opened = read_source(source, part_bytes=part_bytes(config.data.row_length))
    identity = identity_of(source, opened, part_bytes(config.data.row_length), tokenizer)
    if not (store / MANIFEST).exists():
        return Prepared(source, store, documents=opened.count or 0)
    manifest = read_manifest(store)
    if identity in manifest["runs"]:
        return Prepared(source, store, manifest=manifest)
    check_same(manifest["runs"][-1], identity, store, same_texts=not append)
    return Prepared(source, store, len(manifest["runs"]), documents=opened.count or 0)


@dataclass(frozen=True)
class _Task:
    """Part (i, n) of a source, to be written."""

    prepared: Prepared
    part: tuple[int, int]


def _write(config: AdaptConfig, tasks: Sequence[_Task], processes: int) -> None:
    """Write parts, each in one of some processes. UsageError of the first that fails."""
    if not tasks:
        return
    total = sum(task.prepared.documents // task.part[1] for task in tasks)
    spawning = multiprocessing.get_context("spawn")  # threads of tokenizers and torch do not survive a fork
    told = spawning.Array("q", 2 * len(tasks), lock=False)  # documents and tokens of each part
    given = (config.model, part_bytes(config.data.row_length), told)
    with progress("preparing") as update:

        def show() -> None:
            documents, tokens = sum(told[::2]), sum(told[1::2])
            update(documents, max(total, documents), f"{tokens / 1e6:,.1f} M tokens")

        if min(processes, len(tasks)) == 1:
            _open_process(*given)
            for number, task in enumerate(tasks):
                _write_in_process(number, task, show)
            return
        with ProcessPoolExecutor(min(processes, len(tasks)), spawning, _open_process, given) as pool:
            futures = [pool.submit(_write_in_process, number, task) for number, task in enumerate(tasks)]
            try:
                for _ in _until_done(futures):
                    show()
            except BrokenProcessPool:
                raise UsageError(
                    "a process of prepare was killed, most likely for want of memory; start again with fewer "
                    "--processes: it goes on"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)


def _until_done(futures: list[Future[None]]) -> Iterator[None]:
    """Yields now and then until all are done. The error of one that fails."""
    left = set(futures)
    while left:
        done, left = wait(left, timeout=0.5, return_when="FIRST_EXCEPTION")
        for future in done:
            future.result()
        yield


_PROCESS: list[Any] = []
"""Of a process that writes: its tokenizer, `part_bytes`, and where it tells how far it is."""


def _open_process(model: ModelConfig, size: int, told: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many processes as cores work already
    _PROCESS[:] = [parent_tokenizer(model), size, told]


def _write_in_process(number: int, task: _Task, show: Callable[[], None] = lambda: None) -> None:
    tokenizer, size, told = _PROCESS
    one = task.prepared

    def tell(documents: int, tokens: int) -> None:
        told[2 * number], told[2 * number + 1] = documents, tokens
        show()

    folder = one.store / part_name(one.run, *task.part)
    write_part(folder, one.source, tokenizer, part=task.part, part_bytes=size, tell=tell)
