"""The loop: one normalisation (identity 8), the same weights after any kill (identity 9), one pinned loss."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate.utils import is_bnb_available
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import VOCABULARY
from families import tiny_model
from layouts import CHAT, PLAIN, PROMPTED, make_rows
from limits import largest_file
from nextblock.config.errors import UsageError
from nextblock.config.run import AdaptConfig, load_config
from nextblock.config.sections import Source
from nextblock.data.rows import Rows, check_tokens
from nextblock.data.sources import Records, read_source
from nextblock.data.stream import is_held_out
from nextblock.model.loading import load_tokenizer, read_config, read_settings
from nextblock.model.parent import byte_tokenizer
from nextblock.model.probe import without_dropout
from nextblock.training.checkpoint import list_checkpoints, newest_whole_checkpoint
from nextblock.training.loop import train
from nextblock.training.resume import save, trim_log
from nextblock.training.run import StepMetrics
from nextblock.training.setup import prepare
from nextblock.training.step import train_step
from nextblock.workflows.adapt import adapt


def config_of(place: Path, output: Path, **overrides: Any) -> AdaptConfig:
    values = {
        "model": {"path": str(place / "llama"), "tokenizer": "bytes"},
        "data": {"sources": [{"path": str(place / "sums.jsonl")}], "row_length": 32, "held_out": 0.0},
        "growth": {"b_max": 4, "delta": 4},
        "optimizer": {"lr": 3e-3, "warmup_steps": 2},
        "training": {"steps": 12, "batch_rows": 4, "checkpoint_every": 2, "evaluate_rows": 0},
        "output": str(output),
    }
    return load_config(values, {key.replace("__", "."): value for key, value in overrides.items()})


# ------------------------------------------------------------------------------- one step


class GivenRows:
    """A stream that always gives the same rows."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def peek(self) -> Rows:
        return self.rows

    next = peek


class KeepGradients:
    """In the optimizer's place: remembers the gradients and leaves the weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.param_groups: list[dict[str, Any]] = []

    def step(self) -> None:
        self.gradients = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def zero_grad(self) -> None:
        self.model.zero_grad()


def step_in_float64(config: AdaptConfig, rows: Rows, step: int) -> tuple[StepMetrics, list[Tensor]]:
    run: Any = prepare(config)
    run.decoder.model.double()
    run.feed, run.optimizer = GivenRows(rows), KeepGradients(run.decoder.model)
    return train_step(run, step), run.optimizer.gradients


@pytest.mark.parametrize("step", [0, 5, 11])  # block sizes 1, 2 and 4
def test_loss_and_gradients_do_not_depend_on_the_split_into_micro_batches(place, tmp_path, step):
    rows = make_rows([PLAIN, PROMPTED, CHAT, [[28]], [[3]], [[-20, 2]]], 32)
    splits = []
    for size in (None, 1, 2, 4):
        config = config_of(
            place, tmp_path, training__batch_rows=6, training__micro_batch_rows=size, optimizer__grad_clip=1e9
        )
        splits.append(step_in_float64(config, rows, step))
    whole, wanted = splits[0]
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for metrics, gradients in splits[1:]:
        assert metrics.loss == pytest.approx(whole.loss, rel=1e-6)
        assert metrics.tokens == whole.tokens == int((rows.offset >= 0).sum())
        for ours, theirs in zip(gradients, wanted, strict=True):
            # The norms and rotary angles of the model are float32 inside, whatever its dtype.
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7 * scale)


def test_with_soft_targets_too_the_split_into_micro_batches_does_not_enter(place, tmp_path):
    rows = make_rows([PLAIN, PROMPTED, CHAT, [[28]], [[3]], [[-20, 2]]], 32, ended=True)
    options: dict[str, Any] = {"training__batch_rows": 6, "optimizer__grad_clip": 1e9, "recipe__views": 2}
    results = [
        step_in_float64(
            config_of(place, tmp_path, **options, training__micro_batch_rows=n, recipe__soft_weight=w), rows, 11
        )
        for n, w in ((None, 0.7), (2, 0.7), (None, 0.0))
    ]
    (whole, wanted), (split, found), (without, _) = results
    assert whole.loss == pytest.approx(split.loss, rel=1e-6)
    scale = max(float(gradient.abs().max()) for gradient in wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7 * scale)
    masked = (without.loss * without.tokens - 0.5 * without.ar_loss * ar_count(rows)) / without.diffusion_loss * 2
    assert whole.loss - without.loss == pytest.approx(0.7 * whole.soft_loss * masked / (2 * whole.tokens), rel=1e-4)
    assert math.isnan(without.soft_loss)


def ar_count(rows: Rows) -> int:
    return int(((rows.offset[:, 1:] >= 0) & (rows.document[:, 1:] == rows.document[:, :-1])).sum())


def test_a_step_reports_the_mean_losses_and_their_weighted_sum_over_n(place, tmp_path):
    rows = make_rows([PLAIN, PROMPTED, CHAT, [[28]]], 32)
    metrics, _ = step_in_float64(config_of(place, tmp_path), rows, 11)
    assert metrics.block_size == 4
    assert metrics.ar_weight == 0.5
    ar_tokens = sum(n - 1 for n in (13, 6, 1, 5, 28)) + sum((9, 4)) + sum((6, 7))
    masked = (metrics.loss * metrics.tokens - 0.5 * metrics.ar_loss * ar_tokens) / metrics.diffusion_loss
    assert masked == pytest.approx(round(masked), abs=1e-3)
    assert 0 < masked < metrics.tokens


def test_a_non_finite_loss_stops_before_the_update_and_names_the_rows(place, tmp_path):
    run: Any = prepare(config_of(place, tmp_path))
    with torch.no_grad():
        run.decoder.model.model.norm.weight[0] = torch.inf
    before = {name: value.clone() for name, value in run.decoder.model.state_dict().items()}
    with pytest.raises(UsageError, match=r"step 3: loss nan .* not finite \(rows \[0, 1, 2, 3\]\)"):
        train_step(run, 3)
    for name, value in run.decoder.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_non_finite_loss_is_told_by_the_step_of_the_run_whatever_the_stage(place, tmp_path):
    run: Any = prepare(config_of(place, tmp_path))
    run.first_step = 20
    with torch.no_grad():
        run.decoder.model.model.norm.weight[0] = torch.inf
    with pytest.raises(UsageError, match="step 23: loss nan"):
        train_step(run, 3)


DROPOUT: dict[str, Any] = {
    "attention_dropout": 0.5,
    "hidden_dropout": 0.5,
    "resid_pdrop": 0.5,
    "embd_pdrop": 0.5,
    "attn_pdrop": 0.5,
}


def test_without_dropout_a_model_in_train_mode_gives_what_it_gives_in_eval_mode(family):
    model = tiny_model(family, **DROPOUT)
    tokens = make_rows([[[20]]], 20).tokens
    with torch.no_grad():
        wanted = model(tokens).logits
        without_dropout(model)
        torch.testing.assert_close(model.train()(tokens).logits, wanted, rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------- a short run


PINNED = {"first": 2.6018, "last": 2.5306, "last_diffusion": 2.8508, "last_ar": 2.6502}


def test_the_loss_of_a_short_adaptation_is_pinned(place, tmp_path):
    """20 steps with growth 1 -> 2 -> 4: any change of data order, noise, mask, loss or update moves these."""
    metrics: list[StepMetrics] = []
    config = config_of(place, tmp_path / "run", growth__delta=5, training__steps=20)
    train(config, on_step=metrics.append)
    assert [m.block_size for m in metrics] == [1] * 5 + [2] * 5 + [4] * 10
    assert metrics[0].loss == pytest.approx(PINNED["first"], abs=1e-3)
    assert metrics[-1].loss == pytest.approx(PINNED["last"], abs=1e-3)
    assert metrics[-1].diffusion_loss == pytest.approx(PINNED["last_diffusion"], abs=3e-3)
    assert metrics[-1].ar_loss == pytest.approx(PINNED["last_ar"], abs=3e-3)
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in logged] == [m.loss for m in metrics]


def test_a_run_leaves_a_folder_that_is_an_ordinary_model_with_its_settings(place, tmp_path):
    run = train(config_of(place, tmp_path, training__steps=9))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    trained = run.decoder.model.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, trained[name]), name
    settings, tokenizer = read_settings(read_config(tmp_path)), load_tokenizer(tmp_path)
    assert settings is not None
    assert tokenizer is not None
    assert (settings.block_size, settings.mask_token_id) == (4, tokenizer.mask_token_id)
    assert plain.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_resolved_configuration_is_saved_and_makes_the_same_run(place, tmp_path):
    config = config_of(place, tmp_path / "a", training__steps=9)
    train(config)
    assert load_config(tmp_path / "a" / "nextblock.yaml") == config
    train(load_config(tmp_path / "a" / "nextblock.yaml", {"output": str(tmp_path / "b")}))
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


SCRATCH = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_a_parent_from_scratch_is_a_function_of_the_seed(place, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(random.randrange(2**31))
        train(config_of(place, tmp_path / name, model__scratch=SCRATCH, training__seed=seed, training__steps=9))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


def test_a_full_output_folder_is_refused_and_left_as_it_is(place, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="is not empty"):
        train(config_of(place, tmp_path))
    with pytest.raises(UsageError, match=r"is not that of a run \(nextblock.yaml is missing\)"):
        train(config_of(place, tmp_path), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


BAD = {
    "a mask token outside the vocabulary": ({"model.mask_token": 999}, "is outside the vocabulary"),
    "a mask token used in the data": ({"model.mask_token": ord("p") - 33}, "is used in the data"),
    "a row over the model's positions": ({"data.row_length": 1024}, "is over the model's 512 positions"),
    "a missing model": ({"model.path": "./absent"}, "does not exist"),
    "a model with another vocabulary": (
        {"model.scratch": SCRATCH | {"vocab_size": 70}},
        "the tokenizer has 257 tokens, the model's vocabulary 70; use the tokenizer that belongs to the model",
    ),
    "an optimizer that is not installed": (
        {"optimizer.name": "adamw_8bit"},
        "optimizer.name=adamw_8bit needs bitsandbytes; pip install bitsandbytes, or use adamw",
    ),
    "a missing source": ({"data.sources.0.path": "./absent.jsonl"}, "absent.jsonl"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_stops_with_one_line_and_leaves_no_folder(place, tmp_path, monkeypatch, what):
    overrides, said = BAD[what]
    monkeypatch.setattr("nextblock.training.setup.is_bnb_available", lambda: False)
    config = config_of(place, tmp_path / "run", **{k.replace(".", "__"): v for k, v in overrides.items()})
    with pytest.raises(UsageError) as refused:
        train(config)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_what_ends_a_turn_is_no_mask_token(place, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|turn|>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = config_of(
        place, tmp_path / "run", model__tokenizer=str(tmp_path / "tokenizer"), model__mask_token="<|turn|>"
    )
    with pytest.raises(UsageError, match="mask token id 257 ends the turns of the chat template"):
        train(config)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------- kill and resume


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def run_to_the_end(values: Mapping[str, Any], kill_in: str | None = None, after: int = 0) -> None:
    """Body of a training process; kills itself at the (`after` + 1)-th call of the function `kill_in`, if given."""
    torch.set_num_threads(1)
    if kill_in is not None:
        module, name = kill_in.rsplit(".", 1)
        owner: Any = __import__(module, fromlist=[name])
        real, calls = getattr(owner, name), []

        def doomed(*args: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) > after:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(owner, name, doomed)
    train(load_config(values), resume=True)


def start(processes: Any, config: AdaptConfig, *how: Any) -> BaseProcess:
    process = processes.Process(target=run_to_the_end, args=(config.model_dump(mode="json"), *how))
    process.start()
    return process


@pytest.fixture(scope="module")
def undisturbed(place, processes, tmp_path_factory) -> tuple[bytes, float]:
    """(final weights, seconds) of a run that nothing stops."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    start(processes, config_of(place, output, training__steps=9)).join()  # the first start imports everything
    began = time.perf_counter()
    output = output.with_name("timed")
    process = start(processes, config_of(place, output))
    process.join()
    assert process.exitcode == 0
    return weights(output), time.perf_counter() - began


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
        ("nextblock.training.checkpoint.save_file", 1),
        ("torch.save", 2),
        ("nextblock.training.checkpoint._flush", 6),  # between two files of the second save
        ("os.replace", 3),
        ("nextblock.training.output.export", 0),
        ("shutil.rmtree", 4),  # before the oldest checkpoint goes; the first is of a temporary folder
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


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_ends_with_status_0(place, processes, undisturbed, tmp_path):
    output = tmp_path / "run"
    config = config_of(place, output, training__checkpoint_every=1000)
    process = start(processes, config)
    while not (output / "log.jsonl").exists() or not (output / "log.jsonl").read_text():
        time.sleep(0.002)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 0
    (saved,) = list_checkpoints(output)
    assert 0 < int(saved.name.removeprefix("step-")) < 12
    assert not (output / "model.safetensors").exists()
    train(config, resume=True)
    assert weights(output) == undisturbed[0]


def stopped_run(place: Path, output: Path, steps: int, **overrides: Any) -> AdaptConfig:
    """A run that ended by an error of the caller after `steps` steps."""
    config = config_of(place, output, **overrides)

    def stop(metrics: StepMetrics) -> None:
        if metrics.step + 1 == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=stop)
    return config


def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    place, tmp_path, undisturbed, capsys
):
    config = stopped_run(place, tmp_path, 7)
    before, newest = list_checkpoints(tmp_path)
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    done: list[int] = []
    train(config, resume=True, on_step=lambda metrics: done.append(metrics.step))
    said = capsys.readouterr().out
    assert f"checkpoint {newest} is damaged (model.safetensors has changed); going on from {before.name}" in said
    assert done == list(range(int(before.name.removeprefix("step-")), 12))
    assert weights(tmp_path) == undisturbed[0]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again_over_its_model(place, tmp_path):
    config = config_of(place, tmp_path, training__steps=9)
    train(config)
    before, log = weights(tmp_path), (tmp_path / "log.jsonl").read_bytes()
    saved = list_checkpoints(tmp_path)
    assert len(saved) == 2
    for folder in saved:
        (folder / "optimizer.pt").unlink()
    with pytest.raises(UsageError) as refused:
        train(config, resume=True)
    said = str(refused.value)
    assert all(f"checkpoint {folder} is damaged (optimizer.pt is missing)" in said for folder in saved)
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


def test_a_source_that_has_grown_since_is_not_read_in_another_order(place, tmp_path):
    source = tmp_path / "own.jsonl"
    source.write_text((place / "sums.jsonl").read_text() + "\n")
    options = {"data__sources": [{"path": str(source)}]}
    stopped_run(place, tmp_path / "run", 5, **options)
    source.write_text(source.read_text() + '{"text": "one more"}\n')
    with pytest.raises(UsageError, match=r"own.jsonl had \d+ documents and has \d+, so its order would be another"):
        train(config_of(place, tmp_path / "run", **options), resume=True)


def test_held_out_documents_that_cannot_be_read_stop_the_run_before_it_begins(place, tmp_path):
    path = tmp_path / "all.jsonl"
    chats = [json.dumps({"messages": [{"role": "assistant", "name": str(i)}]}) for i in range(60)]
    path.write_text("\n".join(chats))
    read = cast(Records, read_source(Source(path=str(path)))).read
    lines = [
        chat if is_held_out(read(i), 0.2) else json.dumps({"text": f"{i} and {i}"}) for i, chat in enumerate(chats)
    ]
    path.write_text("\n".join(lines))
    options = {"data__sources": [{"path": str(path)}], "data__held_out": 0.2, "training__evaluate_rows": 4}
    with pytest.raises(UsageError, match=r"all.jsonl:\d+: message 1 has no content"):
        train(config_of(place, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_more_positions_are_offered_only_where_they_are_not_learned(family, place, tmp_path):
    tiny_model(family, vocab_size=VOCABULARY).save_pretrained(tmp_path / family)
    config = config_of(place, tmp_path / "run", model__path=str(tmp_path / family), data__row_length=4096)
    with pytest.raises(UsageError, match="is over the model's") as refused:
        train(config)
    assert ("model.override.max_position_embeddings" in str(refused.value)) == (family == "llama")


@pytest.mark.skipif(not is_bnb_available(), reason="needs bitsandbytes")
def test_a_stopped_run_with_8_bit_states_goes_on_to_the_same_weights(place, tmp_path):
    train(config_of(place, tmp_path / "whole", optimizer__name="adamw_8bit"))
    stopped_run(place, tmp_path / "stopped", 5, optimizer__name="adamw_8bit")
    train(config_of(place, tmp_path / "stopped", optimizer__name="adamw_8bit"), resume=True)
    assert weights(tmp_path / "stopped") == weights(tmp_path / "whole")


def test_the_exported_dtype_is_the_one_asked_for(place, tmp_path):
    train(config_of(place, tmp_path, training__steps=9, model__export_dtype="bfloat16"))
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_the_log_is_json_that_strict_readers_take(place, tmp_path):
    train(config_of(place, tmp_path / "run", training__steps=9))
    assert "NaN" not in (tmp_path / "run" / "log.jsonl").read_text()


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


def write_parent(place: Path, folder: Path, **generation: Any) -> str:
    """A copy of the parent with this `generation_config.json`."""
    shutil.copytree(place / "llama", folder)
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return str(folder)


GREEDY = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 256}


def test_a_greedy_config_with_sampling_values_is_exported_without_them_and_with_one_line(place, tmp_path):
    parent = write_parent(place, tmp_path / "parent", **GREEDY)
    with pytest.warns(UserWarning, match=r"sets temperature=0.9, top_p=0.6, which .* \(do_sample=False\)"):
        train(config_of(place, tmp_path / "run", model__path=parent, training__steps=9))
    written = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert (written["do_sample"], written["eos_token_id"], written["pad_token_id"]) == (False, 256, 256)
    assert not {"temperature", "top_p"} & written.keys()


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


# ------------------------------------------------------------------------------- what a run that ends early leaves


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The rows of this step hold what the run refuses."""
    real, taken = check_tokens, []

    def check(rows: Rows, *rest: Any) -> None:
        taken.append(rows)
        if len(taken) > step + 1:  # one look at them comes before the run
            raise UsageError("all.jsonl:77: message 1 has no content")
        real(rows, *rest)

    monkeypatch.setattr("nextblock.training.step.check_tokens", check)


def test_bad_data_in_mid_run_leave_the_log_and_a_checkpoint_of_the_steps_until_there(
    place, tmp_path, monkeypatch, undisturbed
):
    config = config_of(place, tmp_path / "run", training__checkpoint_every=1000)
    with monkeypatch.context() as patch:
        fail_at(patch, 5)
        with pytest.raises(UsageError, match=r"no content; .*step-00000005 holds the steps until here"):
            train(config)
        assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 5
        fail_at(patch, 0)
        with pytest.raises(UsageError, match=r"no content; .*step-00000005 holds"):  # as long as nothing is mended
            train(config, resume=True)
    train(config, resume=True)
    assert weights(tmp_path / "run") == undisturbed[0]


def test_bad_data_before_the_first_step_leave_no_folder(place, tmp_path, monkeypatch):
    fail_at(monkeypatch, 0)
    with pytest.raises(UsageError, match="no content"):
        train(config_of(place, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


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
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 6
    assert newest_whole_checkpoint(tmp_path / "run") == (None, [])
    train(config, resume=True)
    assert weights(tmp_path / "run") == undisturbed[0]


def test_a_run_in_the_same_folder_is_refused_while_one_goes_on_and_taken_when_it_was_killed(
    place, processes, tmp_path, undisturbed
):
    config = config_of(place, tmp_path / "run")
    first = start(processes, config, "nextblock.training.loop.train_step", 4)  # dies at its fifth step
    while first.is_alive() and not (tmp_path / "run" / ".lock").exists():
        time.sleep(0.001)
    os.kill(first.pid or 0, signal.SIGSTOP)
    try:
        assert first.is_alive()
        with pytest.raises(UsageError, match=rf"is in use by process {first.pid} on {socket.gethostname()}; wait"):
            train(config, resume=True)
    finally:
        os.kill(first.pid or 0, signal.SIGCONT)
    first.join()
    assert (tmp_path / "run" / ".lock").exists()  # of a dead process: nobody's
    train(config, resume=True)
    assert weights(tmp_path / "run") == undisturbed[0]
    assert not (tmp_path / "run" / ".lock").exists()


def test_the_seconds_of_a_run_are_those_of_checkpoints_and_evaluations_too(place, tmp_path, monkeypatch):
    def slowly(run: Any) -> None:
        time.sleep(0.3)
        save(run)

    monkeypatch.setattr("nextblock.training.loop.save", slowly)
    options = {"training__steps": 9, "training__checkpoint_every": 3}
    config = config_of(place, tmp_path / "run", **options)
    seconds = adapt(config, resume=True).results["training"]["seconds"]
    steps = sum(json.loads(line)["step_seconds"] for line in (tmp_path / "run" / "log.jsonl").open())
    assert seconds > steps + 3 * 0.3


def signal_at(metrics, step):
    if metrics.step == step:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("attention", "views"), [("eager", 1), ("eager", 2), ("sdpa", 1)])
def test_a_dense_mask_is_named_with_its_memory_before_it_is_made(
    place, tmp_path, capsys, monkeypatch, attention, views
):
    class Begun(Exception):
        pass

    def begun(self: Any, *parts: Any) -> None:
        raise Begun

    monkeypatch.setattr("nextblock.model.decoder.Decoder.two_view_masks", begun)
    monkeypatch.setattr(
        "nextblock.training.loop.run_in_parts", lambda decoder: None
    )  # whose trial is over four tokens
    monkeypatch.setattr("nextblock.training.setup.probe", lambda decoder: None)
    options = {"recipe__views": views, "training__micro_batch_rows": 2, "data__row_length": 512}
    config = config_of(place, tmp_path / "run", growth__b_0=2, **options)
    with pytest.raises(Begun):
        train(config)
    size = 2 * ((views + 1) * config.data.row_length) ** 2 * 4 / 2**20
    assert f"attention: 'sdpa' with a dense mask, up to {size:,.0f} MiB" in capsys.readouterr().out


def test_what_may_change_on_resume_is_said(place, tmp_path, capsys):
    train(config_of(place, tmp_path / "run", training__steps=9), on_step=lambda m: signal_at(m, 1))
    train(config_of(place, tmp_path / "run", training__steps=9, training__micro_batch_rows=2), resume=True)
    assert "resuming: training.micro_batch_rows was None, is 2" in capsys.readouterr().out
