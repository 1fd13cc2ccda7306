"""Laws of token stores: rows equal to those of the text, going on after a kill, and what is refused."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nextblock.workflows.store_writer as writing
from limits import largest_file
from nextblock.config.errors import UsageError
from nextblock.config.files import locked
from nextblock.config.sections import DataConfig, Source
from nextblock.data.mixture import part_bytes
from nextblock.data.records import Record
from nextblock.data.rows import Document
from nextblock.data.sources import read_source
from nextblock.data.store import DOCUMENT, MANIFEST, read_store, spans_of
from nextblock.data.stream import RowStream
from nextblock.workflows.store_writer import merge, part_name, write_part
from samples import CHATML, TALK, assistant, jsonl, marked_bytes, refusal, same, stream, texts, user, words

CHATS = [{"messages": [user(f"{i}?"), assistant("x" * (i % 50) + "y"), user("on"), assistant("é")]} for i in range(90)]
PAIRS = [{"prompt": f"{i} + {i} is ", "completion": f"{2 * i}", "ended": i % 3 > 0} for i in range(90)]
SPELLED = [{"text": f"{i} <|end|> " + "ab\n" * (i % 30)} for i in range(90)]


def put(path: Path, source: str | dict[str, Any], tokenizer: Any = None, parts: int = 3, run: int = 0) -> str:
    """A store of a source, in parts."""
    given = Source.model_validate({"path": source} if isinstance(source, str) else source)
    for part in range(parts):
        folder = path / part_name(run, part, parts)
        write_part(folder, given, tokenizer or marked_bytes(), part=(part, parts), part_bytes=part_bytes(64))
    merge(path, run)
    return str(path)


@pytest.mark.parametrize("rows", [texts(200), CHATS, PAIRS, SPELLED, [*CHATS, *PAIRS, {"text": " "}, *texts(99)]])
@pytest.mark.parametrize("held_out", [False, True])
def test_rows_of_a_store_are_those_of_its_text(tmp_path: Path, rows: list, held_out: bool) -> None:
    source = jsonl(tmp_path / "a.jsonl", rows)
    live, stored = (
        stream(path, share=0.3, held_out=held_out, tokenizer=marked_bytes())
        for path in (source, put(tmp_path / "store", source))
    )
    assert same(live.next(150), stored.next(150))
    places = [one.state()["lost"] for one in (live, stored)]
    for place in places:
        place.pop("spelled_at")
    assert places[0] == places[1]


def test_long_texts_and_tokenizers_that_put_a_space_in_front_are_stored_as_they_are_read(
    tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "long.txt").write_text("ab cd Paris 5\n" * 3000)
    (tmp_path / "text" / "short.txt").write_text("The <s> 5")
    store = put(tmp_path / "store", str(tmp_path / "text"), tokenizer)
    live, stored = (stream(path, share=0.1, tokenizer=tokenizer) for path in (str(tmp_path / "text"), store))
    assert same(live.next(300), stored.next(300))


def test_stores_mix_with_live_sources_by_weight_as_their_texts_would(tmp_path: Path) -> None:
    a, b = (jsonl(tmp_path / name, texts(80, seed)) for seed, name in enumerate(("a.jsonl", "b.jsonl")))
    store = put(tmp_path / "store", a)
    mixed, live = (stream({"path": x, "weight": 3}, b, "task:algebra") for x in (store, a))
    assert same(mixed.next(200), live.next(200))


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_the_number_of_parts_changes_no_document(tmp_path: Path, parts: int) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts(50))
    found, wanted = (read_store(Path(put(tmp_path / f"{n}", source, parts=n))) for n in (parts, 3))
    for index in range(50):
        one, other = (records.read(index).stored for records in (found, wanted))
        assert one is not None
        assert other is not None
        assert one.document.tokens.tolist() == other.document.tokens.tolist()
        assert (one.digest, one.bytes) == (other.digest, other.bytes)


def test_a_position_in_a_store_is_two_numbers_and_resumes_exactly(tmp_path: Path) -> None:
    store = put(tmp_path / "store", jsonl(tmp_path / "a.jsonl", texts(300)))
    one, other = stream(store), stream(store)
    one.next(333)
    state = json.loads(json.dumps(one.state()))
    assert state["start"]["sources"][0].keys() == {"epoch", "index"}
    other.load_state(state)
    assert same(one.next(99), other.next(99))


def test_spans_are_what_offsets_say() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(0, 4, 6)
        offset = np.concatenate([np.full(n, -1) if rng.random() < 0.5 else np.arange(n) for n in lengths])
        offset = offset.astype(np.int64)
        again = np.full(len(offset), -1)
        for start, stop in spans_of([Document(offset, offset)])[0]:
            again[start:stop] = np.arange(stop - start)
        assert again.tolist() == offset.tolist()


class Killed(BaseException):
    """In place of a kill: nothing catches it."""


@pytest.mark.parametrize("kill_at", range(1, 8))
def test_a_part_that_was_killed_goes_on_and_ends_as_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    monkeypatch.setattr(writing, "BATCH_DOCUMENTS", 8)
    monkeypatch.setattr(writing, "COMMIT_SECONDS", 0.0 if kill_at % 2 else 1e9)
    source = jsonl(tmp_path / "a.jsonl", [*texts(50), *CHATS[:5]])
    put(tmp_path / "whole", source, parts=1)
    real, calls = writing._Writer.add, []

    def doomed(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        calls.append(1)
        if len(calls) == kill_at:
            for file in self._files.values():
                file.write(b"torn")
            raise Killed

    monkeypatch.setattr(writing._Writer, "add", doomed)
    folder = part_name(0, 0, 1)
    with pytest.raises(Killed):
        put(tmp_path / "torn", source, parts=1)
    with pytest.raises(UsageError, match="is not finished"):
        merge(tmp_path / "torn", 0)
    put(tmp_path / "torn", source, parts=1)
    if kill_at % 2:  # all batches before were committed: none is done again
        assert len(calls) == 7
    for name in ("tokens.bin", "documents.bin", "spans.bin"):
        assert (tmp_path / "torn" / folder / name).read_bytes() == (tmp_path / "whole" / folder / name).read_bytes()


def test_an_appended_store_holds_the_old_documents_and_then_the_new(tmp_path: Path) -> None:
    a, b = jsonl(tmp_path / "a.jsonl", texts(40)), jsonl(tmp_path / "b.jsonl", CHATS)
    both = jsonl(tmp_path / "both.jsonl", [*texts(40), *CHATS])
    store = put(tmp_path / "store", a)
    put(tmp_path / "store", b, run=1)
    assert same(stream(store).next(200), stream(both).next(200))


def test_a_store_that_was_made_anew_is_another_for_a_run(tmp_path: Path) -> None:
    a, b = jsonl(tmp_path / "a.jsonl", texts(40)), jsonl(tmp_path / "b.jsonl", texts(40, seed=1))
    before = stream(put(tmp_path / "store", a)).state()
    shutil.rmtree(tmp_path / "store")
    put(tmp_path / "store", b)
    put(tmp_path / "store", a, run=1)
    with pytest.raises(UsageError, match=r"store holds other text than when the run was stopped"):
        stream(str(tmp_path / "store")).load_state(before)


def test_opening_reads_no_documents(tmp_path: Path) -> None:
    """Ten million documents that were never written: holes in the files."""
    store, documents = Path(put(tmp_path / "store", jsonl(tmp_path / "a.jsonl", texts(9)), parts=1)), 10**7
    folder = store / part_name(0, 0, 1)
    manifest = json.loads((store / MANIFEST).read_text())
    manifest["parts"][0]["documents"] = documents
    with (folder / "documents.bin").open("r+b") as file:
        file.truncate(documents * DOCUMENT.itemsize)
    manifest["parts"][0]["digest"] = writing.part_digest(folder)
    (store / MANIFEST).write_text(json.dumps(manifest))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    records = read_store(store)
    assert records.count == documents
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 2**10  # KiB
    assert records.read(8).stored is not None


# What is refused


@pytest.mark.parametrize(
    ("other", "words_"),
    [
        (words(), "another tokenizer"),
        (marked_bytes(template=CHATML), "another chat template"),
    ],
)
def test_a_store_of_another_tokenizer_or_template_is_refused(tmp_path: Path, other: Any, words_: str) -> None:
    store = put(tmp_path / "store", jsonl(tmp_path / "a.jsonl", CHATS))
    assert f"was made with {words_}" in refusal(store, tokenizer=other)


def test_a_template_does_not_matter_without_chats_nor_a_special_token_that_was_added(tmp_path: Path) -> None:
    store, other = put(tmp_path / "store", jsonl(tmp_path / "a.jsonl", texts(30))), marked_bytes(template=CHATML)
    other.add_special_tokens({"mask_token": "<|mask|>"})
    assert same(stream(store, tokenizer=other).next(30), stream(store).next(30))


def test_a_special_token_with_another_id_is_another_tokenizer(tmp_path: Path) -> None:
    one, other = marked_bytes(), marked_bytes()
    one.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
    other.add_special_tokens({"additional_special_tokens": ["<|b|>", "<|a|>"]})
    store = put(tmp_path / "store", jsonl(tmp_path / "a.jsonl", texts(30)), one)
    assert "another tokenizer, whose <|a|> is token" in refusal(store, tokenizer=other)


def test_a_file_that_is_missing_cut_or_of_another_run_is_named(tmp_path: Path) -> None:
    a, b = (jsonl(tmp_path / f"{seed}.jsonl", [{"text": f"{seed}{i:03}"} for i in range(60)]) for seed in (1, 2))
    whole, other = put(tmp_path / "whole", a), put(tmp_path / "other", b)
    for name in ("tokens.bin", "documents.bin", "spans.bin"):
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "store")
        file = tmp_path / "store" / part_name(0, 1, 3) / name
        kept = file.read_bytes()
        file.write_bytes(kept[:-1])
        assert f"{file} has {len(kept) - 1} bytes and should have {len(kept)}" in refusal(str(tmp_path / "store"))
        file.unlink()
        assert f"{file} is missing; restore it" in refusal(str(tmp_path / "store"))
        if name != "spans.bin":  # of texts of equal lengths the spans are the same
            shutil.copy(Path(other) / part_name(0, 1, 3) / name, file)
            assert "00-00001-of-00003 are of another run" in refusal(str(tmp_path / "store"))


def test_a_manifest_that_is_broken_or_of_a_later_format_is_named(tmp_path: Path) -> None:
    store = Path(put(tmp_path / "store", jsonl(tmp_path / "a.jsonl", texts(5))))
    (store / MANIFEST).write_text("{")
    assert "store.json cannot be read" in refusal(str(store))
    (store / MANIFEST).write_text('{"format": 99}')
    assert "has format 99" in refusal(str(store))


def test_parts_of_different_runs_do_not_merge(tmp_path: Path) -> None:
    a, b = (jsonl(tmp_path / f"{seed}.jsonl", texts(30, seed)) for seed in range(2))
    for part, source in enumerate((a, b)):
        folder = tmp_path / "store" / part_name(0, part, 3)
        write_part(folder, Source(path=source), marked_bytes(), part=(part, 3), part_bytes=8192)
    with pytest.raises(UsageError, match="was made from another source, or from other text"):
        merge(tmp_path / "store", 0)
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match="00001-of-00003 is missing; run nextblock prepare --part 2/3"):
        merge(tmp_path / "store", 0)
    assert "is not finished" in refusal(str(tmp_path / "store"))
    write_part(tmp_path / "store" / part_name(0, 0, 2), Source(path=a), marked_bytes(), part=(0, 2), part_bytes=8192)
    with pytest.raises(UsageError, match="was begun in 2 and 3 parts"):
        merge(tmp_path / "store", 0)


def test_a_part_goes_on_from_its_own_text_and_tokenizer_only(tmp_path: Path) -> None:
    source, folder = jsonl(tmp_path / "a.jsonl", texts(30)), tmp_path / "part"

    def write(tokenizer: Any = None, size: int = 8192) -> None:
        write_part(folder, Source(path=source), tokenizer or marked_bytes(), part=(0, 1), part_bytes=size)

    write()
    with pytest.raises(UsageError, match="another chat template"):
        write(marked_bytes(template=CHATML))
    with pytest.raises(UsageError, match=r"data\.row_length"):
        write(size=9000)
    jsonl(tmp_path / "a.jsonl", texts(30, seed=1))
    with pytest.raises(UsageError, match="from other text"):
        write()


def test_a_second_writer_of_a_part_is_refused(tmp_path: Path) -> None:
    source = Source(path=jsonl(tmp_path / "a.jsonl", texts(30)))
    with locked(tmp_path / "part"), pytest.raises(UsageError, match="is in use by process"):
        write_part(tmp_path / "part", source, marked_bytes(), part=(0, 1), part_bytes=8192)


def test_a_full_disk_is_one_line_and_what_was_committed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "BATCH_DOCUMENTS", 8)
    source = jsonl(tmp_path / "a.jsonl", texts(40))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # as a full disk does, it stops a write in its middle
    try:
        with pytest.raises(UsageError, match=r"cannot write .*: File too large; .*then start again: it goes on"):
            put(tmp_path / "store", source, parts=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store = put(tmp_path / "store", source, parts=1)
    assert same(stream(store).next(40), stream(source).next(40))


def test_a_folder_of_stores_names_them(tmp_path: Path) -> None:
    store = put(tmp_path / "out" / "0-a", jsonl(tmp_path / "a.jsonl", texts(5)))
    assert f"give each as a source: {store}" in refusal(str(tmp_path / "out"))


def test_a_store_keeps_examples_from_its_start(tmp_path: Path) -> None:
    store = put(tmp_path / "store", jsonl(tmp_path / "a.jsonl", texts(30)))
    records = read_source(Source(path=store, examples=7))
    assert records.count == 7


def test_talk_is_stored_in_its_turns(tmp_path: Path) -> None:
    store = put(tmp_path / "store", jsonl(tmp_path / "a.jsonl", [{"messages": TALK}]), parts=1)
    found = read_store(Path(store)).read(0)
    assert isinstance(found, Record)
    assert found.stored is not None
    assert (found.stored.document.offset == 0).sum() == 2


@pytest.mark.filterwarnings("ignore:.*left out, as all")
def test_a_part_that_a_record_stopped_goes_on_without_it_and_gives_the_rows_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "BATCH_DOCUMENTS", 8)
    monkeypatch.setattr(writing, "COMMIT_SECONDS", 0.0)
    bad = {"messages": [user("2?"), assistant(None)]}
    source = Path(jsonl(tmp_path / "a.jsonl", [*texts(40), bad, *CHATS[:9]]))
    source.write_text(source.read_text() + '{"text": "cut\n')
    folder, given = tmp_path / "store" / part_name(0, 0, 1), Source(path=str(source))

    def write(skip: bool) -> None:
        write_part(folder, given, marked_bytes(), part=(0, 1), part_bytes=part_bytes(64), skip=skip)

    with pytest.raises(UsageError, match=r"a\.jsonl:41: message 2 has no content.*; data\.skip_unusable=true leaves"):
        write(skip=False)
    place = json.loads((folder / writing.PART).read_text())["place"]
    assert place == 40
    write(skip=True)
    found = merge(tmp_path / "store", 0)
    assert (found["documents"], found["unusable"]) == (51, 2)
    assert "a.jsonl:41" in found["unusable_at"]
    config = {"sources": [{"path": str(source)}], "row_length": 64, "held_out": 0.3, "skip_unusable": True}
    live = RowStream(DataConfig.model_validate(config), marked_bytes(), seed=0)
    assert same(live.next(90), stream(str(tmp_path / "store"), share=0.3).next(90))


def test_text_that_was_repaired_in_the_middle_of_a_preparation_is_named_with_the_way_on(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts(9))
    put(tmp_path / "store", source, parts=1)
    jsonl(tmp_path / "a.jsonl", texts(9, seed=1))
    with pytest.raises(UsageError, match=r"other text; put it back \(data\.skip_unusable=true leaves out"):
        put(tmp_path / "store", source, parts=1)


def test_a_disk_that_does_not_take_the_lock_is_one_line(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", texts(9))
    with largest_file(4), pytest.raises(UsageError, match=r"cannot write .*: File too large; .*it goes on"):
        put(tmp_path / "store", source, parts=1)
    put(tmp_path / "store", source, parts=1)
