"""The report says what the numbers say, needs only itself, and bears missing parts and hostile text."""

from __future__ import annotations

import io
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text
from rich.console import Console

from nextblock.config.errors import UsageError
from nextblock.measure.report import load_results, write_report
from nextblock.measure.report.figures import plot_losses, plot_profile, plot_tradeoff
from nextblock.measure.report.page import decoding_table, findings, render, split_blocks
from nextblock.training.log import read_log

GROWTH = [[0, 1], [100, 2], [200, 4], [300, 8], [400, 16]]


def fake_log(steps: int = 1000) -> list[dict[str, Any]]:
    """A log of the shape that training on the word problems gives."""
    rng, log = random.Random(0), []
    for step in range(steps):
        block_size, since = next((b, step - s) for s, b in reversed(GROWTH) if step >= s)
        noise = rng.gauss(0, 0.05)
        level = 0.22 + 0.09 * math.log2(max(2, block_size)) + 0.5 * math.exp(-since / 60)
        log.append(
            {
                "step": step,
                "block_size": block_size,
                "diffusion_loss": math.nan if block_size == 1 else max(0.05, level * (1 + 3 * noise)),
                "ar_loss": 0.26 + 0.04 * math.exp(-since / 30) + noise / 5,
                "loss": 0.4,
                "ar_weight": 0.5,
                "learning_rate": 1e-3,
                "grad_norm": 0.5,
                "tokens": 4096,
                "step_seconds": 0.31,
            }
        )
    return log


def entry(mode: str, accuracy: float, per_forward: float, per_second: float, **other: Any) -> dict[str, Any]:
    values = {
        "model": "adapted",
        "task": "word_problems",
        "threshold": None,
        "block_size": 16,
        "examples": 200,
    }
    measured = {"accuracy": accuracy, "tokens_per_forward": per_forward, "tokens_per_second": per_second}
    return values | {"mode": mode, "equal_to_ar": None} | measured | other


def fake_sample(mode: str, answer: str, prompt: str, block: int = 16) -> dict[str, Any]:
    """Each row of `steps` holds one block; the first token of a block is there from its first step."""
    rng, steps, confidence = random.Random(3), [], []
    for start in range(0, len(answer), block):
        text = answer[start : start + block]
        shown = {0}
        while len(shown) < len(text) or not steps or len(steps[-1]) != len(text) or None in steps[-1]:
            shown |= set(rng.sample(sorted(set(range(len(text))) - shown), min(3, len(text) - len(shown))))
            steps.append([c if i in shown else None for i, c in enumerate(text)])
            confidence.append([0.97 if i in shown else None for i in range(len(text))])
            if len(shown) == len(text):
                break
    return {
        "task": "word_problems",
        "prompt": prompt,
        "mode": mode,
        "answer": answer,
        "steps": steps,
        "confidence": confidence,
    }


def fake_results() -> dict[str, Any]:
    prompt = "Ann has 14 apples. She buys 7 more and gives 5 to Tom. How many apples does Ann have?\n"
    answer = "14 + 7 = 21\n21 - 5 = 16\n#### 16\n"
    return {
        "title": "From next token to next block: tiny-ar, adapted",
        "created": "2026-01-02T03:04:05+00:00",
        "command": "nextblock demo --output runs/demo",
        "environment": {
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "nextblock": "0.1.0",
            "device": "cpu",
            "threads": 2,
        },
        "parent": {"name": "tiny-ar", "parameters": 2014208},
        "settings": {
            "block_size": 16,
            "mask_token_id": 97,
            "context": "context_causal",
            "prediction": "shifted",
        },
        "training": {"steps": 1000, "seconds": 305.2, "tokens": 4096000, "growth": GROWTH},
        "log": "adapted/log.jsonl",
        "bits_per_byte": [
            {
                "model": "parent",
                "measure": "AR (exact)",
                "block_size": None,
                "value": 1.2345,
                "bytes": 120345,
            },
            {
                "model": "adapted",
                "measure": "AR (exact)",
                "block_size": None,
                "value": 1.2456,
                "bytes": 120345,
            },
            {
                "model": "adapted",
                "measure": "diffusion (bound)",
                "block_size": 16,
                "value": 1.61,
                "bytes": 120345,
            },
        ],
        "decoding": [
            entry("ar", 1.0, 0.98, 410.3, model="parent", equal_to_ar=1.0),
            entry("ar", 0.995, 0.98, 409.1, equal_to_ar=1.0),
            entry("diffusion", 0.925, 0.93, 380.0, equal_to_ar=0.905),
            entry("diffusion", 0.92, 1.84, 702.4, threshold=0.99, equal_to_ar=0.9),
            entry("diffusion", 0.905, 2.33, 880.9, threshold=0.95, equal_to_ar=0.885),
            entry("diffusion", 0.89, 2.61, 985.0, threshold=0.9, equal_to_ar=0.865),
            entry("diffusion", 0.84, 3.02, 1130.4, threshold=0.8, equal_to_ar=0.8),
            entry("diffusion", 0.71, 3.61, 1302.5, threshold=0.6, equal_to_ar=0.68),
            entry("speculative", 0.995, 3.31, 1164.8, equal_to_ar=1.0),
        ],
        "samples": [fake_sample("diffusion", answer, prompt)],
    }


@pytest.fixture
def results() -> dict[str, Any]:
    return fake_results()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's folder with its log."""
    (tmp_path / "adapted").mkdir()
    lines = "".join(json.dumps(line) + "\n" for line in fake_log())
    (tmp_path / "adapted" / "log.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


class Elements(HTMLParser):
    """Start tags with their attributes, unclosed tags, and the text, of a page."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_asks_for_nothing_outside_itself(results: dict[str, Any], folder: Path) -> None:
    page = write_report(results, folder).read_text(encoding="utf-8")
    assert "http" not in page
    assert "@import" not in page
    found = Elements(page)
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in found.tags}
    targets = [v for _, a in found.tags for k, v in a.items() if k in ("src", "href", "xlink:href", "data")]
    assert targets
    assert all(str(target).startswith("#") for target in targets)
    assert all(inside.startswith("#") for inside in re.findall(r"url\(([^)]*)", page))


def test_page_is_well_nested_and_every_reference_has_its_one_target(results: dict[str, Any], folder: Path) -> None:
    page = write_report(results, folder).read_text(encoding="utf-8")
    found = Elements(page)
    assert found.open == []
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    references = {str(a["xlink:href"])[1:] for _, a in found.tags if "xlink:href" in a}
    references |= set(re.findall(r"url\(#([^)]*)", page))
    assert references <= set(ids)


def test_results_json_holds_what_the_report_shows(results: dict[str, Any], folder: Path) -> None:
    write_report(results, folder)
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results


def test_report_made_again_from_the_folder_is_the_same(results: dict[str, Any], folder: Path) -> None:
    page = write_report(results, folder).read_text(encoding="utf-8")
    assert write_report(load_results(folder), folder).read_text(encoding="utf-8") == page


def test_numbers_that_are_not_finite_are_stored_as_null(results: dict[str, Any], tmp_path: Path) -> None:
    results["decoding"][2] |= {"tokens_per_second": math.nan, "tokens_per_forward": math.nan}
    write_report(results, tmp_path)
    assert "NaN" not in (tmp_path / "results.json").read_text(encoding="utf-8")
    assert load_results(tmp_path)["decoding"][2]["tokens_per_second"] is None


def test_findings_are_computed_from_the_numbers(results: dict[str, Any]) -> None:
    spoken = [f"{head}: {text}" for head, text in findings(results)]
    assert spoken == [
        "3.31 tokens per forward: speculative mode: output equal to AR mode on 200 of 200 prompts",
        "99.5 % (97–100): accuracy of the adapted model as AR; its parent has 100.0 % (98–100)",
        "92.5 % (88–95): accuracy of diffusion mode, one token per denoising step",
        "1.84 tokens per forward: diffusion mode at threshold 0.99, accuracy 92.0 % (87–95)",
        "1.246 bits per byte: adapted model as AR, held-out text; its parent: 1.234",
    ]


def test_findings_name_the_block_size_when_there_are_several(results: dict[str, Any]) -> None:
    results["decoding"] += [
        entry("diffusion", 0.95, 0.9, 375.0, block_size=8),
        entry("speculative", 0.995, 3.5, 1200.0, block_size=8, equal_to_ar=None, threshold=None),
    ]
    spoken = [text for _, text in findings(results)]
    assert spoken[0] == "speculative mode, b = 8"
    assert spoken[2] == "accuracy of diffusion mode, one token per denoising step, b = 8"
    assert "diffusion, 1 token/step, b = 8" in render(results)


def test_speculative_prompts_that_differ_are_not_hidden(results: dict[str, Any]) -> None:
    results["decoding"][-1]["equal_to_ar"] = 0.985
    assert "on 197 of 200 prompts" in findings(results)[0][1]


@pytest.mark.parametrize("value", ["absent", "null"])
@pytest.mark.parametrize("part", list(fake_results()))
def test_a_missing_part_is_left_out(results: dict[str, Any], folder: Path, part: str, value: str) -> None:
    if value == "absent":
        del results[part]
    else:
        results[part] = None
    page = write_report(results, folder).read_text(encoding="utf-8")
    heading = {"log": "Training", "decoding": "Accuracy and speed", "bits_per_byte": "Bits per byte"}
    heading |= {"samples": "Denoising, step by step"}
    for name, text in heading.items():
        assert (f"<h2>{text}</h2>" in page) == (name != part)


def test_nothing_at_all_still_makes_a_page(results: dict[str, Any], tmp_path: Path) -> None:
    for nothing in ({}, {name: type(part)() for name, part in results.items()}):
        page = write_report(nothing, tmp_path / "new").read_text(encoding="utf-8")
        assert "<h2>" not in page
        assert Elements(page).open == []


def test_a_log_that_is_not_there_leaves_the_curves_out(results: dict[str, Any], tmp_path: Path) -> None:
    assert "<h2>Training</h2>" not in write_report(results, tmp_path).read_text(encoding="utf-8")


def test_text_of_the_model_is_shown_as_text(results: dict[str, Any], folder: Path) -> None:
    evil = "</pre></td><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\"'$title --> $\\frac{$"
    sample = {
        "task": evil,
        "prompt": evil,
        "mode": evil,
        "answer": evil,
        "steps": [[evil, None], [evil, evil]],
    }
    results["samples"].append(sample)
    results["decoding"].append(entry("ar", 0.5, 1.0, 100.0, task=evil))
    results |= {"title": evil, "command": evil, "environment": {evil: evil}, "parent": {"name": evil}}
    found = Elements(write_report(results, folder).read_text(encoding="utf-8"))
    assert not {"script", "img"} & {tag for tag, _ in found.tags}
    assert not any("onerror" in attributes for _, attributes in found.tags)
    assert found.open == []
    assert found.text.count(evil) >= 8
    decoding_table(results)


def test_terminal_table_shows_each_setting(results: dict[str, Any]) -> None:
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(decoding_table(results))
    lines = console.export_text().splitlines()
    row = next(line for line in lines if "0.95" in line)
    assert " ".join(row.split()) == "adapted, diffusion ≥ 0.95 90.5 % 86–94 2.33 881 2.15× 88.5 % –"
    assert max(map(len, lines)) <= 80
    assert sum("adapted" in line or "parent" in line for line in lines) == len(results["decoding"])


def test_growth_steps_are_marked_and_no_mean_crosses_one(folder: Path) -> None:
    log = read_log(folder / "adapted" / "log.jsonl")
    figure = plot_losses(log, GROWTH)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    steps, means = lines["diffusion loss"].get_data()
    mean: dict[float, float] = dict(zip(np.asarray(steps), np.asarray(means), strict=True))
    assert all(math.isnan(mean[step]) for step in range(100))
    assert mean[300] == pytest.approx(log[300]["diffusion_loss"])  # the first step at b = 8, alone
    assert mean[350] == pytest.approx(sum(log[i]["diffusion_loss"] for i in range(331, 351)) / 20)
    upright = [line.get_xdata()[0] for line in figure.axes[0].lines if len(line.get_xdata()) == 2]  # type: ignore[arg-type, index]
    assert upright == [step for step, _ in GROWTH]
    assert [text.get_text() for text in figure.axes[0].texts] == ["b = 1", "2", "4", "8", "16"]


def test_growth_is_read_from_the_log_when_it_is_not_given() -> None:
    log = fake_log(450)
    figure = plot_losses(log)
    assert [text.get_text() for text in figure.axes[0].texts] == ["b = 1", "2", "4", "8", "16"]


def test_labels_of_the_tradeoff_cover_no_label_and_no_point(results: dict[str, Any]) -> None:
    crowd = [entry("diffusion", 0.9 + i % 3 / 100, 2 + i / 20, 700 + 9 * i, threshold=0.5 + i / 25) for i in range(12)]
    figure = plot_tradeoff(results["decoding"] + crowd)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for axes in figure.axes:
        notes = [text for text in axes.texts if isinstance(text, Annotation)]
        assert len(notes) == 6 + 12
        boxes = []
        for note in notes:
            note.update_positions(renderer)
            boxes.append(Text.get_window_extent(note, renderer))
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        points = [axes.transData.transform(note.xy) for note in notes]
        assert not any(box.contains(x, y) for box in boxes for x, y in points)


def test_each_task_has_its_own_panels_and_table(results: dict[str, Any]) -> None:
    results["decoding"] += [{**e, "task": "algebra", "accuracy": e["accuracy"] / 2} for e in results["decoding"]]
    assert len(plot_tradeoff(results["decoding"]).axes) == 4
    page = render(results)
    assert page.count('<table class="numbers">') == 3
    assert "<h3>Algebra</h3>" in page


def test_figures_leave_matplotlib_as_it_was(results: dict[str, Any]) -> None:
    before = matplotlib.rcParams.copy(), matplotlib.rcParams._get_backend_or_none()  # type: ignore[attr-defined]
    render(results, fake_log())
    assert (matplotlib.rcParams.copy(), matplotlib.rcParams._get_backend_or_none()) == before  # type: ignore[attr-defined]


def test_rows_of_one_block_each_and_rows_of_the_whole_answer_split_alike() -> None:
    alone = [["a", None], ["a", "b"], ["c", None], ["c", "d"]]
    whole = [["a", None], ["a", "b"], ["a", "b", "c", None], ["a", "b", "c", "d"]]
    rows = [[["a", None], ["a", "b"]], [["c", None], ["c", "d"]]]
    assert [steps for _, _, steps in split_blocks(alone)] == rows
    assert split_blocks(whole) == [(0, 0, rows[0]), (2, 2, rows[1])]


def test_a_token_keeps_the_colour_of_the_step_that_decided_it(results: dict[str, Any]) -> None:
    steps = [["x", None, None], ["x", None, "z"], ["x", "y", "z"]]
    results["samples"] = [{"task": "t", "prompt": "p", "mode": "diffusion", "answer": "xyz", "steps": steps}]
    cells = [
        a for tag, a in Elements(render(results)).tags if tag == "td" and ("style" in a or a.get("class") == "mask")
    ]
    colours = [a.get("style") for a in cells]
    first, second, third = "--when:0.00", "--when:0.50", "--when:1.00"
    assert colours == [first, None, None, first, None, second, first, third, second]
    assert [i for i, a in enumerate(cells) if a.get("class") == "new"] == [0, 5, 7]


def test_a_folder_without_results_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no results\.json; give") as error:
        load_results(tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="File name too long"):
        load_results("n" * 300)


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_broken_results_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match="make it again"):
        load_results(tmp_path)


def test_a_broken_line_of_the_log_is_named_and_an_unfinished_last_one_is_not_read(
    results: dict[str, Any], folder: Path
) -> None:
    path = folder / "adapted" / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:40]]), encoding="utf-8")
    assert len(read_log(path)) == 3
    path.write_text("\n".join([lines[0], lines[1][:40], lines[2]]), encoding="utf-8")
    with pytest.raises(UsageError, match=r"log\.jsonl, line 2 is not JSON"):
        write_report(results, folder)
    path.write_bytes(lines[0].encode() + b"\n\xff\xfe\n" + lines[1].encode())
    with pytest.raises(UsageError, match=r"log\.jsonl, line 2 is not JSON.*utf-8"):
        write_report(results, folder)
    path.write_text("\n".join([*lines[:2], "5", lines[2]]), encoding="utf-8")
    with pytest.raises(UsageError, match=r"log\.jsonl, line 3 holds a int, not an object; delete the line"):
        write_report(results, folder)
    assert not (folder / "results.json").exists()


def test_the_profile_figure_has_a_line_for_each_block_size_from_its_last_record() -> None:
    records = [
        {"block_size": size, "loss_by_noise": [None, *[level] * 7], "loss_by_offset": [None, *[level] * (size - 1)]}
        for size, level in ((2, 3.0), (2, 1.0), (4, 2.0))
    ]
    noise, offset = plot_profile(records).axes
    assert [set(np.asarray(line.get_ydata())) for line in noise.lines] == [{1.0}, {2.0}]
    assert [list(np.asarray(line.get_xdata())) for line in offset.lines] == [[1], [1, 2, 3]]
    assert "how much of the block is masked" in render({}, (), records)


def test_in_80_columns_names_wrap_and_the_figures_of_a_row_stay_on_one_line():
    spread = {"speedup": 2.484, "speedup_low": 2.3, "speedup_high": 2.6}
    rows = [entry("ar", 0.995, 1.0, 340.0, model="parent", speedup=1.0, speedup_low=1.0, speedup_high=1.0)]
    rows += [
        entry("speculative", 0.995, 3.59, 844.0, model="parent + tiny-draft", equal_to_ar=1.0, p_value=1.0, **spread)
    ]
    screen = io.StringIO()
    Console(file=screen, width=80).print(decoding_table({"decoding": rows}))
    shown = [line.split() for line in screen.getvalue().splitlines() if "×" in line]
    assert [line[-3:] for line in shown] == [["1.00×", "–", "–"], ["100.0", "%", "1.00"]]
    assert "2.48±0.15×" in shown[1]
