"""What is read, made and refused before the first step."""

from __future__ import annotations

import json
import random
from typing import Any, cast

import pytest
import torch

from families import BYTE_VOCABULARY, tiny_model
from layouts import make_rows
from nextblock.config.errors import UsageError
from nextblock.config.sections import Source
from nextblock.data.mixture import is_held_out
from nextblock.data.records import Records
from nextblock.data.sources import read_source
from nextblock.model.parent import byte_tokenizer
from nextblock.model.training_mode import without_dropout
from nextblock.training.loop import train
from nextblock.training.setup import held_out_rows
from runs import config_of, weights

DROPOUT: dict[str, Any] = {
    "attention_dropout": 0.5,
    "hidden_dropout": 0.5,
    "resid_pdrop": 0.5,
    "embd_pdrop": 0.5,
    "attn_pdrop": 0.5,
}


def test_without_dropout_a_model_in_train_mode_gives_what_it_gives_in_eval_mode(family):
    model = tiny_model(family, **DROPOUT)
    tokens = make_rows([[[20]]], 20).tokens
    with torch.no_grad():
        wanted = model(tokens).logits
        without_dropout(model)
        torch.testing.assert_close(model.train()(tokens).logits, wanted, rtol=1e-6, atol=1e-6)


SCRATCH = {
    "model_type": "llama",
    "vocab_size": BYTE_VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def test_a_parent_from_scratch_is_a_function_of_the_seed(place, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(random.randrange(2**31))
        train(config_of(place, tmp_path / name, model__scratch=SCRATCH, training__seed=seed, training__steps=9))
    assert weights(tmp_path / "a") == weights(tmp_path / "b") != weights(tmp_path / "c")


BAD = {
    "a mask token outside the vocabulary": ({"model.mask_token": 999}, "is outside the vocabulary"),
    "a mask token used in the data": ({"model.mask_token": ord("p") - 33}, "is used in the data"),
    "a row over the model's positions": ({"data.row_length": 1024}, "is over the model's 512 positions"),
    "a missing model": ({"model.path": "./absent"}, "does not exist"),
    "a model with another vocabulary": (
        {"model.scratch": SCRATCH | {"vocab_size": 70}},
        "the tokenizer has 257 tokens, the model's vocabulary 70; use the tokenizer that belongs to the model",
    ),
    "an optimizer that is not installed": (
        {"optimizer.name": "adamw_8bit"},
        "optimizer.name=adamw_8bit needs bitsandbytes; pip install bitsandbytes, or use adamw",
    ),
    "a missing source": ({"data.sources.0.path": "./absent.jsonl"}, "absent.jsonl"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_stops_with_one_line_and_leaves_no_folder(place, tmp_path, monkeypatch, what):
    overrides, said = BAD[what]
    monkeypatch.setattr("nextblock.training.setup.is_bnb_available", lambda: False)
    config = config_of(place, tmp_path / "run", **{k.replace(".", "__"): v for k, v in overrides.items()})
    with pytest.raises(UsageError) as refused:
        train(config)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_held_out_documents_that_cannot_be_read_stop_the_run_before_it_begins(place, tmp_path):
    path = tmp_path / "all.jsonl"
    chats = [json.dumps({"messages": [{"role": "assistant", "name": str(i)}]}) for i in range(60)]
    path.write_text("\n".join(chats))
    read = cast(Records, read_source(Source(path=str(path)))).read
    lines = [
        chat if is_held_out(read(i), 0.2) else json.dumps({"text": f"{i} and {i}"}) for i, chat in enumerate(chats)
    ]
    path.write_text("\n".join(lines))
    options = {"data__sources": [{"path": str(path)}], "data__held_out": 0.2, "training__evaluate_rows": 4}
    with pytest.raises(UsageError, match=r"all.jsonl:\d+: message 1 has no content"):
        train(config_of(place, tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_more_positions_are_offered_only_where_they_are_not_learned(family, place, tmp_path):
    tiny_model(family, vocab_size=BYTE_VOCABULARY).save_pretrained(tmp_path / family)
    config = config_of(place, tmp_path / "run", model__path=str(tmp_path / family), data__row_length=4096)
    with pytest.raises(UsageError, match="is over the model's") as refused:
        train(config)
    assert ("model.override.max_position_embeddings" in str(refused.value)) == (family == "llama")


@pytest.mark.parametrize(("attention", "views"), [("eager", 1), ("eager", 2), ("sdpa", 1)])
def test_a_dense_mask_is_named_with_its_memory_before_it_is_made(
    place, tmp_path, capsys, monkeypatch, attention, views
):
    class Begun(Exception):
        pass

    def begun(self: Any, *parts: Any) -> None:
        raise Begun

    monkeypatch.setattr("nextblock.model.decoder.Decoder.two_view_masks", begun)
    monkeypatch.setattr(
        "nextblock.training.setup.run_in_parts", lambda decoder: None
    )  # whose trial is over four tokens
    monkeypatch.setattr("nextblock.training.setup.probe", lambda decoder: None)
    options = {"recipe__views": views, "training__micro_batch_rows": 2, "data__row_length": 512}
    config = config_of(place, tmp_path / "run", growth__b_0=2, **options)
    with pytest.raises(Begun):
        train(config)
    size = 2 * ((views + 1) * config.data.row_length) ** 2 * 4 / 2**20
    assert f"attention: 'sdpa' with a dense mask, up to {size:,.0f} MiB" in capsys.readouterr().out


def test_what_ends_a_turn_is_no_mask_token(place, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<|turn|>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = config_of(
        place, tmp_path / "run", model__tokenizer=str(tmp_path / "tokenizer"), model__mask_token="<|turn|>"
    )
    with pytest.raises(UsageError, match="mask token id 257 ends the turns of the chat template"):
        train(config)
    assert not (tmp_path / "run").exists()


def held_out_of(place, tmp_path, capsys, *sources: str) -> tuple[Any, str]:
    options = {"data__held_out": 0.05, "training__evaluate_rows": 4, "training__evaluate_every": 4}
    config = config_of(place, tmp_path / "run", data__sources=[{"path": path} for path in sources], **options)
    return held_out_rows(config, byte_tokenizer()), capsys.readouterr().out


def test_a_source_without_held_out_documents_is_named_and_the_others_are_measured(place, tmp_path, capsys):
    big, one = tmp_path / "big.jsonl", tmp_path / "one.txt"
    big.write_text("\n".join(json.dumps({"text": f"{n} and {n}"}) for n in range(400)))
    one.write_text("all of it is trained on")
    rows, said = held_out_of(place, tmp_path, capsys, str(big), str(one))
    assert len(rows) == 4
    assert said.count("\n") == 1
    assert f"no document of {one} is held out with data.held_out=0.05" in said
    rows, said = held_out_of(place, tmp_path, capsys, str(one))
    assert rows is None
    assert "nothing is measured on it (training.evaluate_every=4): data source" in said
    assert "change data.held_out or give more documents" in said
