"""Load on a server, and what its clients see: `nextblock bench serve`.

Clients stream answers of an OpenAI endpoint, whoever serves it. In a closed loop each of them asks again when it has
its answer. In an open loop requests come as a Poisson process, whether earlier ones are answered or not.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import httpx
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from nextblock.config.errors import UsageError, one_line
from nextblock.config.progress import Update
from nextblock.measure import words

TICK_SECONDS = 0.5
PERCENTILES = (50, 95, 99)


@dataclass
class Seen:
    """An answer as its client saw it.

    began: when it was asked for. arrivals: when text came. All in seconds of `time.perf_counter`.
    tokens: of the whole answer. error: why there is none.
    """

    began: float
    arrivals: list[float] = field(default_factory=list)
    tokens: int = 0
    text: str = ""
    error: str = ""

    def tokens_until(self, end: float) -> float:
        """Tokens that came by then, if each piece of text had as many as any other."""
        return self.tokens * sum(at <= end for at in self.arrivals) / len(self.arrivals) if self.arrivals else 0.0


Ask = Callable[[Any], Awaitable[Seen]]
"""Asks for the answer to one prompt, a text or a chat."""


@dataclass(frozen=True)
class Load:
    """How requests come: from `clients` that never pause, else at `rate` a second."""

    clients: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        """In a table."""
        return f"{self.clients} clients" if self.clients else f"{self.rate:g} / s"

    async def run(self, ask: Ask, prompts: Sequence[Any], seconds: float) -> list[Seen]:
        """Ask for so long, then wait for what is still to come."""
        return await (self._closed if self.clients else self._open)(ask, prompts, seconds)

    async def _closed(self, ask: Ask, prompts: Sequence[Any], seconds: float) -> list[Seen]:
        found, end, number = list[Seen](), perf_counter() + seconds, itertools.count()

        async def client() -> None:
            while perf_counter() < end:
                found.append(await ask(prompts[next(number) % len(prompts)]))
                if found[-1].error:
                    await asyncio.sleep(TICK_SECONDS)

        await asyncio.gather(*(client() for _ in range(self.clients or 0)))
        return found

    async def _open(self, ask: Ask, prompts: Sequence[Any], seconds: float) -> list[Seen]:
        pick, at, began = random.Random(0), 0.0, perf_counter()
        asked: list[asyncio.Future[Seen]] = []
        while (at := at + pick.expovariate(self.rate or 1.0)) < seconds:
            await asyncio.sleep(began + at - perf_counter())
            asked.append(asyncio.ensure_future(ask(prompts[len(asked) % len(prompts)])))
        return list(await asyncio.gather(*asked))


def summary(found: Sequence[Seen], seconds: float) -> dict[str, Any]:
    """The figures of a load that ran for so long; times in seconds, null where there is none.

    first_token: from a request to its first text. per_token: from there to the last, over the tokens but one; in the
    block modes several come at once.
    """
    right = [seen for seen in found if not seen.error]
    end = min((seen.began for seen in found), default=0.0) + seconds
    spread = [seen for seen in right if seen.tokens > 1 and len(seen.arrivals) > 1]
    times = {
        "first_token": [seen.arrivals[0] - seen.began for seen in right if seen.arrivals],
        "per_token": [(seen.arrivals[-1] - seen.arrivals[0]) / (seen.tokens - 1) for seen in spread],
        "whole": [seen.arrivals[-1] - seen.began for seen in right if seen.arrivals],
    }
    return {
        "answers": len(right),
        "errors": len(found) - len(right),
        "error": next((seen.error for seen in found if seen.error), None),
        "tokens_per_second": sum(seen.tokens_until(end) for seen in right) / seconds,
        **{f"{name}_seconds": {f"p{n}": percentile(values, n) for n in PERCENTILES} for name, values in times.items()},
    }


def percentile(values: Sequence[float], share: int) -> float | None:
    """The least of the values that `share` percent of them do not exceed; None of none."""
    return sorted(values)[math.ceil(share / 100 * len(values)) - 1] if values else None


async def measure(
    decoder: str, ask: Ask, prompts: Sequence[Any], loads: Sequence[Load], seconds: float, update: Update
) -> list[dict[str, Any]]:
    """One line of figures for each load, behind one request that warms up; `update` is told of seconds.

    Raises:
        UsageError: the first request is refused.
    """
    if error := (await ask(prompts[0])).error:
        raise UsageError(f"{decoder}: {error}")
    entries, total = list[dict[str, Any]](), round(len(loads) * seconds)
    for load in loads:
        running, began = asyncio.ensure_future(load.run(ask, prompts, seconds)), perf_counter()
        while not (await asyncio.wait([running], timeout=TICK_SECONDS))[0]:
            if (passed := perf_counter() - began) < seconds:  # then the last answers are still to come
                update(min(total, round(len(entries) * seconds + passed)), total)
        entries.append({"decoder": decoder, "load": load.name, **vars(load), **summary(running.result(), seconds)})
    return entries


class Endpoint:
    """An OpenAI endpoint that is asked.

    url: without /v1. model: as it is called there.
    """

    def __init__(self, client: httpx.AsyncClient, url: str, model: str) -> None:
        self.client, self.url, self.model = client, url, model

    def ask(self, options: Mapping[str, Any]) -> Ask:
        """Asks for streams with these fields of the body."""

        async def ask(prompt: Any) -> Seen:
            seen = Seen(perf_counter())
            path, name = ("completions", "prompt") if isinstance(prompt, str) else ("chat/completions", "messages")
            body = {"model": self.model, name: prompt, "stream": True, "stream_options": {"include_usage": True}}
            try:
                async with self.client.stream("POST", f"{self.url}/v1/{path}", json={**body, **options}) as response:
                    if response.status_code != 200:
                        seen.error = f"status {response.status_code}: {(await response.aread()).decode()[:300]}"
                    async for line in response.aiter_lines():
                        if line.startswith("data: {"):
                            _take(seen, json.loads(line[6:]))
            except (httpx.HTTPError, ValueError) as error:
                seen.error = f"{type(error).__name__}: {one_line(error)}"
            return seen

        return ask


def _take(seen: Seen, chunk: dict[str, Any]) -> None:
    """Take in a chunk of a stream."""
    if chunk.get("error"):
        seen.error = str(chunk["error"].get("message", chunk["error"]))[:300]
    seen.tokens = (chunk.get("usage") or {}).get("completion_tokens", seen.tokens)
    for choice in chunk.get("choices", ()):
        if piece := choice.get("text") or (choice.get("delta") or {}).get("content"):
            seen.text += piece
            seen.arrivals.append(perf_counter())


@asynccontextmanager
async def endpoint(url: str, key: str | None = None) -> AsyncIterator[tuple[Endpoint, list[str]]]:
    """The endpoint of a server that runs, for its first model, and that model's modes (none: it does not say).

    Raises:
        UsageError: there is none.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    url = url.rstrip("/").removesuffix("/v1")
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=httpx.Timeout(600, connect=10)) as client:
        try:
            response = await client.get(f"{url}/v1/models")
            (model, *_) = response.raise_for_status().json()["data"]
            name, modes = model["id"], list(model.get("modes", ()))
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, AttributeError) as error:
            said = f"{url} is no OpenAI endpoint ({one_line(error)})"
            raise UsageError(f"{said}; give the address of a server that runs, as http://127.0.0.1:8000") from None
        yield Endpoint(client, url, name), modes


@contextmanager
def started(model: str, *arguments: str) -> Iterator[tuple[str, int]]:
    """Base URL and process id of a `nextblock serve` that ends with the context.

    Raises:
        UsageError: it does not start; it has said itself why.
    """
    command = [sys.executable, "-m", "nextblock", "serve", model, "--port", "0", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = re.search(r" at (http\S+)", process.stdout.readline())
            if address is None:
                raise UsageError(f"the server of {model} did not start; what it said stands above")
            yield address[1], process.pid
        finally:
            process.terminate()


async def bench(
    url: str,
    prompts: Sequence[Any],
    *,
    modes: Sequence[str],
    loads: Sequence[Load],
    seconds: float,
    options: Mapping[str, Any],
    key: str | None = None,
    update: Update,
    entries: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Each mode of a server under each load.

    Args:
        modes: none: those that the server tells of, or what it does by itself.
        options: fields of each request beside the mode, as `max_tokens`.
        entries: is filled as figures come, so that none is lost where a later mode fails; returned.
    Raises:
        UsageError: no server, or one that refuses a mode: all are tried before the first is measured.
    """
    entries = [] if entries is None else entries
    async with endpoint(url, key) as (server, told):
        asked: list[str] = list(modes) or told or [""]
        total = round(len(asked) * len(loads) * seconds)
        asks = {mode or server.model: server.ask({**options, "mode": mode} if mode else options) for mode in asked}
        for name, ask in asks.items():
            if error := (await ask(prompts[0])).error:
                raise UsageError(f"{name}: {error}")
        for name, ask in asks.items():
            before = round(len(entries) * seconds)
            entries += await measure(
                name, ask, prompts, loads, seconds, lambda done, _, n=before: update(n + done, total)
            )
        return entries


def table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """What `bench serve` prints: a line for each decoder and load."""
    shown = Table(
        box=SIMPLE_HEAD,
        caption="times in ms: p50 / p95 / p99. first token: from the request on; per token: behind the first text",
        caption_justify="left",
    )
    for heading in ("decoder", "load"):
        shown.add_column(heading, no_wrap=True)
    for heading in ("answers", "errors", "tokens/s", "× first load", "first token", "per token"):
        shown.add_column(heading, justify="right", no_wrap=True)
    first: dict[str, float] = {}
    for entry in entries:
        speed = entry["tokens_per_second"]
        base = first.setdefault(entry["decoder"], speed)
        times = (entry[f"{name}_seconds"].values() for name in ("first_token", "per_token"))
        shown.add_row(
            escape(entry["decoder"]),
            entry["load"],
            str(entry["answers"]),
            str(entry["errors"]),
            words.number(speed, 0),
            words.number(speed / base if base else None),
            *(" / ".join(words.number(t and 1000 * t, 1) for t in line) for line in times),
        )
    return shown
