"""`verify` passes sound models of every family and shows what is wrong with broken ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig

from families import FAMILIES, MASK_ID, TOKENS, longrope_model, nested_model, random_model, tiny_model
from nextblock.config.errors import UsageError
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.measure.identities import Check, table, verify, verify_model
from nextblock.training.export import export

SETTINGS = BlockDiffusionSettings(block_size=4, mask_token_id=MASK_ID)
NUMBERS = [" ", "1", "2", "3", "4", "5", "6", "6", "6", "7"]


def failed(checks: list[Check]) -> set[str]:
    return {check.name for check in checks if check.status == "failed"}


def numbers(names: set[str]) -> set[str]:
    return {name[0] for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_all_identities_without_settings_or_tokenizer(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    told: list[tuple[int, int, str]] = []
    checks = verify(tmp_path, on_check=lambda *told_now: told.append(told_now))
    assert [(check.name, check.reason) for check in checks if check.status != "passed"] == []
    assert told == [(number, len(NUMBERS), check.name) for number, check in enumerate(checks)]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_openpangu_folder_passes_under_given_settings(pangu):
    folder, _ = pangu
    checks = verify(folder, settings="{mask_token_id: 299, block_size: 4}")
    assert [check for check in checks if check.status != "passed"] == []
    with pytest.raises(UsageError, match=r"^settings\.mask_token_id=45830 is outside the vocabulary"):
        verify(folder, settings="nbdiff-7b")


@pytest.mark.parametrize("family", ["mistral", "gemma3", "phi3"])
def test_a_short_sliding_window_is_exceeded_and_passes(family, tmp_path):
    tiny_model(family, sliding_window=9).save_pretrained(tmp_path)
    assert [check for check in verify(tmp_path) if check.status != "passed"] == []


def test_a_window_in_a_nested_text_config_is_exceeded_and_passes(tmp_path):
    nested_model(9).save_pretrained(tmp_path)
    checks = verify(tmp_path)
    assert [check for check in checks if check.status != "passed"] == []
    assert {check.positions for check in checks if check.name[0] in "12356"} == {9 + 2 * 8}


def test_a_window_too_long_to_be_exceeded_is_named():
    model = tiny_model("mistral", sliding_window=4096, max_position_embeddings=2**15)
    checks = verify_model(BlockDiffusionLM(model, None, SETTINGS))
    assert failed(checks) == set()
    (untried,) = [check for check in checks if check.status == "skipped"]
    assert "4096 positions, a sliding window" in untried.name
    assert max(check.positions for check in checks if check.name[0] in "12356") < 4096


@pytest.mark.parametrize("original", [32, 128])
def test_longrope_passes_on_both_sides_of_the_length_where_its_factors_change(original, tmp_path):
    longrope_model(original).save_pretrained(tmp_path)
    checks = verify(tmp_path)
    assert [check for check in checks if check.status != "passed"] == []
    assert min(check.positions for check in checks if check.name[0] in "67") > original
    assert max(check.positions for check in checks if check.name[0] in "1235") <= original


def test_a_hybrid_family_with_attention_alone_passes(tmp_path):
    values = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_local_experts": 0}
    values |= {"num_key_value_heads": 2, "shared_intermediate_size": 64, "mamba_n_heads": 4, "mamba_d_head": 16}
    layers = ["attention", "attention"]
    config = AutoConfig.for_model("granitemoehybrid", layer_types=layers, max_position_embeddings=512, **values)
    random_model(config).save_pretrained(tmp_path)
    assert [check for check in verify(tmp_path) if check.status != "passed"] == []


@pytest.mark.parametrize("context", ["context_causal", "block_causal"])
@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
def test_an_adapted_checkpoint_is_measured_under_its_own_settings(context, prediction, tmp_path):
    settings = BlockDiffusionSettings(block_size=4, mask_token_id=5, context=context, prediction=prediction)
    export(tmp_path, tiny_model("llama"), None, settings)
    checks = verify(tmp_path)
    assert failed(checks) == set()
    skipped = numbers({check.name for check in checks if check.status == "skipped"})
    left_out = {"1": context == "block_causal", "3": prediction == "aligned"}
    assert skipped == {number for number, out in left_out.items() if out}


@pytest.mark.parametrize("block_size", [1, 2, 3, 5, 8, 32])
def test_any_block_size_is_measured(block_size):
    settings = BlockDiffusionSettings(block_size=block_size, mask_token_id=MASK_ID)
    checks = verify_model(BlockDiffusionLM(tiny_model("gpt2"), None, settings))
    assert [check for check in checks if check.status != "passed"] == []


@pytest.mark.parametrize(("family", "key"), [("llama", "max_position_embeddings"), ("gpt2", "n_positions")])
@pytest.mark.parametrize("positions", [12, 13, 16, 20, 24, 25])
def test_a_short_context_is_measured_with_shorter_blocks(family, key, positions, tmp_path):
    tiny_model(family, **{key: positions}).save_pretrained(tmp_path)
    checks = verify(tmp_path)
    assert [check for check in checks if check.status != "passed"] == []
    assert max(check.positions for check in checks) <= positions


@pytest.mark.parametrize("positions", [9, 11])
def test_a_context_too_short_for_any_block_is_refused(positions, tmp_path):
    tiny_model("gpt2", n_positions=positions).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"the model has {positions} positions and the identities need 12"):
        verify(tmp_path)


def test_in_bfloat16_the_logits_are_compared_and_the_tokens_left_out(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    checks = verify(tmp_path, dtype=torch.bfloat16)
    assert failed(checks) == set()
    assert numbers({check.name for check in checks if check.status == "skipped"}) == {"6", "7"}


def test_a_mask_token_outside_the_vocabulary_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"^mask_token=97 is outside the vocabulary"):
        verify(tmp_path, mask_token=97)


# ------------------------------------------------------------------------------- broken models


def with_changed_forward(change: Any) -> BlockDiffusionLM:
    """A Llama whose body's arguments go through `change` first."""
    model = tiny_model("llama")
    forward = model.base_model.forward
    model.base_model.forward = lambda *args, **kwargs: forward(*args, **change(kwargs))
    return BlockDiffusionLM(model, None, SETTINGS)


def plain_causal(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Causal by place in the row, whatever mask was asked for."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return kwargs
    queries, keys = mask.shape[-2:]
    return {**kwargs, "attention_mask": torch.ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries)}


def test_a_model_that_ignores_the_mask_fails_where_the_mask_matters():
    checks = verify_model(with_changed_forward(plain_causal))
    assert numbers(failed(checks)) >= {"t", "1", "2", "5"}
    assert "4" not in numbers(failed(checks))
    assert checks[0].reason.startswith("architecture 'llama' ignores the attention mask")


def test_a_model_that_ignores_positions_fails():
    checks = verify_model(with_changed_forward(lambda kwargs: {**kwargs, "position_ids": None}))
    assert numbers(failed(checks)) >= {"t", "2", "5"}


def test_a_cache_that_goes_wrong_fails_the_decoding_identities_alone():
    def shift(kwargs: dict[str, Any]) -> dict[str, Any]:
        late = kwargs.get("past_key_values") is not None and int(kwargs["position_ids"].min()) > 0
        return {**kwargs, "position_ids": kwargs["position_ids"] + 1} if late else kwargs

    checks = verify_model(with_changed_forward(shift))
    assert "2" in numbers(failed(checks))
    assert not numbers(failed(checks)) & {"t", "1", "3", "4", "5"}


def test_the_table_shows_every_check_with_its_result():
    checks = verify_model(with_changed_forward(plain_causal))
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table(checks))
    text = captured.get()
    for check in checks:
        assert check.name in text
    assert "failed" in text
    assert "passed" in text


def test_a_reason_is_shown_whatever_it_holds():
    reason = "ValueError: no [/x] in [bold]m[v2]"
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table([Check("1", "failed", None, None, "relative", reason, 1.0, 9)]))
    assert reason in captured.get()


@pytest.mark.parametrize("width", [72, 80, 100])
def test_a_narrow_table_wraps_and_cuts_no_word(width):
    checks = [
        Check("5  document in a packed row = document alone", "skipped", None, 2e-4, "relative", "x" * 90, 1.0, 512),
        Check("6  prompt in a batch = prompt alone, speculative", "failed", 31, 0, "tokens", "", 100.0, 16384),
    ]
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table(checks))
    lines = captured.get().splitlines()
    assert "…" not in captured.get()
    assert max(map(len, lines)) <= width
    assert captured.get().count("x") == 90
    rule = next(number for number, line in enumerate(lines) if line.startswith("─"))
    names = " ".join(line[: lines[rule - 1].index("positions")] for line in lines[rule + 1 :]).split()
    assert names == [word for check in checks for word in check.name.split()]
