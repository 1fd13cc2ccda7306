"""Speed beside quality: every mode and transformers' own `generate`, over kinds of text, templates, temperatures and
batch sizes.

python benchmarks/quality.py                         # tiny-bd, and tiny-ar with tiny-draft
python benchmarks/quality.py --model runs/real/parent --draft-adapter runs/real/adapter-20
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

import nextblock as nb
import real_prompts
from nextblock.config.files import write_json
from nextblock.config.progress import progress
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.measure.bench.contest import (
    Round,
    alternate,
    compared,
    make_batches,
    our_mode,
    transformers_generate,
)
from nextblock.measure.bench.prompts import Prompts, task_prompts
from nextblock.measure.machine import environment
from nextblock.measure.statistics import wilson
from nextblock.model.decoder import end_tokens
from nextblock.tasks import Example, Task

KINDS = ("chat", "code", "prose")
TEMPLATES = {
    "plain": "{prompt}",
    "instruction": "Read this with care and go on.\n\n{prompt}",
    "one example": "{example}\n\n{prompt}",
}
MODES: tuple[dict[str, Any], ...] = ({"mode": "ar"}, {"mode": "speculative"}, {"mode": "diffusion", "threshold": 0.9})


@dataclass(frozen=True)
class Cell:
    """One contestant under one set of conditions; speeds are over transformers' `generate` beside it.

    tokens_per_forward: answer tokens over the passes that their rows took part in.
    equal: share of answers equal to those of `generate`; None at temperature 1.
    right, interval: accuracy with its 95 % Wilson interval, where the text has an answer.
    """

    model: str
    kind: str
    template: str
    temperature: float
    batch: int
    name: str
    prompts: int
    tokens_per_second: float
    speedup: float
    tokens_per_forward: float
    equal: float | None
    right: float | None
    interval: tuple[float, float] | None


def texts(kind: str, count: int, shipped: bool) -> tuple[list[str], list[str], Prompts | None]:
    """Prompts of a kind, whole texts of the same kind (one for each), and what grades the answers, if anything.

    The shipped models learned word problems and short functions; others get questions and HumanEval's prompts. Prose
    is the Python documentation, which none of them learned.
    """
    tasks = {"chat": "word_problems", "code": "functions"} if shipped else {"code": "human_eval"}
    if kind in tasks:
        prompts = task_prompts(tasks[kind], "test", count)
        assert prompts.task is not None
        split = "train" if shipped else "test"
        examples = [prompts.task.example(split, (count + i) % (prompts.task.count or 10**6)) for i in range(count)]
        return prompts.items, [one.prompt + one.completion for one in examples], prompts
    rows = [row for row in real_prompts.prompts(2 * count, held_out=True, each=True) if row["kind"] == kind]
    items = [row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in rows]
    return items[:count], items[count : 2 * count], None


def encode(lm: BlockDiffusionLM, prompts: list[str], chat: bool) -> list[list[int]]:
    """Token ids, as chats where the model knows chats."""
    templated = chat and getattr(lm.tokenizer, "chat_template", None)
    items: list[Any] = [[{"role": "user", "content": text}] for text in prompts] if templated else prompts
    return Prompts("", items).encode(lm)


def measure(
    lm: BlockDiffusionLM, encoded: list[list[int]], batch: int, temperature: float, max_new_tokens: int, rounds: int
) -> list[tuple[str, list[Round]]]:
    """Each contestant's rounds; they take turns batch by batch."""
    ends = end_tokens(lm.decoder, lm.tokenizer)
    modes = [one for one in MODES if one["mode"] == "ar" or lm.settings is not None or lm.adapter is not None]
    if lm.adapter is not None:
        modes = [one for one in modes if one["mode"] != "diffusion"]
    contestants = [transformers_generate(lm, max_new_tokens, ends, temperature=temperature)]
    contestants += [our_mode(lm, {**mode, "temperature": temperature}, max_new_tokens, ends) for mode in modes]
    batches = make_batches(encoded, min(batch, len(encoded)))
    for one in contestants:
        one.run(batches[0])
    torch.manual_seed(0)
    return list(zip([one.name for one in contestants], alternate(contestants, [batches] * rounds), strict=True))


def grade(lm: BlockDiffusionLM, answers: list[list[int]], task: Task, cases: tuple[Example, ...]) -> float:
    """Share of answers that are right; an end token is not part of an answer."""
    told = [lm.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return sum(task.grade(text, case) for text, case in zip(told, cases, strict=False)) / len(told)


def table(cells: list[Cell]) -> str:
    """All cells as Markdown."""
    lines = [
        "| model | text | template | temperature | batch | decoder "
        "| x generate | tokens per forward | equal | right |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in cells:
        equal = "" if one.equal is None else f"{100 * one.equal:.0f} %"
        right = ""
        if one.right is not None and one.interval is not None:
            low, high = one.interval
            right = f"{100 * one.right:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
        lines.append(
            f"| {one.model} | {one.kind} | {one.template} | {one.temperature:g} | {one.batch} | {one.name} "
            f"| {one.speedup:.2f} | {one.tokens_per_forward:.2f} | {equal} | {right} |"
        )
    return "\n".join(lines)


def summary(cells: list[Cell]) -> str:
    """One line for each model, text, temperature and decoder, as Markdown: median and extremes of the templates."""
    batches = sorted({one.batch for one in cells})
    head = ["model", "text", "temperature", "decoder", *(f"x generate, batch {batch}" for batch in batches)]
    lines = [[*head, "tokens per forward", "equal", "right, by template"], ["---"] * (len(head) + 3)]
    same: dict[tuple[str, str, float, str], list[Cell]] = {}
    for one in cells:
        same.setdefault((one.model, one.kind, one.temperature, one.name), []).append(one)
    for (model, kind, temperature, name), group in same.items():
        speeds = [spread([one.speedup for one in group if one.batch == batch], "{:.2f}") for batch in batches]
        forwards = spread([one.tokens_per_forward for one in group if one.batch == batches[0]], "{:.2f}")
        equal = [100 * one.equal for one in group if one.equal is not None]
        right = [f"{100 * one.right:.0f}" for one in group if one.batch == batches[0] and one.right is not None]
        told = [forwards, f"{min(equal):.0f} %" if equal else "", f"{', '.join(right)} %" if right else ""]
        lines.append([model, kind, f"{temperature:g}", name, *speeds, *told])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(values: list[float], form: str) -> str:
    """The median, and the lowest and the highest where these differ from it as printed."""
    low, middle, high = (form.format(value) for value in (min(values), median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def cells_of(name: str, lm: BlockDiffusionLM, shipped: bool, given: dict[str, Any], on_part: Any) -> list[Cell]:
    """All conditions of one model."""
    found = []
    for kind, (template, form) in itertools.product(given["kinds"], TEMPLATES.items()):
        prompts, examples, graded = texts(kind, given["prompts"], shipped)
        filled = [form.format(prompt=one, example=two) for one, two in zip(prompts, examples, strict=False)]
        encoded = encode(lm, filled, chat=kind == "chat" and not shipped)
        for temperature, batch in itertools.product(given["temperatures"], given["batches"]):
            limits = {"max_new_tokens": given["max_new_tokens"], "rounds": given["rounds"]}
            measured = measure(lm, encoded, batch, temperature, **limits)
            reference = measured[0][1]
            for decoder, rounds in measured:
                answers, share, interval, equal = rounds[0].answers, None, None, None
                if graded is not None and graded.task is not None:
                    share = grade(lm, answers, graded.task, graded.cases)
                    interval = wilson(share, len(answers))
                if not temperature:
                    equal = sum(map(list.__eq__, answers, reference[0].answers)) / len(answers)
                speeds = compared(rounds, reference)
                per_forward = sum(one.new_tokens for one in rounds) / sum(one.row_forwards for one in rounds)
                condition = (name, kind, template, temperature, batch, decoder.partition(", temperature")[0])
                speed = (speeds["tokens_per_second"], speeds["speedup"], per_forward)
                found.append(Cell(*condition, len(answers), *speed, equal, share, interval))
            on_part()
    return found


def main(
    model: Annotated[str | None, typer.Option(help="a model folder; default: the shipped models")] = None,
    draft_adapter: Annotated[str | None, typer.Option(help="a draft adapter for it")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="chat, code or prose; default: all")] = None,
    prompts: Annotated[int, typer.Option(help="of each kind")] = 32,
    batch: Annotated[list[int] | None, typer.Option(help="default: 1, 8 and 32")] = None,
    temperature: Annotated[list[float] | None, typer.Option(help="default: 0 and 1")] = None,
    rounds: Annotated[int, typer.Option(help="passes over the prompts")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="of each answer")] = 96,
    output: Annotated[Path, typer.Option(help="JSON; the table goes beside it as .md")] = Path("runs/quality.json"),
) -> None:
    """Measure, print the table, and write both."""
    given: dict[str, Any] = {
        "kinds": kind or KINDS,
        "prompts": prompts,
        "batches": batch or [1, 8, 32],
        "temperatures": temperature or [0.0, 1.0],
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
    }
    asked = [(model, draft_adapter)] if model else [("tiny-bd", None), ("tiny-ar", "tiny-draft")]
    parts = len(asked) * len(given["kinds"]) * len(TEMPLATES) * len(given["temperatures"]) * len(given["batches"])
    cells: list[Cell] = []
    with progress("measuring") as update:
        done = itertools.count(1)
        for name, adapter in asked:
            lm = nb.load(name, draft_adapter=adapter)
            title = f"{name} + {adapter}" if adapter else name
            cells += cells_of(title, lm, model is None, given, lambda: update(next(done), parts))
    print(f"{table(cells)}\n\n{summary(cells)}")
    results = {
        "environment": environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        **given,
        "cells": [asdict(one) for one in cells],
    }
    write_json(results, output)
    output.with_suffix(".md").write_text(f"{summary(cells)}\n\n{table(cells)}\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
