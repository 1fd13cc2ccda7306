"""Commands that measure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from nextblock.cli.options import (
    GgufFile,
    MaxNewTokens,
    Model,
    Modes,
    PromptFile,
    Results,
    Settings,
    TaskName,
    Thresholds,
    Variants,
    at_least_one,
    check_output,
    decoding_options,
    load_lm,
    loading_options,
    refuse_given,
    takes_loading_options,
    thresholds_of,
    wide_console,
)
from nextblock.config.errors import UsageError
from nextblock.config.files import write_json
from nextblock.config.sections import with_gguf

TEXT = "Scoring text"
Likelihood = Annotated[
    str | None,
    typer.Option(help="text to score: a file, folder, glob, Hub id or task:NAME, as of `adapt`", rich_help_panel=TEXT),
]
BlockSizes = Annotated[
    str | None, typer.Option(help="of the bound: 1,4,32; default: the checkpoint's", rich_help_panel=TEXT)
]
BatchSize = Annotated[
    int | None, typer.Option(help="prompts (default: 25), or rows of --likelihood (default: 4), of one pass")
]
First = Annotated[
    int | None, typer.Option(help="number of the first (default: 0); choose settings on others than you report")
]
Draws = Annotated[
    int | None, typer.Option(help="of the noise of each block, for the bound; default: 8", rich_help_panel=TEXT)
]
RowLength = Annotated[int | None, typer.Option(help="longest context, in tokens; default: 1024", rich_help_panel=TEXT)]
TextField = Annotated[
    str | None, typer.Option(help="of JSONL, Parquet and Hub rows; default: text", rich_help_panel=TEXT)
]
Split = Annotated[str | None, typer.Option(help="where the data has splits; default: test", rich_help_panel=TEXT)]


@takes_loading_options
def evaluate(
    model: Model,
    task: TaskName = None,
    mode: Modes = None,
    threshold: Thresholds = None,
    block_size: Annotated[int | None, typer.Option(help="tokens in a block; default: the checkpoint's")] = None,
    examples: Annotated[
        int | None, typer.Option(help="held-out prompts (default: 200), or documents of --likelihood (default: all)")
    ] = None,
    first: First = None,
    temperature: Annotated[str | None, typer.Option(help="of sampled answers; default: 0, greedy")] = None,
    top_p: Annotated[str | None, typer.Option(help="nucleus of sampled answers")] = None,
    batch_size: BatchSize = None,
    likelihood: Likelihood = None,
    block_sizes: BlockSizes = None,
    draws: Draws = None,
    row_length: RowLength = None,
    text_field: TextField = None,
    split: Split = None,
    output: Annotated[Path | None, typer.Option(help="write the figures as JSON")] = None,
    **given: Any,
) -> None:
    """Score a model on a built-in task: accuracy, tokens per forward, tokens per second, agreement with AR mode.

    With --likelihood score text instead: bits per byte and perplexity, exact as AR, and the block-diffusion bound.
    """
    counts = {"examples": examples, "batch_size": batch_size, "draws": draws, "row_length": row_length}
    at_least_one(**{name: value for name, value in counts.items() if value is not None})
    of_text = {"block_sizes": block_sizes, "draws": draws, "row_length": row_length, "text_field": text_field}
    of_task = {"task": task, "mode": mode, "threshold": threshold, "block_size": block_size, "first": first}
    if likelihood is not None:
        _refuse("a task", **of_task, temperature=temperature, top_p=top_p)
        source = {"path": likelihood, "examples": examples, "text_field": text_field, "split": split}
        options = {"draws": draws or 8, "row_length": row_length or 1024, "batch_rows": batch_size or 4}
        _evaluate_text(model, source, block_sizes, options, output, given)
        return
    _refuse("--likelihood", **of_text, split=split)
    if top_p is not None and temperature is None:
        raise UsageError("--top-p cuts what is sampled, and answers are greedy; give --temperature as well")
    sampling = decoding_options({"temperature": temperature, "top_p": top_p})
    sizes = None if block_size is None else [block_size]
    _check_read(mode or [], threshold, sizes)
    limits = {"examples": examples, "first": first or 0, "batch_size": batch_size or 25}
    output = check_output(output)
    _evaluate_task(model, task or "word_problems", mode, threshold, sizes, sampling, limits, output, given)


def _evaluate_task(
    model: str,
    task: str,
    modes: list[str] | None,
    threshold: list[str] | None,
    sizes: list[int] | None,
    sampling: dict[str, Any],
    limits: dict[str, Any],
    output: Path | None,
    given: dict[str, Any],
) -> None:
    """What `evaluate` does without --likelihood."""
    from nextblock.config.progress import progress
    from nextblock.measure.bench.prompts import make_variants
    from nextblock.measure.bench.scores import score_modes
    from nextblock.measure.report.page import decoding_table
    from nextblock.tasks import get_task

    chosen, first = get_task(task), limits["first"]
    if first < 0:
        raise UsageError(f"first={first} must be at least 0")
    left = max(1, (chosen.count or first + 200) - first)
    limits["examples"] = limits["examples"] or min(200, left)
    chosen.example("test", first + limits["examples"] - 1)  # refused before a model is loaded
    thresholds = thresholds_of(threshold or ["none", "0.9"])
    lm = load_lm(model, given)
    modes = modes or (["ar", "speculative", "diffusion"] if lm.settings else ["ar"])
    _check_read(modes, threshold, sizes)
    variants = make_variants(lm.settings, modes=modes, thresholds=thresholds, block_sizes=sizes or [])
    with progress("scoring") as update:
        wanted = [(model, lm, {**options, **sampling}) for options in variants]
        rows = score_modes(wanted, chosen, on_prompt=update, **limits)
    wide_console().print(decoding_table({"decoding": rows}))
    write_json(rows, output)


def _refuse(kind: str, **options: Any) -> None:
    """UsageError for an option that is given and belongs to the other kind of evaluation."""
    for name, value in options.items():
        if value is not None:
            cure = {"block_size": "give --block-sizes", "block_sizes": "for a task give --block-size"}
            raise UsageError(f"--{name.replace('_', '-')} is an option of {kind}; {cure.get(name, 'leave it out')}")


def _evaluate_text(
    model: str,
    source: dict[str, Any],
    block_sizes: str | None,
    options: dict[str, int],
    output: Path | None,
    given: dict[str, Any],
) -> None:
    """What `evaluate --likelihood` does."""
    from dataclasses import asdict

    from nextblock.config.progress import progress
    from nextblock.config.sections import Source, validate
    from nextblock.data.sources import place_of
    from nextblock.measure.likelihood import likelihood_table
    from nextblock.workflows.text_likelihood import text_likelihood

    try:
        sizes = [int(part) for part in block_sizes.split(",")] if block_sizes else []
    except ValueError:
        raise UsageError(f"block_sizes={block_sizes} are not whole numbers; write 1,4,32") from None
    output = check_output(output)
    source = {name: value for name, value in source.items() if value is not None or name == "split"}
    place_of(validate(Source, source))  # refused before a model is loaded
    lm = load_lm(model, given)
    with progress("scoring text") as update:
        found = text_likelihood(lm, validate(Source, source), block_sizes=sizes, on_documents=update, **options)
    wide_console().print(likelihood_table(found.measures))
    read = {"documents": found.documents, "truncated": found.truncated, "skipped": found.skipped}
    if found.truncated or found.skipped:
        print(
            f"of {found.documents} documents {found.truncated} were cut at --row-length {found.row_length}, and "
            f"{found.skipped} left out, as nothing of them is generated within it"
        )
    options["row_length"] = found.row_length
    likelihood = [asdict(one) for one in found.measures]
    write_json({"model": model, "source": source, **options, **read, "likelihood": likelihood}, output)


Forwards = Annotated[bool, typer.Option("--forwards", help="also time one pass of 1 to 160 positions")]
PromptLookup = Annotated[
    bool, typer.Option("--prompt-lookup", help="also time transformers' prompt-lookup decoding, at batch 1")
]
Assistant = Annotated[
    str | None, typer.Option(help="also time transformers' assisted decoding with this smaller model, at batch 1")
]
Shape = Annotated[
    str | None, typer.Option(help="random weights instead of MODEL: qwen3-0.6b, qwen3-4b, openpangu-7b, ...")
]


@takes_loading_options
def bench_decode(
    model: Annotated[str | None, typer.Argument(help="local folder, Hub id, tiny-ar or tiny-bd")] = None,
    task: TaskName = None,
    prompts: PromptFile = None,
    examples: Annotated[int | None, typer.Option(help="prompts in each round; default: 16")] = None,
    mode: Modes = None,
    threshold: Thresholds = None,
    block_size: Annotated[list[int] | None, typer.Option(help="may be given again; default: the checkpoint's")] = None,
    variant: Variants = None,
    batch: Annotated[list[int] | None, typer.Option(help="prompts decoded together; may be given again")] = None,
    rounds: Annotated[int, typer.Option(help="passes over the prompts; medians are taken over them")] = 5,
    max_new_tokens: MaxNewTokens = 128,
    forwards: Forwards = False,
    cache_length: Annotated[
        int | None, typer.Option(help="cached tokens in front of these passes; default: 256")
    ] = None,
    prompt_lookup: PromptLookup = False,
    assistant: Assistant = None,
    shape: Shape = None,
    output: Results = None,
    **given: Any,
) -> None:
    """Time transformers' own `generate` and the three modes in turns, on the same model and prompts.

    With --shape only forward passes are timed, unless --mode or --variant asks for decoding as well.
    """
    from nextblock.measure.bench.command import read_prompts, run_bench
    from nextblock.measure.bench.forwards import random_model
    from nextblock.measure.bench.prompts import make_variants, parse_variant

    if (model is None) == (shape is None):
        raise UsageError("give either a MODEL or --shape")
    if shape:
        of_models = {"task": task, "prompts": prompts, "examples": examples, **given, "dtype": None, "compile": None}
        refuse_given("--shape makes a model of random weights, which decodes random tokens", **of_models)
    refuse_given("only --forwards and --shape read it", cache_length=None if forwards or shape else cache_length)
    modes, sizes = mode or (["ar"] if shape else []), block_size or ()
    _check_read(modes, threshold, block_size)
    output = check_output(output)
    extra, thresholds = [parse_variant(text) for text in variant or ()], thresholds_of(threshold or [])
    asked = None if shape else read_prompts(task, prompts, 16 if examples is None else examples, "test")
    loading = loading_options(given)
    kind = {name: loading[name] for name in ("dtype", "compile")}
    lm = random_model(shape, **kind) if shape else load_lm(str(model), given)
    _check_read(modes or ([] if lm.settings else ["ar"]), threshold, block_size)
    variants = make_variants(lm.settings, modes=modes, thresholds=thresholds, block_sizes=sizes, extra=extra)
    run_bench(
        lm,
        model=model or f"random weights, shape {shape}",
        prompts=asked,
        variants=variants if model or mode or extra else [],
        batches=batch or [1],
        rounds=rounds,
        max_new_tokens=max_new_tokens,
        forwards=forwards or shape is not None,
        cache_length=256 if cache_length is None else cache_length,
        assisted=_assisted(prompt_lookup, assistant, given, 1 in (batch or [1]) and bool(model or mode or extra)),
        tell=partial(_tell_speeds, output),
    )


def _check_read(modes: Sequence[str], threshold: list[str] | None, block_size: list[int] | None) -> None:
    """UsageError for a threshold or a block size that none of the modes reads; no modes: all that there are."""
    if modes and "diffusion" not in modes:
        refuse_given("only diffusion mode reads it", threshold=threshold)
    if modes and set(modes) <= {"ar"}:
        refuse_given("ar mode has no blocks", block_size=block_size)


def _assisted(
    prompt_lookup: bool, assistant: str | None, given: dict[str, Any], alone: bool
) -> list[tuple[str, dict[str, Any]]]:
    """Transformers' assisted decodings to time, each with its arguments of `generate`.

    alone: whether prompts are decoded at batch 1, beside which alone they are timed.
    """
    if not alone:
        refuse_given(
            "it is timed beside decoding at batch 1", prompt_lookup=prompt_lookup or None, assistant=assistant
        )
    found: list[tuple[str, dict[str, Any]]] = []
    if prompt_lookup:
        found.append(("prompt lookup", {"prompt_lookup_num_tokens": 10}))
    if assistant is not None:
        found.append(
            (f"assistant {assistant}", {"assistant_model": load_lm(assistant, {"dtype": given["dtype"]}).model})
        )
    return found


def _tell_speeds(output: Path | None, results: dict[str, Any]) -> None:
    """Write the figures of a benchmark if an output is named, and print its tables."""
    from nextblock.measure.bench.command import write_results
    from nextblock.measure.bench.figures import forward_table, plot_bench, speed_table

    written = () if output is None else write_results(results, plot_bench(results), output)
    for kind, table in (("decode", speed_table), ("forwards", forward_table)):
        if results[kind]:
            wide_console().print(table(results[kind]))
    if written:
        print(*written)


@takes_loading_options
def tune(
    model: Model,
    task: TaskName = None,
    prompts: PromptFile = None,
    examples: Annotated[int, typer.Option(help="prompts (of a task: from its training split)")] = 64,
    max_drop: Annotated[float, typer.Option(help="most points of accuracy, or of agreement with AR, to lose")] = 2.0,
    mode: Annotated[list[str] | None, typer.Option(help="diffusion or speculative; default: both")] = None,
    variant: Variants = None,
    batch: Annotated[int, typer.Option(help="prompts decoded together")] = 1,
    max_new_tokens: MaxNewTokens = 160,
    write: Annotated[bool, typer.Option("--write", help="make the choice the checkpoint's default")] = False,
    output: Results = None,
    **given: Any,
) -> None:
    """Find the fastest settings that lose no more than you allow, draw the curve, and save the choice."""
    from nextblock.config.progress import progress
    from nextblock.measure import tune as tuning
    from nextblock.measure.bench.command import read_prompts, write_results
    from nextblock.measure.bench.figures import plot_tuning, tuning_table
    from nextblock.measure.bench.prompts import parse_variant
    from nextblock.workflows.stored import writable_folder, write_decoding

    if write and given["draft_adapter"]:
        raise UsageError(
            "--write changes the settings of MODEL, and what is tuned here are those of the draft adapter; leave "
            "--write out, and give `generate` the options found"
        )
    if write and given["settings"]:
        raise UsageError(
            "--write changes settings in config.json; put the block_diffusion section there, not --settings"
        )
    folder = writable_folder(model) if write else None
    output = check_output(output)
    asked = read_prompts(task, prompts, examples, "train")
    extra = [parse_variant(text) for text in variant or ()]
    lm = load_lm(model, given)
    with progress("tuning") as update:
        found = tuning.tune(
            lm,
            asked,
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
        print(f"{name}: {_in_words(trial)}")
    if output is not None:
        figure = plot_tuning(results["trials"], found.measure, max_drop)
        print(*write_results({"model": model, **results}, figure, output))
    if folder is not None and found.winner is not None:
        print(f"wrote {found.decoding()} to {write_decoding(folder, found.decoding())}")


def _in_words(trial: Any) -> str:
    """One line on the choice of a mode."""
    if trial is None:
        return "none stays within the allowed drop; allow more with --max-drop, or adapt the model further"
    return (
        f"{trial.name}: {trial.speedup:.2f} times AR mode's tokens per second, "
        f"{trial.tokens_per_forward:.2f} tokens per forward, drop {trial.drop:.1f} ± {trial.drop_error:.1f} points"
    )


def verify(
    model: Model,
    mask_token: Annotated[
        int | None, typer.Option(help="mask token id; default: as saved, or made for the test")
    ] = None,
    attention: Annotated[str, typer.Option(help="auto, sdpa, flex_attention or eager")] = "auto",
    settings: Settings = None,
    gguf_file: GgufFile = None,
) -> None:
    """Run the identities that define "correct" on your own model, and print a table; exit status 1 if one fails."""
    from nextblock.config.progress import progress
    from nextblock.measure.identities import table
    from nextblock.measure.identities import verify as run

    with progress("verifying") as update:
        checks = run(
            with_gguf(model, gguf_file), mask_token=mask_token, attention=attention, settings=settings, on_check=update
        )
    wide_console().print(table(checks))
    if any(check.status == "failed" for check in checks):
        raise typer.Exit(1)


def report(run: Annotated[Path, typer.Argument(help="output folder of adapt or demo")]) -> None:
    """Make `report.html` of a finished run again, from its figures and its log."""
    from nextblock.measure.report import load_results, write_report

    try:
        print(write_report(load_results(run), run))
    except OSError as error:
        place = error.filename2 or run
        raise UsageError(
            f"{place} cannot be written: {error.strerror}; make way there, or copy the run and name the copy"
        ) from None
