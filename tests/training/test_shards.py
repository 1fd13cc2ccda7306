"""A parent read straight into its shards: the run is the same, bit for bit, as one whose ranks load all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from families import BYTE_VOCABULARY, tiny_model
from nextblock.config.run import AdaptConfig
from nextblock.config.sections import ModelConfig
from nextblock.model.parent import load_parent
from nextblock.training.checkpoint import weights_of
from nextblock.training.run import LOG, RESOLVED_CONFIG
from nextblock.training.shards import BareParent, _bare, whole_because
from runs import adapt_rank, config_of, finish, launch

CPU = torch.device("cpu")


def loading_rank(rank: int, values: dict[str, Any], whole: bool, stop_after: int | None = None) -> None:
    """Train, reading parts or `whole` models; end without a word after `stop_after` steps."""
    from nextblock.training import setup

    real = setup.bare_parent

    def parts(*arguments: Any) -> Any:
        found = real(*arguments)
        assert found is not None
        return found

    setup.bare_parent = (lambda *_: None) if whole else parts

    adapt_rank(rank, values, stop_after)


def on_ranks(processes: Any, config: AdaptConfig, *how: Any, count: int = 2) -> tuple[dict[str, bytes], list[str]]:
    """What a run leaves but for its log, and its log but for times."""
    output = Path(config.output)
    output.parent.mkdir(exist_ok=True)
    ranks = launch(processes, output.parent, loading_rank, config.model_dump(mode="json"), *how, count=count)
    assert finish(ranks) == [0] * count, (output.parent / "stderr-0").read_text()
    files = {file.name: file.read_bytes() for file in output.glob("*.*") if file.name not in (LOG, RESOLVED_CONFIG)}
    return files, [line.split('"step_seconds"')[0] for line in (output / LOG).open()]


STAGES = [{"name": name, "training": {"steps": 9}} for name in "ab"]
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "untied, in a padded vocabulary": ({"vocab_size": BYTE_VOCABULARY}, {}, 2),
    "tied, with a row for the mask token": (
        {"vocab_size": 257, "tie_word_embeddings": True},
        {"training__gradient_checkpointing": True},
        2,
    ),
    "two copies": ({"vocab_size": 257}, {"machine__shard_over": 2}, 4),
    "in stages, gathered in bfloat16": (
        {"vocab_size": 257},
        {"training__mixed_precision": "bf16", "stages": STAGES},
        2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_that_reads_parts_equals_one_that_reads_the_whole_model(place, processes, tmp_path, case):
    """Losses, result and all, also where it was stopped and goes on."""
    shape, options, count = CASES[case]
    tiny_model("llama", std=0.08, **shape).save_pretrained(tmp_path / "parent", max_shard_size="60KB")
    options = {"model__path": str(tmp_path / "parent"), "training__fsdp": True, "training__steps": 9, **options}
    parts, whole = (config_of(place, tmp_path / name / "run", **options) for name in ("parts", "whole"))
    if case == "untied, in a padded vocabulary":
        on_ranks(processes, parts, False, 5)
    (ours, our_log), (theirs, their_log) = (
        on_ranks(processes, config, is_whole, count=count) for config, is_whole in ((parts, False), (whole, True))
    )
    assert ours.keys() == theirs.keys() >= {"model.safetensors", "config.json", "generation_config.json"}
    assert [name for name, found in ours.items() if found != theirs[name]] == []
    assert our_log[-4:] == their_log[-4:]


@pytest.mark.slow
def test_a_weight_that_is_not_finite_is_named_by_all_ranks_in_one_line(place, processes, tmp_path):
    model = tiny_model("llama", vocab_size=BYTE_VOCABULARY)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "parent")
    config = config_of(place, tmp_path / "run", model__path=str(tmp_path / "parent"), training__fsdp=True)
    ranks = launch(processes, tmp_path, loading_rank, config.model_dump(mode="json"), False)
    assert finish(ranks) == [1, 1]
    for rank in range(2):
        said = " ".join((tmp_path / f"stderr-{rank}").read_text().split())
        assert "weight model.layers.1.mlp.up_proj.weight holds NaN or infinite values" in said


def test_what_the_files_hold_decides_and_buffers_are_those_of_a_loaded_model(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    found, loaded = _bare(config, CPU), load_parent(config, CPU).model
    if family == "gpt_neox":  # whose files call the head embed_out
        assert isinstance(found, str)
        assert "lm_head.weight under this name" in found
        return
    assert isinstance(found, BareParent)
    bare = found.decoder.model
    assert weights_of(bare).keys() == weights_of(loaded).keys() == found.files.keys()
    assert bare.config.to_dict() == loaded.config.to_dict()
    assert bare.generation_config.to_dict() == loaded.generation_config.to_dict()
    assert not bare.training
    buffers = dict(bare.named_buffers())
    assert buffers.keys() == dict(loaded.named_buffers()).keys()
    for name, value in loaded.named_buffers():
        assert torch.equal(buffers[name], value), name


def test_a_parent_is_read_whole_where_its_files_are_not_as_the_model_has_it(tmp_path):
    tied = tiny_model("llama", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    file = tmp_path / "tied" / "model.safetensors"
    stored = load_file(file)
    config = ModelConfig(path=str(tmp_path / "tied"))

    def why(tensors: dict[str, torch.Tensor]) -> Any:
        save_file(tensors, file, {"format": "pt"})
        return _bare(config, CPU)

    renamed = {name.removeprefix("model."): value for name, value in stored.items()}
    assert "do not hold model.embed_tokens.weight" in why(renamed)
    assert "lm_head.weight, which the config ties" in why(stored | {"lm_head.weight": torch.zeros(97, 32)})
    name = "model.layers.0.mlp.up_proj.weight"
    assert f"do not hold {name}" in why(stored | {name: torch.zeros(3, 32)})
    file.write_bytes(b"no weights")
    assert _bare(config, CPU) == "its files cannot be listed"
    assert whole_because(ModelConfig(scratch={"vocab_size": 9}), None) == "its weights are random"
    assert "GGUF" in (whole_because(ModelConfig(path="x", gguf_file="m.gguf"), None) or "")
