"""Commands that decode."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nextblock.cli.options import (
    Model,
    Seed,
    Stop,
    decoding_options,
    load_lm,
    loading_options,
    takes_decoding_options,
    takes_loading_options,
)
from nextblock.config.errors import UsageError
from nextblock.config.files import user_path, write_whole
from nextblock.config.sections import with_gguf
from nextblock.decoding.options import resolve_config

Prompts = Annotated[
    list[str] | None,
    typer.Argument(
        help="texts to go on from, as they stand (in bash $'a\\nb' has a line break); none: standard input"
    ),
]
Input = Annotated[
    str | None,
    typer.Option(
        "--input", help="answer a file: .jsonl with `prompt` or `messages`, or a prompt a line; or task:NAME"
    ),
]
Output = Annotated[
    Path | None, typer.Option(help="with --input: rows for `adapt` (.jsonl); the same command goes on after a stop")
]


@takes_decoding_options
@takes_loading_options
def generate(
    model: Model,
    prompts: Prompts = None,
    seed: Seed = None,
    stop: Stop = None,
    live: Annotated[bool, typer.Option("--live", help="watch the answer to one prompt being denoised")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="print forwards and speed to standard error")] = False,
    source: Input = None,
    output: Output = None,
    examples: Annotated[int | None, typer.Option(help="with --input: the first so many prompts")] = None,
    batch_size: Annotated[int | None, typer.Option(help="with --input: prompts decoded together; default: 8")] = None,
    ray: Annotated[
        int | None,
        typer.Option(help="with --input: so many copies of the model on a Ray cluster (RAY_ADDRESS, or this machine)"),
    ] = None,
    **given: Any,
) -> None:
    """Answer prompts, in ar, diffusion or speculative mode; with --input and --output, as training data."""
    options = {**decoding_options(given), "stop": stop or ()}
    if (source is None) != (output is None):
        raise UsageError(
            "--input and --output go together: prompts are read from one and answers written to the other"
        )
    if source is not None and output is not None:
        if prompts or live or stats:
            raise UsageError("--input does not go with prompts on the command line, --live or --stats; leave them out")
        batch_size = 8 if batch_size is None else batch_size
        options |= {**loading_options(given), "examples": examples, "batch_size": batch_size, "seed": seed or 0}
        options["ray"] = ray
        _answer_file(with_gguf(model, options.pop("gguf_file")), source, output, **options)
        return
    if (examples, batch_size, ray) != (None, None, None):
        raise UsageError("--examples, --batch-size and --ray go with --input alone; leave them out")
    if live and (len(prompts or ()) > 1 or stats or stop):
        raise UsageError("--live shows one answer, without --stats or --stop; give one prompt, and leave them out")
    from nextblock.data.records import check_characters

    texts = prompts or [sys.stdin.read()]
    for number, text in enumerate(texts):
        check_characters(text, f"prompt {number}")
    lm = load_lm(model, given)
    options = {**_mode_of(lm), **options, "seed": seed}
    if live:
        _show_live(lm, texts[0], options)
        return
    out = lm.generate(texts, **options)
    for prompt, answer in zip(texts, out.texts, strict=True):
        print(f"{prompt}{answer}")
    if stats:
        count, seconds = out.stats.new_tokens, out.stats.seconds
        words = f"{count} tokens, {out.stats.forwards} forwards, {out.stats.tokens_per_forward:.2f} tokens per forward"
        if out.stats.drafts:
            words += f", {out.stats.kept} of {out.stats.drafts} drafts kept"
        print(f"{words}, {count / seconds:.0f} tokens/s", file=sys.stderr)


def _mode_of(lm: Any) -> dict[str, str]:
    """What a model without block-diffusion settings needs to be told: it decodes token by token."""
    return {} if lm.settings else {"mode": "ar"}


def _answer_file(model: str, source: str, output: Path, **options: Any) -> None:
    """Answer the prompts of a file, with a bar."""
    from transformers.utils.logging import disable_progress_bar

    from nextblock.config.progress import progress
    from nextblock.workflows.answers import write_answers

    disable_progress_bar()
    with progress("answering") as update:
        written = write_answers(model, source, output, on_batch=update, **options)
    print(f"wrote {written} answers to {output}" if written else f"{output} is finished; nothing was left to do")


def _show_live(lm: Any, prompt: str, options: dict[str, Any]) -> None:
    """Show one answer while it is denoised."""
    from rich.console import Console

    from nextblock.cli.live import show_denoising

    size = lm.settings.block_size if lm.settings else 1
    show_denoising(lm.stream(prompt, **options), lm.tokenizer, prompt, size, console=Console(), seconds=0.08)


@takes_decoding_options
@takes_loading_options
def chat(model: Model, **given: Any) -> None:
    """Talk to a model. /mode NAME changes the mode, /save FILE writes the talk as a row of training data.

    Ctrl-C ends an answer. An empty line or end of input leaves.
    """
    options = decoding_options(given)
    lm = load_lm(model, given)
    if not lm.tokenizer.chat_template:
        raise UsageError(
            f"{model} has no chat template, so it cannot chat; put a chat_template.jinja into its folder, or use "
            "`nextblock generate`"
        )
    options = {**_mode_of(lm), **options}
    messages: list[dict[str, str]] = []
    while True:
        try:
            said = input("you: ")
        except EOFError:
            said = ""
            print()
        if not said.strip():
            return
        if said.startswith("/"):
            try:
                print(_obey(said, lm, options, messages))
            except UsageError as error:
                print(error)
            continue
        messages.append({"role": "user", "content": said})
        try:
            answer = _answer(lm, messages, options)
        except UsageError as error:  # the talk so far can still be saved
            print(error)
            answer = ""
        if answer:
            messages.append({"role": "assistant", "content": answer})
        else:  # stopped before it began, or nothing was said: a template wants turns that alternate
            messages.pop()


def _answer(lm: Any, messages: list[dict[str, str]], options: dict[str, Any]) -> str:
    """Print an answer as it grows, as far as it is let. UsageError for a turn that is refused."""
    pieces, said = lm.stream_text(messages, **options), ""
    print("model: ", end="", flush=True)
    try:
        for _, piece in pieces:
            said += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return said


def _obey(command: str, lm: Any, options: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """Do what a line that begins with / says; what to print. UsageError for a command or a value that is none."""
    name, _, value = command.partition(" ")
    value = value.strip()
    if name == "/mode" and value:
        changed = {**options, **decoding_options({"mode": value})}
        resolve_config(lm.settings, changed, drafted=lm.adapter is not None)
        options |= changed
        return f"mode: {value}"
    if name == "/save" and value:
        file = user_path(value, "/save")
        try:
            write_whole(file, (json.dumps({"messages": messages}, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise UsageError(f"{file} cannot be written: {error.strerror}; choose another file") from None
        return f"wrote {len(messages)} messages to {file}"
    raise UsageError(f"{command!r:.60} is no command; use /mode NAME or /save FILE")
