"""The command line: thin; every command is one call into the library."""

from __future__ import annotations

import codecs
import io
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from nextblock.cli import decode, train  # noqa: F401  # each module adds its commands to `app`
from nextblock.cli.measure import bench_app
from nextblock.cli.options import (
    app,
    at_least_one,
)
from nextblock.config.errors import UsageError


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
    if isinstance(sys.stdin, io.TextIOWrapper) and codecs.lookup(sys.stdin.encoding).name in ("ascii", "utf-8"):
        # UTF-8, which ASCII is a part of, without the mark that PowerShell puts in front.
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")


app.add_typer(bench_app, name="bench")


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option(help="folder for everything; default: a new one under runs/")] = None,
    examples: Annotated[int, typer.Option(help="held-out problems scored in each mode")] = 200,
) -> None:
    """Adapt the shipped AR model in front of your eyes, then decode with it in every mode (about 8 minutes)."""
    at_least_one(examples=examples)
    from nextblock.cli.demo import demo as run

    run(output, examples=examples)
