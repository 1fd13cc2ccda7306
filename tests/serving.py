"""A server in a thread, for tests and the load test."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager

import uvicorn

from nextblock.server.app import Server
from nextblock.server.run import listen


@contextmanager
def served(lm, name="tiny-bd", **options):
    """(server, base URL) of a server in a thread."""
    listener = listen("127.0.0.1", 0)
    server = Server(lm, name, **options)
    running = uvicorn.Server(uvicorn.Config(server.app, log_level="error", lifespan="on", ws="none"))
    thread = threading.Thread(target=lambda: asyncio.run(running.serve([listener])))
    thread.start()
    until(lambda: running.started)
    try:
        yield server, f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join()


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
