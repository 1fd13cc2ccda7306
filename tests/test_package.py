"""What the installed package promises as a whole."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from importlib import resources

import pytest

import nextblock as nb

PUBLIC_NAMES = ("adapt", "load", "AdaptConfig", "RunResult", "BlockDiffusionLM", "Generation")
COMMANDS = ("adapt", "generate", "chat", "evaluate", "verify", "demo")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run(
        [sys.executable, "-m", "nextblock", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


def test_types_are_published():
    assert resources.files("nextblock").joinpath("py.typed").is_file()


def test_version_is_that_of_the_installed_distribution():
    assert nb.__version__ == importlib.metadata.version("nextblock")


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_names_are_exported(name):
    assert name in nb.__all__
    assert getattr(nb, name) is not None


def test_module_run_shows_help_with_every_command():
    result = _run("--help")
    assert result.returncode == 0, result.stderr
    missing = [command for command in COMMANDS if command not in result.stdout]
    assert not missing


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command):
    result = _run(command, "--help")
    assert result.returncode == 0, result.stderr
    assert command in result.stdout


def test_unknown_command_exits_with_status_2_and_no_traceback():
    result = _run("no-such-command")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
