"""The demo from end to end, cut to a few steps and prompts: its figures, its report, its checkpoint."""

from __future__ import annotations

import io
import json

from rich.console import Console

import nextblock as nb
from nextblock.cli import demo as demo_module
from nextblock.config.run import load_config


def test_the_demo_trains_shows_scores_and_reports(tmp_path, monkeypatch):
    few = {"training.steps": 10, "growth.delta": 2, "training.batch_rows": 1, "training.evaluate_rows": 1}
    monkeypatch.setattr(demo_module, "load_config", lambda path, options: load_config(path, {**options, **few}))
    screen = io.StringIO()
    results = demo_module.demo(tmp_path / "demo [v2]", examples=2, console=Console(file=screen, width=150))
    assert "blocks grow 1 -> 2 -> 4 -> 8 -> 16, AR loss weight 0.5" in screen.getvalue()
    assert f"checkpoint  {tmp_path / 'demo [v2]'}\n" in screen.getvalue()
    rows = [(row["model"], row["mode"], row["threshold"]) for row in results["decoding"]]
    assert rows == [
        ("parent", "ar", None),
        ("parent + tiny-draft", "speculative", None),
        ("adapted", "ar", None),
        ("adapted", "speculative", None),
        *(("adapted", "diffusion", threshold) for threshold in demo_module.THRESHOLDS),
    ]
    equal = {row["mode"]: row["equal_to_ar"] for row in results["decoding"] if row["mode"] == "speculative"}
    assert equal == {"speculative": 1.0}
    assert results["decoding"][0]["speedup"] == 1.0
    assert all(row["speedup_low"] <= row["speedup"] <= row["speedup_high"] for row in results["decoding"])
    assert "scoring 2/80" in screen.getvalue()  # no terminal: a line at once
    assert [len(sample["steps"]) > 1 for sample in results["samples"]] == [True] * demo_module.SAMPLES
    saved = json.loads((tmp_path / "demo [v2]" / "results.json").read_text())
    assert saved["decoding"] == json.loads(json.dumps(results["decoding"]))
    page = (tmp_path / "demo [v2]" / "report.html").read_text()
    assert "<svg" in page or "data:image" in page
    settings = nb.load(tmp_path / "demo [v2]").settings
    assert settings is not None
    assert settings.block_size == 16


def test_a_new_demo_gets_a_folder_of_its_own(tmp_path):
    wanted = tmp_path / "demo"
    assert demo_module.free_folder(str(wanted)) == wanted
    wanted.mkdir()
    assert demo_module.free_folder(str(wanted)) == wanted
    (wanted / "log.jsonl").touch()
    assert demo_module.free_folder(str(wanted)) == tmp_path / "demo-2"
