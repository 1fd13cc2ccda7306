"""Load on a server of one's own, for correctness: nothing may be mixed up, lost, or held.

python benchmarks/serve_load.py --seconds 30

First, 64 clients stream one answer after another for so many seconds, in all modes, greedy and drawn; each answer must
equal that of `generate`. Then 200 requests come at once, of which a third are cut off, malformed or over the limits;
every other answer must be right, every fault told by its status, and the server idle at the end. Prints counts;
exit status 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import resource
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import openai

import nextblock as nb
from nextblock.server.limits import Limits
from nextblock.tasks import get_task

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from serving import served, until  # pyright: ignore[reportMissingImports]

CLIENTS, MIXED, PROMPTS = 64, 200, 4
OPTIONS: list[dict[str, Any]] = [
    {"mode": mode, **drawn}
    for mode in ("ar", "diffusion", "speculative")
    for drawn in ({}, {"temperature": 0.8, "seed": 11})
]


def cases(lm: nb.BlockDiffusionLM, max_tokens: int) -> list[tuple[dict[str, Any], str]]:
    """Requests, and what `generate` answers to each alone."""
    prompts = [get_task("word_problems").example("test", n).prompt for n in range(PROMPTS)]
    made = []
    for prompt, options in itertools.product(prompts, OPTIONS):
        text = lm.generate(prompt, max_new_tokens=max_tokens, **options).texts[0]
        made.append(({"model": "tiny-bd", "prompt": prompt, "max_tokens": max_tokens, **options}, text))
    return made


async def stream(client: openai.AsyncOpenAI, body: dict[str, Any]) -> str:
    """The text of a streamed answer."""
    own = {"mode": body["mode"]}
    chunks = await client.completions.create(
        **{name: value for name, value in body.items() if name != "mode"}, extra_body=own, stream=True
    )
    return "".join([chunk.choices[0].text async for chunk in chunks if chunk.choices])


async def steady(url: str, known: list[tuple[dict[str, Any], str]], seconds: float) -> tuple[int, int]:
    """(answers, wrong ones) of clients that stream without a pause."""
    counts, end = [0, 0], time.monotonic() + seconds

    async def work(number: int) -> None:
        pick = random.Random(number)
        while time.monotonic() < end:
            body, text = pick.choice(known)
            counts[0] += 1
            counts[1] += await stream(client, body) != text

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        await asyncio.gather(*map(work, range(CLIENTS)))
    return counts[0], counts[1]


async def mixed(url: str, known: list[tuple[dict[str, Any], str]]) -> dict[str, int]:
    """How many of `MIXED` requests ended in which way; `wrong ...` is what must not be."""
    found: dict[str, int] = {}
    pick = random.Random(7)

    async def one(number: int, client: httpx.AsyncClient) -> str:
        body, text = pick.choice(known)
        path = f"{url}/v1/completions"
        if number % 3:
            response = await client.post(path, json=body)
            right = response.status_code == 200 and response.json()["choices"][0]["text"] == text
            return "right" if right else f"wrong answer, status {response.status_code}"
        kind = number // 3 % 4
        if kind == 0:
            async with client.stream("POST", path, json={**body, "stream": True}) as response:
                async for _ in response.aiter_bytes():
                    return "cut off"
        content, expected = {
            1: (b'{"prompt": ', 400),
            2: (json.dumps({**body, "max_tokens": 10**7}).encode(), 400),
        }.get(kind, (json.dumps({**body, "prompt": "a" * 70_000}).encode(), 413))
        response = await client.post(path, content=content, headers={"Content-Type": "application/json"})
        said = response.status_code == expected and response.json()["error"]["message"]
        return "refused" if said else f"wrong status {response.status_code}"

    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=MIXED), timeout=600) as client:
        for end in await asyncio.gather(*(one(number, client) for number in range(MIXED))):
            found[end] = found.get(end, 0) + 1
    return found


def main() -> None:
    """Run both parts against a server in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--max-tokens", type=int, default=48)
    given = parser.parse_args()
    lm = nb.load("tiny-bd")
    known = cases(lm, given.max_tokens)
    with served(lm, limits=Limits(max_body=65536)) as (server, url):
        peaks = []
        answers, wrong = asyncio.run(steady(url, known, given.seconds / 2))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        more, mistaken = asyncio.run(steady(url, known, given.seconds / 2))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        answers, wrong = answers + more, wrong + mistaken
        print(
            f"{CLIENTS} clients: {answers} answers, {wrong} wrong; peak memory {peaks[0]:.0f}, then {peaks[1]:.0f} MiB"
        )
        ends = asyncio.run(mixed(url, known))
        print(f"{MIXED} mixed requests: " + ", ".join(f"{count} {end}" for end, count in sorted(ends.items())))
        until(lambda: not (server.engine.rows or server.engine.waiting), 60)
        print("idle: no row held")
    sys.exit(bool(wrong or any(end.startswith("wrong") for end in ends)))


if __name__ == "__main__":
    main()
