"""The mask token: which one is taken, what a new one changes, and that it outlives an export."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from families import head_rows, nested_model, tiny_model
from nextblock.config.errors import UsageError
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.model.decoder import Decoder
from nextblock.model.loading import load_model, load_tokenizer
from nextblock.model.mask_token import MASK_TOKEN, check_round_trip, check_vocabulary, choose_mask_token
from nextblock.model.parent import byte_tokenizer
from nextblock.training.export import export


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


@pytest.mark.parametrize("wanted", [300, "[nope]", 256])
def test_a_wrong_mask_token_is_refused_by_the_name_of_its_option(wanted):
    model = tiny_model("llama", vocab_size=300)
    model.generation_config.eos_token_id = 256
    with pytest.raises(UsageError) as refused:
        choose_mask_token(Decoder(model), byte_tokenizer(), wanted, name="mask_token")
    assert "mask_token" in str(refused.value)
    assert "model.mask_token" not in str(refused.value)


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


def test_a_token_that_is_called_as_ours_is_taken_with_its_own_row_and_not_overwritten():
    model, tokenizer = tiny_model("llama", vocab_size=300), byte_tokenizer()
    tokenizer.add_tokens([MASK_TOKEN])
    before = head_rows(model)[0].clone()
    assert choose_mask_token(Decoder(model), tokenizer, None) == 257
    assert tokenizer.mask_token_id == 257
    assert torch.equal(head_rows(model)[0], before)


def test_a_nested_model_with_tied_heads_gets_a_new_row_that_it_is_saved_with(tmp_path):
    model = nested_model(5)
    mask_id = choose_mask_token(Decoder(model), None, None)
    model.save_pretrained(tmp_path)
    again, tokens = load_model(tmp_path), torch.arange(3, 13)[None]
    assert (mask_id, Decoder(again).vocabulary) == (97, 98)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_special_tokens_may_lack_a_row_and_others_may_not():
    model, tokenizer = tiny_model("llama", vocab_size=257), byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    check_vocabulary(tokenizer, 257)
    old = head_rows(model)[0].clone()
    assert choose_mask_token(Decoder(model), tokenizer, None) == 258
    torch.testing.assert_close(head_rows(model)[0][257:], old.mean(dim=0).expand(2, -1))
    assert torch.equal(head_rows(model)[0][:257], old)
    check_round_trip(tokenizer, 258)
    with pytest.raises(UsageError, match="the tokenizer has 259 tokens, the model's vocabulary 70; use the tokenizer"):
        check_vocabulary(tokenizer, 70)
    with pytest.raises(UsageError, match="has 257 tokens, the model's vocabulary 256"):  # the end token has no row
        check_vocabulary(byte_tokenizer(), 256)
    tokenizer.add_tokens(["word"])
    with pytest.raises(UsageError, match="the tokenizer has 260 tokens, the model's vocabulary 259"):
        check_vocabulary(tokenizer, 259)
