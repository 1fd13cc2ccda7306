"""The report in words, tables and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from rich import box
from rich.markup import escape as escape_markup
from rich.table import Table

from nextblock.measure.report.figures import inline_svg, of_kind, plot_losses, plot_profile, plot_tradeoff, tasks_of
from nextblock.measure.statistics import wilson
from nextblock.measure.style import Entry
from nextblock.measure.words import DASH, count, duration, number, percent, percent_between, spaced

MODES = {"ar": "AR"}  # the others are called as they are
SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥", "": "∅"}  # for tokens that would not be seen
SAME_ACCURACY = 0.01  # a faster setting counts as no worse within this much of the slow one's accuracy
FIGURES = {  # what each figure shows, for those who cannot see it
    "losses": "Diffusion and AR loss against the training step",
    "profile": "Diffusion loss by masked share of the block and by place in the block",
    "tradeoff": "Accuracy against tokens per forward and per second",
}


def render(
    results: Mapping[str, Any],
    log: Sequence[Entry] = (),
    profiles: Sequence[Entry] = (),
    resumes: Sequence[Entry] = (),
) -> str:
    """The whole report as one HTML page; `log`, `profiles` and `resumes` are the records of a run's log."""
    decoding, training = results.get("decoding") or [], results.get("training") or {}
    facts = {"created": results["created"]} if results.get("created") else {}
    for part in ("settings", "environment"):
        facts |= {spaced(key): value for key, value in (results.get(part) or {}).items()}
    facts |= {f"from step {e['step']} on": "; ".join(e["changes"]) for e in resumes}
    page = Environment(
        loader=PackageLoader("nextblock.measure.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return page.get_template("page.html").render(
        title=results.get("title") or "nextblock report",
        summary=summary(results),
        findings=findings(results),
        losses=_svg("losses", log and plot_losses(log, training.get("growth"), training.get("stages"))),
        profile=_svg("profile", profiles and plot_profile(profiles)),
        tradeoff=_svg("tradeoff", decoding and plot_tradeoff(decoding)),
        tasks=[_task_table(task, decoding) for task in tasks_of(decoding)],
        bits_per_byte=[
            (
                e["model"],
                e["measure"],
                number(e.get("block_size"), 0),
                number(e["value"], 3),
                number(e.get("bytes"), 0),
            )
            for e in results.get("bits_per_byte") or []
        ],
        samples=[_sample(sample) for sample in results.get("samples") or []],
        command=results.get("command"),
        facts=list(facts.items()),
    )


def _svg(name: str, figure: Any) -> Markup:
    """A figure of `FIGURES` as an SVG element; nothing where there is none."""
    return Markup(inline_svg(figure, name, FIGURES[name])) if figure else Markup()


def summary(results: Mapping[str, Any]) -> str:
    """One or two plain sentences: what was done."""
    parent, training = results.get("parent") or {}, results.get("training") or {}
    settings = results.get("settings") or {}
    model = f"The autoregressive model {parent['name']}" if parent.get("name") else "An autoregressive model"
    if parent.get("parameters"):
        model += f" ({count(parent['parameters'])} parameters)"
    block_size = settings.get("block_size")
    text = f"{model} was adapted to write " + (f"blocks of {block_size} tokens" if block_size else "whole blocks")
    parts = (("steps", "{:,} steps".format), ("tokens", lambda n: f"{count(n)} tokens"), ("seconds", duration))
    done = [say(training[name]) for name, say in parts if training.get(name)]
    text += f": {', '.join(done)}." if done else "."
    sizes = [str(size) for _, size in training.get("growth") or []]
    return text + (f" The block grew {' → '.join(sizes)}." if len(sizes) > 1 else "")


def findings(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The main results as (figure, sentence), each computed from the numbers; empty if there are none."""
    decoding = results.get("decoding") or []
    tasks = tasks_of(decoding)
    found = []
    for task in tasks:
        where = f" ({spaced(task)})" if len(tasks) > 1 else ""
        entries = [entry for entry in decoding if entry["task"] == task]
        found += [(head, text + where) for head, text in _decoding_findings(entries)]
    values = {(e["model"], e["measure"]): e["value"] for e in results.get("bits_per_byte") or []}
    parent, adapted = values.get(("parent", "AR (exact)")), values.get(("adapted", "AR (exact)"))
    if parent is not None and adapted is not None:
        found.append((f"{adapted:.3f} bits per byte", f"adapted model as AR, held-out text; its parent: {parent:.3f}"))
    return found


def _decoding_findings(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Findings of one task: speculative, AR kept, diffusion a token at a time, diffusion faster."""
    found = []
    measured = [entry for entry in entries if entry.get("tokens_per_forward") is not None]
    speculative, diffusion = (of_kind(measured, "adapted", mode) for mode in ("speculative", "diffusion"))
    ar, parent = of_kind(entries, "adapted", "ar"), of_kind(entries, "parent", "ar")
    if speculative:
        best = max(speculative, key=lambda e: e["tokens_per_forward"])
        text = "speculative mode" + _block_size(best, speculative)
        if best.get("equal_to_ar") is not None:
            same = round(best["equal_to_ar"] * best["examples"])
            text += f": output equal to AR mode on {same} of {best['examples']} prompts"
        found.append((f"{best['tokens_per_forward']:.2f} tokens per forward", text))
    if ar and parent:
        text = f"accuracy of the adapted model as AR; its parent has {_accuracy(parent[0])}"
        found.append((_accuracy(ar[0]), text))
    if diffusion:
        single = [entry for entry in diffusion if entry.get("threshold") is None]
        slow = max(single or diffusion, key=lambda e: e["accuracy"])
        how = "one token per denoising step" if single else f"threshold {slow['threshold']:g}"
        text = f"accuracy of diffusion mode, {how}{_block_size(slow, diffusion)}"
        found.append((_accuracy(slow), text))
        least = slow["accuracy"] - SAME_ACCURACY
        good = [e for e in diffusion if e.get("threshold") is not None and e["accuracy"] >= least]
        fast = max(good, key=lambda e: e["tokens_per_forward"], default=slow)
        if fast is not slow:
            how = f"threshold {fast['threshold']:g}{_block_size(fast, diffusion)}"
            text = f"diffusion mode at {how}, accuracy {_accuracy(fast)}"
            found.append((f"{fast['tokens_per_forward']:.2f} tokens per forward", text))
    return found


def _accuracy(entry: Entry) -> str:
    """`96.5 % (93–98)`: accuracy and its 95 % interval."""
    return percent_between(entry["accuracy"], *wilson(entry["accuracy"], entry["examples"]))


def _block_size(entry: Entry, among: Sequence[Entry]) -> str:
    """`, b = 8` where the entries differ in block size."""
    return f", b = {entry['block_size']}" if len({other["block_size"] for other in among}) > 1 else ""


# --------------------------------------------------------------------------------------------- tables

INTERVAL = "95 %"
MEASURES = ("Accuracy", INTERVAL, "Tokens per forward", "Tokens per second", "Speed-up", "Equal to AR", "p")
BROKEN = ("Accu-\nracy", "95 %", "Tokens/\nforward", "Tokens/\nsecond", "Speed-\nup", "Equal\nto AR", "p")  # narrow


def decoding_table(results: Mapping[str, Any]) -> Table:
    """The decoding results as a table for a terminal of 80 columns; without rows when there are none."""
    decoding = results.get("decoding") or []
    tasks = tasks_of(decoding)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, title_justify="left")
    if len(tasks) == 1:
        table.title = escape_markup(f"{spaced(tasks[0]).capitalize()}, {_prompts(decoding)}")
    table.caption = "95 %: interval of the accuracy. p: McNemar's test, as many right answers as AR mode."
    table.add_column("Model and mode", vertical="bottom")
    for heading in BROKEN:
        table.add_column(heading, justify="right", vertical="bottom")
    for task in tasks:
        entries = [entry for entry in decoding if entry["task"] == task]
        if len(tasks) > 1:
            table.add_row(escape_markup(f"{spaced(task).capitalize()}, {_prompts(entries)}"), style="bold")
        for row in _decoding_rows(entries):
            table.add_row(*map(escape_markup, row))
        table.add_section()
    return table


def _prompts(entries: Sequence[Entry]) -> str:
    """`200 held-out prompts`, or `100 to 200 held-out prompts`."""
    counts = sorted({entry["examples"] for entry in entries})
    return " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1]))) + " held-out prompts"


def _decoding_rows(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    """One task's entries: what was run, then MEASURES. Speed-up is against the parent's AR."""
    parent = of_kind(entries, "parent", "ar")
    base = parent[0]["tokens_per_second"] if parent else None
    blockwise = [entry for entry in entries if entry["mode"] != "ar"]
    rows = []
    for entry in entries:
        mode, threshold, speed = entry["mode"], entry.get("threshold"), entry.get("tokens_per_second")
        name = f"{entry['model']}, {MODES.get(mode, mode)}"
        if mode == "diffusion":
            name += ", 1 token/step" if threshold is None else f" ≥ {threshold:g}"
        name += _block_size(entry, blockwise) if mode != "ar" else ""
        ratio = entry.get("speedup") or (speed / base if speed and base else None)
        spread = (entry["speedup_high"] - entry["speedup_low"]) / 2 if entry.get("speedup_low") else None
        low, high = wilson(entry["accuracy"], entry["examples"])
        figures = (
            percent(entry["accuracy"]),
            f"{100 * low:.0f}–{100 * high:.0f}",
            number(entry.get("tokens_per_forward")),
        )
        same = (percent(entry.get("equal_to_ar")), number(entry.get("p_value")))
        pace = number(speed, 0 if speed and speed >= 100 else 1)
        gain = f"{ratio:.2f}{f'±{spread:.2f}' if spread else ''}×" if ratio else DASH
        rows.append((name, *figures, pace, gain, *same))
    return rows


def _task_table(task: str, decoding: Sequence[Entry]) -> dict[str, Any]:
    """One task's part of the page: its name, its prompts in words, columns and rows."""
    entries = [entry for entry in decoding if entry["task"] == task]
    columns = ("Model and mode", *MEASURES)
    name = spaced(task).capitalize()
    return {"name": name, "prompts": _prompts(entries), "columns": columns, "rows": _decoding_rows(entries)}


# -------------------------------------------------------------------------------------------- samples


def _sample(sample: Entry) -> dict[str, Any]:
    """One sample: prompt, answer, and a strip of cells for each block."""
    confidence = sample.get("confidence") or []
    blocks = split_blocks(sample.get("steps") or []) if sample["mode"] != "ar" else []  # AR: nothing to see
    total = sum(len(steps) for _, _, steps in blocks)
    heading = f"{spaced(sample['task']).capitalize()}, {MODES.get(sample['mode'], sample['mode'])}"
    heading += f": {total} steps, {len(blocks)} block{'s' * (len(blocks) != 1)}" if total else ""
    strips = [_strip(steps, confidence[first : first + len(steps)], start) for first, start, steps in blocks]
    return {"heading": heading, "prompt": sample["prompt"], "answer": sample["answer"], "strips": strips}


def split_blocks(steps: Sequence[Sequence[str | None]]) -> list[tuple[int, int, list[Sequence[str | None]]]]:
    """Group the denoising steps of an answer by block.

    A new block begins where a decided place is masked or other text again (each row holds its block alone),
    or where a wholly decided row is followed by a longer one that repeats it (each row holds the whole answer
    so far); the repeated part is left out.

    Returns:
        For each block its first step, its first place in the rows' own numbering, and its rows.
    """
    blocks: list[tuple[int, int, list[Sequence[str | None]]]] = []
    before: Sequence[str | None] = []
    for step, row in enumerate(steps):
        pairs = zip(before, row, strict=False)
        kept = len(row) >= len(before) and all(old is None or old == new for old, new in pairs)
        if not blocks or not kept:
            blocks.append((step, 0, []))
        elif len(row) > len(before) and None not in before:
            blocks.append((step, len(before), []))
        blocks[-1][2].append(row[blocks[-1][1] :])
        before = row
    return blocks


def _strip(
    steps: Sequence[Sequence[str | None]], confidence: Sequence[Sequence[float | None]], start: int
) -> list[list[dict[str, Any] | None]]:
    """A block's steps as rows of cells; None: masked. `when`, 0 to 1: the step in which a place was decided."""
    decided: dict[int, int] = {}  # place -> step
    rows: list[list[dict[str, Any] | None]] = []
    for step, row in enumerate(steps):
        known = confidence[step] if step < len(confidence) else ()
        rows.append([])
        for place, text in enumerate(row):
            if text is None:
                rows[-1].append(None)
                continue
            when = decided.setdefault(place, step)
            sure = known[start + place] if when == step and start + place < len(known) else None
            kind = " ".join(["sign"] * (text in SIGNS) + ["new"] * (when == step))
            share = when / max(1, len(steps) - 1)
            rows[-1].append({"text": SIGNS.get(text, text), "kind": kind, "when": share, "confidence": sure})
    return rows
