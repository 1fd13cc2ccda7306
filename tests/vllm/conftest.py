"""The plug-in's tests, which `make test-vllm` runs in an environment of their own; without vLLM they are skipped."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest

import nextblock as nb


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip these tests, and no others, where there is no vLLM."""
    # This folder, which has the name too, would be a package without a file.
    if getattr(importlib.util.find_spec("vllm"), "origin", None) is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make test-vllm"))


@pytest.fixture(scope="session")
def ours() -> Any:
    """The adapted model in nextblock itself."""
    return nb.load("tiny-bd")
