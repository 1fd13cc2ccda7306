"""The output folder: refused, held, and whole or as it was when a disk or a step fails."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from contextlib import ExitStack
from typing import Any

import pytest

from limits import largest_file
from nextblock.config.errors import UsageError
from nextblock.config.run import load_config
from nextblock.training.checkpoint import list_checkpoints, newest_whole_checkpoint
from nextblock.training.loop import train
from nextblock.training.output import check_output
from nextblock.training.run import StepMetrics
from nextblock.workflows.adapt import adapt
from runs import config_of, signal_at, start, weights


def test_a_full_output_folder_is_refused_and_left_as_it_is(place, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="is not empty"):
        train(config_of(place, tmp_path))
    with pytest.raises(UsageError, match=r"is not that of a run \(nextblock.yaml is missing\)"):
        train(config_of(place, tmp_path), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_disk_that_is_full_ends_in_one_line_wherever_the_run_writes(place, tmp_path):
    run = train(config_of(place, tmp_path / "run", training__steps=9), on_step=lambda m: signal_at(m, 2))
    assert not run.finished
    log = tmp_path / "run" / "log.jsonl"
    log.unlink()
    log.symlink_to("/dev/full")
    with pytest.raises(UsageError, match=r"cannot write .*: No space left on device"):
        train(config_of(place, tmp_path / "run", training__steps=9), resume=True)


TOO_LARGE = r"cannot write .*: File too large; allow larger files \(ulimit -f\), then go on with --resume auto"


@pytest.mark.parametrize("what", ["model", "lora", "draft_adapter"])
def test_an_export_that_the_disk_does_not_take_leaves_no_model_and_is_made_by_a_resume(place, tmp_path, what):
    if what == "lora":
        pytest.importorskip("peft")
    section = {} if what == "model" else {what: {"rank": 4}}
    plain = config_of(place, tmp_path / "run", training__steps=9, growth__b_0=4).model_dump()
    config, output = load_config(plain, section), tmp_path / "run"
    train(config)
    names = [
        name
        for name in ("config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors", "adapter")
        if (output / name).exists()
    ]
    before = {
        path: path.read_bytes()
        for name in names
        for path in (output / name, *(output / name).glob("*"))
        if path.is_file()
    }
    assert not any(b"partial" in content for content in before.values())
    saved = list_checkpoints(output)
    with largest_file(8000), pytest.raises(UsageError, match=TOO_LARGE):
        train(config, resume=True)
    assert {path: path.read_bytes() for path in before} == before  # the earlier export is whole
    for path in before:
        path.unlink()
    with largest_file(8000), pytest.raises(UsageError, match=TOO_LARGE):
        train(config, resume=True)
    assert not any(path.exists() for path in before)
    assert not list(output.glob(".partial-*"))
    assert list_checkpoints(output) == saved
    train(config, resume=True)
    assert {path: path.read_bytes() for path in before} == before


def test_a_report_that_the_disk_does_not_take_ends_in_one_line_and_leaves_no_half_of_it(place, tmp_path):
    config = config_of(place, tmp_path, training__steps=9, training__evaluate_rows=2, data__held_out=0.2)
    with ExitStack() as until_then:

        def narrow(words: str) -> None:
            if "bits per byte" in words:  # the last thing before the report
                until_then.enter_context(largest_file(1000))

        with pytest.raises(UsageError, match=TOO_LARGE) as stopped:
            adapt(config, on_stage=narrow)
    assert "\n" not in str(stopped.value)
    assert (tmp_path / "model.safetensors").is_file()
    assert not [path.name for path in tmp_path.iterdir() if path.name.endswith((".part", ".html"))]
    assert adapt(config, resume=True).finished
    assert (tmp_path / "report.html").is_file()


def test_a_parent_whose_result_could_not_be_written_is_refused_before_the_first_step(place, tmp_path, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("Object of type dtype is not JSON serializable")

    monkeypatch.setattr("transformers.PreTrainedConfig.save_pretrained", broken)
    done: list[StepMetrics] = []
    with pytest.raises(UsageError, match="the result of this parent could not be written: Object of type dtype"):
        train(config_of(place, tmp_path / "run"), on_step=done.append)
    assert not done
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_would_not_be_read_again_is_refused_before_the_first_step(place, tmp_path, monkeypatch):
    monkeypatch.setattr("nextblock.training.export.export_settings", lambda *_: None)
    monkeypatch.setattr("nextblock.training.output.export_settings", lambda *_: None)  # an empty folder
    with pytest.raises(UsageError, match="the result of this parent could not be written"):
        train(config_of(place, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room_for_what_the_run_leaves_is_refused_before_the_first_step(place, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(UsageError, match=r"has 0.00 GiB of free space, .*lower training.keep_last"):
        train(config_of(place, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [ValueError("GenerationConfig is invalid"), RuntimeError("tensors share memory")])
def test_a_run_that_failed_in_its_export_exports_when_it_is_resumed(place, tmp_path, monkeypatch, error):
    def broken(*_: Any, **__: Any) -> None:
        raise error

    config, done = config_of(place, tmp_path / "run", training__steps=9), []
    with monkeypatch.context() as patch:
        patch.setattr("nextblock.training.output.export", broken)
        with pytest.raises(type(error), match=str(error)):
            train(config)
    assert train(config, resume=True, on_step=done.append).finished
    assert not done
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_first_step_that_fails_for_any_reason_leaves_the_output_folder_as_it_was(place, tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("nextblock.training.loop.train_step", broken)
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "run", tmp_path / "empty"):
        with pytest.raises(RuntimeError, match="out of memory"):
            train(config_of(place, output))
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "empty").iterdir())


def test_a_first_checkpoint_that_the_disk_does_not_take_leaves_the_log(place, tmp_path, undisturbed):
    config = config_of(place, tmp_path / "run", training__checkpoint_every=6)
    with largest_file(8000), pytest.raises(UsageError, match="cannot write checkpoint"):
        train(config)
    # Steps that were done while it was written are in the log too; then the run has stopped.
    assert 6 <= len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) < 12
    assert newest_whole_checkpoint(tmp_path / "run") == (None, [])
    train(config, resume=True)
    assert weights(tmp_path / "run") == undisturbed[0]


def test_a_run_in_the_same_folder_is_refused_while_one_goes_on_and_taken_when_it_was_killed(
    place, processes, tmp_path, undisturbed
):
    config = config_of(place, tmp_path / "run")
    first = start(processes, config, "nextblock.training.loop.train_step", 4)  # dies at its fifth step
    lock = tmp_path / "run" / ".lock"
    while first.is_alive() and not (lock.exists() and lock.read_text()):  # locked first, then signed
        time.sleep(0.001)
    os.kill(first.pid or 0, signal.SIGSTOP)
    try:
        assert first.is_alive()
        with pytest.raises(UsageError, match=rf"is in use by process {first.pid} on {socket.gethostname()}; wait"):
            train(config, resume=True)
        (tmp_path / "run" / "notes.txt").touch()
        with pytest.raises(UsageError, match=rf"is in use by process {first.pid}"):  # and not "is not empty"
            check_output(tmp_path / "run", [config], resume=False)
        (tmp_path / "run" / "notes.txt").unlink()
    finally:
        os.kill(first.pid or 0, signal.SIGCONT)
    first.join()
    assert (tmp_path / "run" / ".lock").exists()  # of a dead process: nobody's
    train(config, resume=True)
    assert weights(tmp_path / "run") == undisturbed[0]
    assert not (tmp_path / "run" / ".lock").exists()
