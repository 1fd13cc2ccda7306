"""A run killed at any moment and resumed ends with the same weights (identity 9), or says why it cannot."""

from __future__ import annotations

import errno
import json
import random
import shutil
import signal
from typing import Any

import pytest
from accelerate.utils import is_bnb_available

from nextblock.config.errors import UsageError
from nextblock.data import cursors, stream
from nextblock.data.cursors import HubStream
from nextblock.training.checkpoint import list_checkpoints
from nextblock.training.log import trim_log
from nextblock.training.loop import train
from runs import config_of, signal_at, start, stopped_run, weights

PART = "__0_0.distcp"
"""What the one process of a run writes of a checkpoint."""


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_weights_of_one_that_was_not(
    place, processes, undisturbed, tmp_path
):
    wanted, seconds = undisturbed
    moments, kills, trial = random.Random(0), 0, 0
    while kills < 20:
        trial += 1
        output = tmp_path / str(trial)
        config = config_of(place, output)
        for _ in range(5):
            process = start(processes, config)
            process.join(moments.uniform(0.1, 1.0) * seconds)
            if process.is_alive():
                kills += 1
                process.kill()
            process.join()
            if process.exitcode == 0:
                break
        process = start(processes, config)
        process.join()
        assert process.exitcode == 0
        assert weights(output) == wanted, f"trial {trial}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "after"),
    [
        ("nextblock.training.checkpoint.save", 1),
        ("torch.save", 100),  # in the middle of the part of the third save
        ("nextblock.training.checkpoint.write_whole", 3),  # the manifest of the second save
        ("nextblock.training.checkpoint._flush", 3),  # as that has got its name
        ("nextblock.training.output.export", 0),
        ("shutil.rmtree", 0),  # before the oldest checkpoint goes
    ],
)
def test_a_run_killed_within_a_save_ends_with_the_weights_of_one_that_was_not(
    place, processes, undisturbed, tmp_path, function, after
):
    output = tmp_path / "run"
    config = config_of(place, output)
    process = start(processes, config, function, after)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (output / "model.safetensors").exists()
    process = start(processes, config)
    process.join()
    assert process.exitcode == 0
    assert weights(output) == undisturbed[0]
    assert len(list_checkpoints(output)) == 2
    steps = [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(12))


def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    place, tmp_path, undisturbed, capsys
):
    config = stopped_run(place, tmp_path, 7)
    before, newest = list_checkpoints(tmp_path)
    content = bytearray((newest / PART).read_bytes())
    content[-1] ^= 1
    (newest / PART).write_bytes(content)
    done: list[int] = []
    train(config, resume=True, on_step=lambda metrics: done.append(metrics.step))
    said = capsys.readouterr().out
    assert f"checkpoint {newest} is damaged ({PART} has changed); going on from {before.name}" in said
    assert done == list(range(int(before.name.removeprefix("step-")), 12))
    assert weights(tmp_path) == undisturbed[0]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again_over_its_model(place, tmp_path):
    config = config_of(place, tmp_path, training__steps=9)
    train(config)
    before, log = weights(tmp_path), (tmp_path / "log.jsonl").read_bytes()
    saved = list_checkpoints(tmp_path)
    assert len(saved) == 2
    for folder in saved:
        (folder / PART).unlink()
    with pytest.raises(UsageError) as refused:
        train(config, resume=True)
    said = str(refused.value)
    assert all(f"checkpoint {folder} is damaged ({PART} is missing)" in said for folder in saved)
    assert said.endswith("delete what is damaged to start over, or choose another --output")
    assert "going" not in said
    assert (weights(tmp_path), (tmp_path / "log.jsonl").read_bytes()) == (before, log)


def test_a_stage_whose_checkpoints_are_all_damaged_is_refused_before_the_stage_before_it_is_exported_again(
    place, tmp_path
):
    stages = [{"name": "a"}, {"name": "b"}]
    config = config_of(place, tmp_path, training__steps=3, growth__delta=1, stages=stages)
    train(config)
    (folder,) = [stage for stage in tmp_path.glob("stage-*") if stage.name.endswith("-b")]
    for saved in list_checkpoints(folder):
        (saved / "state.json").write_text("{}")
    log = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"is damaged \(state.json has changed\).*; no other is left"):
        train(config, resume=True)
    assert (tmp_path / "log.jsonl").read_bytes() == log


GARBAGE = {
    "text": b"garbage\n",
    "NUL bytes": b"\0" * 64 + b"\n",
    "bytes that are no text": b"\xff\xfe\n",
    "JSON that is no record": b'[1]\n{"loss": 1}\n',
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_damaged_log_loses_what_cannot_be_read_and_the_run_goes_on(place, tmp_path, capsys, what):
    config = stopped_run(place, tmp_path, 7)
    log = tmp_path / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([*lines[:3], GARBAGE[what], *lines[3:], GARBAGE[what]]))
    train(config, resume=True)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(12))
    assert "damaged lines were dropped" in capsys.readouterr().out


def test_a_trimmed_log_is_written_whole_or_left_as_it_is(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"step": {step}}}\n' for step in range(6)))
    before = log.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="No space left"):
            trim_log(log, 3)
    assert log.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]
    assert trim_log(log, 3) == 0
    assert log.read_bytes() == b"".join(before.splitlines(keepends=True)[:3])


def test_resuming_a_finished_run_trains_no_further_and_leaves_the_same_weights(place, tmp_path):
    config = config_of(place, tmp_path, training__steps=9)
    train(config)
    before, done = weights(tmp_path), []
    train(config, resume=True, on_step=done.append)
    assert not done
    assert weights(tmp_path) == before


@pytest.mark.filterwarnings("ignore:.*is read as text")
def test_a_mask_token_spelled_in_the_data_is_text_and_a_resumed_run_reads_it_alike(place, tmp_path):
    (tmp_path / "data.jsonl").write_text(
        '{"text": "the <|mask|> token"}\n{"text": "no <|mask|>."}\n', encoding="utf-8"
    )
    data = {"data__sources": [{"path": str(tmp_path / "data.jsonl")}]}
    train(config_of(place, tmp_path / "whole", **data))
    train(stopped_run(place, tmp_path / "stopped", 3, **data), resume=True)
    assert weights(tmp_path / "whole") == weights(tmp_path / "stopped")


def test_a_resume_under_a_changed_configuration_names_each_difference(place, tmp_path):
    stopped_run(place, tmp_path, 5)
    changed = config_of(place, tmp_path, optimizer__lr=0.1, growth__b_max=2, recipe__ar_weight=0.25)
    with pytest.raises(UsageError) as refused:
        train(changed, resume=True)
    said = str(refused.value)
    assert "growth.b_max was 4, is 2" in said
    assert "optimizer.lr was 0.003, is 0.1" in said
    assert "recipe.ar_weight was 0.5, is 0.25" in said
    assert said.count(" was ") == 3


def test_a_resume_may_change_what_does_not_touch_the_result(place, tmp_path, undisturbed):
    stopped_run(place, tmp_path, 5)
    changed = config_of(place, tmp_path, training__checkpoint_every=3, training__keep_last=1)
    train(changed, resume=True)
    assert weights(tmp_path) == undisturbed[0]
    assert len(list_checkpoints(tmp_path)) == 1


def test_a_source_that_has_grown_at_its_beginning_is_not_read_in_another_order(place, tmp_path):
    source = tmp_path / "own.jsonl"
    source.write_text((place / "sums.jsonl").read_text() + "\n")
    options = {"data__sources": [{"path": str(source)}]}
    stopped_run(place, tmp_path / "run", 5, **options)
    source.write_text('{"text": "one more"}\n' + source.read_text())
    with pytest.raises(UsageError, match=r"own\.jsonl holds other text than when the run was stopped"):
        train(config_of(place, tmp_path / "run", **options), resume=True)


def test_a_lasting_network_error_leaves_a_checkpoint_and_the_run_goes_on_to_the_same_weights(
    place, tmp_path, monkeypatch
):
    (tmp_path / "data").mkdir()
    shutil.copy(place / "sums.jsonl", tmp_path / "data" / "train.jsonl")
    options: dict[str, Any] = {"data__sources": [{"path": str(tmp_path / "data"), "format": "hub"}]}
    options |= {"training__steps": 20, "training__batch_rows": 16, "training__checkpoint_every": 1000}
    monkeypatch.setattr(cursors, "SHUFFLED_ROWS", 40)
    monkeypatch.setattr(stream, "MOST_ROWS", 64)  # of a chunk: else the first holds all that the run needs
    train(config_of(place, tmp_path / "whole", **options))
    real, done, waited = HubStream._fill, [], []

    def cut_off(self: HubStream, group: list[Any]) -> None:
        if len(done) > 2:
            raise ConnectionError("no route to host")
        real(self, group)

    with monkeypatch.context() as patch:
        patch.setattr(HubStream, "_fill", cut_off)
        patch.setattr(cursors, "sleep", waited.append)
        with pytest.raises(UsageError, match=r"stopped: no route to host; .*step-\d+ holds the steps until here"):
            train(config_of(place, tmp_path / "cut", **options), on_step=done.append)
    assert waited[: len(cursors.RETRY_SECONDS)] == list(cursors.RETRY_SECONDS)
    (saved,) = list_checkpoints(tmp_path / "cut")
    assert 0 < int(saved.name.removeprefix("step-")) < 20
    train(config_of(place, tmp_path / "cut", **options), resume=True)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.skipif(not is_bnb_available(), reason="needs bitsandbytes")
def test_a_stopped_run_with_8_bit_states_goes_on_to_the_same_weights(place, tmp_path):
    train(config_of(place, tmp_path / "whole", optimizer__name="adamw_8bit"))
    stopped_run(place, tmp_path / "stopped", 5, optimizer__name="adamw_8bit")
    train(config_of(place, tmp_path / "stopped", optimizer__name="adamw_8bit"), resume=True)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def test_what_may_change_on_resume_is_said(place, tmp_path, capsys):
    train(config_of(place, tmp_path / "run", training__steps=9), on_step=lambda m: signal_at(m, 1))
    train(config_of(place, tmp_path / "run", training__steps=9, training__micro_batch_rows=2), resume=True)
    assert "resuming: training.micro_batch_rows was None, is 2" in capsys.readouterr().out
