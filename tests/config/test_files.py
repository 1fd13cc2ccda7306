"""Files are written whole or not at all; what a disk did not take is told from every other error."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from limits import largest_file
from nextblock.config.errors import UsageError, require
from nextblock.config.files import locked, read_yaml, to_yaml, unwritten, user_path, whole_folder, write_whole
from nextblock.model.parent import byte_tokenizer

TOKENIZER: Any = byte_tokenizer().backend_tokenizer
LARGE = {"weight": torch.zeros(10_000)}
WRITERS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "python": (lambda path: path.write_bytes(b"0" * 10_000), "File too large", "allow larger files"),
    "safetensors": (lambda path: save_file(LARGE, path), "File too large", "allow larger files"),
    "tokenizers": (lambda path: TOKENIZER.save(str(path)), "File too large", "allow larger files"),
    "torch": (lambda path: torch.save(LARGE, path), "most likely because the disk is full", "free space"),
}


@pytest.mark.parametrize("library", WRITERS)
def test_a_file_that_is_not_taken_is_told_whichever_library_writes_it(tmp_path, library):
    write, reason, cure = WRITERS[library]
    with largest_file(1000), pytest.raises(Exception) as failed:  # noqa: PT011
        write(tmp_path / "file")
    why = unwritten(failed.value)
    assert why is not None
    assert reason in why[0]
    assert cure in why[1]


def test_a_full_disk_is_told_by_its_number_alone():
    assert unwritten(OSError(errno.ENOSPC, "x")) == ("No space left on device", "free space")
    assert unwritten(Exception("No space left on device (os error 28)")) == ("No space left on device", "free space")


@pytest.mark.parametrize(
    "error",
    [ValueError("1"), RuntimeError("CUDA out of memory"), FileNotFoundError(2, "x"), Exception("gone (os error 2)")],
)
def test_other_errors_are_not_taken_for_a_full_disk(error):
    assert unwritten(error) is None


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "x:\n  t: {s: 1}\n  t: {b: 2}", "[{p: 1, p: 2}]"])
def test_a_key_that_comes_twice_is_refused_with_its_line(text):
    with pytest.raises(UsageError, match=r"the key '[atp]' comes twice .*line [13]"):
        read_yaml(text)


def test_a_merged_mapping_may_replace_keys():
    assert read_yaml("a: &x {p: 1, q: 2}\nb: {<<: *x, p: 3}") == {"a": {"p": 1, "q": 2}, "b": {"p": 3, "q": 2}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", "010"),
        ("1:30.5", "1:30.5"),
        ("0x1f", 31),
        ("-1_000", -1000),
        ("-.5", -0.5),
        ("1e-4", 1e-4),
        ("3.", 3.0),
        ("0", 0),
    ],
)
def test_whole_numbers_are_read_as_everywhere_else(text, value):
    assert read_yaml(text) == value
    assert read_yaml(to_yaml(value)) == value


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path):
    path = tmp_path / "file"
    write_whole(path, b"first")
    with largest_file(10), pytest.raises(OSError, match="File too large"):
        write_whole(path, b"0" * 100)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"first")]
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"


def test_two_that_write_one_file_at_once_do_not_write_into_each_others_parts(tmp_path, monkeypatch):
    path, replace = tmp_path / "file", os.replace

    def meanwhile(part: Path, whole: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        thread = threading.Thread(target=write_whole, args=(path, b"other"))
        thread.start()
        thread.join()
        assert path.read_bytes() == b"other"
        replace(part, whole)

    monkeypatch.setattr(os, "replace", meanwhile)
    write_whole(path, b"own")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"own")]


def test_parts_of_killed_processes_go_and_those_of_others_at_work_stay(tmp_path):
    for name, age in (
        (".file.part", 7200),
        (".file.1-2.part", 7200),
        (".file.3-4.part", 5),
        (".files.1-2.part", 7200),
    ):
        (tmp_path / name).write_text("cut")
        os.utime(tmp_path / name, (0, time.time() - age))
    write_whole(tmp_path / "file", b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {"file", ".file.3-4.part", ".files.1-2.part"}


def test_a_folder_in_the_way_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "no_such_package_here").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="key needs no_such_package_here, which is not installed"):
        require("no_such_package_here", "extra", "key")


def model_in(folder: Path, weights: str, text: str) -> None:
    (folder / weights).write_text(text)
    (folder / "config.json").write_text(text)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_gets_all_files_or_none_and_keeps_what_is_not_of_a_model(tmp_path):
    (tmp_path / "log.jsonl").write_text("log")
    with largest_file(10), pytest.raises(OSError, match="File too large"), whole_folder(tmp_path) as folder:
        model_in(folder, "model.safetensors", "0" * 11)
    assert contents(tmp_path) == {"log.jsonl": "log"}
    for weights, text in (("model-00001-of-00002.safetensors", "1"), ("model.safetensors", "2")):
        with whole_folder(tmp_path) as folder:
            model_in(folder, weights, text)
        model = dict.fromkeys(("config.json", "custom_generate/generate.py", weights), text)
        assert contents(tmp_path) == {"log.jsonl": "log", **model}
    assert not list(tmp_path.glob(".partial-*"))


def test_a_move_that_ends_half_way_leaves_no_folder_that_looks_like_a_model(tmp_path, monkeypatch):
    with whole_folder(tmp_path) as folder:
        model_in(folder, "model.safetensors", "1")
    import nextblock.config.files as module

    real, left = module.os.replace, [2]

    def doomed(*paths: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(*paths)

    monkeypatch.setattr("os.replace", doomed)
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path) as folder:
        model_in(folder, "model.safetensors", "2")
    assert not (tmp_path / "config.json").exists()


def test_a_path_may_begin_at_home_and_need_not_exist(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs/x") == tmp_path / "runs" / "x"
    (tmp_path / "file").touch()
    assert user_path("~/file/below") == tmp_path / "file" / "below"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("~no-such-user/x", "model ~no-such-user/x is in the home folder of an unknown user; write the whole path"),
        ("word " * 60, "word ...' cannot be looked up: File name too long; name a file or folder"),
        ("a\0b", "cannot be looked up: embedded null byte"),
    ],
)
def test_a_path_that_the_system_does_not_take_is_refused_in_one_short_line(name, said):
    with pytest.raises(UsageError) as refused:
        user_path(name, "model")
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 200


def test_a_lock_takes_away_the_empty_folders_that_it_made_and_no_others(tmp_path):
    (tmp_path / "there").mkdir()
    with locked(tmp_path / "there" / "a" / "b"):
        assert (tmp_path / "there" / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]
    assert not any((tmp_path / "there").iterdir())
    with locked(tmp_path / "a" / "b" / "c"):
        (tmp_path / "a" / "kept").touch()
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "kept"]
