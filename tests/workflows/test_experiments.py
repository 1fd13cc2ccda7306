"""Experiments: every run once, whatever stopped it; error bars that are those of the textbook."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from nextblock.cli.main import app
from nextblock.config.errors import UsageError
from nextblock.config.files import LOCK, locked
from nextblock.config.run import load_config
from nextblock.workflows import experiments
from nextblock.workflows.evidence import (
    Estimate,
    difference,
    estimate,
    estimates,
    filled,
    markdown_table,
    plot,
    student,
)
from nextblock.workflows.experiment import Experiment, find_experiment, load_experiment
from nextblock.workflows.experiments import (
    place_of,
    read_results,
    run_experiment,
    run_one,
    run_parent,
    training_figures,
    wanted_runs,
)

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "question": "Does the clean half matter?",
    "seeds": [0, 1],
    "base": {
        "model": {
            "tokenizer": "bytes",
            "scratch": {
                "model_type": "llama", "vocab_size": 264, "hidden_size": 32, "intermediate_size": 32,
                "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
                "max_position_embeddings": 256, "eos_token_id": 256, "pad_token_id": 256, "bos_token_id": None,
            },
        },
        "data": {"sources": [{"path": "task:algebra"}], "row_length": 64},
        "growth": {"b_0": 4, "b_max": 4},
        "training": {"steps": 4, "batch_rows": 2, "evaluate_rows": 2},
    },
    "arms": {"causal": None, "block": {"recipe.context": "block_causal"}},
    "score": {"diffusion": {"mode": "diffusion", "threshold": 0.5, "examples": 2, "max_new_tokens": 4}},
}  # fmt: skip


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
    return path


def fake(values: dict[str, list[float]]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(arm, seed): {"figures": {"loss": v}} for arm, row in values.items() for seed, v in enumerate(row)}


def test_every_run_is_made_once_and_gives_the_figures_of_a_run_alone(tmp_path):
    source = written(tmp_path, seeds=[1])
    experiment, place = load_experiment(source), place_of(source, tmp_path / "runs")
    told: list[tuple[int, int]] = []
    run_experiment(experiment, place, jobs=2, on_step=lambda done, total, what="": told.append((done, total)))
    assert told[-1] == (10, 10)  # two runs of four steps, and of one measurement
    results = read_results(experiment, place)
    assert list(results) == wanted_runs(experiment) == [("causal", 1), ("block", 1)]
    for one in results.values():
        assert one["figures"]["diffusion: accuracy"] in (0, 0.5, 1)
        assert one["figures"]["bits per byte, diffusion (bound)"] > 1
        assert one["training"]["steps"] == 4
    causal, block = results.values()
    assert causal["training"]["tokens"] == block["training"]["tokens"], "arms of one seed read the same rows"
    assert causal["figures"] != block["figures"]

    alone = place_of(source, tmp_path / "alone")
    place.result("block", 1).unlink()
    assert run_one(experiment, alone, "block", 1)["figures"] == block["figures"]
    before = {path: path.stat().st_mtime_ns for path in place.results.iterdir()}
    run_experiment(experiment, place, jobs=1)  # nothing is missing
    assert before == {path: path.stat().st_mtime_ns for path in place.results.iterdir()}


def test_an_arm_of_another_experiment_is_not_trained_twice(tmp_path, monkeypatch):
    source = written(tmp_path, seeds=[1])
    first = run_one(load_experiment(source), place_of(source, tmp_path / "runs"), "causal", 1)
    score = {"ar": {"mode": "ar", "examples": 2, "max_new_tokens": 4}}
    source = source.rename(tmp_path / "other.yaml")
    source.write_text(yaml.safe_dump({**TINY, "arms": {"plain": None, "less": {"training.steps": 3}}, "score": score}))
    other, place = load_experiment(source), place_of(source, tmp_path / "runs")
    monkeypatch.setattr(experiments, "adapt", lambda config, resume: pytest.fail("trained again"))
    second = run_one(other, place, "plain", 1)
    assert second["training"] == first["training"]
    assert second["figures"]["diffusion loss"] == first["figures"]["diffusion loss"]
    assert "ar: accuracy" in second["figures"]
    for arm, seed in (("plain", 0), ("less", 1)):
        with pytest.raises(pytest.fail.Exception, match="trained again"):
            run_one(other, place, arm, seed)


def test_a_parent_that_is_trained_on_has_the_scores_of_ar_mode(tmp_path):
    score = {"ar": {"mode": "ar", "examples": 1, "max_new_tokens": 4}, "block": {"examples": 1, "max_new_tokens": 4}}
    arms = {"parent": {"growth.b_0": 1, "growth.b_max": 1}, "adapted": None}
    source = written(tmp_path, seeds=[0], arms=arms, score=score)
    experiment, place = load_experiment(source), place_of(source, tmp_path / "runs")
    parent, adapted = (run_one(experiment, place, arm, 0)["figures"].keys() for arm in arms)
    assert "ar: accuracy" in parent & adapted
    assert "block: accuracy" in adapted - parent


def test_a_killed_experiment_goes_on_to_the_same_figures(tmp_path):
    longer = {**TINY["base"], "training": {"steps": 60, "batch_rows": 2, "evaluate_rows": 0, "checkpoint_every": 5}}
    source = written(tmp_path, base=longer, seeds=[0], arms={"causal": None}, score={})
    experiment, place = load_experiment(source), place_of(source, tmp_path / "runs")
    command = [sys.executable, "-m", "nextblock", "experiment", str(source), "--runs", str(tmp_path / "runs")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    checkpoints = place.run("causal", 0) / "checkpoints"
    deadline = time.monotonic() + 120
    while not (checkpoints.is_dir() and any(checkpoints.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not read_results(experiment, place)
    while place.run("causal", 0).joinpath(LOCK).exists() and time.monotonic() < deadline:  # the run dies on its own
        try:
            with locked(place.run("causal", 0)):
                break
        except UsageError:
            time.sleep(0.02)
    resumed = run_one(experiment, place, "causal", 0)
    undisturbed = run_one(experiment, place_of(source, tmp_path / "other"), "causal", 0)
    assert resumed["figures"] == undisturbed["figures"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_ends_with_the_process_that_started_it_and_the_next_one_goes_on(tmp_path, number):
    longer = {
        **TINY["base"],
        "training": {"steps": 4000, "batch_rows": 2, "evaluate_rows": 0, "checkpoint_every": 4000},
    }
    source = written(tmp_path, base=longer, seeds=[0], arms={"causal": None}, score={})
    run = place_of(source, tmp_path / "runs").run("causal", 0)
    command = [sys.executable, "-m", "nextblock", "experiment", str(source), "--runs", str(tmp_path / "runs")]
    for begun in (0, 1):  # the second goes on at once from where the first was
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline, log = time.monotonic() + 120, run / "log.jsonl"
        before = len(log.read_text().splitlines()) if begun else 0
        while not log.exists() or len(log.read_text().splitlines()) <= before + 3:
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(60) in (-number, 128 + number)
        if process.stderr:
            process.stderr.close()
    ended = time.monotonic() + 60
    while True:
        try:
            with locked(run):
                break
        except UsageError:
            assert time.monotonic() < ended
            time.sleep(0.1)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if line.startswith('{"step"')]
    assert steps == list(range(len(steps)))
    assert list((run / "checkpoints").iterdir())


def test_a_run_that_fails_is_named_with_its_reason(tmp_path):
    source = written(tmp_path, base={**TINY["base"], "data": {"sources": [{"path": "none.txt"}], "row_length": 64}})
    place = place_of(source, tmp_path / "runs")
    with pytest.raises(UsageError, match=r"the run causal-0 failed .*error: .*none\.txt"):
        run_experiment(load_experiment(source), place, jobs=1)
    assert not list(place.results.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arms": {"a": {"growth.bmax": 4}}}, "arm a: unknown key 'growth.bmax'; did you mean 'b_max'"),
        ({"arms": {"a": {"growth.b_max": 3}}}, "arm a: growth.b_0=4 is larger than growth.b_max=3"),
        ({"arms": {"a": {"model.path": "parent:smal", "model.scratch": None}}}, "there is no parent 'smal'"),
        ({"arms": {}}, "arms"),
        ({"seeds": []}, "seeds"),
        ({"questions": "a"}, "unknown key 'questions'; did you mean 'question'"),
        ({"base": {"data": {"sources": []}}}, "arm causal: data.sources"),
        ({"parents": {"p": {"data": {}}}}, "parent p: data.sources is missing"),
        ({"score": {"a": {"mode": "diffusio"}}}, "score a: .*did you mean 'diffusion'"),
        ({"score": {"a": {"task": "algebr"}}}, "score a: task 'algebr' does not exist"),
        ({"score": {"a": {"mode": "ar", "tresh": 1}}}, "score a: .*tresh"),
        ({"seeds": [0, 1, 0]}, "one comes twice"),
        ({"arms": {"a": {"training.seed": 7}}}, "arm a: training.seed is set for each run"),
        ({"arms": {"a": {"training": {"seed": 7}}}}, "arm a: training.seed is set for each run"),
        ({"arms": {"a": {"output": "x"}}}, "arm a: output is set for each run"),
        ({"arms": {"b/c": None}}, "'b/c' cannot be the name of a folder"),
        ({"parents": {"../p": {}}}, "cannot be the name of a folder"),
    ],
)
def test_a_bad_experiment_is_refused_in_one_line_before_anything_runs(tmp_path, changes, words):
    with pytest.raises(UsageError, match=words) as error:
        load_experiment(written(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_a_section_in_an_arm_leaves_the_other_keys_of_the_base(tmp_path):
    base = {**TINY["base"], "optimizer": {"lr": 1.0e-4, "schedule": "constant", "weight_decay": 0.5}}
    experiment = load_experiment(written(tmp_path, base=base, arms={"a": {"optimizer": {"lr": 1.0e-3}}}))
    found = experiment.config("a", 0, Path("o"), Path("p")).optimizer
    assert (found.lr, found.schedule, found.weight_decay) == (1e-3, "constant", 0.5)
    tiny = {"model.path": "tiny-ar", "model.scratch": None, "model.tokenizer": None}
    with_lora = load_experiment(written(tmp_path, base=base, arms={"a": {"lora": {}, **tiny}}))
    assert with_lora.config("a", 0, Path("o"), Path("p")).lora is not None
    same = load_experiment(written(tmp_path, base=base, arms={"a": {"optimizer.lr": 1.0e-3}}))
    assert experiments.fingerprint(experiment, "a") == experiments.fingerprint(same, "a")


def test_a_run_of_another_version_of_an_arm_is_neither_taken_nor_gone_on_with(tmp_path):
    source = written(tmp_path, seeds=[0], arms={"a": {"optimizer.lr": 1.0e-3}}, score={})
    place = place_of(source, tmp_path / "runs")
    run_one(load_experiment(source), place, "a", 0)
    written(tmp_path, seeds=[0], arms={"a": {"optimizer.lr": 1.0e-7}}, score={})
    changed = load_experiment(source)
    with pytest.raises(UsageError, match=f"move it and the run's folder {place.run('a', 0)} away"):
        read_results(changed, place)
    with pytest.raises(UsageError, match=f"the run in {place.run('a', 0)} was begun by another version"):
        run_one(changed, place, "a", 0)
    shutil.rmtree(place.run("a", 0))
    run_one(changed, place, "a", 0)
    assert load_config(place.run("a", 0) / "nextblock.yaml").optimizer.lr == 1e-7


def test_a_changed_parent_is_trained_anew_and_so_are_its_arms(tmp_path):
    def experiment(lr: float) -> Experiment:
        parents = {"p": {**TINY["base"], "optimizer": {"lr": lr}}}
        arms = {"a": {"model.path": "parent:p", "model.scratch": None, "model.tokenizer": None}}
        return load_experiment(written(tmp_path, seeds=[0], arms=arms, parents=parents, score={}))

    place = place_of(tmp_path / "tiny.yaml", tmp_path / "runs")
    with pytest.raises(UsageError, match=r"the parent 'p' is not trained yet; .*--parent p"):
        run_one(experiment(1e-3), place, "a", 0)
    run_experiment(experiment(1e-3), place, jobs=1)
    place.result("a", 0).unlink()
    run_parent(experiment(0.3), place, "p")
    with pytest.raises(UsageError, match="was begun by another version"):
        run_one(experiment(0.3), place, "a", 0)
    assert len([path for path in place.parents.iterdir() if path.is_dir()]) == 2
    with pytest.raises(UsageError, match="there is no parent 'q'"):
        run_parent(experiment(1e-3), place, "q")


def test_what_a_run_prints_has_a_file_of_its_own(tmp_path):
    source = written(tmp_path, seeds=[0], arms={"0.06": {"training.steps": 1}, "0.2": {"training.steps": 2}}, score={})
    place = place_of(source, tmp_path / "runs")
    run_experiment(load_experiment(source), place, jobs=2)
    assert {path.name for path in place.runs.glob("*.out")} == {"0.06-0.out", "0.2-0.out"}


def test_an_experiment_is_found_by_its_name_or_named_as_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert find_experiment("table1") == Path("experiments/table1.yaml")
    with pytest.raises(UsageError, match="there is no experiment 'tabel1'; did you mean 'table1'"):
        find_experiment("tabel1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="give a YAML file"):
        find_experiment("table1")


def test_figures_of_another_version_of_an_experiment_are_not_mixed_in(tmp_path):
    source = written(tmp_path)
    experiment, place = load_experiment(source), place_of(source, tmp_path / "runs")
    place.results.mkdir(parents=True)
    place.result("causal", 0).write_text('{"fingerprint": "0", "figures": {}}')
    with pytest.raises(UsageError, match=r"causal-0\.json was made by another version of .*tiny\.yaml"):
        read_results(experiment, place)
    place.result("causal", 0).write_text("{")
    with pytest.raises(UsageError, match="holds no figures"):
        read_results(experiment, place)


def test_a_question_and_a_folder_are_shown_whatever_they_hold(tmp_path, monkeypatch):
    figures = fake({"causal": [1.0, 1.2], "block": [2.0, 2.1]})
    monkeypatch.setattr("nextblock.workflows.experiments.read_results", lambda *_: figures)
    source, runs = written(tmp_path, question="Is [/x] better than [y]?"), tmp_path / "runs[v2]"
    result = CliRunner().invoke(
        app, ["experiment", str(source), "--runs", str(runs), "--table"], catch_exceptions=False
    )
    assert "Is [/x] better than [y]?" in result.stdout
    assert "runs[v2]" in result.stdout


def test_every_shipped_experiment_is_valid():
    files = sorted((ROOT / "experiments").glob("*.yaml"))
    assert len(files) >= 9
    for path in files:
        experiment = load_experiment(path)
        assert len(experiment.seeds) >= 5


def test_intervals_are_those_of_the_textbook():
    # Student's t with 4 degrees of freedom: 2.776; the sample's standard deviation is sqrt(2.5).
    found = estimate([1, 2, 3, 4, 5])
    assert found.mean == 3
    assert found.half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-3)
    assert math.isnan(estimate([1.0]).half)
    # 2.131, 2.120 and 1.980 with 15, 16 and 120 degrees of freedom.
    assert [student(n) for n in (15, 16, 120)] == pytest.approx([2.131, 2.120, 1.980], abs=1e-3)
    assert Estimate(1, 0.4, 5).apart(Estimate(2, 0.5, 5))
    assert not Estimate(1, 0.6, 5).apart(Estimate(2, 0.5, 5))


def test_a_figure_that_no_run_has_is_named_once_every_arm_has_run():
    experiment = Experiment.model_validate({**TINY, "figures": ["los"]})
    with pytest.raises(UsageError, match="no run has 'los'; did you mean 'loss'"):
        estimates(experiment, fake({"causal": [1.0], "block": [2.0]}))
    assert estimates(experiment, fake({"causal": [1.0]})) == {"los": {}}


def test_differences_are_paired_by_seed(tmp_path):
    experiment = Experiment.model_validate({**TINY, "seeds": [0, 1, 2]})
    results = fake({"causal": [1.0, 5.0, 9.0], "block": [2.0, 6.0, 10.0]})
    shown = markdown_table(experiment, results).splitlines()
    assert len(shown) == 5
    assert shown[2].startswith("| causal | 3 | 5.00 ±")
    assert shown[4] == "| *block less causal* | | +1.000 ± 0.000 |"
    plot(experiment, results).savefig(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert estimates(experiment, results)["loss"]["causal"].half > 5
    assert difference(experiment, results, "loss", "block", "causal") == Estimate(1, 0, 3)
    del results["block", 1]
    after = difference(experiment, results, "loss", "block", "causal")
    assert after is not None
    assert after.seeds == 2


def test_a_plot_shows_its_titles_whole_and_no_share_beyond_0_and_1():
    arms = {"a name as long as that of some arms": {}, "block": {}}
    shown = ("diffusion: accuracy", "bits per byte, diffusion (bound)")
    experiment = Experiment.model_validate({**TINY, "arms": arms, "figures": shown})
    values = [("block", 0, 0.2, 0.3), ("block", 1, 0.9, 0.4), (next(iter(arms)), 0, 0.9, 0.4)]
    results = {(arm, seed): {"figures": dict(zip(shown, two, strict=True))} for arm, seed, *two in values}
    figure = plot(experiment, results)
    figure.draw_without_rendering()
    share, bits = figure.axes
    for panel in (share, bits):
        title = panel.title.get_window_extent()
        assert 0 <= title.x0 < title.x1 <= figure.bbox.x1
        assert [text.get_text()[-7:] for text in panel.get_yticklabels()] == ["(n = 1)", "(n = 2)"]
    assert (share.dataLim.x0, share.dataLim.x1) == (0, 1)
    assert bits.dataLim.x0 < 0


def test_the_swing_of_a_loss_is_that_from_step_to_step(tmp_path):
    def swing(losses: list[float]) -> float:
        lines = [json.dumps({"step": i, "diffusion_loss": x, "ar_loss": None}) for i, x in enumerate(losses)]
        (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
        return training_figures(tmp_path, {})["swing of the diffusion loss"]

    assert swing([9.0] * 24 + [4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5]) == pytest.approx(0)
    assert swing([9.0] * 24 + [1.0, 3.0] * 4) > 0.9


def test_numbers_in_a_sentence_are_those_of_the_runs():
    experiment = Experiment.model_validate({**TINY, "figures": ["other"], "seeds": [0, 1, 2]})
    results = fake({"causal": [1.0, 5.0, 9.0], "block": [2.0, 6.0, 10.0]})
    known = filled("blocks lose {loss|block}, {as} {loss|causal}", experiment, results)
    assert known == f"blocks lose {estimate([2, 6, 10])}, {{as}} {estimate([1, 5, 9])}"
    apart = fake({"causal": [1.0, 5.0, 9.0], "block": [2.0, 6.0, 11.5]})
    assert filled("{loss|block less causal}", experiment, apart) == "+1.500 ± 2.151"  # 1, 1 and 2.5; t = 4.303
    for arm in ("nobody", "block less nobody"):
        with pytest.raises(UsageError, match=rf"no number for \{{loss\|{arm}\}}"):
            filled(f"{{loss|{arm}}}", experiment, results)
