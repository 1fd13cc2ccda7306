"""Commands that measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from nextblock.cli.options import (
    BlockSize,
    Compile,
    DraftAdapterFolder,
    Dtype,
    MaxNewTokens,
    Model,
    Settings,
    app,
    at_least_one,
    load_lm,
    number,
    torch_dtype,
)
from nextblock.config.errors import UsageError


@app.command()
def evaluate(
    model: Model,
    task: Annotated[str, typer.Option(help="word_problems, algebra or functions")] = "word_problems",
    mode: Annotated[list[str] | None, typer.Option(help="modes to score; may be given again; default: all")] = None,
    threshold: Annotated[
        list[str] | None, typer.Option(help="thresholds of diffusion mode; 'none': one a step")
    ] = None,
    block_size: BlockSize = None,
    examples: Annotated[int, typer.Option(help="held-out prompts")] = 200,
    first: Annotated[int, typer.Option(help="number of the first; choose settings on others than you report")] = 0,
    batch_size: Annotated[int, typer.Option(help="prompts decoded together")] = 25,
    output: Annotated[Path | None, typer.Option(help="write the figures as JSON")] = None,
    draft_adapter: DraftAdapterFolder = None,
    settings: Settings = None,
    dtype: Dtype = None,
) -> None:
    """Score a model on a built-in task: accuracy, tokens per forward, tokens per second, agreement with AR mode."""
    from rich.console import Console

    from nextblock.data.tasks import get_task
    from nextblock.measure.bench.command import check_output
    from nextblock.measure.bench.scores import score_modes
    from nextblock.measure.progress import progress
    from nextblock.measure.report.page import decoding_table

    chosen = get_task(task)
    at_least_one(examples=examples, batch_size=batch_size)
    thresholds = [number(value, "threshold") for value in threshold or ("none", "0.9")]
    check_output(output)
    lm = load_lm(model, dtype, draft_adapter, settings=settings)
    variants: list[dict[str, Any]] = []
    for name in mode or (["ar", "speculative", "diffusion"] if lm.settings else ["ar"]):
        common = {"mode": name} if name == "ar" or block_size is None else {"mode": name, "block_size": block_size}
        variants += [{**common, "threshold": t} for t in thresholds] if name == "diffusion" else [common]
    with progress("scoring") as update:
        wanted = [(model, lm, options) for options in variants]
        rows = score_modes(wanted, chosen, examples=examples, first=first, batch_size=batch_size, on_prompt=update)
    Console().print(decoding_table({"decoding": rows}))
    if output is not None:
        output.write_text(json.dumps(rows, indent=1), encoding="utf-8")


bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Measure speed.")

TaskName = Annotated[str, typer.Option(help="prompts of a built-in task: word_problems, algebra or functions")]
PromptFile = Annotated[
    Path | None, typer.Option(help="prompts of a file instead: one a line, or .jsonl with `prompt` or `messages`")
]
Variants = Annotated[
    list[str] | None, typer.Option(help="further settings: 'speculative,draft_length=8'; may be given again")
]
Results = Annotated[Path | None, typer.Option(help="write the figures to this .json file, and a plot beside it")]


@bench_app.command("decode")
def bench_decode(
    model: Annotated[str | None, typer.Argument(help="local folder, Hub id, tiny-ar or tiny-bd")] = None,
    task: TaskName = "word_problems",
    prompts: PromptFile = None,
    examples: Annotated[int, typer.Option(help="prompts in each round")] = 16,
    mode: Annotated[list[str] | None, typer.Option(help="may be given again; default: all")] = None,
    threshold: Annotated[list[str] | None, typer.Option(help="of diffusion mode; may be given again")] = None,
    block_size: Annotated[list[int] | None, typer.Option(help="may be given again; default: the checkpoint's")] = None,
    variant: Variants = None,
    batch: Annotated[list[int] | None, typer.Option(help="prompts decoded together; may be given again")] = None,
    rounds: Annotated[int, typer.Option(help="passes over the prompts; medians are taken over them")] = 5,
    max_new_tokens: MaxNewTokens = 128,
    forwards: Annotated[bool, typer.Option("--forwards", help="also time one pass of 1 to 160 positions")] = False,
    cache_length: Annotated[int, typer.Option(help="cached tokens in front of these passes")] = 256,
    prompt_lookup: Annotated[
        bool, typer.Option("--prompt-lookup", help="also time transformers' prompt-lookup decoding, at batch 1")
    ] = False,
    assistant: Annotated[
        str | None, typer.Option(help="also time transformers' assisted decoding with this smaller model, at batch 1")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="random weights instead of MODEL: qwen3-0.6b, qwen3-4b, openpangu-7b, ...")
    ] = None,
    output: Results = None,
    draft_adapter: DraftAdapterFolder = None,
    settings: Settings = None,
    dtype: Dtype = None,
    compile: Compile = None,
) -> None:
    """Time transformers' own `generate` and the three modes in turns, on the same model and prompts.

    With --shape only forward passes are timed, unless --mode or --variant asks for decoding as well.
    """
    from nextblock.measure.bench.command import check_output, read_prompts, run_bench, wide_console, write_results
    from nextblock.measure.bench.figures import forward_table, plot_bench, speed_table
    from nextblock.measure.bench.forwards import random_model
    from nextblock.measure.bench.prompts import make_variants, parse_variant

    if (model is None) == (shape is None):
        raise UsageError("give either a MODEL or --shape")
    check_output(output)
    extra = [parse_variant(text) for text in variant or ()]
    thresholds = [number(text, "threshold") for text in threshold or ()]
    given = None if shape else read_prompts(task, prompts, examples, "test")
    if shape:
        lm = random_model(shape, dtype=torch_dtype(dtype), compile=compile)
    else:
        lm = load_lm(str(model), dtype, draft_adapter, compile, settings)
    assisted: list[tuple[str, dict[str, Any]]] = []
    if prompt_lookup:
        assisted.append(("prompt lookup", {"prompt_lookup_num_tokens": 10}))
    if assistant is not None:
        assisted.append((f"assistant {assistant}", {"assistant_model": load_lm(assistant, dtype).model}))
    variants = make_variants(
        lm.settings,
        modes=mode or (["ar"] if shape else ()),
        thresholds=thresholds,
        block_sizes=block_size or (),
        extra=extra,
    )
    results = run_bench(
        lm,
        model=model or f"random weights, shape {shape}",
        prompts=given,
        variants=variants if model or mode or extra else [],
        batches=batch or [1],
        rounds=rounds,
        max_new_tokens=max_new_tokens,
        forwards=forwards or shape is not None,
        cache_length=cache_length,
        assisted=assisted,
    )
    for kind, table in (("decode", speed_table), ("forwards", forward_table)):
        if results[kind]:
            wide_console().print(table(results[kind]))
    if output is not None:
        print(*write_results(results, plot_bench(results), output))


@app.command()
def tune(
    model: Model,
    task: TaskName = "word_problems",
    prompts: PromptFile = None,
    examples: Annotated[int, typer.Option(help="prompts (of a task: from its training split)")] = 64,
    max_drop: Annotated[float, typer.Option(help="most points of accuracy, or of agreement with AR, to lose")] = 2.0,
    mode: Annotated[list[str] | None, typer.Option(help="diffusion or speculative; default: both")] = None,
    variant: Variants = None,
    batch: Annotated[int, typer.Option(help="prompts decoded together")] = 1,
    max_new_tokens: MaxNewTokens = 160,
    write: Annotated[bool, typer.Option("--write", help="make the choice the checkpoint's default")] = False,
    output: Results = None,
    draft_adapter: DraftAdapterFolder = None,
    settings: Settings = None,
    dtype: Dtype = None,
) -> None:
    """Find the fastest settings that lose no more than you allow, draw the curve, and save the choice."""
    from nextblock.measure import tune as tuning
    from nextblock.measure.bench.command import check_output, read_prompts, wide_console, write_results
    from nextblock.measure.bench.figures import plot_tuning, tuning_table
    from nextblock.measure.bench.prompts import parse_variant
    from nextblock.measure.progress import progress

    if write and settings:
        raise UsageError(
            "--write changes settings in config.json; put the block_diffusion section there, not --settings"
        )
    folder = tuning.writable_folder(model) if write else None
    check_output(output)
    given = read_prompts(task, prompts, examples, "train")
    extra = [parse_variant(text) for text in variant or ()]
    lm = load_lm(model, dtype, draft_adapter, settings=settings)
    with progress("tuning") as update:
        found = tuning.tune(
            lm,
            given,
            max_drop=max_drop,
            modes=mode or tuning.MODES,
            extra=extra,
            batch=batch,
            max_new_tokens=max_new_tokens,
            on_call=update,
        )
    results = found.as_dict()
    wide_console().print(tuning_table(results["trials"], found.measure))
    for name, trial in found.best.items():
        print(f"{name}: {tuning.setting_in_words(trial)}")
    if output is not None:
        figure = plot_tuning(results["trials"], found.measure, max_drop)
        print(*write_results({"model": model, **results}, figure, output))
    if folder is not None and found.winner is not None:
        print(f"wrote {found.decoding()} to {tuning.write_decoding(folder, found.decoding())}")


@app.command()
def verify(
    model: Model,
    mask_token: Annotated[
        int | None, typer.Option(help="mask token id; default: as saved, or made for the test")
    ] = None,
    attention: Annotated[str, typer.Option(help="auto, sdpa, flex_attention or eager")] = "auto",
    settings: Settings = None,
) -> None:
    """Run the identities that define "correct" on your own model, and print a table; exit status 1 if one fails."""
    from rich.console import Console

    from nextblock.measure.identities import table
    from nextblock.measure.identities import verify as run
    from nextblock.measure.progress import progress

    with progress("verifying") as update:
        checks = run(model, mask_token=mask_token, attention=attention, settings=settings, on_check=update)
    Console().print(table(checks))
    if any(check.status == "failed" for check in checks):
        raise typer.Exit(1)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="output folder of adapt or demo")]) -> None:
    """Make `report.html` of a finished run again, from its figures and its log."""
    from nextblock.measure.report import load_results, write_report

    print(write_report(load_results(run), run))
