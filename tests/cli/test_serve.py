"""`nextblock serve` as a process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import httpx
import pytest

from nextblock.cli import main as cli


@contextmanager
def serving(*arguments, **environment):
    """(process, URL) of a server that has said where it is."""
    command = [sys.executable, "-m", "nextblock", "serve", "tiny-bd", "--port", "0", *arguments]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **environment})
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving tiny-bd at http://127.0.0.1:"), process.communicate()
        yield process, line.split()[3]
    finally:
        process.kill()
        process.wait()


def stream(url, **options):
    body = {"prompt": "Q:", "max_tokens": 500, "mode": "ar", "temperature": 2.0, "seed": 1, "stream": True, **options}
    headers = {"Authorization": "Bearer of-the-environment"}
    return httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60, headers=headers)


def test_sigterm_lets_answers_end_and_the_status_is_0():
    # With a draft length of its own it does not time passes, which it may announce.
    with serving("--draft-length", "8", NEXTBLOCK_API_KEY="of-the-environment") as (process, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        with stream(url) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("stop", "length")
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")


def test_an_answer_that_takes_longer_than_the_deadline_is_given_up():
    with serving("--stop-seconds", "1", "--log-prompts", "--draft-length", "8") as (process, url):
        with stream(url, n=16, max_tokens=2000, stop="never said") as response:
            next(response.iter_lines())
            process.send_signal(signal.SIGTERM)
            killer = threading.Timer(60, process.kill)
            killer.start()
            _, err = process.communicate()
            killer.cancel()
        assert process.returncode == 0
        assert "Traceback" not in err
        (line,) = [line for line in err.splitlines() if "INFO" in line]
        sent = {"prompt": "Q:", "max_tokens": 2000, "mode": "ar", "temperature": 2.0, "seed": 1, "stream": True}
        assert json.loads(line[line.index("{") :]) == {**sent, "n": 16, "stop": "never said"}


@pytest.fixture
def refused(monkeypatch, capsys):
    """The one line that a command ends with."""

    def call(*arguments, model="tiny-bd"):
        monkeypatch.setattr(sys, "argv", ["nextblock", "serve", model, *arguments])
        monkeypatch.setattr("warnings.showwarning", lambda *_, **__: None)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        assert exit.value.code == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    return call


@pytest.mark.filterwarnings("ignore:block_size=1024 is larger")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--api-key", " "], "the API key is empty"),
        (["--compile"], "the server has no compiled passes"),
        (["--max-rows", "0"], "max_rows=0 must be at least 1"),
        (["--port", "99999"], "port=99999"),
        (["--temperature", "-1"], "temperature=-1"),
        (["--mode", "diffusion", "--sub-blocks", "5", "--draft-length", "8"], "sub_blocks=5 does not divide"),
        (["--block-size", "1024", "--draft-length", "8"], "passes of 1024 tokens; at most 512 go here"),
    ],
    ids=str,
)
def test_bad_options_end_in_one_line(arguments, said, refused):
    assert said in refused(*arguments)


def test_a_mode_that_the_model_cannot_do_is_told_at_the_start(refused):
    assert "works in ar mode only" in refused("--mode", "diffusion", "--port", "0", model="tiny-ar")


def test_a_port_in_use_is_told_in_one_line_before_the_model_is_loaded(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = refused("--port", str(taken.getsockname()[1]), model="no-such-model")
    assert "choose another with --host or --port" in line
