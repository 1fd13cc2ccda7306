"""The two-view forward on every family (identities 1 and 5)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from families import EOS_ID, MASK_ID, VOCABULARY, WINDOW, tiny_model
from layouts import CHAT, PLAIN, PROMPTED, make_rows
from nextblock.attention.rule import Places, block_diffusion_rule
from nextblock.config.sections import RecipeConfig
from nextblock.data.rows import Rows
from nextblock.model.decoder import Decoder
from nextblock.recipe.corruption import TwoView, corrupt

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
            alone = replace(view, tokens=view.tokens[row : row + 1, own], places=places, noised_length=0)
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


class NothingIsReadBack(TorchDispatchMode):
    """On a GPU, a number of a tensor makes the host wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [WINDOW, 28, 512])
def test_masks_of_a_step_are_made_without_a_look_at_the_device(window):
    decoder = Decoder(tiny_model("gemma3", sliding_window=window))
    view, rule = two_views(ROWS, 4), block_diffusion_rule()
    noised, clean = view.places.part(0, view.noised_length), view.places.part(view.noised_length)
    with NothingIsReadBack():
        ours = [
            decoder.two_view_masks(rule, noised, clean),
            decoder.two_view_masks(rule, noised, clean, cached=True),
            decoder.masks(rule, clean, longest=28),
        ]
    theirs = [
        decoder.masks(rule, view.places),
        decoder.masks(rule, noised, clean.followed_by(noised)),
        decoder.masks(rule, clean),
    ]
    for one, other in zip(ours, theirs, strict=True):
        pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_the_vocabulary_of_the_tests_leaves_the_mask_token_alone():
    assert int(ROWS.tokens.max()) < MASK_ID == VOCABULARY - 1
