"""From a configuration's sources to token stores: in processes of this machine, or a part at a time on many."""

from __future__ import annotations

import multiprocessing
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nextblock.config.errors import UsageError
from nextblock.config.files import make_folder, to_yaml, user_path, write_whole
from nextblock.config.progress import progress
from nextblock.config.run import AdaptConfig, stage_configs
from nextblock.config.sections import DataConfig, ModelConfig, Source
from nextblock.data.mixture import part_bytes
from nextblock.data.records import Records, naming_the_way_on
from nextblock.data.sources import place_of, read_source
from nextblock.data.store import MANIFEST, read_manifest
from nextblock.model.loading import SHIPPED
from nextblock.model.parent import parent_tokenizer
from nextblock.workflows.store_writer import (
    check_same,
    disk_errors,
    identity_of,
    merge,
    part_name,
    parts_begun,
    write_part,
)

CONFIG = "nextblock.yaml"
"""File in the output folder: the configuration with its stores in place of the sources."""


@dataclass(frozen=True)
class Prepared:
    """One source, the section that it stands in, and its store. `manifest` is None until all parts are merged."""

    data: DataConfig
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
    """Tokenise every source of a configuration and its stages once. Started again after a kill, it goes on.

    Args:
        output: gets a store for each source, and a configuration that reads them. Built-in tasks and sources that
            are stores stay as they are.
        processes: of this machine; default: one for each core that this process may use.
        part: (i, n), from 0: write this part of each source alone, and do not merge.
        merge_parts: merge parts that were written, and write none.
        append: add the sources to the stores that are there.
    Returns:
        What was prepared, in the order of the sources, those of stages last.
    Raises:
        UsageError: as `write_part` and `merge`.
    """
    tokenizer = parent_tokenizer(config.model)
    given = _unprepared(config, output)
    stores = {place: _begin(*given[place], place, output, tokenizer, append) for place in given}
    if not merge_parts:
        make_folder(output)
    left = {place: one for place, one in stores.items() if one.manifest is None}
    if part is not None:
        _write(config, [_Task(one, part) for one in left.values()], 1)
        return list(stores.values())
    if not merge_parts:
        count = processes or _cores()
        divided = [(one, parts_begun(one.store, one.run) or count) for one in left.values()]
        _write(config, [_Task(one, (i, n)) for one, n in divided for i in range(n)], count)
    done = {**stores, **{place: replace(one, manifest=merge(one.store, one.run)) for place, one in left.items()}}
    with disk_errors(output):
        write_whole(output / CONFIG, to_yaml(_values(config, done)).encode())
    for one in done.values():
        if one.manifest and (count := one.manifest.get("unusable", 0)):
            said = f"{count} documents cannot be used and are left out; the first: {one.manifest['unusable_at']}"
            warnings.warn(f"{one.store}: {said}", stacklevel=2)
    return list(done.values())


Place = tuple[int | None, int]
"""Of a source in a configuration: the number of the stage, from 0, or None for the run itself; and the source's."""


def _values(config: AdaptConfig, stores: Mapping[Place, Prepared]) -> dict[str, Any]:
    """The configuration with stores in place of sources, as plain values that hold in any folder."""
    values = config.model_dump(mode="json", exclude_defaults=True)
    for key, path in values.get("model", {}).items():
        if key in ("path", "tokenizer") and path:
            values["model"][key] = _absolute(path)
    for number, stage in _with_sources(config).items():
        sources = [source.model_dump(mode="json", exclude_defaults=True) for source in stage.data.sources]
        for k, source in enumerate(sources):
            one = stores.get((number, k))
            if one is not None:
                sources[k] = {"path": str(one.store.absolute()), "weight": stage.data.sources[k].weight}
            else:
                source["path"] = _absolute(source["path"])
        whole = values if number is None else values["stages"][number]
        whole["data"]["sources"] = sources
    return values


def _absolute(path: str) -> str:
    """The path of what is on this machine, for any folder; another name as it is."""
    found = user_path(path)
    return str(found.absolute()) if found.exists() and path not in SHIPPED else path


def _with_sources(config: AdaptConfig) -> dict[int | None, AdaptConfig]:
    """The run, and those of its stages that have sources of their own; by number."""
    stages = zip(config.stages, stage_configs(config), strict=False)
    return {None: config} | {number: whole for number, (stage, whole) in enumerate(stages) if "sources" in stage.data}


def _cores() -> int:
    """Of this machine, as many as this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unprepared(config: AdaptConfig, output: Path) -> dict[Place, tuple[DataConfig, Source]]:
    """The sources that get a store, with the section that they stand in. UsageError if none does."""
    listed = {
        (number, k): (stage.data, source)
        for number, stage in _with_sources(config).items()
        for k, source in enumerate(stage.data.sources)
    }
    found = {place: given for place, given in listed.items() if place_of(given[1]) not in ("task", "store")}
    if not found:
        raise UsageError(
            f"data.sources: nothing to prepare for {output}: built-in tasks and token stores are read as they are; "
            "give a source of text"
        )
    return found


def _begin(data: DataConfig, source: Source, place: Place, output: Path, tokenizer: Any, append: bool) -> Prepared:
    """A source, opened and checked, and where its store stands."""
    name = re.sub(r"[^\w-]+", "-", Path(source.path.rstrip("/")).stem).strip("-") or "source"
    number = f"{place[1]}" if place[0] is None else f"stage-{place[0] + 1}-{place[1]}"
    store = next(iter(sorted(output.glob(f"{number}-*/"))), output / f"{number}-{name}")
    size = part_bytes(data.row_length)
    opened = read_source(source, part_bytes=size, skip=data.skip_unusable)
    identity = identity_of(source, opened, size, tokenizer)
    manifest = read_manifest(store) if (store / MANIFEST).exists() else None
    if manifest and identity in manifest["runs"]:
        return Prepared(data, source, store, manifest=manifest)
    if manifest:
        check_same(manifest["runs"][-1], identity, store, same_texts=not append)
    if isinstance(opened, Records):
        with naming_the_way_on():
            opened.check(tokenizer)
    return Prepared(data, source, store, len(manifest["runs"]) if manifest else 0, documents=opened.count or 0)


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
    given = (config.model, told)
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
"""Of a process that writes: its tokenizer, and where it tells how far it is."""


def _open_process(model: ModelConfig, told: Any) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many processes as cores work already
    _PROCESS[:] = [parent_tokenizer(model), told]


def _write_in_process(number: int, task: _Task, show: Callable[[], None] = lambda: None) -> None:
    tokenizer, told = _PROCESS
    one = task.prepared

    def tell(documents: int, tokens: int) -> None:
        told[2 * number], told[2 * number + 1] = documents, tokens
        show()

    folder = one.store / part_name(one.run, *task.part)
    size, skip = part_bytes(one.data.row_length), one.data.skip_unusable
    write_part(folder, one.source, tokenizer, part=task.part, part_bytes=size, skip=skip, tell=tell)
