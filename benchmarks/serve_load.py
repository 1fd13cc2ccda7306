"""`nextblock serve` under load: is each answer the right one, does memory stay flat, does throughput grow?

    python benchmarks/serve_load.py steady --seconds 300
    python benchmarks/serve_load.py scale --seconds 30
    python benchmarks/serve_load.py mixed

steady: 64 clients stream without a pause, in all modes, greedy and with seeds. Each answer must be what `generate`
gives to it alone, and the server's memory in the last minute within 5 % of that in the first.
scale: each mode with 1 to 64 clients. 16 clients must get 2.5 times the tokens per second of one, and speculative
mode no fewer than ar mode under any load. Figures mean something on a quiet machine alone.
mixed: of 200 requests at once a third is cut off by its client, malformed, or over the limits. All others must be
right, every fault told by its status, and the server idle at the end.

Exit status 1 if anything is not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
from rich.console import Console

import nextblock as nb
from nextblock.config.progress import progress
from nextblock.server import load
from nextblock.tasks import get_task

CLIENTS, MIXED, PROMPTS, LARGEST_BODY = 64, 200, 4, 65536
SCALE = [load.Load(clients=n) for n in (1, 2, 4, 8, 16, 32, 64)]
OPTIONS: list[dict[str, Any]] = [
    {"mode": mode, **drawn}
    for mode in ("ar", "diffusion", "speculative")
    for drawn in ({}, {"temperature": 0.8, "seed": 11}, {"temperature": 1.1, "top_p": 0.9, "seed": 5})
]
Case = tuple[str, dict[str, Any], str]
"""Prompt, fields of the body, and what `generate` answers to it alone."""


def prompts(count: int) -> list[str]:
    """Held-out problems."""
    return [get_task("word_problems").example("test", n).prompt for n in range(count)]


def cases(model: str, max_tokens: int) -> list[Case]:
    """All prompts with all options."""
    lm, made = nb.load(model), list[Case]()
    for prompt, options in itertools.product(prompts(PROMPTS), OPTIONS):
        text = lm.generate(prompt, max_new_tokens=max_tokens, **options).texts[0]
        made.append((prompt, {"max_tokens": max_tokens, **options}, text))
    return made


def memory_mib(process: int) -> float:
    """Resident memory of a process."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


async def steady(url: str, process: int, known: list[Case], seconds: float) -> bool:
    """Whether all answers were right and memory stayed flat."""
    wrong, pick, held = 0, random.Random(0), list[float]()
    async with load.endpoint(url) as (server, _):

        async def ask(_: Any) -> load.Seen:
            nonlocal wrong
            prompt, options, text = pick.choice(known)
            seen = await server.ask(options)(prompt)
            wrong += not seen.error and seen.text != text
            return seen

        running = asyncio.ensure_future(load.Load(clients=CLIENTS).run(ask, [None], seconds))
        with progress("streaming") as update:
            while not (await asyncio.wait([running], timeout=seconds / 300))[0]:
                held.append(memory_mib(process))
                if len(held) < 300:
                    update(len(held), 300)
    part = len(held) // 5  # the first and the last minute of five
    first, last = mean(held[:part]), mean(held[-part:])
    told = load.summary(running.result(), seconds)
    print(f"{CLIENTS} clients, {seconds:g} s: {told['answers']} answers, {wrong} wrong, {told['errors']} errors")
    print(f"memory: {first:.0f} MiB in the first fifth, {last:.0f} MiB in the last ({last / first - 1:+.1%})")
    return not wrong and not told["errors"] and last <= 1.05 * first


async def scale(url: str, seconds: float, max_tokens: int) -> bool:
    """Whether throughput grows as it must."""
    told: dict[str, Any] = {"modes": (), "options": {"max_tokens": max_tokens, "temperature": 0}}
    with progress("serving") as update:
        entries = await load.bench(url, prompts(32), loads=SCALE, seconds=seconds, update=update, **told)
    Console(width=140).print(load.table(entries))
    speed = {(entry["decoder"], entry["clients"]): entry["tokens_per_second"] for entry in entries}
    grown = {mode: speed[mode, 16] / speed[mode, 1] for mode, count in speed if count == 1}
    ahead = {count: speed["speculative", count] / speed["ar", count] for mode, count in speed if mode == "ar"}
    print("16 clients over 1: " + ", ".join(f"{mode} {ratio:.2f}" for mode, ratio in grown.items()))
    print("speculative over ar: " + ", ".join(f"{ratio:.2f} at {count}" for count, ratio in ahead.items()))
    return min(grown.values()) >= 2.5 and min(ahead.values()) >= 1 and not any(entry["errors"] for entry in entries)


async def mixed(url: str, known: list[Case]) -> bool:
    """Whether every request ended as it must."""
    pick, path = random.Random(7), f"{url}/v1/completions"

    async def one(number: int, client: httpx.AsyncClient) -> str:
        prompt, options, text = pick.choice(known)
        body = {"prompt": prompt, **options}
        if number % 3:
            response = await client.post(path, json=body)
            right = response.status_code == 200 and response.json()["choices"][0]["text"] == text
            return "right" if right else f"wrong answer, status {response.status_code}"
        if number // 3 % 4 == 0:
            async with client.stream("POST", path, json={**body, "stream": True}) as response:
                async for _ in response.aiter_bytes():
                    return "cut off"
        content, expected = {
            1: (b'{"prompt": ', 400),
            2: (json.dumps({**body, "max_tokens": 10**7}).encode(), 400),
        }.get(number // 3 % 4, (json.dumps({**body, "prompt": "a" * (LARGEST_BODY + 1)}).encode(), 413))
        response = await client.post(path, content=content, headers={"Content-Type": "application/json"})
        said = response.status_code == expected and response.json()["error"]["message"]
        return "refused" if said else f"wrong status {response.status_code}"

    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=MIXED), timeout=600) as client:
        ends = Counter(await asyncio.gather(*(one(number, client) for number in range(MIXED))))
        print(f"{MIXED} requests: " + ", ".join(f"{count} {end}" for end, count in sorted(ends.items())))
        await asyncio.sleep(1.0)
        health = (await client.get(f"{url}/health")).json()
        print(f"at the end: {health}")
    return health["running"] == health["waiting"] == 0 and not any(end.startswith("wrong") for end in ends)


def main() -> None:
    """Run one of the three against a server in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=("steady", "scale", "mixed"))
    parser.add_argument("--model", default="tiny-bd")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--max-tokens", type=int, default=48)
    given = parser.parse_args()
    known = [] if given.check == "scale" else cases(given.model, given.max_tokens)
    with load.started(given.model, "--max-body", str(LARGEST_BODY)) as (url, process):
        if given.check == "steady":
            right = asyncio.run(steady(url, process, known, given.seconds))
        elif given.check == "scale":
            right = asyncio.run(scale(url, given.seconds, given.max_tokens))
        else:
            right = asyncio.run(mixed(url, known))
    print("as it must be" if right else "NOT as it must be")
    sys.exit(not right)


if __name__ == "__main__":
    main()
