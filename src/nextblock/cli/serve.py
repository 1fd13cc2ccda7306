"""Commands that serve a model, and put load on a server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from nextblock.cli.options import (
    LOADING,
    MaxNewTokens,
    Model,
    Modes,
    PromptFile,
    TaskName,
    at_least_one,
    check_output,
    decoding_options,
    given_of,
    load_lm,
    refuse_given,
    takes_decoding_options,
    takes_loading_options,
    takes_section,
    wide_console,
)
from nextblock.config.errors import UsageError, require
from nextblock.config.files import write_json
from nextblock.server.limits import Limits

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@takes_decoding_options
@takes_section(Limits, "Limits")
@takes_loading_options
def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="address to listen at; 0.0.0.0: for everyone who reaches it")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen at; 0: a free one")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="NEXTBLOCK_API_KEY", help="key that clients must send; default: none")
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="write each request, prompt included, to the log (stderr)")
    ] = False,
    **given: Any,
) -> None:
    """Serve a model to OpenAI clients, many requests at a time, with a page at / that shows how it decodes."""
    for package in ("starlette", "uvicorn", "prometheus_client"):
        require(package, "serve", "nextblock serve")
    options, limits = decoding_options(given), Limits(**given_of(Limits, given))
    if given["compile"]:
        raise UsageError("--compile: rows join the batches here, so the server has no compiled passes; leave it out")
    if api_key is not None and not api_key.strip():
        raise UsageError("the API key is empty; give one, or leave it out")
    if host not in LOOPBACK and api_key is None:
        print(f"warning: {host} may be reached by others, and no API key is asked for; set --api-key", file=sys.stderr)
    from nextblock.server.run import listen, run

    with listen(host, port) as listener:  # before the model is loaded
        lm, name = load_lm(model, given), model.rstrip("/")
        run(lm, name, listener, options=options, limits=limits, key=api_key, log_prompts=log_prompts)


@takes_loading_options
def bench_serve(
    model: Annotated[
        str | None, typer.Argument(help="is served for the time of the benchmark, else give --url")
    ] = None,
    url: Annotated[str | None, typer.Option(help="OpenAI endpoint that runs already, of whatever server")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="NEXTBLOCK_API_KEY", help="key of that server")] = None,
    mode: Modes = None,
    clients: Annotated[
        list[int] | None, typer.Option(help="that ask again as soon as they are answered; may be given again")
    ] = None,
    rate: Annotated[
        list[float] | None, typer.Option(help="requests a second, by a Poisson process; may be given again")
    ] = None,
    seconds: Annotated[float, typer.Option(help="of each mode under each load")] = 30.0,
    task: TaskName = None,
    prompts: PromptFile = None,
    examples: Annotated[int, typer.Option(help="prompts that are asked in turns")] = 32,
    max_new_tokens: MaxNewTokens = 96,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="transformers' continuous batching, too, on the same MODEL")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="write the figures to this .json file")] = None,
    **given: Any,
) -> None:
    """Load a server with clients that stream greedy answers: throughput, time to first token, time per token.
    Default: 1, 4, 16 and 64 clients, each mode of the server.
    """
    for package in ("starlette", "uvicorn", "prometheus_client", "httpx"):
        require(package, "serve", "nextblock bench serve")
    if (model is None) == (url is None):
        raise UsageError("give either a MODEL, which is then served, or the --url of a server")
    if transformers and model is None:
        raise UsageError("--transformers loads the model itself; give a MODEL, not --url")
    refuse_given("it says how a MODEL is loaded, and --url loads none", **(given if url else {}))
    refuse_given("a server has no compiled passes", compile=given["compile"] or None)
    if not seconds > 0 or any(not each > 0 for each in rate or ()):
        raise UsageError("--seconds and --rate must be above 0")
    at_least_one(max_new_tokens=max_new_tokens, clients=min(clients or [1]))
    from nextblock.config.progress import progress
    from nextblock.measure.bench.command import read_prompts
    from nextblock.server import load

    output = check_output(output)
    asked = read_prompts(task, prompts, examples, "test")
    loads = [load.Load(clients=n) for n in clients or ([] if rate else [1, 4, 16, 64])]
    loads += [load.Load(rate=each) for each in rate or ()]
    options = {"max_tokens": max_new_tokens, "temperature": 0}
    server = nullcontext((url or "", 0)) if model is None else load.started(model, *_loading_arguments(given))
    told = {"modes": mode or (), "loads": loads, "seconds": seconds, "options": options, "key": api_key}
    entries = list[dict[str, Any]]()
    try:
        with progress("serving") as update, server as (address, _):
            asyncio.run(load.bench(address, asked.items, **told, update=update, entries=entries))
        if model is not None and transformers:
            entries += _transformers(load_lm(model, given), asked.items, max_new_tokens, loads, seconds)
    finally:  # what was measured is not lost where a later part fails
        if entries:
            wide_console().print(load.table(entries))
            about = {"model": model or url, "prompts": asked.source, **options, "seconds": seconds}
            write_json({**about, "entries": entries}, output)


def _transformers(lm: Any, prompts: list[Any], max_tokens: int, loads: list[Any], seconds: float) -> list[Any]:
    """The figures of transformers' own continuous batching."""
    from nextblock.config.progress import progress
    from nextblock.server.load import measure
    from nextblock.server.peer import transformers_batching

    with transformers_batching(lm, prompts, max_tokens, Limits()) as ask, progress("transformers") as update:
        return asyncio.run(measure("transformers (ar)", ask, prompts, loads, seconds, update))


def _loading_arguments(given: Mapping[str, Any]) -> list[str]:
    """Loading options as they stand on a command line."""
    named = {f"--{name.replace('_', '-')}": given.get(name) for name in LOADING}
    return [part for name, value in named.items() if isinstance(value, str) for part in (name, value)]
