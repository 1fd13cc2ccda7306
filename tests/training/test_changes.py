"""A resumed run takes the changes of one table, each as the table says, and refuses all others."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nextblock.config.errors import UsageError
from nextblock.config.run import AdaptConfig, load_config
from nextblock.data import stream
from nextblock.measure.report import write_report
from nextblock.model.parent import byte_tokenizer
from nextblock.recipe import schedules
from nextblock.recipe.objective import LossSums, TwoViewLoss
from nextblock.training.changes import MAY_CHANGE, check_differences, table
from nextblock.training.log import read_log
from nextblock.training.loop import train
from nextblock.training.run import StepMetrics
from runs import config_of, stopped_run, weights

ROOT = Path(__file__).parents[2]
ADDED = [{"path": "FIRST"}, {"path": "SECOND"}]
TAKEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # key -> overrides before and after, at step 5
    "training.steps": ({}, {"training.steps": 20}),
    "optimizer.schedule": ({}, {"optimizer.schedule": "constant"}),
    "optimizer.decay_share": ({}, {"optimizer.decay_share": 0.5}),
    "optimizer.min_lr_ratio": ({}, {"optimizer.min_lr_ratio": 0.0}),
    "optimizer.lr": ({}, {"optimizer.lr": 1e-3}),
    "data.sources.N.path": ({}, {"data.sources.0.path": "MOVED"}),
    "data.sources.N": ({}, {"data.sources": ADDED}),
    "data.sources.N.weight": ({}, {"data.sources.0.weight": 3.0}),
    "training.skip_rows": ({"training.skip_rows": [3]}, {"training.skip_rows": [3, 21]}),
    "training.micro_batch_rows": ({}, {"training.micro_batch_rows": 2}),
    "training.fsdp": ({}, {"training.fsdp": True}),
    "training.compile": ({}, {"training.compile": True}),
    "training.gradient_checkpointing": ({}, {"training.gradient_checkpointing": True}),
    "model.attention": ({}, {"model.attention": "sdpa"}),
    "machine.shard_over": ({"training.fsdp": True}, {"training.fsdp": True, "machine.shard_over": 2}),
    "machine.hold_gradients": ({"training.fsdp": True}, {"training.fsdp": True, "machine.hold_gradients": True}),
    "data.skip_unusable": ({}, {"data.skip_unusable": True}),
    "training.checkpoint_every": ({}, {"training.checkpoint_every": 3}),
    "training.keep_last": ({}, {"training.keep_last": 5}),
    "training.keep_every": ({}, {"training.keep_every": 2}),
    "training.evaluate_rows": ({}, {"training.evaluate_rows": 0}),
    "training.evaluate_every": ({}, {"training.evaluate_every": 4}),
    "training.profile_every": ({}, {"training.profile_every": 7}),
    "training.trackers": ({}, {"training.trackers": ["tensorboard"]}),
    "model.export_dtype": ({}, {"model.export_dtype": "bfloat16"}),
    "decoding": ({}, {"decoding.sub_blocks": 2}),
    "machine.gpu": ({}, {"machine.gpu": "cpu"}),
    "machine.gpus": ({}, {"machine.gpus": 8}),
}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an unlisted key": ({}, {"growth.delta": 5}, "growth.delta was 4, is 5;"),
    "the seed": ({}, {"training.seed": 1}, "training.seed was 0, is 1;"),
    "the batch": ({}, {"training.batch_rows": 8}, "training.batch_rows was 4, is 8;"),
    "shards": ({}, {"data.shards": 2}, "data.shards was None, is 2;"),
    "a section": ({}, {"lora.rank": 4}, "lora was None, is {"),
    "a field of a source": ({}, {"data.sources.0.text_field": "body"}, "data.sources.0.text_field was 'text'"),
    "a source less": ({"data.sources": ADDED}, {"data.sources": ADDED[:1]}, "a source that was read cannot be left"),
    "a streamed source": ({}, {"data.sources.0.path": "owner/name"}, "only files and token stores are recognised"),
    "a source that is not there": ({}, {"data.sources.0.path": "./absent"}, "./absent does not exist"),
    "a higher rate": ({}, {"optimizer.lr": 0.1}, "optimizer.lr was 0.003, is 0.1 (it may only become lower)"),
    "fewer steps than done": (
        {"optimizer.schedule": "constant", "growth.delta": 1},
        {"training.steps": 4},
        "training.steps was 12, is 4 (5 steps are done)",
    ),
    "a decay that has begun": (
        {"optimizer.decay_share": 1.0},
        {"training.steps": 20},
        "(step 2, which is done, would have had another learning rate)",
    ),
    "a decay that would have begun": ({}, {"optimizer.decay_share": 1.0}, "(step 2, which is done, would have had"),
    "a cosine": ({"optimizer.schedule": "cosine"}, {"training.steps": 20}, "(step 3, which is done, would have"),
    "rows that are done": ({}, {"training.skip_rows": [19]}, "training.skip_rows was [], is [19] (the rows before 20"),
    "rows skipped no more": ({"training.skip_rows": [3]}, {}, "is [] (the rows before 20 are done)"),
}


def pair(
    place: Path, tmp_path: Path, before: dict[str, Any], after: dict[str, Any]
) -> tuple[AdaptConfig, AdaptConfig]:
    """A run's configurations before and after a change."""
    names = {"FIRST": place / "sums.jsonl", "MOVED": tmp_path / "moved.jsonl", "SECOND": tmp_path / "more.jsonl"}
    for name in ("MOVED", "SECOND"):
        shutil.copy(place / "sums.jsonl", names[name])
    values = config_of(place, tmp_path / "run", training__evaluate_rows=4, data__held_out=0.1).model_dump(mode="json")

    def named(overrides: dict[str, Any]) -> dict[str, Any]:
        text = json.dumps(overrides)
        for name, path in names.items():
            text = text.replace(f'"{name}"', json.dumps(str(path)))
        return json.loads(text)

    return load_config(values, named(before)), load_config(values, named(before | after if after else after))


def checked(before: AdaptConfig, now: AdaptConfig, **how: Any) -> list[str]:
    return check_differences(before.model_dump(mode="json"), now, "cannot resume", **{"step": 5, "row": 20, **how})


def test_every_key_of_the_table_has_a_case_and_the_table_is_in_the_documentation():
    assert TAKEN.keys() == MAY_CHANGE.keys() - {"processes", "documents"}
    assert table() in (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("key", TAKEN)
def test_a_change_of_the_table_is_taken_and_named(place, tmp_path, key):
    (change,) = checked(*pair(place, tmp_path, *TAKEN[key]))
    place_of_it = key.replace(".N", "." + ("1" if key.endswith("N") else "0"))
    assert change.startswith((f"{place_of_it} was ", f"{place_of_it}.sub_blocks was "))


@pytest.mark.parametrize("what", REFUSED)
def test_a_change_that_is_not_in_the_table_is_refused_in_one_line_that_says_where_it_is(place, tmp_path, what):
    before, after, said = REFUSED[what]
    with pytest.raises(UsageError) as refused:
        checked(*pair(place, tmp_path, before, after))
    line = str(refused.value)
    assert said in line
    assert "\n" not in line
    if "does not exist" not in said:
        assert line.endswith("What may change is a table in docs/distributed.md")


@pytest.mark.parametrize("key", TAKEN)
def test_a_stage_that_is_done_takes_only_what_leaves_its_weights(place, tmp_path, key):
    before, now = pair(place, tmp_path, *TAKEN[key])
    if "differ" in MAY_CHANGE[key].effect or "same" in MAY_CHANGE[key].effect:
        assert checked(before, now, done=True)
    else:
        with pytest.raises(UsageError, match="set it in a stage to come"):
            checked(before, now, done=True)


def test_a_configuration_saved_before_a_key_was_there_has_its_default(place, tmp_path):
    before, now = pair(place, tmp_path, {}, {})
    saved = before.model_dump(mode="json")
    del saved["training"]["skip_rows"]
    saved["training"]["checkpoint"] = "full"  # an option of older versions
    assert check_differences(saved, now, "cannot resume", step=5, row=20) == []


AS_BEGUN = {
    "a constant run that ends with a decay": ({"optimizer__schedule": "constant"}, {"optimizer__schedule": "wsd"}),
    "a wsd run made longer before its decay": ({}, {"training__steps": 20}),
    "a wsd run made shorter": ({"training__steps": 30}, {"training__steps": 11}),
    "an annealed mask": (
        {"growth__b_0": 4, "recipe__annealed_mask_steps": 9, "optimizer__schedule": "constant"},
        {"training__steps": 15},
    ),
}


@pytest.mark.parametrize("what", AS_BEGUN)
def test_steps_and_schedule_that_change_leave_the_weights_of_a_run_that_began_with_them(place, tmp_path, what):
    before, after = AS_BEGUN[what]
    train(config_of(place, tmp_path / "begun", **(before | after)))
    stopped_run(place, tmp_path / "changed", 7, **before)
    train(config_of(place, tmp_path / "changed", **(before | after)), resume=True)
    assert weights(tmp_path / "changed") == weights(tmp_path / "begun")


def test_a_finished_run_at_a_constant_rate_goes_on(place, tmp_path):
    constant = {"optimizer__schedule": "constant"}
    train(config_of(place, tmp_path / "begun", **constant))
    train(config_of(place, tmp_path / "run", training__steps=9, **constant))
    train(config_of(place, tmp_path / "run", **constant), resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "begun")
    assert [record["step"] for record in read_log(tmp_path / "run" / "log.jsonl")] == list(range(12))


def test_a_lower_rate_holds_for_the_steps_to_come(place, tmp_path, monkeypatch):
    stopped_run(place, tmp_path / "changed", 7)  # the last checkpoint: after 6 steps
    now = config_of(place, tmp_path / "changed", optimizer__lr=1e-3)
    rates: list[float] = []
    train(now, resume=True, on_step=lambda metrics: rates.append(metrics.learning_rate))
    real = schedules.learning_rate

    def bent(step: int, optimizer: Any, steps: int) -> float:
        return real(step, optimizer if step < 6 else now.optimizer, steps)

    with monkeypatch.context() as patch:
        patch.setattr(schedules, "learning_rate", bent)
        train(config_of(place, tmp_path / "bent"))
    assert weights(tmp_path / "changed") == weights(tmp_path / "bent")
    assert rates == [real(step, now.optimizer, 12) for step in range(6, 12)]


def test_moved_data_leave_the_weights_and_other_data_are_refused(place, tmp_path, undisturbed):
    run, moved, other = tmp_path / "run", tmp_path / "moved.jsonl", tmp_path / "other.jsonl"
    shutil.copy(place / "sums.jsonl", moved)
    other.write_text(moved.read_text().replace("plus", "PLUS"))
    stopped_run(place, run, 7)
    with pytest.raises(UsageError, match=r"other.jsonl holds other text than when the run was stopped"):
        train(config_of(place, run, data__sources=[{"path": str(other)}]), resume=True)
    train(config_of(place, run, data__sources=[{"path": str(moved)}]), resume=True)
    assert weights(run) == undisturbed[0]


def test_documents_added_to_a_file_are_told_once_and_a_kill_behind_that_changes_nothing(place, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_ROWS", 4)
    monkeypatch.setattr(stream, "MOST_ROWS", 4)
    rows = [json.dumps({"text": f"{n} plus one."}) + "\n" for n in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(rows[:16]))
    sources = {"data__sources": [{"path": str(tmp_path / "data.jsonl")}], "data__shards": 2}
    stopped_run(place, tmp_path / "one", 3, **sources)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "data.jsonl").write_text("".join(rows))
    train(config_of(place, tmp_path / "one", **sources), resume=True)
    (record,) = read_log(tmp_path / "one" / "log.jsonl", "resume")
    assert record["step"] == 2
    assert re.fullmatch(r"data\.sources\.0 had 16 documents, has 24: .* come in with its epoch \d", *record["changes"])

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config_of(place, tmp_path / "two", **sources), resume=True, on_step=stop)
    train(config_of(place, tmp_path / "two", **sources), resume=True)
    assert len(read_log(tmp_path / "two" / "log.jsonl", "resume")) == 1
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_the_log_and_the_report_tell_what_was_changed_once_whatever_is_resumed_again(place, tmp_path):
    stopped_run(place, tmp_path, 7)
    changed = {"optimizer__lr": 1e-3, "training__steps": 13}

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # before the next checkpoint: the change is taken again
        train(config_of(place, tmp_path, **changed), resume=True, on_step=stop)
    train(config_of(place, tmp_path, **changed), resume=True)
    (record,) = read_log(tmp_path / "log.jsonl", "resume")
    said = ["optimizer.lr was 0.003, is 0.001", "training.steps was 12, is 13"]
    assert record == {"kind": "resume", "step": 6, "changes": said}
    page = write_report({"log": "log.jsonl"}, tmp_path).read_text()
    assert all(f"{change}" in page for change in said)
    train(config_of(place, tmp_path, **changed, training__keep_last=3), resume=True)
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl", "resume")] == [6, 13]


def poison(monkeypatch: pytest.MonkeyPatch, token: int) -> None:
    """A row with this token has no finite loss."""
    real = TwoViewLoss.forward

    def forward(self: Any, view: Any, *rest: Any, **more: Any) -> LossSums:
        sums = real(self, view, *rest, **more)
        return sums._replace(ar=sums.ar * torch.nan) if bool((view.tokens == token).any()) else sums

    monkeypatch.setattr(TwoViewLoss, "forward", forward)


def test_rows_without_a_finite_loss_are_named_and_left_out(place, tmp_path, monkeypatch):
    poison(monkeypatch, *byte_tokenizer()("~", add_special_tokens=False).input_ids)
    texts = [{"text": f"{n} plus one is {n + 1}.{' ~' * (n == 70)}"} for n in range(120)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    options = {
        "data__sources": [{"path": str(tmp_path / "data.jsonl")}],
        "training__steps": 40,
        "optimizer__schedule": "constant",
    }
    with pytest.raises(UsageError, match=r"are not finite \(rows \[\d+\]\)") as stopped:
        train(config_of(place, tmp_path / "run", **options))
    said = str(stopped.value)
    assert said.endswith("and go on with --resume auto")
    skip = json.loads(said.partition("training.skip_rows=")[2].partition("]")[0] + "]")
    assert len(skip) == 1
    options |= {"training__steps": max(9, skip[0] // 4 + 3), "training__skip_rows": skip}
    for output in ("run", "begun"):
        train(config_of(place, tmp_path / output, **options), resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "begun")


def test_a_batch_whose_rows_are_all_left_out_changes_nothing_but_what_the_optimizer_carries_on(place, tmp_path):
    done: list[StepMetrics] = []
    train(
        config_of(place, tmp_path, training__skip_rows=[4, 5, 6, 7, 9], training__micro_batch_rows=2),
        on_step=done.append,
    )
    assert (done[1].loss, done[1].grad_norm) == (0, 0)
    assert all(metrics.grad_norm > 0 for metrics in (done[0], *done[2:]))
