"""Options of decoding: each is stated once, and shown wherever it can be given."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import typer

import nextblock as nb
from nextblock.cli.main import app
from nextblock.config.errors import UsageError
from nextblock.config.sections import BlockDiffusionSettings, validate
from nextblock.decoding.options import DecodingConfig
from nextblock.vllm.checks import request_options

FIELDS = DecodingConfig.model_fields


@pytest.mark.parametrize("name", ["generate", "stream", "stream_text"])
def test_a_method_shows_each_option_with_its_default_and_its_meaning(name):
    method = getattr(nb.BlockDiffusionLM, name)
    shown = inspect.signature(method).parameters
    assert {option: shown[option].default for option in FIELDS} == {n: field.default for n, field in FIELDS.items()}
    assert {"attention_mask", "seed", "stop", "eos_token_id"} <= set(shown)
    assert "options" not in shown
    for option, field in FIELDS.items():
        assert f"{option}: {field.description}" in method.__doc__


def test_inside_transformers_the_options_are_shown_that_the_generation_config_does_not_have():
    shown = set(inspect.signature(nb.block_diffusion).parameters)
    assert set(FIELDS) - shown == {"max_new_tokens", "temperature", "top_p", "top_k"}


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_a_command_has_each_option_with_its_meaning(command):
    parser = typer.main.get_command(app).commands[command]  # pyright: ignore[reportAttributeAccessIssue]
    options = {parameter.name: parameter for parameter in parser.params}
    for name, field in FIELDS.items():
        assert options[name].opts == [f"--{name.replace('_', '-')}"]
        assert options[name].help.startswith(field.description)


def test_a_number_of_torch_or_numpy_is_a_number():
    for number in (torch.tensor(4), np.int64(4), np.array(4)):
        assert validate(DecodingConfig, {"draft_length": number}).draft_length == 4
    with pytest.raises(UsageError, match="draft_length=0 must be at least 1"):
        validate(DecodingConfig, {"draft_length": torch.tensor(0)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": "x"}, "threshold=x is not a number"),
        ({"temperature": float("inf")}, "temperature=inf is not a finite number"),
        ({"draft_ahead": -1}, "draft_ahead=-1 must be 0 or more"),
        ({"draft_length": 0}, "draft_length=0 must be at least 1"),
        ({"draft_length": True}, "draft_length=True is not a number of tokens; use 1 or more, or auto"),
    ],
)
def test_a_value_out_of_its_limits_is_refused_in_one_line(options, message):
    with pytest.raises(UsageError) as refused:
        validate(DecodingConfig, options)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("most", "given", "block_size", "sub_blocks"),
    [
        (32, {}, 32, 4),
        (40, {}, 32, 4),
        (16, {}, 16, 1),
        (32, {"block_size": 8}, 8, 1),
        (32, {"threshold": 0.5}, 32, 4),
    ],
)
def test_an_engine_of_vllm_keeps_the_stored_sub_blocks_where_it_has_room_for_the_block(
    most, given, block_size, sub_blocks
):
    settings = BlockDiffusionSettings(block_size=32, mask_token_id=5, decoding={"sub_blocks": 4})
    found = request_options(settings, most, {"mode": "diffusion", **given})
    assert (found.block_size, found.sub_blocks) == (block_size, sub_blocks)
