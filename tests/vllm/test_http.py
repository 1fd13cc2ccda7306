"""vLLM's OpenAI endpoint with an adapted folder."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import openai
import pytest

from engines import LIMIT, PROMPTS, SPECULATIVE
from nextblock.model.loading import resolve


def test_a_refused_engine_is_one_line_and_status_2():
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", resolve("tiny-ar")]
    command += ["--dtype", "float32", "--speculative-config", json.dumps(SPECULATIVE)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "has no block-diffusion settings in its config.json" in ended.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[openai.OpenAI]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", resolve("tiny-bd")]
    command += ["--served-model-name", "tiny-bd", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--speculative-config", json.dumps(SPECULATIVE)]
    with (
        log.open("w") as out,
        subprocess.Popen(command, stdout=out, stderr=out, env=os.environ, start_new_session=True) as server,
    ):
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + 600
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1)
        yield client
        server.terminate()


@pytest.mark.parametrize("mode", ["ar", "speculative", "diffusion"])
def test_an_openai_client_chooses_the_mode(client, ours, mode):
    answer = client.completions.create(
        model="tiny-bd", prompt=PROMPTS[0], max_tokens=LIMIT, temperature=0, extra_body={"vllm_xargs": {"mode": mode}}
    )
    assert answer.choices[0].text == ours.generate(PROMPTS[0], mode=mode, max_new_tokens=LIMIT).texts[0]


@pytest.mark.parametrize(
    ("options", "word"),
    [({"vllm_xargs": {"mode": "diffusion"}, "logprobs": 1}, "logprobs"), ({"vllm_xargs": {"mod": "ar"}}, "mod")],
    ids=str,
)
def test_a_refusal_is_status_400_and_the_server_goes_on(client, options, word):
    with pytest.raises(openai.BadRequestError, match=word):
        client.completions.create(model="tiny-bd", prompt="Q: 1 + 1", max_tokens=8, extra_body=options)
    assert client.completions.create(model="tiny-bd", prompt="Q: 1 + 1", max_tokens=4).choices
