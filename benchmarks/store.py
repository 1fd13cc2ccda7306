"""`python benchmarks/store.py`: token stores and live sources, side by side with what they are measured against.

Speed of `prepare` over the tokenizer's own, opening and resuming a store of many documents, opening as many live.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nextblock.config.run import load_config
from nextblock.config.sections import DataConfig, Source
from nextblock.data.feed import Feed
from nextblock.data.files import open_file
from nextblock.data.lines import BLOCK_BYTES
from nextblock.data.sources import read_source
from nextblock.data.store import DOCUMENT, MANIFEST, part_digest, read_manifest
from nextblock.model.parent import byte_tokenizer, parent_tokenizer
from nextblock.workflows.prepare import prepare

WORDS = (
    "the",
    "model",
    "reads",
    "rows",
    "of",
    "tokens",
    "and",
    "each",
    "block",
    "is",
    "written",
    "left",
    "to",
    "right",
)


def peak_mib() -> float:
    """Most memory that this process has held."""
    status = Path("/proc/self/status").read_text()  # `ru_maxrss` would count the process that started this one
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def write_texts(path: Path, documents: int, words: int) -> None:
    """A JSONL file of documents of about so many words, and some of a single one."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for n in range(documents):
            drawn = rng.integers(0, len(WORDS), int(rng.integers(1, 2 * words)))
            file.write(json.dumps({"text": f"{n} " + " ".join(WORDS[k] for k in drawn)}) + "\n")


def prepare_and_tokenizer(folder: Path, model: str, documents: int) -> dict[str, float]:
    """Tokens per second of `prepare` in one process, and of the tokenizer alone on one thread, in turns."""
    source = folder / "prepared.jsonl"
    write_texts(source, documents, 300)
    texts = [json.loads(line)["text"] for line in source.open()]
    data = {"sources": [{"path": str(source)}]}
    config = load_config({"model": {"path": model}, "data": data, "growth": {"b_max": 1}})
    tokenizer, alone, ours, tokens = parent_tokenizer(config.model), [], [], 0
    for turn in range(3):
        began = time.perf_counter()
        tokens = sum(
            len(ids)
            for first in range(0, len(texts), 256)
            for ids in tokenizer(texts[first : first + 256], return_attention_mask=False)["input_ids"]
        )
        alone.append(time.perf_counter() - began)
        began = time.perf_counter()
        prepare(config, folder / f"turn-{turn}", processes=1)
        ours.append(time.perf_counter() - began)
    return {
        "tokenizer_tokens_per_second": tokens / min(alone),
        "prepare_tokens_per_second": tokens / min(ours),
        "prepare_over_tokenizer": min(alone) / min(ours),
    }


def made_store(folder: Path, documents: int, tokens: int) -> Path:
    """A store of so many documents of so many tokens each, written without a tokenizer's work."""
    source = folder / "one.jsonl"
    source.write_text(json.dumps({"text": "x" * (tokens - 1)}) + "\n")
    data = {"sources": [{"path": str(source)}]}
    config = load_config({"model": {"tokenizer": "bytes"}, "data": data, "growth": {"b_max": 1}})
    store = prepare(config, folder / "made", processes=1)[0].store
    manifest = read_manifest(store)
    part: dict[str, Any] = manifest["parts"][0]
    here = store / part["folder"]
    table = np.repeat(np.fromfile(here / "documents.bin", DOCUMENT), documents)
    table["tokens"], table["spans"] = np.arange(1, documents + 1) * tokens, np.arange(1, documents + 1)
    table["digest"] = np.random.default_rng(0).integers(0, 2**63, documents)
    table.tofile(here / "documents.bin")
    np.tile(np.fromfile(here / "spans.bin", "<u4"), documents).tofile(here / "spans.bin")
    with (here / "tokens.bin").open("ab") as file:
        file.truncate(2 * documents * tokens)
    part.update(documents=documents, tokens=documents * tokens, spans=documents, digest=part_digest(here))
    (store / MANIFEST).write_text(json.dumps(manifest))
    return store


def opened_store(store: Path) -> dict[str, float]:
    """What opening a store takes, the first row at the slowest of five places, and how fast rows come."""
    tokenizer, before, began = byte_tokenizer(), peak_mib(), time.perf_counter()
    count = read_source(Source(path=str(store))).count or 0
    found = {"open_store_seconds": time.perf_counter() - began, "open_store_mib": peak_mib() - before}
    data = DataConfig(sources=(Source(path=str(store)),), row_length=512, shards=1)
    with closing(Feed(data, tokenizer, seed=0, batch_rows=8)) as feed:
        state, seconds = feed.state(), []
        place = state["shards"]["0"]["start"]["sources"][0]
        for epoch, share in enumerate((0.0, 0.1, 0.5, 0.9, 0.999)):
            index = int(share * count)
            state["shards"]["0"]["start"]["sources"][0] = {**place, "epoch": epoch, "index": index}
            began = time.perf_counter()
            feed.load_state(state)
            feed.peek()
            seconds.append(time.perf_counter() - began)
        found["first_row_after_resume_seconds"] = max(seconds)
        began = time.perf_counter()
        tokens = sum(int((feed.next().document >= 0).sum()) for _ in range(400))
        found["store_feed_tokens_per_second"] = tokens / (time.perf_counter() - began)
    return found


def opened_live(path: Path) -> dict[str, float]:
    """What opening a JSONL file takes, beside reading its bytes once by blocks and by lines."""
    seconds = []
    for read in (lambda file: iter(lambda: file.read(BLOCK_BYTES), b""), iter):
        with open_file(str(path)) as file:
            began = time.perf_counter()
            for _ in read(file):
                pass
            seconds.append(time.perf_counter() - began)
    before, began = peak_mib(), time.perf_counter()
    read_source(Source(path=str(path)))
    return {
        "read_blocks_seconds": seconds[0],
        "read_lines_seconds": seconds[1],
        "open_live_seconds": time.perf_counter() - began,
        "open_live_mib": peak_mib() - before,
    }


def in_fresh_process(function: str, path: Path) -> dict[str, float]:
    """A function of this script in a process of its own, whose memory is its own."""
    command = [sys.executable, __file__, "--only", function, "--path", str(path)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main(
    model: Annotated[str, typer.Option(help="whose tokenizer is measured")] = "tiny-ar",
    prepared: Annotated[int, typer.Option(help="documents that are prepared, of about 300 words")] = 20_000,
    stored: Annotated[int, typer.Option(help="documents of the store that is opened")] = 10_000_000,
    live: Annotated[int, typer.Option(help="JSONL documents that are opened live")] = 1_000_000,
    only: Annotated[str | None, typer.Option(hidden=True)] = None,
    path: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print all figures as JSON."""
    if only is not None and path is not None:
        print(json.dumps({"opened_store": opened_store, "opened_live": opened_live}[only](path)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = prepare_and_tokenizer(folder, model, prepared)
        found |= in_fresh_process("opened_store", made_store(folder, stored, 120))
        write_texts(folder / "live.jsonl", live, 30)
        found |= in_fresh_process("opened_live", folder / "live.jsonl")
    print(json.dumps({key: round(value, 4) for key, value in found.items()}, indent=1))


if __name__ == "__main__":
    typer.run(main)
