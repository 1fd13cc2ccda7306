"""Copies of a model on a Ray cluster of two nodes leave the file that one process leaves, also when a node is lost."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

import pytest

from families import tiny_model
from nextblock.config.errors import UsageError
from nextblock.model.parent import byte_tokenizer
from nextblock.training.export import export
from nextblock.workflows.answers import write_answers

PROMPTS = [f"{'long ' * (n % 4)}prompt {n}:" for n in range(24)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny parent, prompts, and the answers of one process."""
    folder = tmp_path_factory.mktemp("cluster")
    export(folder / "parent", tiny_model("llama", vocab_size=264, std=0.1), byte_tokenizer(), None)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    answer(folder, "whole.jsonl")
    return folder


def answer(folder, output, **options):
    given = {"max_new_tokens": 12, "temperature": 1.0, "seed": 7, "batch_size": 2, **options}
    return write_answers(folder / "parent", str(folder / "prompts.jsonl"), folder / output, **given)


@pytest.fixture(scope="module")
def cluster():
    """A head node without room for a copy, and two nodes with room for one each."""
    ray: Any = pytest.importorskip("ray", reason="ray is not installed")
    cluster = import_module("ray.cluster_utils").Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster, nodes
    ray.shutdown()
    cluster.shutdown()


def test_the_file_is_that_of_one_process_and_is_gone_on_with(place, cluster):
    whole = (place / "whole.jsonl").read_bytes()
    assert answer(place, "two.jsonl", ray=2) == len(PROMPTS)
    assert (place / "two.jsonl").read_bytes() == whole
    (place / "two.jsonl").write_bytes(whole[: len(whole) // 2])
    assert answer(place, "two.jsonl", ray=1) == len(PROMPTS) - whole[: len(whole) // 2].count(b"\n")
    assert (place / "two.jsonl").read_bytes() == whole


def test_a_node_that_is_lost_in_the_middle_loses_no_line_and_repeats_none(place, cluster):
    cluster, nodes = cluster
    lost = []

    def lose(done, total):
        if done >= 4 and not lost:
            cluster.remove_node(nodes[0], allow_graceful=False)
            lost.append(done)

    assert answer(place, "lost.jsonl", ray=2, on_batch=lose) == len(PROMPTS)
    assert lost
    assert lost[0] < len(PROMPTS)
    assert (place / "lost.jsonl").read_bytes() == (place / "whole.jsonl").read_bytes()


def test_without_ray_one_line_says_what_to_install(place, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"--ray needs Ray; install it with pip install 'nextblock\[ray\]'"):
        answer(place, "none.jsonl", ray=1)


def test_no_copies_are_refused(place):
    with pytest.raises(UsageError, match="ray=0 copies of the model answer nothing"):
        answer(place, "none.jsonl", ray=0)
