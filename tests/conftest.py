"""Settings and fixtures that all tests share."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

# Before transformers is imported: nothing in the tests may reach the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel

from families import BYTE_VOCABULARY, FAMILIES, WINDOW, pangu_folder, tiny_model
from nextblock.decoding import lm
from nextblock.model.costs import Costs
from runs import config_of, start, weights

# A loaded machine is no fault of the code.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Models here are tiny: more threads cost more than they give, and sums keep one order.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What the costs of passes are kept in; set here, when libraries have looked for their own folders."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _every_width_costs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the same passes are made on every machine: blocks are drafted as a whole, beside the free token."""
    flat = {"check": {1: {1: 1.0, 4096: 1.0}, 4096: {1: 1.0, 4096: 1.0}}}
    flat |= {kind: {1: seconds, 4096: seconds} for kind, seconds in (("draft", 1.0), ("alone", 9.0))}

    monkeypatch.setattr(lm, "costs_of", lambda *_: Costs.model_validate(flat))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same global random state, alone or in company."""
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """The name of each supported family in turn."""
    return request.param


@pytest.fixture
def family_model(family: str) -> PreTrainedModel:
    """A fresh tiny random model of each supported family in turn; a test may change it."""
    return tiny_model(family)


@pytest.fixture(params=[*FAMILIES, *(f"{family}, window" for family in ("mistral", "gemma3", "phi3", "llama"))])
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Every family, those that have sliding windows once more with a short one, and one that ignores its window."""
    family, _, windowed = request.param.partition(", ")
    return tiny_model(family, sliding_window=WINDOW) if windowed else tiny_model(family)


@pytest.fixture
def llama() -> PreTrainedModel:
    """A fresh tiny random Llama, for laws that do not depend on the family."""
    return tiny_model("llama")


@pytest.fixture
def pangu(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A folder in openPangu-Embedded's layout, and its model as a Llama."""
    folder = tmp_path / "pangu"
    return folder, pangu_folder(folder)


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny Llama parent and a corpus of short sums."""
    folder = tmp_path_factory.mktemp("parent")
    tiny_model("llama", vocab_size=BYTE_VOCABULARY, std=0.08).save_pretrained(folder / "llama")
    texts = [f"{a} plus {b} is {a + b}." for a in range(12) for b in range(12)]
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "sums.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def processes() -> Any:
    """Starts real processes quickly: a server that has imported everything forks them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nextblock.workflows.adapt", "runs"])
    return context


@pytest.fixture(scope="session")
def undisturbed(place, processes, tmp_path_factory) -> tuple[bytes, float]:
    """(final weights, seconds) of a run that nothing stops."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    start(processes, config_of(place, output, training__steps=9)).join()  # the first start imports everything
    began = time.perf_counter()
    output = output.with_name("timed")
    process = start(processes, config_of(place, output))
    process.join()
    assert process.exitcode == 0
    return weights(output), time.perf_counter() - began
