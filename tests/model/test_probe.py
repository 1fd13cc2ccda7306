"""What a model must obey, and that the probe refuses one that does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from families import VOCABULARY, longrope_model, random_model
from nextblock.config.errors import UsageError
from nextblock.model.decoder import Decoder
from nextblock.model.probe import probe

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def test_the_probe_passes_every_family(any_model):
    probe(Decoder(any_model))


def test_the_probe_compiles_no_attention_for_its_few_tokens(llama, monkeypatch):
    llama.set_attn_implementation("flex_attention")
    monkeypatch.setattr("nextblock.model.decoder.to_block_mask", None)
    probe(Decoder(llama))
    assert llama.config._attn_implementation == "flex_attention"


def broken(model: PreTrainedModel, **override: Any) -> Decoder:
    """The model with some arguments of its forward pass replaced, as one that ignores them would."""
    forward = model.base_model.forward
    model.base_model.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, **override})
    return Decoder(model)


def test_the_probe_refuses_a_model_that_ignores_the_mask(family_model):
    with pytest.raises(UsageError, match="ignores the attention mask or the position ids"):
        probe(broken(family_model, attention_mask=None))


def test_the_probe_refuses_a_model_that_ignores_the_positions(family_model):
    with pytest.raises(UsageError, match="ignores the attention mask or the position ids"):
        probe(broken(family_model, position_ids=None))


def test_the_probe_refuses_rotary_factors_that_depend_on_the_longest_position_of_the_pass():
    model = longrope_model(128)
    model.config.rope_parameters["rope_type"] = "of its own"  # not known by name: the model itself keeps longrope
    with pytest.raises(UsageError, match="a document changes when another in its row stands at position 512"):
        probe(Decoder(model))


def test_the_probe_names_a_weight_that_is_not_a_number(llama):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[3, 2] = torch.nan
    with pytest.raises(UsageError, match=r"weight model.layers.1.mlp.up_proj.weight holds NaN"):
        probe(Decoder(llama))


def test_the_probe_refuses_a_window_that_the_plain_forward_pass_does_not_apply():
    config = AutoConfig.for_model("moshi", sliding_window=8, max_position_embeddings=512, **SMALL)
    with pytest.raises(UsageError, match="'moshi' declares a sliding window of 8 that its own forward pass does not"):
        probe(Decoder(random_model(config)))
    config = AutoConfig.for_model("moshi", sliding_window=8, max_position_embeddings=8, **SMALL)
    probe(Decoder(random_model(config)))


@pytest.mark.parametrize("kind", ["bloom", "openai-gpt", "prophetnet", "xlm", "xlnet", "xmod"])
def test_a_family_that_takes_no_mask_is_refused_in_one_line_of_our_own(kind):
    own = {
        "prophetnet": {"num_decoder_layers": 2, "num_decoder_attention_heads": 4, "vocab_size": 97, "hidden_size": 32},
        "xlnet": {"d_model": 32, "n_layer": 2, "n_head": 4, "d_head": 8, "vocab_size": 97},
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **own.get(kind, SMALL)))
    said = (
        "cannot run on token ids alone" if kind == "xmod" else "takes no mask of query and key .* use a decoder that"
    )
    with pytest.raises(UsageError, match=f"^architecture '{kind}' {said}"):
        probe(Decoder(model.eval()))


def test_the_probe_refuses_a_model_that_stays_causal(llama):
    forward = llama.base_model.forward

    def causal(**kwargs: Any) -> Any:
        mask, position = kwargs.get("attention_mask"), kwargs["position_ids"]
        if mask is not None:
            later = position[:, None, None, :] > position[:, None, :, None]
            kwargs["attention_mask"] = mask.masked_fill(later, torch.finfo(mask.dtype).min)
        return forward(**kwargs)

    llama.base_model.forward = causal
    with pytest.raises(UsageError, match="stays causal"):
        probe(Decoder(llama))


@pytest.mark.parametrize(("dtype", "part"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-3)])
def test_the_probe_passes_a_model_whose_tokens_hardly_heed_later_ones(llama, dtype, part):
    """As one may be that was trained on blocks for long: what it says of a clean token is what the AR head says."""
    for layer in llama.model.layers:
        layer.self_attn.o_proj.weight.data *= part
    probe(Decoder(llama.to(dtype)))


def test_the_probe_refuses_a_head_that_does_more_than_the_config_says(llama):
    head = llama.lm_head.forward
    llama.lm_head.forward = lambda hidden: head(hidden)
    forward = llama.forward

    def scaled(**kwargs: Any) -> Any:
        output = forward(**kwargs)
        output.logits = output.logits * 1.5
        return output

    llama.forward = scaled
    with pytest.raises(UsageError, match="do not give the model's logits"):
        probe(Decoder(llama))
