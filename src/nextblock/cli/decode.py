"""Commands that decode."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nextblock.cli.options import (
    AnswerTokens,
    BlockSize,
    Compile,
    DraftAdapterFolder,
    DraftAhead,
    DraftLength,
    DraftPaths,
    Dtype,
    Mode,
    Model,
    Sampler,
    Seed,
    Settings,
    Steps,
    SubBlocks,
    Temperature,
    Threshold,
    TopK,
    TopP,
    app,
    decoding_options,
    load_lm,
    torch_dtype,
)
from nextblock.config.errors import UsageError


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
    from nextblock.data.records import check_characters

    options = decoding_options(locals())
    if (source is None) != (output is None):
        raise UsageError(
            "--input and --output go together: prompts are read from one and answers written to the other"
        )
    if source is not None and output is not None:
        if prompts or live or stats:
            raise UsageError("--input does not go with prompts on the command line, --live or --stats; leave them out")
        from transformers.utils.logging import disable_progress_bar

        from nextblock.measure.progress import progress
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
