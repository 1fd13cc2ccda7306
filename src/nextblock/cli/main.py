"""The command line: the app with its commands, and the entry point."""

from __future__ import annotations

import codecs
import io
import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer

from nextblock import __version__
from nextblock.cli import decode, experiment, measure, serve, train
from nextblock.config.errors import UsageError

Misused: Any = typer.BadParameter.__base__
"""What click raises for a command line that it cannot read; typer carries a click of its own and does not name it."""

app = typer.Typer(
    name="nextblock",
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn an autoregressive language model into a block-diffusion one, and run it (arXiv 2512.06776).\n\n"
    "A MODEL is a local Hugging Face folder, a Hub id, or a shipped model: tiny-ar (the AR parent) or tiny-bd "
    "(adapted).",
)
bench = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="Measure speed.")
any_key: Any = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "epilog": "Every key of the configuration is an option: `--growth.b_max 16`, `--data.sources.0.path my_texts/`. "
    "`nextblock adapt demo --keys` lists them all.",
}


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="print the version and end")] = False,
) -> None:
    """The options of no command."""
    if version:
        print(f"nextblock {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


app.command()(train.demo)
app.command(**any_key)(train.adapt)
app.command(**any_key)(train.prepare)
app.command(**any_key)(train.plan)
for command in (
    decode.generate,
    decode.chat,
    serve.serve,
    measure.evaluate,
    measure.tune,
    measure.verify,
    measure.report,
):
    app.command()(command)
app.command()(experiment.experiment)
app.add_typer(bench, name="bench")
bench.command("decode")(measure.bench_decode)
bench.command("serve")(serve.bench_serve)


def main() -> None:
    """Entry point: bad input ends in one line on standard error and exit status 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it raises is told in one line
    _make_streams_safe()
    status: Any = 2
    try:
        status = app(prog_name="nextblock", standalone_mode=False) or 0
    except SystemExit as done:
        status = done.code
    except Misused as error:
        said, its = error.format_message().rstrip("."), error.ctx.command_path if error.ctx else "nextblock"
        print(f"error: {' '.join(said.split())}; see {its} --help", file=sys.stderr)
    except UsageError as error:
        # The processes of one run fail together: one line is enough. A rank without others is of no launcher.
        if os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    # Here the error and what it held of the run are gone. Nothing is imported for this alone: torch takes seconds.
    if (ranks := sys.modules.get("nextblock.training.ranks")) is not None:
        ranks.end_process_group()
    sys.exit(status)


def _make_streams_safe() -> None:
    """No character ends a command: what the terminal's encoding lacks is printed as an escape.

    Bytes that standard input cannot decode stay, as Python keeps those of arguments, and the prompt is refused.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper) and codecs.lookup(sys.stdin.encoding).name in ("ascii", "utf-8"):
        # UTF-8, which ASCII is a part of, without the mark that PowerShell puts in front.
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
