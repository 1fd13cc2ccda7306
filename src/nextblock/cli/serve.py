"""The command that serves a model."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from nextblock.cli.options import (
    Model,
    decoding_options,
    given_of,
    load_lm,
    takes_decoding_options,
    takes_loading_options,
    takes_section,
)
from nextblock.config.errors import UsageError, require
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
    **given: Any,
) -> None:
    """Serve a model to OpenAI clients, many requests at a time, with a page at / that shows how it decodes."""
    for package in ("starlette", "uvicorn", "prometheus_client"):
        require(package, "serve", "nextblock serve")
    options, limits = decoding_options(given), Limits(**given_of(Limits, given))
    if api_key is not None and not api_key.strip():
        raise UsageError("the API key is empty; give one, or leave it out")
    if host not in LOOPBACK and api_key is None:
        print(f"warning: {host} may be reached by others, and no API key is asked for; set --api-key", file=sys.stderr)
    from nextblock.server.run import listen, run

    listener = listen(host, port)  # before the model is loaded
    run(load_lm(model, given), model.rstrip("/"), listener, options=options, limits=limits, key=api_key)
