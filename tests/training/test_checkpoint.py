"""Checkpoints are whole or absent, the newest whole one is found, and the last n are kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from families import tiny_model
from limits import largest_file
from nextblock.config.errors import UsageError
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.decoding.lm import load
from nextblock.model.decoder import end_tokens
from nextblock.model.loading import load_model, load_tokenizer
from nextblock.model.parent import byte_tokenizer
from nextblock.training import checkpoint
from nextblock.training.checkpoint import (
    CheckpointWriter,
    list_checkpoints,
    load_checkpoint,
    newest_whole_checkpoint,
    remove_partial,
)
from nextblock.training.export import export


def trained(seed: int, width: int = 8) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model with tied weights, after two optimizer steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
    model[2].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(torch.randn(3, width)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("own", [False, True])
def test_an_export_loads_wherever_a_parent_with_code_beside_it_does(own, tmp_path):
    """Code that transformers did without is not named any more; code that was used comes along."""
    parent, out = tmp_path / "parent", tmp_path / "out"
    tiny_model("phi3", vocab_size=260).save_pretrained(parent)
    byte_tokenizer().save_pretrained(parent)
    code = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    changes = {
        "config.json": {"auto_map": code, **({"model_type": "own_phi3"} if own else {})},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}},
    }
    for name, values in changes.items():
        saved = json.loads((parent / name).read_text())
        (parent / name).write_text(json.dumps({**saved, **values}))
    lines = {
        "configuration_own": "class OwnConfig(transformers.Phi3Config): model_type = 'own_phi3'",
        "modeling_own": "from .configuration_own import OwnConfig\n"
        "class OwnForCausalLM(transformers.Phi3ForCausalLM): config_class = OwnConfig",
        "tokenization_own": "class OwnTokenizer(transformers.PreTrainedTokenizerFast): pass",
    }
    for module, text in lines.items():
        (parent / f"{module}.py").write_text(f"import transformers\n{text}\n")
    model, tokenizer = load_model(parent, trust_remote_code=own), load_tokenizer(parent, trust_remote_code=own)
    export(out, model, tokenizer, BlockDiffusionSettings(mask_token_id=5))
    tokens = torch.arange(3, 23)[None]
    for trust in (True,) if own else (True, False):
        again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=trust)
        assert torch.equal(again(tokens).logits, model(tokens).logits)
        assert AutoTokenizer.from_pretrained(out, trust_remote_code=trust)("abc")["input_ids"] == [64, 65, 66]


def values_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state_dict()["state"].values() for value in state.values()]


def save(output: Path, step: int, *what: Any, **options: Any) -> Path:
    """Write one checkpoint and wait for it."""
    writer = CheckpointWriter()
    try:
        folder = writer.save(output, step, *what, **options)
        writer.finish()
        return folder
    finally:
        writer.close()


def write(output: Path, step: int, keep: int = 10, state: dict[str, Any] | None = None) -> Path:
    return save(output, step, *trained(step), state or {}, keep)


def test_weights_optimizer_and_state_come_back_bit_for_bit(tmp_path):
    model, optimizer = trained(0)
    folder = save(tmp_path, 7, model, optimizer, {"stream": {"taken": 3}}, keep=2)
    other, other_optimizer = trained(1)
    state = load_checkpoint(folder, other, other_optimizer)
    assert state == {"step": 7, "stream": {"taken": 3}}
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert other[2].weight is other[0].weight  # type: ignore[index]
    for a, b in zip(values_of(optimizer), values_of(other_optimizer), strict=True):
        assert torch.equal(a, b)


def test_the_last_n_checkpoints_are_kept(tmp_path):
    for step in (5, 10, 15, 100):
        write(tmp_path, step, keep=2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000015", "step-00000100"]


def test_those_of_every_mth_step_are_kept_for_good(tmp_path):
    for step in range(2, 22, 2):
        save(tmp_path, step, *trained(step), {}, keep=2, keep_every=6)
    assert [int(folder.name[5:]) for folder in list_checkpoints(tmp_path)] == [6, 12, 18, 20]


def test_a_fresh_optimizer_takes_the_state_of_one_that_has_made_steps(tmp_path):
    model, optimizer = trained(0)
    folder = save(tmp_path, 7, model, optimizer, {}, keep=2)
    other = trained(1)[0]
    fresh = torch.optim.AdamW(other.parameters(), lr=0.5)
    load_checkpoint(folder, other, fresh)
    for a, b in zip(values_of(optimizer), values_of(fresh), strict=True):
        assert torch.equal(a, b)
    assert fresh.param_groups[0]["lr"] == 0.1


def test_the_training_goes_on_while_a_checkpoint_of_before_is_written(tmp_path, monkeypatch):
    """What is written is the state at the call, whatever happens to the model meanwhile; the next save waits."""
    model, optimizer = trained(0)
    wanted, goes_on, real = {n: v.clone() for n, v in model.state_dict().items()}, Event(), checkpoint.save

    def slowly(*args: Any, **options: Any) -> Any:
        assert goes_on.wait(60)
        return real(*args, **options)

    monkeypatch.setattr(checkpoint, "save", slowly)
    writer = CheckpointWriter()
    folder = writer.save(tmp_path, 7, model, optimizer, {}, keep=2)
    with torch.no_grad():
        for value in (*model.parameters(), *values_of(optimizer)):
            value.zero_()
    assert not folder.exists()
    goes_on.set()
    again = writer.save(tmp_path, 8, model, optimizer, {}, keep=2)
    assert newest_whole_checkpoint(tmp_path)[0] in (folder, again)
    writer.finish()
    writer.close()
    other, other_optimizer = trained(1)
    load_checkpoint(folder, other, other_optimizer)
    for name, value in other.state_dict().items():
        assert torch.equal(value, wanted[name])
    assert all(value.any() for value in values_of(other_optimizer))
    load_checkpoint(again, other, other_optimizer)
    assert not any(value.any() for value in other.state_dict().values())


def test_tensors_that_ranks_hold_alike_are_each_written_by_one_of_them_in_parts_of_like_size(monkeypatch):
    values = {"model": {str(n): torch.zeros(n % 7 + 1, 5) for n in range(40)}, "optimizer": {"step": 3}}
    parts = []
    for rank in range(3):
        monkeypatch.setattr(
            checkpoint, "process_state", lambda rank=rank: SimpleNamespace(process_index=rank, num_processes=3)
        )
        parts.append(checkpoint.own_part(values, {}))
    assert sorted(name for part in parts for name in part["model"]) == sorted(values["model"])
    sizes = [sum(value.numel() for value in part["model"].values()) for part in parts]
    assert max(sizes) - min(sizes) <= 35
    assert all(part["optimizer"] == {"step": 3} for part in parts)


def test_a_checkpoint_of_the_form_before_this_one_is_called_that(tmp_path):
    before, newest = write(tmp_path, 5), write(tmp_path, 10)
    (newest / "manifest.json").write_text('{"model.safetensors": "1:a", "optimizer.pt": "1:b", "state.json": "1:c"}')
    found, said = newest_whole_checkpoint(tmp_path)
    assert found == before
    assert "is of an earlier version of nextblock, which alone can go on from it" in said[0]


def test_a_step_written_again_replaces_the_old_one(tmp_path):
    write(tmp_path, 5, state={"try": 1})
    folder = write(tmp_path, 5, state={"try": 2})
    assert load_checkpoint(folder, *trained(0))["try"] == 2
    assert list_checkpoints(tmp_path) == [folder]


PART = "__0_0.distcp"
FILES = [PART, ".metadata", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["removed", "cut short", "one bit flipped", "emptied"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(tmp_path, name, damage):
    before, newest = write(tmp_path, 5), write(tmp_path, 10)
    file = newest / name
    content = file.read_bytes()
    if damage == "removed":
        file.unlink()
    elif damage == "cut short":
        file.write_bytes(content[:-5])
    elif damage == "emptied":
        file.write_bytes(b"")
    else:
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    found, said = newest_whole_checkpoint(tmp_path)
    assert found == before
    assert len(said) == 1
    assert str(newest) in said[0]
    assert name in said[0] or name == "manifest.json"  # a wrong digest speaks of the file it is for


def test_without_a_whole_checkpoint_there_is_none(tmp_path):
    assert newest_whole_checkpoint(tmp_path) == (None, [])
    folder = write(tmp_path, 5)
    (folder / PART).unlink()
    assert newest_whole_checkpoint(tmp_path) == (None, [f"checkpoint {folder} is damaged ({PART} is missing)"])


def test_each_damaged_checkpoint_is_told_with_the_one_that_is_gone_on_from(tmp_path):
    whole, *others = (write(tmp_path, step) for step in (5, 10, 15))
    for folder in others:
        (folder / PART).unlink()
    found, said = newest_whole_checkpoint(tmp_path)
    assert found == whole
    assert [line.endswith("; going on from step-00000005") for line in said] == [True, True]


@pytest.mark.parametrize("content", ["[1]", "{}", "null", '{"state.json": 1}'])
def test_a_manifest_that_does_not_list_the_files_counts_as_damage(tmp_path, content):
    before, newest = write(tmp_path, 5), write(tmp_path, 10)
    (newest / "manifest.json").write_text(content)
    found, said = newest_whole_checkpoint(tmp_path)
    assert found == before
    assert "manifest.json does not list its files" in said[0]


def test_folders_of_the_user_among_the_checkpoints_are_left_alone(tmp_path):
    folder = write(tmp_path, 2)
    own = [folder.with_name(name) for name in ("step-00000002-good", "step-best", "step-", "mine")]
    for copy in own:
        shutil.copytree(folder, copy)
    (folder.parent / "step-00000099").write_text("a file")
    assert list_checkpoints(tmp_path) == [folder]
    for step in (4, 6):
        save(tmp_path, step, *trained(step), {}, keep=1, keep_every=6)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000006"]
    assert all((copy / PART).is_file() for copy in own)


def test_checkpoints_stand_in_the_order_of_their_steps(tmp_path):
    for step in (99_999_999, 100_000_000):
        write(tmp_path, step, keep=1)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-100000000"]


def test_a_damaged_later_checkpoint_does_not_push_out_the_whole_ones(tmp_path):
    write(tmp_path, 5)
    (write(tmp_path, 10) / PART).unlink()
    whole = write(tmp_path, 6, keep=1)  # the run went back to step 5 and on
    assert newest_whole_checkpoint(tmp_path) == (whole, [])


@pytest.mark.parametrize("stage", ["save", "write_whole", "_digest", "_flush", "os.replace"])
def test_a_save_that_stops_half_way_leaves_the_earlier_checkpoint_the_newest(tmp_path, monkeypatch, stage):
    before = write(tmp_path, 5)

    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt  # what no handler of write errors catches, as a kill

    with monkeypatch.context() as patch:
        patch.setattr(f"nextblock.training.checkpoint.{stage}" if "." not in stage else stage, stop)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 10)
    assert newest_whole_checkpoint(tmp_path) == (before, [])
    assert newest_whole_checkpoint(tmp_path)[0] != write(tmp_path, 10)
    assert newest_whole_checkpoint(tmp_path)[0] == checkpoint.list_checkpoints(tmp_path)[-1]


@pytest.mark.parametrize("room", ["no weights", "weights but no optimizer"])
def test_a_disk_that_is_full_stops_with_one_line_and_leaves_the_last_good_checkpoint(tmp_path, room):
    before = write(tmp_path, 5)
    model, optimizer = trained(0, width=256)
    limit, said = {
        "no weights": (2**10, r"File too large; allow larger files \(ulimit -f\) and resume"),
        "weights but no optimizer": (300 * 2**10, "most likely because the disk is full; free space and resume"),
    }[room]
    with largest_file(limit), pytest.raises(UsageError, match=f"cannot write checkpoint .*{said}") as stopped:
        save(tmp_path, 10, model, optimizer, {}, keep=1)
    assert "\n" not in str(stopped.value)
    assert newest_whole_checkpoint(tmp_path) == (before, [])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [before.name]


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(UsageError, match="cannot write checkpoint"):
        write(tmp_path, 1)
    shutil.rmtree(tmp_path)


def test_what_a_killed_save_left_is_removed(tmp_path):
    write(tmp_path, 3)
    (tmp_path / "checkpoints" / ".partial-step-00000007").mkdir()
    remove_partial(tmp_path)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_an_exported_model_ends_with_the_turns_of_its_chat_template(tmp_path):
    model, tokenizer = tiny_model("llama", vocab_size=264), byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    export(tmp_path, model, tokenizer, None)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [256, 258]
    lm = load(tmp_path)
    assert end_tokens(lm.decoder, lm.tokenizer) == [256, 258]
