"""The command line: thin; every command is one call into the library."""

from __future__ import annotations

import codecs
import io
import json
import logging
import os
import re
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
import yaml

from nextblock.config.errors import UsageError
from nextblock.config.run import AdaptConfig
from nextblock.config.sections import Section

app = typer.Typer(
    name="nextblock",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn an autoregressive language model into a block-diffusion one, and run it (arXiv 2512.06776).\n\n"
    "A MODEL is a local Hugging Face folder, a Hub id, or a shipped model: tiny-ar (the AR parent) or tiny-bd "
    "(adapted).",
)

Model = Annotated[str, typer.Argument(help="local folder, Hub id, tiny-ar or tiny-bd")]
Mode = Annotated[
    str | None,
    typer.Option(help="ar: token by token. diffusion: a block at a time. speculative: a block at a time, AR's output"),
]
MaxNewTokens = Annotated[int, typer.Option(help="longest answer, in tokens")]
AnswerTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", help="longest answer, in tokens; default: the checkpoint's, else 256")
]
BlockSize = Annotated[int | None, typer.Option(help="tokens in a block; default: the checkpoint's")]
SubBlocks = Annotated[int | None, typer.Option(help="runs in which a block is denoised; divides the block size")]
Sampler = Annotated[str | None, typer.Option(help="confidence, entropy, margin or entropy_bound")]
Threshold = Annotated[str | None, typer.Option(help="diffusion: commit all above it, 0 to 1; 'none': one a step")]
Temperature = Annotated[float | None, typer.Option(help="0: greedy; default: the checkpoint's, else 0")]
TopP = Annotated[float | None, typer.Option(help="nucleus sampling")]
TopK = Annotated[int | None, typer.Option(help="sample from the k likeliest tokens")]
Seed = Annotated[int | None, typer.Option(help="of the random draws")]
Steps = Annotated[int | None, typer.Option(help="diffusion: denoising steps per block")]
DraftLength = Annotated[
    str | None, typer.Option(help="speculative: tokens per draft, or 'auto': by what was kept lately")
]
DraftAhead = Annotated[
    int | None, typer.Option(help="speculative: draft in the check's own pass, for so many points of acceptance")
]
DraftPaths = Annotated[int | None, typer.Option(help="speculative: paths of a draft, checked at once as a tree")]
DraftAdapterFolder = Annotated[
    str | None, typer.Option("--draft-adapter", help="folder of a draft adapter for this model, or tiny-draft")
]
Settings = Annotated[
    str | None,
    typer.Option(help="block-diffusion settings in place of config.json's: nbdiff-7b, {mask_token_id: 7}, or a file"),
]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16; default: float32 on CPU, else as saved")]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="torch.compile and a static cache; default: on CUDA alone"),
]


def main() -> None:
    """Entry point: bad input ends in one line on standard error and exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it raises is told in one line
    _make_streams_safe()
    try:
        app()
    except UsageError as error:
        if os.environ.get("RANK", "0") == "0":  # the processes of one run fail together: one line is enough
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    # Here the error and what it held of the run are gone.
    if (
        ranks := sys.modules.get("nextblock.training.ranks")
    ) is not None:  # not for its sake alone: torch takes seconds
        ranks.leave()
    sys.exit(2)


def _make_streams_safe() -> None:
    """No character ends a command: what the terminal's encoding lacks is printed as an escape.

    Bytes that standard input cannot decode stay, as Python keeps those of arguments, and the prompt is refused.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper) and codecs.lookup(sys.stdin.encoding).name == "ascii":
        sys.stdin.reconfigure(encoding="utf-8")  # which ASCII is a part of


def _explain_config(section: type[Section] = AdaptConfig, prefix: str = "") -> list[str]:
    """One line of help for each key of a run's configuration."""
    lines = []
    for name, field in section.model_fields.items():
        inner: Any = next((t for t in (field.annotation, *get_args(field.annotation)) if is_section(t)), None)
        if inner is not None:
            many = ".0" if field.annotation is not inner and name.endswith("s") else ""
            lines += _explain_config(inner, f"{prefix}{name}{many}.")
        else:
            default = "" if field.is_required() else f" [{field.get_default(call_default_factory=True)}]"
            lines.append(f"--{prefix}{name}{default}: {field.description or ''}".rstrip(": "))
    return lines


def is_section(kind: Any) -> bool:
    """Whether an annotation is a group of options."""
    return isinstance(kind, type) and issubclass(kind, Section)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Every key of the configuration is an option: `--growth.b_max 16`, `--data.sources.0.path my_texts/`. "
    "`nextblock adapt demo --keys` lists them all.",
)
def adapt(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a preset: demo, tiny_ar, ...")],
    output: Annotated[str | None, typer.Option(help="folder for checkpoint, log and report")] = None,
    resume: Annotated[
        str | None,
        typer.Option(help="auto: go on from the newest whole checkpoint in the output folder, else start"),
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="list every key of the configuration and stop")] = False,
) -> None:
    """Adapt an AR model into a block-diffusion model, with any key of the configuration as an option."""
    if keys:
        print("\n".join(_explain_config()))
        return
    from nextblock.config.presets import find_config

    overrides = parse_overrides(context.args)
    if output is not None:
        overrides["output"] = output
    if resume not in (None, "auto"):
        raise UsageError(f"--resume {resume}: the one value is auto; --output names the folder")

    from transformers.utils.logging import disable_progress_bar

    from nextblock.cli.live import TrainingBar
    from nextblock.config.run import load_config, stage_configs
    from nextblock.training.ranks import is_main, together
    from nextblock.workflows.adapt import adapt as run

    disable_progress_bar()
    with together():  # a file may be missing on one machine
        checked = load_config(find_config(config), overrides)
    steps = sum(stage.training.steps for stage in stage_configs(checked))
    with TrainingBar(steps) if is_main() else nullcontext() as bar:
        options = {"on_step": bar.update, "on_evaluation": bar.evaluated} if bar else {}
        result = run(checked, resume=resume == "auto", **options)
    if not is_main():
        return
    if not result.finished:
        print(f"stopped at step {result.steps}; go on with --resume auto", file=sys.stderr)
        return
    for measure in result.results.get("bits_per_byte", []):
        print(f"{measure['model']:8s} {measure['measure']:18s} {measure['value']:.3f} bits per byte")
    lost = result.results["training"]
    if lost["truncated"] or lost["skipped"]:
        print(f"data        {lost['truncated']} documents were cut at data.row_length, {lost['skipped']} left out")
    print(f"checkpoint  {result.output}\nreport      {result.output / 'report.html'}")


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`--a.b value` and `--a.b=value` -> {"a.b": value}, values read as YAML."""
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--"):
            raise UsageError(f"unexpected argument '{key}'; options are written --key.sub value")
        key, equals, value = key[2:].partition("=")
        if not equals:
            if not rest:
                raise UsageError(f"option --{key} needs a value")
            value = rest.pop(0)
        overrides[key] = read_value(key, value)
    return overrides


def read_value(key: str, text: str) -> Any:
    """An option's value, read as YAML; what is text by its key, or is no YAML, is taken as it stands."""
    is_text = key.rpartition(".")[2] in ("path", "tokenizer", "text_field", "output", "revision", "mask_token")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if is_text and value is not None and not (isinstance(value, int) and key.endswith("mask_token")):
        return value if isinstance(value, str) else text
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d+", value):  # YAML wants 1.0e+3
        return float(value)
    return value


@app.command()
def generate(
    model: Model,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            help="texts to go on from, as they stand (in bash $'a\\nb' has a line break); none: standard input"
        ),
    ] = None,
    mode: Mode = None,
    max_new_tokens: AnswerTokens = None,
    block_size: BlockSize = None,
    sub_blocks: SubBlocks = None,
    sampler: Sampler = None,
    threshold: Threshold = None,
    steps: Steps = None,
    draft_length: DraftLength = None,
    draft_ahead: DraftAhead = None,
    draft_paths: DraftPaths = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="text that ends an answer; may be given again")] = None,
    draft_adapter: DraftAdapterFolder = None,
    settings: Settings = None,
    dtype: Dtype = None,
    compile: Compile = None,
    live: Annotated[bool, typer.Option("--live", help="watch the first answer being denoised")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="print forwards and speed to standard error")] = False,
    source: Annotated[
        str | None,
        typer.Option(
            "--input", help="answer a file: .jsonl with `prompt` or `messages`, or a prompt a line; or task:NAME"
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="with --input: rows for `adapt` (.jsonl); the same command goes on after a stop"),
    ] = None,
    examples: Annotated[int | None, typer.Option(help="with --input: the first so many prompts")] = None,
    batch_size: Annotated[int, typer.Option(help="with --input: prompts decoded together")] = 8,
) -> None:
    """Answer prompts, in ar, diffusion or speculative mode; with --input and --output, as training data."""
    from nextblock.data.sources import check_characters

    options = decoding_options(locals())
    if (source is None) != (output is None):
        raise UsageError(
            "--input and --output go together: prompts are read from one and answers written to the other"
        )
    if source is not None and output is not None:
        if prompts or live or stats:
            raise UsageError("--input does not go with prompts on the command line, --live or --stats; leave them out")
        from transformers.utils.logging import disable_progress_bar

        from nextblock.cli.live import progress
        from nextblock.workflows.answers import write_answers

        disable_progress_bar()
        with progress("answering") as update:
            written = write_answers(
                model,
                source,
                output,
                draft_adapter=draft_adapter,
                settings=settings,
                dtype=torch_dtype(dtype),
                compile=compile,
                examples=examples,
                batch_size=batch_size,
                seed=seed or 0,
                stop=stop or (),
                on_batch=update,
                **options,
            )
        print(f"wrote {written} answers to {output}" if written else f"{output} is finished; nothing was left to do")
        return
    texts = prompts or [sys.stdin.read()]
    for number, text in enumerate(texts):
        check_characters(text, f"prompt {number}")
    lm = load_lm(model, dtype, draft_adapter, compile, settings)
    if lm.settings is None:
        options.setdefault("mode", "ar")
    common: dict[str, Any] = {"seed": seed, "stop": stop or (), **options}
    if live:
        from rich.console import Console

        from nextblock.cli.live import show_denoising

        size = lm.settings.block_size if lm.settings else 1
        show_denoising(lm.stream(texts[0], **common), lm.tokenizer, texts[0], size, console=Console(), seconds=0.08)
        return
    out = lm.generate(texts, **common)
    for prompt, answer in zip(texts, out.texts, strict=True):
        print(f"{prompt}{answer}")
    if stats:
        print(
            f"{out.stats.new_tokens} tokens, {out.stats.forwards} forwards, {out.stats.tokens_per_forward:.2f} tokens "
            f"per forward, {out.stats.new_tokens / out.stats.seconds:.0f} tokens/s",
            file=sys.stderr,
        )


def decoding_options(given: dict[str, Any]) -> dict[str, Any]:
    """The decoding options that were given; the others stay the checkpoint's, or `generate`'s own."""
    names = ("mode", "max_new_tokens", "block_size", "sub_blocks", "sampler", "steps", "temperature", "top_p", "top_k")
    names += ("draft_ahead", "draft_paths")
    options = {name: given[name] for name in names if given.get(name) is not None}
    if given.get("threshold") is not None:
        options["threshold"] = number(given["threshold"], "threshold")
    if (length := given["draft_length"]) is not None:
        if length != "auto" and not length.isdecimal():
            raise UsageError(f"draft_length={length} is not a number of tokens; use 1 or more, or auto")
        options["draft_length"] = length if length == "auto" else int(length)
    return options


def number(text: str, name: str) -> float | None:
    """A number, or None for 'none'."""
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise UsageError(f"{name}={text} is not a number; use 0 to 1, or none") from None


def at_least_one(**counts: int) -> None:
    """UsageError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name}={count} must be at least 1")


def torch_dtype(name: str | None) -> Any:
    """A torch dtype by name, None for none."""
    import torch

    if name not in (None, "float32", "bfloat16"):
        raise UsageError(f"dtype={name} is unknown; use float32 or bfloat16")
    return getattr(torch, name) if name else None


def load_lm(
    model: str,
    dtype: str | None = None,
    draft_adapter: str | None = None,
    compile: bool | None = None,
    settings: str | None = None,
) -> Any:
    """`nextblock.load` with a dtype by name, and without transformers' own progress bars."""
    from transformers.utils.logging import disable_progress_bar

    from nextblock.decoding.lm import load
    from nextblock.model.loading import no_tokenizer

    disable_progress_bar()
    lm = load(model, dtype=torch_dtype(dtype), draft_adapter=draft_adapter, compile=compile, settings=settings)
    if lm.tokenizer is None:
        raise UsageError(f"{no_tokenizer(model)}; use it from Python with token ids")
    return lm


@app.command()
def chat(
    model: Model,
    mode: Mode = None,
    max_new_tokens: AnswerTokens = None,
    steps: Steps = None,
    draft_length: DraftLength = None,
    draft_ahead: DraftAhead = None,
    draft_paths: DraftPaths = None,
    temperature: Temperature = None,
    draft_adapter: DraftAdapterFolder = None,
    settings: Settings = None,
    dtype: Dtype = None,
) -> None:
    """Talk to a model; an empty line or end of input leaves."""
    options = decoding_options(locals())

    lm = load_lm(model, dtype, draft_adapter, settings=settings)
    if lm.settings is None:
        options.setdefault("mode", "ar")
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = input("you: ")
        except EOFError:
            said = ""
        if not said.strip():
            return
        messages.append({"role": "user", "content": said})
        said = ""
        print("model: ", end="", flush=True)
        for _, piece in lm.stream_text(messages, **options):
            said += piece
            print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": said})


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

    from nextblock.cli.live import progress
    from nextblock.data.tasks import get_task
    from nextblock.measure.bench.command import check_output
    from nextblock.measure.bench.scores import score_modes
    from nextblock.measure.report import decoding_table

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
app.add_typer(bench_app, name="bench")
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


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Every key of the configuration is an option, as for `nextblock adapt`.",
)
def plan(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a preset: qwen3-0.6b, qwen3-8b, ...")],
    gpu: Annotated[
        str | None,
        typer.Option(
            help="h200, h100, a100-80g, a100-40g, l40s, l4, rtx5090, rtx4090, b200; cpu: memory alone; "
            "default: machine.gpu of the configuration"
        ),
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="how many of them; default: machine.gpus")] = None,
    parallel: Annotated[
        str | None,
        typer.Option(help="ddp: copies; fsdp2: sharded weights, gradients and optimizer; default: as training.fsdp"),
    ] = None,
    mfu: Annotated[float, typer.Option(help="share of the GPU's peak that useful FLOPs reach, for the time")] = 0.4,
    json_: Annotated[bool, typer.Option("--json", help="print JSON instead of the table")] = False,
) -> None:
    """Say what a run takes before it starts: parameters, memory by kind, the longest row, FLOPs, days, GPU-hours.

    Without options: what `nextblock adapt` of the same configuration will do. Exit status 1 if it does not fit.
    """
    from nextblock.config.presets import find_config
    from nextblock.config.run import load_config
    from nextblock.measure.bench.command import wide_console
    from nextblock.measure.plan import plan as run
    from nextblock.measure.plan import plan_stages, shortfall
    from nextblock.measure.plan.table import plan_table, stages_table

    checked = load_config(find_config(config), parse_overrides(context.args))
    machine: Any = {"device": gpu, "devices": gpus, "parallel": parallel, "mfu": mfu}
    if checked.stages:
        staged = plan_stages(checked, **machine)
        found, table = staged, stages_table(staged)
    else:
        one = run(checked, **machine)
        found, table = one, plan_table(one)
    if json_:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        wide_console().print(table)
    if line := shortfall(found, checked):
        print(line, file=sys.stderr)
        raise typer.Exit(1)


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
    from nextblock.cli.live import progress
    from nextblock.measure import tune as tuning
    from nextblock.measure.bench.command import check_output, read_prompts, wide_console, write_results
    from nextblock.measure.bench.figures import plot_tuning, tuning_table
    from nextblock.measure.bench.prompts import parse_variant

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

    from nextblock.cli.live import progress
    from nextblock.measure.identities import table
    from nextblock.measure.identities import verify as run

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


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option(help="folder for everything; default: a new one under runs/")] = None,
    examples: Annotated[int, typer.Option(help="held-out problems scored in each mode")] = 200,
) -> None:
    """Adapt the shipped AR model in front of your eyes, then decode with it in every mode (about 8 minutes)."""
    at_least_one(examples=examples)
    from nextblock.cli.demo import demo as run

    run(output, examples=examples)
