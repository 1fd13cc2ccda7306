"""The two-view forward on every family (identities 1 and 5), mask tokens, the probe, and bad models."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    MambaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import nextblock as nb
from families import EOS_ID, FAMILIES, MASK_ID, VOCABULARY, longrope_model, nested_model, random_model, tiny_model
from layouts import CHAT, PLAIN, PROMPTED, make_rows
from nextblock.attention.rule import Places, block_diffusion_rule
from nextblock.config.errors import UsageError
from nextblock.config.sections import BlockDiffusionSettings, ModelConfig, RecipeConfig
from nextblock.data.rows import Rows
from nextblock.model.decoder import Decoder
from nextblock.model.loading import load_model, load_tokenizer, read_config, read_settings, replace_values
from nextblock.model.mask_token import MASK_TOKEN, check_round_trip, choose_mask_token
from nextblock.model.parent import byte_tokenizer, load_parent, parent_tokenizer
from nextblock.model.positions import check_row_length, layer_windows
from nextblock.model.probe import probe, recompute_activations
from nextblock.recipe.corruption import TwoView, corrupt
from nextblock.training.export import export
from nextblock.workflows.adapt import adapt

ROWS = make_rows([PLAIN, PROMPTED, CHAT], 28)
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}  # float32, logits of size 10


def two_views(rows: Rows, block_size: int, **recipe: Any) -> TwoView:
    """Every maskable token masked, so that every block has a noised view."""
    options = RecipeConfig(full_mask_share=1.0, fill_last_block=False, **recipe)
    return corrupt(rows, block_size, mask_token_id=MASK_ID, end_token_id=EOS_ID, recipe=options, seed=0, step=0)


@torch.no_grad()
def logits_of(model: PreTrainedModel, view: TwoView, context: Any = "context_causal") -> Tensor:
    decoder = Decoder(model)
    masks = decoder.masks(block_diffusion_rule(context), view.places)
    return decoder.logits(decoder.hidden(view.tokens, view.places.position, masks))


def documents_of(rows: Rows) -> list[tuple[int, slice]]:
    """(row, columns) of every document."""
    found = []
    for row in range(len(rows)):
        for number in range(int(rows.document[row].max()) + 1):
            at = torch.nonzero(rows.document[row] == number).flatten()
            found.append((row, slice(int(at[0]), int(at[-1]) + 1)))
    return found


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WINDOW = 5  # shorter than most documents
KINDS = [*FAMILIES, *(f"{family}, window" for family in ("mistral", "gemma3", "phi3", "llama"))]


@pytest.fixture(params=KINDS)
def any_model(request) -> PreTrainedModel:
    """Every family, those that have sliding windows once more with a short one, and one that ignores its window."""
    family, _, windowed = request.param.partition(", ")
    return tiny_model(family, sliding_window=WINDOW) if windowed else tiny_model(family)


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


@pytest.mark.parametrize("block_size", [1, 4])
def test_clean_half_logits_are_the_plain_causal_forward_of_each_document_alone(any_model, block_size):
    view = two_views(ROWS, block_size)
    clean = logits_of(any_model, view)[:, view.noised_length :]
    for row, columns in documents_of(ROWS):
        with torch.no_grad():
            alone = any_model(input_ids=ROWS.tokens[row : row + 1, columns], use_cache=False).logits[0]
        torch.testing.assert_close(clean[row, columns], alone, **CLOSE)


@pytest.mark.parametrize("context", ["context_causal", "block_causal"])
def test_a_packed_row_gives_each_document_its_own_logits_in_both_halves(any_model, context):
    view = two_views(ROWS, 4)
    logits = logits_of(any_model, view, context)
    for row in range(len(ROWS)):
        for number in range(int(ROWS.document[row].max()) + 1):
            own = view.places.document[row] == number
            places = Places(
                **{k: v[row : row + 1] if k == "seed" else v[row : row + 1, own] for k, v in vars(view.places).items()}
            )
            alone = TwoView(
                view.tokens[row : row + 1, own],
                places,
                view.target[row : row + 1, own],
                view.teacher[:1, :0],
                view.noise[:1, :0],
                0,
            )
            torch.testing.assert_close(logits[row, own], logits_of(any_model, alone, context)[0], **CLOSE)


@torch.no_grad()
def test_noised_logits_do_not_depend_on_their_own_clean_block_or_what_follows(any_model):
    rows = make_rows([[[-3, 16]]], 19)
    view = two_views(rows, 4)
    before = logits_of(any_model, view)
    start = 3 + 2 * 4  # the third block
    changed = view.tokens.clone()
    clean = changed[:, view.noised_length :]
    clean[:, start:] = (clean[:, start:] + 11 - 3) % 90 + 3
    after = logits_of(any_model, replace(view, tokens=changed))
    place = view.places
    unaffected = ((place.view > 0) & (place.block_start <= start)) | ((place.view == 0) & (place.position < start))
    torch.testing.assert_close(after[unaffected], before[unaffected], **CLOSE)
    assert (after[~unaffected] - before[~unaffected]).abs().amax(dim=-1).min() > 1e-3


@torch.no_grad()
def test_a_masked_slot_sees_its_whole_block_and_every_earlier_clean_token(llama):
    view = two_views(make_rows([[[12]]], 12), 4)
    before = logits_of(llama, view)
    third = torch.nonzero((view.places.view == 1) & (view.places.block_start == 8))[:, 1]
    seen = [*third.tolist(), *range(view.noised_length, view.noised_length + 8)]
    for at in seen:
        tokens = view.tokens.clone()
        tokens[0, at] = 3 if tokens[0, at] != 3 else 4
        after = logits_of(llama, replace(view, tokens=tokens))
        assert ((after - before)[0, third].abs().amax(dim=-1) > 1e-6).all(), at


# ------------------------------------------------------------------------------- mask token


def head_rows(model: Any) -> list[Tensor]:
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [layer.weight for layer in layers]


def with_mask_token() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[M]"})
    return tokenizer


def test_an_explicit_mask_id_or_token_is_taken_and_changes_no_weight():
    model = tiny_model("llama", vocab_size=300)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert choose_mask_token(Decoder(model), byte_tokenizer(), 7) == 7
    assert choose_mask_token(Decoder(model), with_mask_token(), "[M]") == 257
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_checkpoints_setting_comes_before_the_tokenizers_own_token():
    model = tiny_model("llama", vocab_size=300)
    model.config.block_diffusion = {"mask_token_id": 12}
    assert choose_mask_token(Decoder(model), with_mask_token(), None) == 12


def test_the_tokenizers_own_mask_token_is_used_as_it_is():
    model = tiny_model("llama", vocab_size=300)
    before = head_rows(model)[0].clone()
    assert choose_mask_token(Decoder(model), with_mask_token(), None) == 257
    assert torch.equal(head_rows(model)[0], before)


@pytest.mark.parametrize("tied", [True, False])
def test_an_unused_row_of_a_padded_vocabulary_becomes_the_mean_of_the_used_ones(tied):
    model, tokenizer = tiny_model("llama", vocab_size=300, tie_word_embeddings=tied), byte_tokenizer()
    before = [weight.clone() for weight in head_rows(model)]
    assert choose_mask_token(Decoder(model), tokenizer, None) == 257
    assert tokenizer.mask_token == MASK_TOKEN
    for now, old in zip(head_rows(model), before, strict=True):
        assert now.shape == old.shape
        torch.testing.assert_close(now[257], old[:257].mean(dim=0))
        assert torch.equal(now[:257], old[:257])
        assert torch.equal(now[258:], old[258:])


@pytest.mark.parametrize("tied", [True, False])
def test_a_full_vocabulary_gets_one_more_row_at_the_mean(tied):
    model, tokenizer = tiny_model("llama", vocab_size=257, tie_word_embeddings=tied), byte_tokenizer()
    before = [weight.clone() for weight in head_rows(model)]
    assert choose_mask_token(Decoder(model), tokenizer, None) == 257
    assert model.config.vocab_size == 258
    for now, old in zip(head_rows(model), before, strict=True):
        assert now.shape[0] == 258
        torch.testing.assert_close(now[257], old.mean(dim=0))
        assert torch.equal(now[:257], old)
    embedding, head = head_rows(model)
    assert (embedding is head) == tied


def test_a_new_mask_token_is_saved_with_the_tokenizer_and_the_model_and_found_again(tmp_path):
    model, tokenizer = tiny_model("llama", vocab_size=257), byte_tokenizer()
    mask_id = choose_mask_token(Decoder(model), tokenizer, None)
    export(tmp_path, model, tokenizer, BlockDiffusionSettings(mask_token_id=mask_id))
    again = load_tokenizer(tmp_path)
    assert again is not None
    assert again.mask_token_id == mask_id
    assert again("a" + MASK_TOKEN, add_special_tokens=False)["input_ids"][1:] == [mask_id]
    assert choose_mask_token(Decoder(load_model(tmp_path)), again, None) == mask_id


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (300, "mask_token=300 is outside the vocabulary; ids run from 0 to 299"),
        (-1, "mask_token=-1 is outside the vocabulary"),
        ("[nope]", "'[nope]' is not in the tokenizer's vocabulary"),
        (256, "mask token id 256 is an end token"),
        (255, "mask token id 255 is an end token"),
    ],
)
def test_a_wrong_mask_token_is_refused(wanted, said):
    model = tiny_model("llama", vocab_size=300)
    model.generation_config.eos_token_id = [256, 255]
    with pytest.raises(UsageError) as refused:
        choose_mask_token(Decoder(model), byte_tokenizer(), wanted)
    assert said in str(refused.value)


def test_a_tokenizer_with_a_mask_token_of_its_own_follows_the_one_that_is_chosen():
    tokenizer = with_mask_token()
    choose_mask_token(Decoder(tiny_model("llama", vocab_size=300)), tokenizer, 7)
    assert tokenizer.mask_token_id == 7


def holed_tokenizer() -> Any:
    """Bytes whose ids leave out 128 to 132, and the end token 261."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {symbol: i if i < 128 else i + 5 for i, symbol in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab={**ids, "<|end|>": 261}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def test_a_vocabulary_that_an_added_token_would_renumber_is_refused_and_takes_an_unused_id(tmp_path):
    model = tiny_model("llama", vocab_size=262)
    tokenizer = holed_tokenizer()
    with pytest.raises(UsageError, match=r"once saved and loaded as .* set model.mask_token to an unused id"):
        check_round_trip(tokenizer, choose_mask_token(Decoder(model), tokenizer, None))
    tokenizer = holed_tokenizer()
    check_round_trip(tokenizer, choose_mask_token(Decoder(model), tokenizer, 130))
    export(tmp_path, model, tokenizer, BlockDiffusionSettings(mask_token_id=130))
    text = "".join(map(chr, range(32, 256)))
    assert load_tokenizer(tmp_path)(text)["input_ids"] == tokenizer(text)["input_ids"]  # type: ignore[misc]


@pytest.fixture
def untied_in_fact(tmp_path) -> Path:
    """A folder whose config.json says that the head is the embedding, while its file holds another head."""
    tiny_model("llama", vocab_size=257).save_pretrained(tmp_path / "parent")
    config = json.loads((tmp_path / "parent" / "config.json").read_text())
    (tmp_path / "parent" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return tmp_path / "parent"


def test_a_head_in_the_file_stays_whatever_the_config_says(untied_in_fact, tmp_path):
    tokens, model = torch.arange(3, 23)[None], load_model(untied_in_fact)
    before = model(tokens).logits
    mask_id = choose_mask_token(Decoder(model), byte_tokenizer(), None)
    assert torch.equal(model(tokens).logits[..., :mask_id], before)
    export(tmp_path / "out", model, None, BlockDiffusionSettings(mask_token_id=mask_id))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(tokens).logits[..., :mask_id], before)


# ------------------------------------------------------------------------------- export


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_loads_in_plain_transformers_with_the_same_logits(family, tied, tmp_path):
    model = tiny_model(family, tie_word_embeddings=tied)
    export(tmp_path, model, None, BlockDiffusionSettings(block_size=8, mask_token_id=MASK_ID, context="block_causal"))
    assert not torch.equal(head_rows(model)[0], head_rows(model)[1]) or tied
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = make_rows([[[20]]], 20).tokens
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, model(tokens).logits, rtol=1e-6, atol=1e-6)
    section = json.loads((tmp_path / "config.json").read_text())["block_diffusion"]
    assert section["block_size"] == 8
    settings = read_settings(read_config(tmp_path))
    assert settings == BlockDiffusionSettings(block_size=8, mask_token_id=MASK_ID, context="block_causal")


def test_an_export_in_bfloat16_holds_rounded_weights_and_leaves_the_model_as_it_was(llama, tmp_path):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    export(tmp_path, llama, None, BlockDiffusionSettings(mask_token_id=MASK_ID), torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert llama.dtype == torch.float32
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert plain.dtype == torch.bfloat16
    for name, value in plain.state_dict().items():
        assert torch.equal(value, before[name].bfloat16()), name


def test_tied_weights_are_exported_once_in_any_dtype(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    for dtype in (torch.float32, torch.bfloat16):
        export(tmp_path / str(dtype), model, None, BlockDiffusionSettings(mask_token_id=MASK_ID), dtype)
        with safe_open(tmp_path / str(dtype) / "model.safetensors", "pt") as weights:
            assert "lm_head.weight" not in weights.keys()  # noqa: SIM118


def test_a_plain_model_has_no_settings(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    assert read_settings(read_config(tmp_path)) is None
    assert load_tokenizer(tmp_path) is None


# ------------------------------------------------------------------------------- what a model must obey


def test_the_probe_passes_every_family(any_model):
    probe(Decoder(any_model))


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


# ------------------------------------------------------------------------------- bad models


def test_a_recurrent_model_is_refused_before_its_weights_are_read(tmp_path):
    MambaConfig(hidden_size=16, num_hidden_layers=1).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(UsageError, match="architecture 'mamba' carries a recurrent state"):
        load_model(tmp_path)


def folder(path: Path, **files: str) -> Path:
    path.mkdir(exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has no config.json"),
        ({"config__json": "{"}, "cannot read"),
        ({"config__json": '{"model_type": "llama"}'}, "has no weights (*.safetensors)"),
        ({"config__json": '{"model_type": "llamo"}', "model__safetensors": ""}, "cannot load model"),
        ({"config__json": '{"model_type": "bert"}', "model__safetensors": ""}, None),
        ({"config__json": '{"model_type": "t5"}', "model__safetensors": ""}, "is not a causal decoder"),
        ({"config__json": '{"model_type": "llama"}', "model__safetensors": "no"}, "cannot load model"),
    ],
)
def test_a_folder_that_holds_no_usable_model_stops_with_one_line(tmp_path, files, said):
    with pytest.raises(UsageError) as refused:
        probe(Decoder(load_model(folder(tmp_path / "m", **files))))
    assert "\n" not in str(refused.value)
    assert said is None or said in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vocab_size": 90}, r"is \(97, 32\) in its files and would be \(90, 32\) by config.json"),
        ({"num_attention_heads": 5}, "hidden size .* is not a multiple of the number of attention"),
        ({"rope_parameters": {"rope_type": "other"}}, "KeyError 'other'"),
        ({"block_diffusion": 5}, "block_diffusion of config.json is 5; it must be a mapping"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_with_its_cause(llama, tmp_path, changes, said):
    llama.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UsageError, match=said):
        nb.load(tmp_path)


def test_settings_and_a_tokenizer_config_that_are_no_mappings_are_refused(llama, tmp_path):
    with pytest.raises(UsageError, match="settings is 5; it must be a mapping"):
        read_settings(llama.config, 5)  # pyright: ignore[reportArgumentType]
    export(tmp_path, llama, byte_tokenizer(), None)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UsageError, match="cannot load the tokenizer"):
        nb.load(tmp_path)


def test_a_missing_model_folder_and_a_file_are_named(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_model(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        load_model(tmp_path / "file")


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


def test_the_vocabulary_of_the_tests_leaves_the_mask_token_alone():
    assert int(ROWS.tokens.max()) < MASK_ID == VOCABULARY - 1


@pytest.mark.parametrize("transformers_version", ["new", "before 5.23"])
def test_activations_are_computed_again_under_either_name_of_transformers(llama, monkeypatch, transformers_version):
    if transformers_version != "new":
        monkeypatch.setattr(llama, "activation_checkpointing_enable", None, raising=False)
        monkeypatch.setattr(
            llama,
            "gradient_checkpointing_enable",
            lambda options: llama._set_gradient_checkpointing(True, partial(checkpoint, **options)),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recompute_activations(llama)
    passes: list[int] = []
    llama.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    llama(torch.zeros(1, 3, dtype=torch.int64)).logits.sum().backward()
    assert len(passes) == 2


# ------------------------------------------------------------------------- openPangu and NBDiff


def test_an_openpangu_folder_is_a_llama_with_biases_in_attention_and_runs_no_code_of_its_own(pangu):
    folder, llama = pangu
    model = load_model(folder)
    assert type(model) is type(llama)
    tokens = torch.arange(3, 23)[None]
    assert torch.equal(model(tokens).logits, llama(tokens).logits)
    assert load_tokenizer(folder) is None
    assert read_config(folder, trust_remote_code=True).model_type == "llama"


def test_an_openpangu_config_keeps_its_own_defaults(pangu):
    folder, _ = pangu
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "rope_theta"}))
    assert read_config(folder).rope_parameters["rope_theta"] == 1.6e7
    (folder / "config.json").write_text(json.dumps({**config, "bias": False}))
    assert not read_config(folder).attention_bias


def test_an_openpangu_folder_is_adapted_to_an_ordinary_llama_that_decodes_in_every_mode(pangu, tmp_path):
    folder, _ = pangu
    config = {
        "model": {"path": str(folder), "mask_token": 299},
        "data": {"sources": [{"path": "task:algebra"}], "row_length": 64},
        "growth": {"b_max": 4, "delta": 1},
        "training": {"steps": 4, "batch_rows": 2, "evaluate_rows": 0},
        "output": str(tmp_path / "out"),
    }
    with pytest.raises(UsageError, match=r"tokenizer of .* is code in its folder.*set model.tokenizer"):
        adapt(config)
    assert not (tmp_path / "out").exists()
    adapt(config, {"model.tokenizer": "bytes"})
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], "auto_map" in written) == ("llama", False)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    lm, tokens = nb.load(tmp_path / "out"), torch.arange(3, 13)[None]
    expected = plain.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for mode in ("ar", "speculative", "diffusion"):
        out = lm.generate(tokens, mode=mode, max_new_tokens=8, eos_token_id=[]).sequences
        assert torch.equal(out, expected) or mode == "diffusion"
        assert out.shape == expected.shape


# ------------------------------------------------------------------------------ settings given


def test_given_settings_take_the_place_of_the_checkpoints_own(llama, tmp_path):
    config, whole = llama.config, BlockDiffusionSettings(mask_token_id=5)
    assert read_settings(config, whole) is whole
    assert read_settings(config, {"mask_token_id": 5}) == whole
    assert read_settings(config, "{mask_token_id: 5}") == whole
    (tmp_path / "settings.json").write_text('{"mask_token_id": 5}')
    assert read_settings(config, str(tmp_path / "settings.json")) == whole
    assert read_settings(config, "nbdiff-7b") == BlockDiffusionSettings(block_size=32, mask_token_id=45830)
    config.block_diffusion = {"block_size": 4, "mask_token_id": 9}
    assert read_settings(config, {"mask_token_id": 5}) == BlockDiffusionSettings(block_size=4, mask_token_id=5)
    assert read_settings(config) == BlockDiffusionSettings(block_size=4, mask_token_id=9)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nbdif-7b", "did you mean 'nbdiff-7b'"),
        ("{mask_token_id: [", "settings {mask_token_id: ["),
        ("{block_size: 4}", "mask_token_id is missing"),
        ({"mask_token_id": 5, "blocksize": 4}, "did you mean 'block_size'"),
    ],
)
def test_settings_that_cannot_be_read_are_refused_in_one_line(llama, given, said):
    with pytest.raises(UsageError) as refused:
        read_settings(llama.config, given)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
