"""The scripts of benchmarks/: they run shrunk, and what they compare with computes the same loss."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nextblock as nb
from families import tiny_model
from nextblock.attention.rule import block_diffusion_rule
from nextblock.config.errors import UsageError
from nextblock.config.presets import preset
from nextblock.config.run import load_config
from nextblock.config.sections import RecipeConfig
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.model.decoder import Decoder
from nextblock.model.parent import byte_tokenizer
from nextblock.recipe.corruption import corrupt
from nextblock.recipe.objective import TwoViewLoss
from nextblock.tasks import human_eval

FOLDER = Path(__file__).parents[1] / "benchmarks"


def script(name: str) -> Any:
    """The names of a script, which is not run."""
    return SimpleNamespace(**runpy.run_path(str(FOLDER / f"{name}.py")))


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run a script as `python benchmarks/NAME.py ARGUMENTS` does."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert not ended.value.code


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_the_plain_way_computes_this_projects_loss(block_size):
    """Two programs, one loss: the whole noised half and all logits change nothing but the cost."""
    training, model = script("training"), tiny_model("llama")
    tokens = torch.randint(0, 90, (3, 32), generator=torch.Generator().manual_seed(1))
    masked = training.random_masks(tokens, block_size, 5)
    drawn = iter(masked.view(3, -1, block_size).numpy())
    view = corrupt(
        training.whole_rows(tokens),
        block_size,
        mask_token_id=96,
        end_token_id=None,
        recipe=RecipeConfig(),
        seed=0,
        step=0,
        draw=lambda generator, maskable: [next(drawn)],
    )
    sums = TwoViewLoss(Decoder(model))(view, block_diffusion_rule())
    ours = sums.total(training.AR_WEIGHT) / tokens.numel()
    torch.testing.assert_close(ours, training.plain_loss(Decoder(model), tokens, masked, block_size))


def test_the_training_script_times_every_way_and_measures_its_memory_in_processes_of_their_own(
    tmp_path, monkeypatch, capsys
):
    tiny_model("llama", vocab_size=8192, std=0.08).save_pretrained(tmp_path / "parent")
    sizes = ("--row-length", "128", "--rows", "2", "--block-size", "8", "--rounds", "1", "--views", "2")
    output = tmp_path / "t.json"
    run("training", monkeypatch, str(tmp_path / "parent"), *sizes, "--draft-adapter", "--output", str(output))
    entries = {entry["name"]: entry for entry in json.loads(output.read_text())["train"]}
    assert list(entries) == ["plain way", "AR step", "this step, 2 views", "draft adapter, 2 views"]
    assert (entries["plain way"]["speedup"], entries["AR step"]["ar_steps"]) == (1, 1)
    assert all(entry["tokens_per_second"] > 0 for entry in entries.values())
    if Path("/proc/self/clear_refs").exists():
        memory = {name: 2**30 * entry["peak_memory_gib"] for name, entry in entries.items()}
        assert memory["plain way"] > 4 * 2 * (2 * 128) * 8192  # float32 logits of both halves of 2 rows
        assert memory["AR step"] > 4 * 2 * 128 * 8192
        assert all(0 <= held < 2**30 for held in memory.values())
    assert all(name in capsys.readouterr().out for name in ["draft adapter, 2 views"])


def test_a_drafts_step_changes_the_adapter_alone_and_the_others_the_model_alone(tmp_path):
    tiny_model("llama", std=0.08).save_pretrained(tmp_path / "parent")
    training = script("training")
    methods = [training.Method(kind) for kind in ("plain", "ar", "nextblock", "draft adapter")]
    comparison = training.Comparison(
        training.Workload(str(tmp_path / "parent"), row_length=32, rows=2, block_size=8), methods
    )
    model = comparison.decoder.model.model.embed_tokens.weight
    for method in methods:
        # Learning rates are 0 but for this project's own steps, which set it by schedule.
        before = model.detach().clone(), comparison.adapter.mask_vector.detach().clone()
        comparison.run(method, 1)
        changed = [not torch.equal(a, b) for a, b in zip(before, (model, comparison.adapter.mask_vector), strict=True)]
        assert not changed[method.kind != "draft adapter"]
        assert model.grad is None
        assert comparison.adapter.mask_vector.grad is None


def test_mixed_lengths_fill_98_percent_of_rows(monkeypatch, capsys):
    packing = script("packing")
    sources = packing.DATA["mixed lengths"]
    speed, full = packing.drain(sources, byte_tokenizer(), rows=3, row_length=512, rounds=2)
    assert full >= 0.98
    assert speed > 0
    assert packing.DATA["the demo's documents"] == tuple(s.path for s in load_config(preset("demo")).data.sources)
    sizes = ("--row-length", "256", "--rows", "2", "--rounds", "1", "--round-tokens", "1", "--step-seconds", "1")
    run("packing", monkeypatch, *sizes)
    lines = capsys.readouterr().out.splitlines()
    said = r"(.+): ([\d,]+) tokens per second, ([\d.]+) × a step's, rows ([\d.]+) % full"
    found = [re.fullmatch(said, line) for line in lines]
    assert [match and match[1] for match in found] == list(packing.DATA)
    for match in found:
        assert match is not None
        batches = float(match[2].replace(",", "")) / (float(match[4]) / 100) / 512
        assert float(match[3]) == pytest.approx(batches, rel=0.01)


def test_prompts_to_measure_on_share_nothing_with_those_to_train_on():
    prompts = script("real_prompts").prompts
    trained, held_out = prompts(200), prompts(10, held_out=True, each=True)
    assert {row["kind"] for row in trained} == {"code", "chat", "prose"}
    assert [sum(row["kind"] == kind for row in held_out) for kind in ("code", "chat", "prose")] == [10, 10, 10]
    texts = [{json.dumps({**row, "kind": ""}) for row in rows} for rows in (trained, held_out)]
    assert not texts[0] & texts[1]


def test_nothing_to_measure_on_stands_in_the_text_to_train_on():
    made = script("real_prompts")
    text = "\n".join(row["text"] for row in made.library_text())
    assert len(text) > 1_000_000
    words = " ".join(text.split())
    for row in made.prompts(40, held_out=True, each=True):
        asked = row.get("prompt") or row["messages"][0]["content"]
        if row["kind"] != "chat":
            assert " ".join(asked.split()) not in words
    assert '"assert": ' not in text  # pages of the documentation


def test_the_real_model_script_asks_for_no_more_than_there_is_and_goes_on_after_a_kill(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    real = script("real")
    monkeypatch.setitem(real.kinds.__globals__, "task_prompts", lambda *_: None)
    with pytest.raises(UsageError, match=r"REAL_PROMPTS=9999 is more than .*; use at most \d+"):
        real.kinds(9999)
    # A parent whose weights were not written, and a trial of which one step was logged.
    source, tried = Path(nb.__file__).parent / "assets" / "tiny-ar", []
    (tmp_path / real.FILE).parent.mkdir()
    (tmp_path / real.FILE).touch()
    monkeypatch.setattr(real.nb, "load", lambda path: BlockDiffusionLM(tiny_model("llama"), byte_tokenizer(), None))
    with monkeypatch.context() as killed:
        killed.setattr(type(byte_tokenizer()), "save_pretrained", stopped)
        with pytest.raises(KeyboardInterrupt):
            real.bring_parent(tmp_path)
    assert not (tmp_path / "parent" / "config.json").is_file()
    assert sorted(path.name for path in real.bring_parent(tmp_path).glob("*.safetensors")) == ["model.safetensors"]
    log = tmp_path / "tried-1" / real.LOG
    log.parent.mkdir()
    step = {"step": 1, "step_seconds": 1.0}
    log.write_text(json.dumps(step) + "\n")

    def adapted(config: Any, **_: Any) -> None:
        tried.append(config.training.steps)
        log.write_text("".join(json.dumps({**step, "step": n + 1}) + "\n" for n in range(real.HERE.tried_steps)))

    monkeypatch.setitem(real.train.__globals__, "adapt", adapted)
    real.train(tmp_path, source, tmp_path / "answers.jsonl", 1.0)
    assert tried == [real.HERE.tried_steps, 60]


def stopped(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_the_real_model_script_trains_for_its_minutes_and_compares_with_generate(tmp_path, monkeypatch, capsys):
    shutil.copytree(Path(nb.__file__).parent / "assets" / "tiny-ar", tmp_path / "parent")  # in place of the download
    problem = {"prompt": "def one(x):\n", "canonical_solution": "", "test": "", "entry_point": "one", "task_id": "1"}
    monkeypatch.setattr(human_eval, "_problems", lambda: [problem])
    monkeypatch.syspath_prepend(str(FOLDER))
    sizes = ("--minutes", "0.02", "--prompts", "1", "--max-new-tokens", "8", "--skip-verify")
    for _ in range(2):  # the second call finds everything but the figures
        run("real", monkeypatch, *sizes, "--folder", str(tmp_path))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["training"]["steps"] >= 6
    assert list(results["kinds"]) == ["HumanEval", "chat", "prose"]
    for speeds in results["kinds"].values():
        assert [one["name"] for one in speeds][:2] == ["transformers", "speculative"]
        assert all(one["equal_to_ar"] == 1 for one in speeds)
    assert "| prose | speculative |" in capsys.readouterr().out


def test_the_adapter_of_the_repository_is_what_its_preset_trains_and_small():
    folder = FOLDER / "smollm2_draft"
    trained, wanted = load_config(folder / "nextblock.yaml"), load_config(preset("smollm2_135m_draft_gpu"))
    for part in ("draft_adapter", "correction", "recipe", "growth", "optimizer"):
        assert getattr(trained, part) == getattr(wanted, part)
    assert sum(file.stat().st_size for file in folder.rglob("*.safetensors")) <= 12_000_000
    steps = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    told = json.loads((FOLDER / "results" / "real_gpu.json").read_text(encoding="utf-8"))["training"]
    assert (len(steps), sum(step["tokens"] for step in steps)) == (told["steps"], told["tokens"])


def test_the_loading_script_measures_ranks_that_read_their_part_beside_ranks_that_read_all():
    command = [sys.executable, str(FOLDER / "loading.py"), "--small"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    for line in ("MiB of 2 ranks", "loading", "a step", "export", "base and loading", "planned: {"):
        assert line in done.stdout


def test_checkpoints_that_hold_the_step_and_that_do_not_are_both_whole(tmp_path):
    found = script("checkpoints").saves(tmp_path, layers=1, width=64, vocabulary=97, rounds=2)
    assert found["whole"]
    assert found["held"] > 0
    assert found["waiting"] > 0
