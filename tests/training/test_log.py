"""What is measured beside the loss: its profile token by token, useful operations, held-out evaluation, trackers."""

from __future__ import annotations

import importlib.util
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import accelerate.tracking
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from families import EOS_ID, MASK_ID, nested_model, tiny_model
from layouts import CHAT, PLAIN, PROMPTED, make_rows
from nextblock.attention.rule import block_diffusion_rule
from nextblock.cli.live import TrainingBar
from nextblock.config.errors import UsageError
from nextblock.config.run import load_config
from nextblock.config.sections import RecipeConfig
from nextblock.model.decoder import Decoder
from nextblock.recipe.corruption import corrupt
from nextblock.recipe.objective import TwoViewLoss
from nextblock.training.flops import Products
from nextblock.training.log import NOISE_LEVELS, LossProfile, read_log, scalars, trim_log
from nextblock.training.loop import train
from nextblock.training.run import StepMetrics
from nextblock.training.setup import prepare
from nextblock.workflows.adapt import adapt
from nextblock.workflows.held_out import first_prompt


def test_products_are_those_of_the_text_model_where_images_come_with_it():
    assert Products.of(nested_model(9)) == Products.of(tiny_model("gemma3"))


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
@torch.no_grad()
def test_a_profile_holds_each_masked_tokens_loss_once_by_noise_level_and_by_offset(prediction):
    model, block_size, shifted = tiny_model("llama"), 4, prediction == "shifted"
    rows = make_rows([PLAIN, PROMPTED, CHAT], 28)
    recipe = RecipeConfig(prediction=prediction, fill_last_block=False, views=2)
    view = corrupt(rows, block_size, mask_token_id=MASK_ID, end_token_id=EOS_ID, recipe=recipe, seed=1, step=0)
    decoder, rule, n = Decoder(model), block_diffusion_rule(), view.noised_length
    losses = TwoViewLoss(decoder)(view, rule, profile=True)
    assert losses.nats is not None
    profile = LossProfile(block_size, torch.device("cpu"))
    profile.add(view.masked, losses.nats)
    record = profile.record(Accelerator(), 7)
    assert record is not None

    logits = decoder.logits(decoder.hidden(view.tokens, view.places.position, decoder.masks(rule, view.places)))
    noise: dict[int, list[float]] = {}
    offset: dict[int, list[float]] = {}
    blocks: dict[tuple[int, ...], list[int]] = {}
    for row in range(len(rows)):
        for slot in range(n):
            place = tuple(int(getattr(view.places, name)[row, slot]) for name in ("view", "document", "block_start"))
            blocks.setdefault((row, *place), []).append(slot)
    for (row, _, document, start), slots in blocks.items():
        masked = [slot for slot in slots if view.tokens[row, slot] == MASK_ID and document >= 0]
        for slot in masked:
            at = int(view.places.position[row, slot])
            token = rows.tokens[row][(rows.document[row] == document) & (rows.position[row] == at)]
            nats = -float(logits[row, slot - 1 if shifted else slot].log_softmax(-1)[token])
            share = len(masked) / (len(slots) - int(shifted))
            level = next(k for k in range(NOISE_LEVELS) if share <= (k + 1) / NOISE_LEVELS)
            noise.setdefault(level, []).append(nats)
            offset.setdefault(at - start, []).append(nats)
    for name, found, buckets in (("noise", noise, NOISE_LEVELS), ("offset", offset, block_size)):
        assert record[f"tokens_by_{name}"] == [len(found.get(k, [])) for k in range(buckets)]
        means = [sum(found[k]) / len(found[k]) if k in found else None for k in range(buckets)]
        assert record[f"loss_by_{name}"] == [None if m is None else pytest.approx(m, rel=1e-4) for m in means]
    assert sum(record["tokens_by_noise"]) == int(losses.diffusion_tokens)


def test_useful_operations_are_those_that_run_less_the_pairs_that_may_not_look():
    length = 24
    model: Any = tiny_model("llama")
    model.set_attn_implementation("eager")  # its products are counted one by one
    rows = make_rows([[[length]]], length)
    view = corrupt(rows, 1, mask_token_id=MASK_ID, end_token_id=EOS_ID, recipe=RecipeConfig(), seed=0, step=0)
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model(input_ids=rows.tokens, use_cache=False).last_hidden_state
        model.lm_head(hidden[:, :-1]).logsumexp(-1).sum().backward()  # at b = 1: plain AR training
    width, layers = 32, 2
    unseen = length * length - length * (length + 1) // 2
    ran = counter.get_total_flops() - 3 * 4 * width * layers * unseen
    assert Products.of(model).of_view("full", view, score_ar=True).useful == ran


# ------------------------------------------------------------------------------- a short run


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    tiny_model("llama", vocab_size=260, std=0.08).save_pretrained(folder)
    return folder


def config_of(parent: Path, output: Path, **training: Any) -> Any:
    values = {
        "model": {"path": str(parent), "tokenizer": "bytes"},
        "data": {"sources": [{"path": "task:algebra", "examples": 200}], "row_length": 64, "held_out": 0.2},
        "growth": {"b_max": 4, "delta": 2},
        "training": {"steps": 6, "batch_rows": 2, "checkpoint_every": 3, "evaluate_rows": 2, **training},
        "output": str(output),
    }
    return load_config(values)


def test_profiles_and_evaluations_stand_in_the_log_and_change_nothing_that_is_trained(parent, tmp_path):
    seen: list[Any] = []
    watched = config_of(parent, tmp_path / "watched", evaluate_every=2, profile_every=2)
    result = adapt(watched, on_evaluation=seen.append)
    train(config_of(parent, tmp_path / "alone"))
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("watched", "alone"))
    assert one == other

    log = tmp_path / "watched" / "log.jsonl"
    assert [step["step"] for step in read_log(log)] == list(range(6))
    evaluations, profiles = read_log(log, "evaluation"), read_log(log, "profile")
    assert [(e["step"], e["block_size"]) for e in evaluations] == [(1, 1), (3, 2), (5, 4)]
    assert [(p["step"], p["block_size"]) for p in profiles] == [(3, 2), (5, 4)]  # at b = 1 nothing is masked
    assert [record["sample"] for record in seen] == [e["sample"] for e in evaluations]
    assert all(e["prompt"] and e["ar_loss"] > 0 for e in evaluations)
    for step, profile in zip((3, 5), profiles, strict=True):
        total = sum(p * t for p, t in zip(profile["loss_by_noise"], profile["tokens_by_noise"], strict=True) if t)
        mean = total / sum(profile["tokens_by_noise"])
        assert mean == pytest.approx(read_log(log)[step]["diffusion_loss"], rel=1e-4)
    assert result.results["training"]["tokens"] == sum(step["tokens"] for step in read_log(log))
    assert "by masked share" in (tmp_path / "watched" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("section", ["lora", "draft_adapter"])
def test_adapters_are_evaluated_while_they_train_and_change_by_it_as_little(parent, tmp_path, section):
    pytest.importorskip("peft")
    saved = "adapter/adapter_model.safetensors" if section == "lora" else "adapter_model.safetensors"
    weights = []
    for name, every in (("watched", 3), ("alone", None)):
        plain = config_of(parent, tmp_path / name, evaluate_every=every, profile_every=3).model_dump()
        config = load_config(plain, {section: {"rank": 2, "dropout": 0.1}, "growth.b_0": 4})
        assert adapt(config).results["bits_per_byte"]
        weights.append((tmp_path / name / saved).read_bytes())
    assert weights[0] == weights[1]
    evaluations = read_log(tmp_path / "watched" / "log.jsonl", "evaluation")
    assert [(e["step"], e["block_size"]) for e in evaluations] == [(2, 4), (5, 4)]
    assert all(e["diffusion_loss"] > 0 for e in evaluations)
    assert len(read_log(tmp_path / "watched" / "log.jsonl", "profile")) == 2


def test_a_resumed_log_has_each_record_once(parent, tmp_path):
    config = config_of(parent, tmp_path, profile_every=1)

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=stop)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "blo')  # as a killed run leaves it
    train(config, resume=True)
    assert [step["step"] for step in read_log(tmp_path / "log.jsonl")] == list(range(6))
    assert [step["step"] for step in read_log(tmp_path / "log.jsonl", "profile")] == [2, 3, 4, 5]


def test_trimming_keeps_every_kind_of_record_of_the_steps_that_stay(tmp_path):
    records = [
        {"step": 0},
        {"step": 0, "kind": "profile"},
        {"step": 1},
        {"step": 1, "kind": "evaluation"},
        {"step": 2},
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    trim_log(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == records[:4]


def test_the_sample_continues_a_prompt_or_the_beginning_of_a_text():
    assert len(first_prompt(make_rows([PROMPTED], 28))) == 5
    assert len(first_prompt(make_rows([[[20]]], 28))) == 10
    assert len(first_prompt(make_rows([[[1]]], 28))) == 1


def test_the_training_bar_prints_an_evaluation_with_its_sample():
    console = Console(file=io.StringIO(), width=80, record=True)
    record = {"block_size": 4, "diffusion_loss": 1.5, "ar_loss": math.nan, "prompt": "[1] + ", "sample": "[/b] 2"}
    TrainingBar(3, console=console).evaluated(record)
    text = console.export_text()
    assert "held out, block 4: diffusion loss 1.500\n" in text
    assert "[1] + [/b] 2" in text


# ------------------------------------------------------------------------------- trackers


class FakeTracker(GeneralTracker):
    """Stands in for TensorBoard: keeps what it is given."""

    name = "tensorboard"
    requires_logging_directory = True
    made: ClassVar[list[Any]] = []

    def __init__(self, run_name: str, logging_dir: str, **options: Any) -> None:
        super().__init__()
        self.where, self.finished = (run_name, logging_dir), False
        self.logged: dict[int, dict[str, Any]] = {}
        FakeTracker.made.append(self)

    @property
    def tracker(self) -> Any:
        return self

    def start(self) -> None:
        """Nothing to open."""

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None, **options: Any) -> None:
        self.logged.setdefault(step or 0, {}).update(values)

    def finish(self) -> None:
        self.finished = True


def test_a_tracker_gets_every_number_of_the_log_and_is_closed(parent, tmp_path, monkeypatch):
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", FakeTracker)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin="here"))
    train(config_of(parent, tmp_path, trackers=["tensorboard"], profile_every=2))
    fake = FakeTracker.made[-1]
    assert fake.finished
    assert fake.where == ("nextblock", str(tmp_path / "trackers"))
    assert fake.config["growth.b_max"] == 4
    for record in [*read_log(tmp_path / "log.jsonl"), *read_log(tmp_path / "log.jsonl", "profile")]:
        assert scalars(record).items() <= fake.logged[record["step"]].items()
    assert {"loss", "device_tokens_per_second", "profile/loss_by_offset/1"} <= fake.logged[3].keys()


def test_a_run_in_stages_is_one_run_of_a_tracker_whose_steps_go_on(parent, tmp_path, monkeypatch):
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", FakeTracker)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin="here"))
    stages = [
        {"name": "base"},
        {"name": "more", "training": {"steps": 2}},
        {"name": "last", "training": {"steps": 3}},
    ]
    plain = config_of(parent, tmp_path, trackers=["tensorboard"]).model_dump(mode="json")
    FakeTracker.made.clear()
    train(load_config(plain | {"stages": stages}))
    (fake,) = FakeTracker.made
    assert fake.finished
    assert fake.where == ("nextblock", str(tmp_path / "trackers"))
    assert fake.config["training.steps"] == 6
    assert [fake.logged[step]["stage_number"] for step in range(11)] == [1] * 6 + [2] * 2 + [3] * 3
    assert [line["stage_number"] for line in read_log(tmp_path / "log.jsonl")] == [1] * 6 + [2] * 2 + [3] * 3
    assert not list(tmp_path.glob("stage-*/trackers"))


def test_what_is_not_known_is_not_sent_to_trackers():
    record = {
        "step": 3,
        "kind": "profile",
        "block_size": 4,
        "loss_by_noise": [None, 0.5],
        "loss": math.nan,
        "mfu": None,
    }
    assert scalars(record) == {"profile/block_size": 4, "profile/loss_by_noise/1": 0.5}


def test_a_missing_tracker_is_named_with_its_extra_and_nothing_else_is_said(parent, tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(
        UsageError, match=r"training.trackers=wandb needs wandb, .* `pip install 'nextblock\[trackers\]'`"
    ):
        prepare(config_of(parent, tmp_path / "run", trackers=["wandb"]))
    assert not [warning for warning in recwarn if "log_with" in str(warning.message)]
    assert not (tmp_path / "run").exists()


def test_tensorboard_writes_its_files_under_the_output_folder(parent, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    train(config_of(parent, tmp_path, trackers=["tensorboard"]))
    assert list((tmp_path / "trackers").rglob("events.out.tfevents.*"))


def test_evaluating_without_held_out_rows_is_refused():
    with pytest.raises(UsageError, match="evaluate_every=5 needs held-out rows"):
        load_config({"data": {"sources": [{"path": "x"}], "held_out": 0}, "training": {"evaluate_every": 5}})
