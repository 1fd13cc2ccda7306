"""The parent of a run: its tokenizer, and shapes from scratch."""

from __future__ import annotations

import pytest

from nextblock.config.errors import UsageError
from nextblock.config.sections import ModelConfig
from nextblock.model.parent import load_parent, parent_tokenizer, scratch_config
from nextblock.model.shapes import SHAPES, shape_values


def test_adapting_needs_a_tokenizer(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no tokenizer"):
        parent_tokenizer(ModelConfig(path=str(tmp_path)))


def test_a_scratch_parent_has_the_given_shape_and_an_unknown_kind_is_refused():
    shape = {"model_type": "qwen3", "hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 260, "head_dim": 4}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16}
    config = ModelConfig(scratch=shape, tokenizer="bytes")
    decoder, tokenizer = load_parent(config, "cpu"), parent_tokenizer(config)
    assert decoder.model.config.model_type == "qwen3"
    assert decoder.vocabulary == 260
    text = "naïve π\n"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    with pytest.raises(UsageError, match="model_type='qwen33'"):
        load_parent(ModelConfig(scratch={"model_type": "qwen33"}, tokenizer="bytes"), "cpu")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_size": "big"}, r"model.scratch .*Field 'hidden_size' expected int"),
        ({"hidden_size": 33, "num_attention_heads": 4}, r"hidden size \(33\) is not a multiple"),
        ({"hidden_sise": 64}, r"model.scratch.hidden_sise: .*did you mean 'hidden_size'"),
        ({"model_type": "gpt2", "n_layers": 2}, r"model.scratch.n_layers: .*did you mean 'n_layer'"),
    ],
)
def test_values_that_a_scratch_parent_cannot_have_are_refused(values, said):
    with pytest.raises(UsageError, match=said):
        scratch_config(values)


def test_every_known_shape_and_a_familys_older_names_make_a_config():
    assert all(scratch_config(shape_values(name)).vocab_size > 4e4 for name in SHAPES)
    assert scratch_config({"model_type": "gpt2", "hidden_size": 32, "n_layer": 1}).n_embd == 32
