"""GGUF parents: the same model as its source weights, through every command; bad files in one line."""

from __future__ import annotations

import importlib.util
import shutil

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import nextblock as nb
from gguf_files import END, source_model, write_gguf
from nextblock.config.errors import UsageError
from nextblock.config.run import load_config
from nextblock.config.sections import with_gguf
from nextblock.gguf.files import architectures, find_gguf, quantizations
from nextblock.measure.identities import verify
from nextblock.measure.plan import plan
from nextblock.model.loading import load_model, load_tokenizer, read_config
from nextblock.workflows.adapt import adapt
from nextblock.workflows.answers import write_answers

KINDS = gguf.GGMLQuantizationType
TEXT = "the thing that the other thing is"


@pytest.fixture(scope="module")
def source():
    return source_model()


@pytest.fixture(scope="module")
def file(source, tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", source)


@pytest.mark.parametrize(("kind", "tied"), [(KINDS.F32, False), (KINDS.Q8_0, True), (KINDS.Q4_1, False)])
@torch.no_grad()
def test_a_gguf_file_computes_what_its_source_weights_do(kind, tied, tmp_path):
    source = source_model(tied)
    model = load_model(write_gguf(tmp_path / "tiny.gguf", source, kind=kind))
    tokens = torch.arange(5, 45)[None]
    assert torch.allclose(model(tokens).logits, source(tokens).logits, atol=1e-5)
    assert model.dtype == torch.float32
    assert model.config.eos_token_id == END


def test_its_tokenizer_reads_and_writes_text(file):
    tokenizer = load_tokenizer(file)
    assert tokenizer is not None
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) < len(TEXT)  # the merges were read
    assert tokenizer.eos_token_id == END
    assert tokenizer.chat_template


def test_a_folder_and_the_name_of_its_file_are_the_file(file):
    a = nb.load(file.parent, gguf_file=file.name).generate(TEXT, mode="ar", max_new_tokens=4)
    assert a.answers == nb.load(file).generate(TEXT, mode="ar", max_new_tokens=4).answers
    assert with_gguf("owner/name", "q.gguf") == "owner/name/q.gguf"


def run(file, output, **more):
    values = {
        "model": {"path": str(file.parent), "gguf_file": file.name},
        "data": {"sources": [{"path": "task:word_problems"}], "row_length": 256, "held_out": 0},
        "growth": {"b_0": 4, "b_max": 4},
        "training": {"steps": 1, "batch_rows": 1, "evaluate_rows": 0},
        "output": str(output),
        **more,
    }
    return load_config(values)


def test_an_adapted_gguf_parent_is_an_ordinary_safetensors_folder(file, source, tmp_path):
    adapt(run(file, tmp_path / "out", optimizer={"lr": 1e-30}))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    tokens = torch.arange(5, 25)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(again(tokens).logits[..., : END + 1], source(tokens).logits[..., : END + 1], atol=1e-5)
    assert "gguf" not in (tmp_path / "out" / "config.json").read_text()
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXT)["input_ids"]
    assert ids == load_tokenizer(file)(TEXT)["input_ids"]  # pyright: ignore[reportOptionalCall]


def test_a_draft_adapter_knows_its_gguf_parent_and_no_other(file, tmp_path):
    adapt(run(file, tmp_path / "out", draft_adapter={"rank": 2}))
    lm = nb.load(file, draft_adapter=tmp_path / "out")
    plain = nb.load(file).generate(TEXT, mode="ar", max_new_tokens=12)
    assert lm.generate(TEXT, mode="speculative", max_new_tokens=12).answers == plain.answers
    other = source_model()
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    with pytest.raises(UsageError, match="load it with its own parent"):
        nb.load(write_gguf(tmp_path / "other.gguf", other), draft_adapter=tmp_path / "out")


def test_plan_verify_and_answers_take_a_gguf_file(file, tmp_path):
    assert plan(run(file, tmp_path / "out"))
    assert all(check.status != "failed" for check in verify(str(file)))
    (tmp_path / "prompts.txt").write_text("the\n")
    assert write_answers(file, str(tmp_path / "prompts.txt"), tmp_path / "answers.jsonl", max_new_tokens=4) == 1
    assert write_answers(file, str(tmp_path / "prompts.txt"), tmp_path / "answers.jsonl", max_new_tokens=4) == 0


def refused(file, match):
    with pytest.raises(UsageError, match=match) as error:
        read_config(file)
    assert "\n" not in str(error.value)


def test_an_architecture_that_transformers_cannot_read_is_named_with_those_it_can(source, tmp_path):
    refused(write_gguf(tmp_path / "a.gguf", source, architecture="rwkv6"), "architecture 'rwkv6'.*llama, .*qwen3")
    assert {"llama", "qwen2", "gemma3"} <= set(architectures())


@pytest.mark.parametrize("architecture", ["t5", "mamba", "deci", "mistral", "bloom"])
def test_what_is_refused_is_in_no_list_of_what_can_be_read(architecture, source, tmp_path):
    file = write_gguf(tmp_path / "a.gguf", source, architecture=architecture)
    with pytest.raises(UsageError, match=f"architecture '{architecture}'") as error:
        read_config(file)
    assert architecture not in str(error.value).split("these can: ")[1].split(", ")


def test_weights_of_a_kind_that_nobody_unpacks_are_named(source, tmp_path):
    extra = {"blk.0.extra.weight": np.zeros((2, 32), np.int32)}
    refused(write_gguf(tmp_path / "a.gguf", source, more=extra), "weights of kind I32.*Q4_K")
    assert {"F16", "BF16", "Q4_0", "Q8_0"} <= set(quantizations())


def test_what_transformers_would_leave_out_silently_is_refused(source, tmp_path):
    scaled = {"llama.rope.scaling.type": "yarn"}
    refused(write_gguf(tmp_path / "a.gguf", source, values=scaled), "rope.scaling.type=yarn")
    factors = {"rope_freqs.weight": np.ones(8, np.float32)}
    with pytest.raises(UsageError, match="so the model would compute something else"):
        load_model(write_gguf(tmp_path / "b.gguf", source, more=factors))


def test_a_split_file_names_the_part_that_is_missing(source, tmp_path):
    part = write_gguf(tmp_path / "m-00001-of-00002.gguf", source, values={"split.count": 2, "split.no": 0})
    refused(part, r"one of 2 parts, and m-00002-of-00002.gguf is missing \(1 of 2 are\)")
    shutil.copy(part, tmp_path / "m-00002-of-00002.gguf")
    refused(part, "one file; join them: llama-gguf-split --merge m-00001-of-00002.gguf m.gguf")


def test_what_is_no_gguf_file_is_refused(file, tmp_path):
    (tmp_path / "a.gguf").write_text("<html>")
    refused(tmp_path / "a.gguf", "is no GGUF file")
    (tmp_path / "b.gguf").write_bytes(file.read_bytes()[:-5000])
    refused(tmp_path / "b.gguf", "cut short")
    (tmp_path / "b.gguf").write_bytes(file.read_bytes()[:100])
    refused(tmp_path / "b.gguf", "cut short")
    refused(tmp_path / "c.gguf", "c.gguf does not exist")
    refused(tmp_path / "nowhere" / "c.gguf", "c.gguf does not exist")


@pytest.mark.parametrize(
    ("name", "said"), [("~no-such-user/x.gguf", "unknown user"), ("x" * 300 + ".gguf", "too long")]
)
def test_a_file_name_that_can_be_no_path_is_refused(name, said):
    with pytest.raises(UsageError, match=said):
        find_gguf(name)


def test_a_folder_of_gguf_files_says_how_to_name_one(file):
    refused(file.parent, "has no config.json; name its file: .*tiny.gguf")


def test_a_model_folder_may_have_a_name_like_a_gguf_file(source, tmp_path):
    source.save_pretrained(tmp_path / "model.gguf")
    assert load_model(tmp_path / "model.gguf").config.hidden_size == source.config.hidden_size


def test_weights_that_a_file_lacks_are_not_laid_to_a_config_json(source, tmp_path):
    wider = {"llama.feed_forward_length": 128}
    with pytest.raises(UsageError, match=r"header says .*; use the model's safetensors folder") as error:
        load_model(write_gguf(tmp_path / "a.gguf", source, values=wider))
    assert "config.json" not in str(error.value)


@pytest.mark.parametrize("kind", ["none", "no_vocab"])
def test_a_file_without_a_vocabulary_takes_token_ids(kind, source, tmp_path):
    lm = nb.load(write_gguf(tmp_path / "a.gguf", source, values={"tokenizer.ggml.model": kind}))
    assert lm.tokenizer is None
    prompt = torch.arange(5, 9)[None]
    expected = source.generate(prompt, max_new_tokens=4, do_sample=False)[0, 4:].tolist()
    assert lm.generate(prompt, mode="ar", max_new_tokens=4).sequences[0, 4:].tolist() == expected


def test_a_file_that_may_not_be_read_says_so(file, monkeypatch):
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(file), "open", denied)
    refused(file, "tiny.gguf cannot be read: Permission denied")


def test_a_missing_package_names_the_extra(file, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(file, r"pip install 'nextblock\[gguf\]'")
