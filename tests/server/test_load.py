"""Load on a server: what its clients count, and what a server does under it."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

import nextblock as nb
from nextblock.cli.main import app
from nextblock.config.errors import UsageError
from nextblock.server import load
from nextblock.server.limits import Limits
from nextblock.server.load import Load, Seen, percentile, summary
from serving import served, until

PROMPTS = [f"Q: Leo has {n} bags with {n + 2} coins in each. How many coins does Leo have?\nA:" for n in range(3, 7)]
MODES = ("ar", "diffusion", "speculative")
DRAWN: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 11}, {"temperature": 1.2, "top_p": 0.9, "seed": 5}]


@pytest.fixture(scope="module")
def lm():
    return nb.load("tiny-bd")


def test_figures_of_answers_are_those_of_their_clocks():
    found = [
        Seen(0.0, [1.0, 2.0, 5.0], tokens=9),
        Seen(1.0, [1.5], tokens=1),
        Seen(2.0, [4.0, 12.0], tokens=5),
        Seen(3.0, error="status 429"),
    ]
    told = summary(found, 10.0)
    assert (told["answers"], told["errors"], told["error"]) == (3, 1, "status 429")
    assert told["tokens_per_second"] == pytest.approx((9 + 1 + 2.5) / 10)  # half of the third came too late
    assert told["first_token_seconds"] == {"p50": 1.0, "p95": 2.0, "p99": 2.0}
    assert told["per_token_seconds"] == {"p50": 0.5, "p95": 2.0, "p99": 2.0}
    assert told["whole_seconds"]["p50"] == 5.0
    assert percentile([*range(1, 101)], 95) == 95
    assert percentile([], 50) is None
    entries = [{"decoder": "ar", "load": "4 clients", **told}, {"decoder": "m[/x]", "load": "0 / s", **summary([], 1)}]
    console = Console(width=140)
    with console.capture() as captured:
        console.print(load.table(entries))
    assert "m[/x]" in captured.get()


def test_a_closed_loop_asks_again_at_once_and_an_open_loop_does_not_wait():
    busy, most = 0, 0

    async def ask(prompt):
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0.05)
        busy -= 1
        return Seen(0.0, [1.0], tokens=1, text=prompt)

    found = asyncio.run(Load(clients=3).run(ask, ["a", "b"], 0.2))
    assert most == 3
    assert 9 <= len(found) <= 15
    assert {seen.text for seen in found} == {"a", "b"}
    most = 0
    found = asyncio.run(Load(rate=200.0).run(ask, ["a"], 0.5))
    assert most > 3
    assert 60 <= len(found) <= 140


@pytest.mark.parametrize("told", [[], {}, {"data": []}, {"data": [5]}, {"data": [{}]}, "models"], ids=str)
def test_what_is_no_endpoint_is_told_in_one_line(monkeypatch, told):
    async def get(self, url):
        return httpx.Response(200, json=told, request=httpx.Request("GET", url))

    async def ask():
        async with load.endpoint("http://127.0.0.1:9"):
            pass

    monkeypatch.setattr(httpx.AsyncClient, "get", get)
    with pytest.raises(UsageError, match=r"is no OpenAI endpoint .*give the address"):
        asyncio.run(ask())


def test_a_running_server_is_measured_in_its_modes_and_answers_as_generate_does(lm, monkeypatch):
    texts = []
    kept = load.summary
    monkeypatch.setattr(load, "summary", lambda found, seconds: (texts.append(found), kept(found, seconds))[1])
    with served(lm, limits=Limits(max_rows=3), key="secret") as (_, url):
        told: dict[str, Any] = {"modes": (), "options": {"max_tokens": 8, "temperature": 0}}
        loads = [Load(clients=4), Load(rate=10.0)]
        entries = asyncio.run(
            load.bench(url, PROMPTS, loads=loads, seconds=0.4, key="secret", update=lambda *_: None, **told)
        )
        with pytest.raises(UsageError, match="no OpenAI endpoint"):
            asyncio.run(load.bench(url, PROMPTS, loads=loads, seconds=0.4, update=lambda *_: None, **told))
    assert [entry["decoder"] for entry in entries[::2]] == ["diffusion", "speculative", "ar"]
    assert not any(entry["errors"] for entry in entries)
    for mode, closed in zip(("diffusion", "speculative", "ar"), texts[::2], strict=True):
        alone = lm.generate(PROMPTS, mode=mode, max_new_tokens=8)
        assert {seen.text for seen in closed} <= set(alone.texts)
        assert all(seen.tokens == 8 for seen in closed)


def test_transformers_own_continuous_batching_is_asked_in_the_same_way(lm):
    from nextblock.server.peer import transformers_batching

    with transformers_batching(lm, PROMPTS, 8, Limits(max_rows=4)) as ask:
        found = asyncio.run(Load(clients=3).run(ask, PROMPTS, 0.2))
    assert len(found) >= 3
    assert all(seen.tokens == 8 and len(seen.arrivals) == 8 and not seen.error for seen in found)


def test_a_mode_that_is_refused_is_told_before_another_is_measured_and_figures_are_kept(lm, monkeypatch):
    told: dict[str, Any] = {"options": {"max_tokens": 2}, "seconds": 0.1, "update": lambda *_: None}
    entries: list[dict[str, Any]] = []
    with served(lm, limits=Limits(max_rows=3)) as (_, url):
        bench = load.bench(url, PROMPTS, modes=["ar", "difusion"], loads=[Load(clients=1)], entries=entries, **told)
        with pytest.raises(UsageError, match="difusion: status 400"):
            asyncio.run(bench)
        assert entries == []
        kept = load.measure

        async def measure(decoder, *rest):
            if decoder == "diffusion":
                raise UsageError("gone")
            return await kept(decoder, *rest)

        monkeypatch.setattr(load, "measure", measure)
        bench = load.bench(url, PROMPTS, modes=["ar", "diffusion"], loads=[Load(clients=1)], entries=entries, **told)
        with pytest.raises(UsageError, match="gone"):
            asyncio.run(bench)
    assert [entry["decoder"] for entry in entries] == ["ar"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either a MODEL"),
        (["tiny-bd", "--url", "http://x"], "give either a MODEL"),
        (["--url", "http://127.0.0.1:9", "--transformers"], "give a MODEL, not --url"),
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9 is no OpenAI endpoint"),
        (["tiny-bd", "--clients", "0"], "clients=0 must be at least 1"),
        (["tiny-bd", "--rate", "0"], "above 0"),
        (["tiny-bd", "--output", "a.txt"], "not the name of a .json file"),
        (["tiny-bd", "--output", "/proc/x.json"], "/proc/x.json cannot be written"),
        (["tiny-bd", "--compile"], "--compile: a server has no compiled passes"),
        (["--url", "http://127.0.0.1:9", "--dtype", "float32"], "--dtype: it says how a MODEL is loaded"),
        (["--url", "http://127.0.0.1:9", "--draft-adapter", "tiny-draft"], "--draft-adapter: it says how"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_told_in_one_line(arguments, said):
    result = CliRunner().invoke(app, ["bench", "serve", *arguments])
    assert isinstance(result.exception, UsageError)
    assert said in str(result.exception)


def test_every_right_request_among_faulty_and_abandoned_ones_gets_its_answer_and_no_row_is_held(lm):
    """A third is cut off by its client, malformed, or over the limits."""
    cases = [
        ({"prompt": p, "max_tokens": 16, "mode": m, **d}, lm.generate(p, max_new_tokens=16, mode=m, **d).texts[0])
        for p in PROMPTS[:2]
        for m in MODES
        for d in DRAWN
    ]
    pick, headers = random.Random(3), {"Content-Type": "application/json"}

    async def one(number: int, client: httpx.AsyncClient, path: str) -> bool:
        body, text = pick.choice(cases)
        if number % 3:
            response = await client.post(path, json=body)
            return response.status_code == 200 and response.json()["choices"][0]["text"] == text
        if number // 3 % 4 == 0:
            async with client.stream("POST", path, json={**body, "stream": True}) as response:
                async for _ in response.aiter_bytes():
                    return True
        content, status = {
            1: (b'{"prompt": ', 400),
            2: (json.dumps({**body, "max_tokens": 10**7}).encode(), 400),
        }.get(number // 3 % 4, (json.dumps({**body, "prompt": "a" * 9000}).encode(), 413))
        response = await client.post(path, content=content, headers=headers)
        return response.status_code == status and bool(response.json()["error"]["message"])

    async def all_of_them(url: str) -> list[bool]:
        async with httpx.AsyncClient(timeout=60) as client:
            return await asyncio.gather(*(one(n, client, f"{url}/v1/completions") for n in range(36)))

    with served(lm, limits=Limits(max_rows=8, max_body=8192)) as (server, url):
        assert asyncio.run(all_of_them(url)) == [True] * 36
        until(lambda: not (server.engine.rows or server.engine.waiting or server.engine._running))
