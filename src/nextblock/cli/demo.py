"""`nextblock demo`: the whole method on the shipped parent, on a laptop, while you watch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from nextblock.cli.live import TrainingBar, show_denoising
from nextblock.config.presets import preset
from nextblock.config.progress import progress
from nextblock.config.run import AdaptConfig, load_config
from nextblock.decoding.lm import BlockDiffusionLM, load
from nextblock.measure.bench.scores import score_modes
from nextblock.measure.report import write_report
from nextblock.measure.report.page import decoding_table
from nextblock.recipe import schedules
from nextblock.tasks import get_task
from nextblock.workflows.adapt import adapt

PARENT, ADAPTER = "tiny-ar", "tiny-draft"
TASK = "word_problems"
THRESHOLDS: tuple[float | None, ...] = (None, 0.99, 0.9, 0.7)
SAMPLES = 3


def demo(output: str | Path | None = None, *, examples: int = 200, console: Console | None = None) -> dict[str, Any]:
    """Adapt the shipped parent, show a denoising, score all modes, and write the report.

    Args:
        output: folder for everything; default: the first free one of runs/demo, runs/demo-2, ...
        examples: held-out prompts scored in each mode.
        console: where to print.
    Returns:
        The figures of `results.json`.
    """
    console = console or Console()
    disable_progress_bar()  # transformers' own, which would break up the picture
    config = load_config(preset("demo"), {"output": str(output or free_folder("runs/demo"))})
    folder = Path(config.output)
    console.print(plan_in_words(config), soft_wrap=True)
    with TrainingBar(config.training.steps, console=console) as bar:
        result = adapt(config, on_step=bar.update)
    results = result.results
    if not result.finished:
        console.print("stopped early; run the command again to start over")
        return results
    parent, adapted = load(config.model.path), load(folder)
    console.print("\nA held-out problem, denoised block by block:")
    results["samples"] = sample_denoisings(adapted, console)
    results["decoding"] = score_all(parent, adapted, examples, console)
    results |= {"title": f"{config.model.path}, adapted in the demo", "command": "nextblock demo"}
    report = write_report(results, folder)
    console.print(decoding_table(results))
    told = f"report      {report}\nfigures     {folder / 'results.json'}\ncheckpoint  {folder}\ntry         "
    told += f"nextblock generate {folder} {shlex.quote(get_task(TASK).example('test', 7).prompt)}"
    console.print(told, soft_wrap=True, markup=False)
    return results


def free_folder(wanted: str) -> Path:
    """`wanted`, or `wanted-2`, `wanted-3`, ...: the first that is empty or does not exist."""
    folder, number = Path(wanted), 1
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = Path(f"{wanted}-{number}")
    return folder


def plan_in_words(config: AdaptConfig) -> str:
    """What the demo is about to do, from its configuration."""
    sizes = " -> ".join(str(size) for _, size in schedules.growth_steps(config.growth, config.training.steps))
    weight, final = config.recipe.ar_weight, config.recipe.ar_weight_final
    rising = "" if final is None else f" to {final}"
    return (
        f"Adapting {config.model.path}, a small autoregressive model, into a block-diffusion model: blocks grow "
        f"{sizes}, AR loss weight {weight}{rising}, {config.training.steps} steps."
    )


def sample_denoisings(lm: BlockDiffusionLM, console: Console) -> list[dict[str, Any]]:
    """Denoise a few held-out problems, the first live; frames for the report."""
    assert lm.settings is not None
    samples = []
    for index in range(SAMPLES):
        prompt = get_task(TASK).example("test", index).prompt
        events = lm.stream(prompt, mode="diffusion", max_new_tokens=96)
        shown = console if index == 0 else Console(quiet=True)
        view = show_denoising(events, lm.tokenizer, prompt, lm.settings.block_size, console=shown, seconds=0.12)
        samples.append(
            {
                "task": TASK,
                "prompt": prompt,
                "mode": "diffusion",
                "answer": "".join(piece or "" for piece in view.steps[-1]),
                "steps": view.steps,
                "confidence": view.confidence,
            }
        )
    return samples


def score_all(
    parent: BlockDiffusionLM, adapted: BlockDiffusionLM, examples: int, console: Console
) -> list[dict[str, Any]]:
    """The parent in AR mode, alone and with the shipped draft adapter, and the adapted model in every mode."""
    drafting = load(PARENT, draft_adapter=ADAPTER)
    wanted: list[tuple[str, BlockDiffusionLM, dict[str, Any]]] = [
        ("parent", parent, {"mode": "ar"}),
        (f"parent + {ADAPTER}", drafting, {"mode": "speculative"}),
        ("adapted", adapted, {"mode": "ar"}),
        ("adapted", adapted, {"mode": "speculative"}),
        *(("adapted", adapted, {"mode": "diffusion", "threshold": t}) for t in THRESHOLDS),
    ]
    with progress("scoring", console) as update:
        return score_modes(wanted, get_task(TASK), examples=examples, on_prompt=update)
