"""Windows and positions that a config declares, nested ones too, and rotary factors that change with the length."""

from __future__ import annotations

import pytest
from transformers import AutoConfig

from families import FAMILIES, TOKENS, WINDOW, longrope_model, nested_model, random_model, tiny_model
from nextblock.config.errors import UsageError
from nextblock.model.decoder import Decoder
from nextblock.model.loading import replace_values
from nextblock.model.positions import check_row_length, layer_windows
from nextblock.model.probe import probe


def test_a_window_counts_only_where_the_architecture_has_one():
    windows = {family: layer_windows(tiny_model(family, sliding_window=WINDOW).config) for family in FAMILIES}
    assert {family for family, kinds in windows.items() if any(kinds.values())} == {"mistral", "gemma3", "phi3"}
    switched_on = tiny_model("qwen2", sliding_window=WINDOW, use_sliding_window=True, max_window_layers=1).config
    assert layer_windows(switched_on) == {"full_attention": None, "sliding_attention": WINDOW}
    assert windows["llama"] == {"full_attention": None}


def test_a_nested_text_config_gives_windows_positions_and_overrides():
    decoder = Decoder(nested_model(WINDOW, final_logit_softcapping=30.0))
    assert decoder.windows == {"sliding_attention": WINDOW, "full_attention": None}
    assert (decoder.max_positions, decoder.logit_cap) == (512, 30.0)
    replace_values(decoder.model.config, {"sliding_window": 7, "max_position_embeddings": 64})
    assert (decoder.windows["sliding_attention"], decoder.max_positions) == (7, 64)
    with pytest.raises(UsageError, match=r"data.row_length=65 is over the model's 64"):
        check_row_length(65, decoder.model.config)


def test_rows_end_where_longrope_factors_change_unless_they_are_made_equal():
    config = longrope_model(128).config
    check_row_length(128, config)
    with pytest.raises(UsageError, match=r"model's 128 positions; .* longrope factors change, .*short_factor"):
        check_row_length(129, config)
    replace_values(config, {"rope_parameters": {"short_factor": config.rope_parameters["long_factor"]}})
    check_row_length(512, config)


@pytest.mark.parametrize("kind", ["dynamic", "linear", "yarn"])
def test_other_rotary_factors_stay_the_same_up_to_the_models_positions(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    decoder = Decoder(tiny_model("llama", rope_parameters=rope))
    assert decoder.max_positions == 512
    probe(decoder)


def test_scales_that_change_beyond_the_original_length_end_rows_there_as_factors_do():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
    rope |= {"short_mscale": 1.0, "long_mscale": 1.5, "original_max_position_embeddings": 128}
    sizes = {**TOKENS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 512}
    decoder = Decoder(random_model(AutoConfig.for_model("phimoe", **sizes, rope_parameters=rope)))
    assert decoder.max_positions == 128
    probe(decoder)
