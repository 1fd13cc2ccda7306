"""LoRA's laws: it learns, merging changes no logits, the rest of the parent stays, a resume is exact."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM

import nextblock as nb
from families import tiny_model
from nextblock.config.errors import UsageError
from nextblock.config.run import AdaptConfig, load_config
from nextblock.config.sections import LoraConfig
from nextblock.model.decoder import Decoder
from nextblock.model.lora import LoraAdapter
from nextblock.model.parent import byte_tokenizer
from nextblock.training.loop import train
from nextblock.training.run import StepMetrics
from nextblock.training.setup import prepare

pytest.importorskip("peft")

VOCABULARY = 260  # the byte tokenizer's 257 and three unused rows
TIED = {"llama": False, "gemma3": True, "gpt2": True}


@pytest.fixture(scope="module", params=TIED)
def parent(request, tmp_path_factory) -> Path:
    """The folder of a tiny parent: untied; tied with scaled embeddings; tied with transposed linear layers."""
    folder = tmp_path_factory.mktemp(request.param)
    model: Any = tiny_model(request.param, vocab_size=VOCABULARY, std=0.08)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == TIED[request.param]
    model.save_pretrained(folder)
    return folder


def config_of(parent: Path, output: Path, **overrides: Any) -> AdaptConfig:
    values = {
        "model": {"path": str(parent), "tokenizer": "bytes"},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "data": {"sources": [{"path": "task:algebra"}], "row_length": 64},
        "growth": {"b_max": 4, "delta": 4},
        "optimizer": {"lr": 0.02, "warmup_steps": 2},
        "training": {"steps": 20, "batch_rows": 4, "checkpoint_every": 7, "evaluate_rows": 0},
        "output": str(output),
    }
    return load_config(values, {key.replace("__", "."): value for key, value in overrides.items()})


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def test_a_run_learns_leaves_the_parent_and_ends_in_an_adapter_and_a_merged_model(parent, tmp_path):
    peft = pytest.importorskip("peft")
    metrics: list[StepMetrics] = []
    run = train(config_of(parent, tmp_path / "run"), on_step=metrics.append)
    assert sum(m.ar_loss for m in metrics[-3:]) < sum(m.ar_loss for m in metrics[:3])
    mask_id = run.mask_token_id
    assert mask_id is not None
    tokens = torch.tensor([[40, 41, mask_id, 43, 44, mask_id]])

    folders = (parent, tmp_path / "run")
    before, after = (cast(Any, AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)) for f in folders)
    rows = [model.get_input_embeddings().weight.detach() for model in (before, after)]
    others = torch.arange(VOCABULARY) != mask_id
    assert torch.equal(rows[0][others], rows[1][others])
    assert not torch.equal(rows[0][mask_id], rows[1][mask_id])

    read = peft.PeftModel.from_pretrained(before, tmp_path / "run" / "adapter")
    merged = logits_of(after, tokens)
    # An untied head's row of the mask token is that of the merged model alone; it is never generated.
    torch.testing.assert_close(logits_of(read, tokens)[..., others], merged[..., others], rtol=1e-4, atol=1e-4)

    lm = nb.load(tmp_path / "run")
    assert lm.settings is not None
    assert (lm.settings.block_size, lm.settings.mask_token_id) == (4, mask_id)
    assert lm.generate("1 + 1", mode="diffusion", max_new_tokens=8).stats.new_tokens > 0
    torch.testing.assert_close(logits_of(lm.model, tokens), merged)
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["r"]) == (str(parent), 4)


def test_merging_changes_no_logits_and_no_other_row(parent):
    model: Any = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float64)
    names, plain = list(model.state_dict()), model.get_input_embeddings().weight.detach().clone()
    lora = LoraAdapter(model, LoraConfig(rank=3), 259, "parent")
    tokens, position = torch.tensor([[40, 259, 42, 259, 44]]), torch.arange(5)[None]
    decoder = Decoder(model)
    with torch.no_grad():
        untouched = decoder.logits(decoder.hidden(tokens, position, None))
        for weight in lora.weights.values():
            weight.add_(torch.randn_like(weight), alpha=0.3)
        apart = decoder.logits(decoder.hidden(tokens, position, None))
        lora.merge()
        merged = decoder.logits(decoder.hidden(tokens, position, None))
    assert float((apart - untouched).abs().max()) > 0.1
    torch.testing.assert_close(merged, apart, rtol=1e-5, atol=1e-5)
    assert list(model.state_dict()) == names
    changed = (model.get_input_embeddings().weight != plain).any(1)
    assert changed.nonzero().flatten().tolist() == [259]


def test_a_new_lora_changes_nothing(parent):
    model: Any = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    tokens = torch.tensor([[40, 259, 42]])
    before = logits_of(model, tokens)
    LoraAdapter(model, LoraConfig(rank=3), 259, "parent")
    torch.testing.assert_close(logits_of(model, tokens), before)


def test_a_stopped_run_goes_on_to_the_same_weights_and_its_checkpoints_hold_what_is_trained(parent, tmp_path):
    whole, stopped = (config_of(parent, tmp_path / name) for name in ("whole", "stopped"))
    train(whole)

    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, on_step=stop)
    saved = FileSystemReader(tmp_path / "stopped" / "checkpoints" / "step-00000007").read_metadata()
    names = [name for name in saved.state_dict_metadata if name.startswith("model.")]
    assert names
    assert all("lora_" in name or name.endswith("mask_row") for name in names)
    train(stopped, resume=True)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        one, other = (load_file(tmp_path / run / name) for run in ("whole", "stopped"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_a_mask_token_past_the_parents_vocabulary_gets_a_row(tmp_path):
    peft = pytest.importorskip("peft")
    tiny_model("llama", vocab_size=257, std=0.08).save_pretrained(tmp_path / "parent")
    run = train(config_of(tmp_path / "parent", tmp_path / "run", training__steps=9))
    assert run.mask_token_id == 257
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / f, dtype=torch.float32) for f in ("parent", "run")
    )
    before.resize_token_embeddings(258, mean_resizing=False)
    read = peft.PeftModel.from_pretrained(before, tmp_path / "run" / "adapter")
    tokens = torch.tensor([[40, 257, 42]])
    torch.testing.assert_close(logits_of(read, tokens)[..., :257], logits_of(after, tokens)[..., :257])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"lora.target_modules": ["q_proj", "v_porj"]}, "lora.target_modules=['v_porj'] match nothing; did you"),
        ({"draft_adapter": {}, "growth.b_0": 4}, "lora and draft_adapter exclude each other"),
        ({"model.scratch": {"model_type": "llama"}}, "leaves random weights"),
        ({"lora": None, "model.quantization": "4bit"}, "is for a frozen parent"),
    ],
)
def test_bad_settings_stop_with_one_line(tmp_path, overrides, said):
    tiny_model("llama", vocab_size=VOCABULARY).save_pretrained(tmp_path / "parent")
    with pytest.raises(UsageError) as refused:
        prepare(
            config_of(tmp_path / "parent", tmp_path / "run", **{k.replace(".", "__"): v for k, v in overrides.items()})
        )
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_nearest_right_target_is_named(llama):
    with pytest.raises(UsageError, match="did you mean 'v_proj'"):
        LoraAdapter(llama, LoraConfig(target_modules=("v_porj",)), None, "parent")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal without CUDA")
def test_four_bit_without_cuda_is_refused(tmp_path):
    tiny_model("llama", vocab_size=VOCABULARY).save_pretrained(tmp_path / "parent")
    with pytest.raises(UsageError, match="needs a CUDA device"):
        prepare(config_of(tmp_path / "parent", tmp_path / "run", model__quantization="4bit"))


@pytest.mark.gpu
def test_a_run_over_a_four_bit_parent_ends_in_a_whole_merged_model(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model("llama", vocab_size=VOCABULARY, std=0.08).save_pretrained(tmp_path / "parent")
    options: dict[str, Any] = {"model__quantization": "4bit", "model__attention": "sdpa", "training__steps": 9}
    run = train(config_of(tmp_path / "parent", tmp_path / "run", **options))
    assert nb.load(tmp_path / "run").model.num_parameters() >= VOCABULARY * 32
    assert run.lora is not None


def test_a_missing_peft_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"lora needs peft, which is not installed; run `pip install 'nextblock\[lora\]'`"
    ):
        prepare(config_of(tmp_path, tmp_path / "run"))


def test_byte_tokenizers_mask_token_lies_in_the_tests_vocabulary():
    assert len(byte_tokenizer()) < VOCABULARY
