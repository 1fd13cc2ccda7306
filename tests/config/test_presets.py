"""Presets: every file in the folder is a valid configuration that is found by its name."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from transformers import AutoConfig, AutoModelForCausalLM

from nextblock.config.errors import UsageError
from nextblock.config.presets import find_config, preset
from nextblock.config.run import load_config
from nextblock.measure import plan
from nextblock.model.parent import byte_tokenizer
from nextblock.training.export import export
from nextblock.training.loop import train

NAMES = sorted(path.stem for path in (Path(__file__).parents[2] / "presets").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_a_valid_configuration(name):
    assert load_config(preset(name)).training.steps >= 1
    assert find_config(name).stem == name


def test_an_unknown_preset_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="did you mean 'demo'"):
        find_config("dem")
    with pytest.raises(UsageError, match="does not exist"):
        find_config("elsewhere/demo.yaml")
    with pytest.raises(UsageError, match=r"configuration 'nnn.*too long"):
        find_config("n" * 300)


def test_a_preset_is_found_by_the_name_of_its_model():
    assert find_config("qwen3-0.6b") == preset("qwen3_0_6b")
    assert find_config("llama-3.2-1b") == preset("llama_3_2_1b")


REAL = ("qwen3_0_6b", "qwen3_0_6b_lora", "qwen3_4b", "qwen3_8b", "openpangu_7b", "llama_3_2_1b")
BASELINES = tuple(name for name in NAMES if name.startswith("baseline_"))
TINY: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in REAL else ()) for n in NAMES])
def test_a_preset_runs_as_planned_on_the_machine_that_it_names(name, monkeypatch):
    monkeypatch.setattr(plan, "largest_row", lambda *_: None)  # several steps more; see test_plan
    config = load_config(preset(name))
    found = (plan.plan_stages if config.stages else plan.plan)(config)
    plans = [stage.plan for stage in found.stages] if isinstance(found, plan.StagedPlan) else [found]
    for one in plans:
        assert (one.device, one.devices) == (config.machine.gpu, config.machine.gpus)
        assert one.parallel == (None if one.devices == 1 else "fsdp2" if config.training.fsdp else "ddp")
    assert (found.fits, found.seconds is None) == ((None, True) if config.machine.gpu == "cpu" else (True, False))
    assert plan.shortfall(found, config) is None


@pytest.mark.parametrize("name", NAMES)
def test_the_head_of_a_preset_says_no_more_than_the_preset(name):
    """It plans without options, and starts as many processes as the machine has GPUs, each with its own shards."""
    text, config = preset(name).read_text(encoding="utf-8"), load_config(preset(name))
    assert not re.search(r"nextblock plan \S+ --", text)
    counts = [int(n) for n in re.findall(r"--(?:nnodes|nproc-per-node) (\d+)", text)]
    assert math.prod(counts) == config.machine.gpus
    assert config.training.fsdp == (config.machine.gpus > 1)
    assert config.data.shards == (None if config.machine.gpus == 1 else config.machine.gpus)
    if config.machine.gpu != "cpu":
        words = text.partition("\nmodel:")[0].lower()
        size = {"rtx4090": "one 24 gb gpu", "a100-40g": "one 40 gb gpu"}
        assert size.get(config.machine.gpu, f"{config.machine.gpus} {config.machine.gpu}") in words


@pytest.fixture
def _fresh_accelerator():
    """accelerate keeps one state a process, and refuses another precision in it."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("_fresh_accelerator")
@pytest.mark.parametrize("name", [*REAL, "smoke", *BASELINES])
def test_a_preset_takes_two_steps_at_toy_size(name, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "one two three four five six seven eight nine ten"}\n' * 40)
    shape = plan.model_shape(load_config(preset(name)).model)
    parent = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.model_type, **TINY))
    export(tmp_path / "parent", parent, byte_tokenizer(), None)
    first, largest = {"baseline_full_sequence": (64, 64), "baseline_annealed_mask": (8, 8)}.get(name, (4, 8))
    small = {
        "model.path": str(tmp_path / "parent"),
        "model.scratch": None,
        "model.tokenizer": None,
        "model.mask_token": None,
        "data.sources": [{"path": str(tmp_path / "texts.jsonl")}],
        "data.row_length": 64,
        "data.held_out": 0.0,
        "data.shards": 1,
        "growth.b_0": first,
        "growth.b_max": largest,
        "growth.delta": 1,
        "training.steps": 2,
        "training.batch_rows": 2,
        "stages": [],
        "output": str(tmp_path / "run"),
    }
    run = train(load_config(preset(name), small))
    assert run.step == 2
    written = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(step["diffusion_loss"]) for step in written if "diffusion_loss" in step)
    assert (tmp_path / "run" / "model.safetensors").is_file()
