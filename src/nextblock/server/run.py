"""From a model to a server that listens, and its end."""

from __future__ import annotations

import logging
import socket
import sys
from types import FrameType
from typing import Any

import uvicorn

from nextblock.config.errors import UsageError
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.decoding.options import DecodingConfig, with_stored
from nextblock.decoding.pace import costs_of
from nextblock.model.costs import Costs
from nextblock.server.app import Server
from nextblock.server.limits import Limits


class _Uvicorn(uvicorn.Server):
    """Ends with status 0 on a signal, as what is in flight was finished or given up on purpose."""

    def __init__(self, config: uvicorn.Config, greeting: str) -> None:
        super().__init__(config)
        self.greeting = greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.greeting, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # else they are raised once more behind the end


def run(
    lm: BlockDiffusionLM,
    name: str,
    listener: socket.socket,
    *,
    options: dict[str, Any] | None = None,
    limits: Limits | None = None,
    key: str | None = None,
    log_prompts: bool = False,
) -> None:
    """Serve a model until a signal says stop; what is in flight then has `limits.stop_seconds` to end.

    Args:
        listener: from `listen`.
        name, options, limits, key, log_prompts: as for `Server`.
    Raises:
        UsageError: a model that cannot decode batches, or limits beyond its context.
    """
    if lm.refusal:
        raise UsageError(lm.refusal)
    limits = limits or Limits()
    context = lm.decoder.max_positions
    if context is not None and (limits.max_prompt or 0) > context:
        raise UsageError(f"max_prompt={limits.max_prompt} is more than the model's context of {context}; lower it")
    costs = _costs(lm, options or {}, limits)
    server = Server(lm, name, options=options, limits=limits, key=key, costs=costs, log_prompts=log_prompts)
    if log_prompts:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("nextblock.server").setLevel(logging.INFO)
    if lm.settings is None:
        said = "it has no block-diffusion settings, so it decodes token by token (ar mode)"
        print(f"warning: {name}: {said}", file=sys.stderr)
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(limits.stop_seconds)),
        lifespan="on",
        ws="none",
    )
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    _Uvicorn(config, f"serving {name} at {address}  (page: /, endpoint: /v1; Ctrl-C stops)").run(sockets=[listener])


def _costs(lm: BlockDiffusionLM, options: dict[str, Any], limits: Limits) -> Costs | None:
    """What passes cost here, alone and under load, if drafts go by that; before the server listens."""
    if lm.settings is None:
        return None
    default = with_stored(lm.settings, options)
    if default.draft_length != "auto":
        return None
    size = default.block_size or lm.settings.block_size
    config = DecodingConfig(mode="speculative", block_size=size, draft_paths=default.draft_paths)
    return [costs_of(lm.decoder, lm.settings, config, min(rows, limits.max_rows)) for rows in (8, 2**62)][-1]


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address, before anything long begins. UsageError where it cannot be had."""
    if not 0 <= port < 1 << 16:
        raise UsageError(f"port={port} is none; choose another, from 1 to 65535, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise UsageError(
            f"cannot listen at {host}:{port}: {error.strerror}; choose another with --host or --port"
        ) from None
    return listener
