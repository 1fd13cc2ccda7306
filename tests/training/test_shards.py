"""A parent read straight into its shards: the run is the same, bit for bit, as one whose ranks load all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from families import BYTE_VOCABULARY, tiny_model
from nextblock.config.run import load_config
from runs import config_of, finish, launch

pytestmark = pytest.mark.slow


def loading_rank(rank: int, values: dict[str, Any], whole: bool, stop_after: int | None = None) -> None:
    """Train, reading parts or `whole` models; end without a word after `stop_after` steps."""
    from nextblock.training import loop, setup
    from nextblock.training.step import train_step

    real = setup.bare_parent

    def parts(*arguments: Any) -> Any:
        found = real(*arguments)
        assert found is not None
        return found

    setup.bare_parent = (lambda *_: None) if whole else parts

    def doomed(run: Any, step: int) -> Any:
        if step == stop_after:
            import os

            os._exit(0)
        return train_step(run, step)

    loop.train_step = doomed
    loop.train(load_config(values), resume=True)


def on_ranks(processes: Any, folder: Path, config: Any, *how: Any, count: int = 2) -> dict[str, bytes]:
    """What a run leaves, but for times and paths."""
    folder.mkdir(exist_ok=True)
    ranks = launch(processes, folder, loading_rank, config.model_dump(mode="json"), *how, count=count)
    assert finish(ranks) == [0] * count, (folder / "stderr-0").read_text()
    output = Path(config.output)
    return {
        file.name: file.read_bytes() for file in output.glob("*.*") if file.name not in ("log.jsonl", "nextblock.yaml")
    }


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "untied, in a padded vocabulary": ({"vocab_size": BYTE_VOCABULARY}, {}, 2),
    "tied, with a row for the mask token": (
        {"vocab_size": 257, "tie_word_embeddings": True},
        {"training__gradient_checkpointing": True},
        2,
    ),
    "two copies": ({"vocab_size": 257}, {"machine__shard_over": 2}, 4),
    "gathered in bfloat16": ({"vocab_size": 257}, {"training__mixed_precision": "bf16"}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_reads_parts_equals_one_that_reads_the_whole_model(place, processes, tmp_path, case):
    shape, options, count = CASES[case]
    tiny_model("llama", std=0.08, **shape).save_pretrained(tmp_path / "parent", max_shard_size="60KB")
    options = {"model__path": str(tmp_path / "parent"), "training__fsdp": True, "training__steps": 9, **options}
    left = [
        on_ranks(processes, tmp_path / name, config_of(place, tmp_path / name / "run", **options), whole, count=count)
        for name, whole in (("parts", False), ("whole", True))
    ]
    assert left[0].keys() == left[1].keys() >= {"model.safetensors", "config.json", "generation_config.json"}
    for name, found in left[0].items():
        assert found == left[1][name], name
    losses = [
        [line.split('"step_seconds"')[0] for line in (tmp_path / n / "run/log.jsonl").open()]
        for n in ("parts", "whole")
    ]
    assert losses[0] == losses[1]
