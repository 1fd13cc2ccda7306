"""Attention in parts against a plain softmax over what Eq. 4 allows, and against the dense mask in models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations import sdpa_attention

from families import MASK_ID, tiny_model
from layouts import CHAT, LAYOUTS, PLAIN, PROMPTED, make_rows, may_look, places_of, slots_of_row
from nextblock.attention import split as parts
from nextblock.attention.masks import to_dense
from nextblock.attention.rule import Places, block_diffusion_rule, within_window
from nextblock.config.sections import DraftAdapterConfig, RecipeConfig
from nextblock.model.decoder import Decoder
from nextblock.model.draft_adapter import DraftAdapter
from nextblock.model.training_mode import recompute_activations, run_in_parts
from nextblock.recipe.corruption import TwoView, corrupt
from nextblock.recipe.objective import TwoViewLoss

LENGTH = 28
ROWS = make_rows([PLAIN, PROMPTED, CHAT], LENGTH)


def view_of(block_size: int, **options) -> TwoView:
    recipe = RecipeConfig(fill_last_block=False, **options)
    return corrupt(ROWS, block_size, mask_token_id=MASK_ID, end_token_id=2, recipe=recipe, seed=1, step=0)


def inputs(rows: int, length: int) -> list[Tensor]:
    return [torch.randn(rows, 2, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def softmax_over(allowed: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, H, T, D], every score written out; `allowed` bool, broadcastable to [B, H, T, T]."""
    scores = (query @ key.mT) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    return weights @ value


def assert_same(allowed: Tensor, mask: parts.SplitMask, real: Tensor, tensors: list[Tensor]) -> None:
    """Outputs and gradients at real positions (bool [B, T]) equal those of the plain softmax."""
    wanted = softmax_over(allowed | ~real[:, None, :, None], *tensors)
    query, key, value = tensors
    found = parts.split_attention(nn.Module(), query, key, value, mask)[0].transpose(1, 2)
    upstream = torch.randn_like(wanted) * real[:, None, :, None]
    keep = real[:, None, :, None]
    torch.testing.assert_close(found * keep, wanted * keep, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(out, tensors, upstream) for out in (found, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [2, 3, 16, 28])
@pytest.mark.parametrize("context", ["context_causal", "block_causal"])
@pytest.mark.parametrize("views", [(1,), (1, 2)])
def test_attention_in_parts_is_a_softmax_over_what_equation_4_allows(layout, block_size, context, views):
    rows = make_rows([LAYOUTS[layout]], LENGTH)
    slots = slots_of_row(rows, 0, block_size, noised=views)
    places, noised = places_of(slots), sum(slot.view > 0 for slot in slots)
    real = torch.tensor([[slot.document >= 0 for slot in slots]])
    allowed = torch.tensor([[may_look(q, k, context) if q.document >= 0 else True for k in slots] for q in slots])
    mask = parts.split_mask(
        block_diffusion_rule(context), places.part(0, noised), places.part(noised), dtype=torch.float64
    )
    assert_same(allowed[None, None], mask, real, inputs(1, len(slots)))


@pytest.mark.parametrize("piece", [5, 256])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize("target_share", [None, 0.5])
def test_rows_of_unequal_layout_windows_and_the_annealed_mask(monkeypatch, piece, window, target_share):
    monkeypatch.setattr(parts, "PIECE", piece)
    view = view_of(4, views=2, random_start_share=1.0)
    places, n = view.places, view.noised_length
    rule = within_window(block_diffusion_rule(target_share=target_share), window)
    mask = parts.split_mask(rule, places.part(0, n), places.part(n), torch.float64)
    assert_same(to_dense(rule, places), mask, places.document >= 0, inputs(len(ROWS), view.tokens.shape[1]))


@pytest.mark.parametrize("block_size", [8, 16])
def test_rows_of_one_document_let_the_kernel_skip_what_lies_ahead_and_whole_blocks_lie_in_their_places(block_size):
    rows = make_rows([[[64]]] * 3, 64)
    options = {"mask_token_id": MASK_ID, "end_token_id": 2, "recipe": RecipeConfig(), "seed": 1}
    for step in range(50):  # until nothing was masked in some block of some row, and padding takes its place
        view = corrupt(rows, block_size, step=step, **options)
        places, n, rule = view.places, view.noised_length, block_diffusion_rule()
        if n % parts.TILE == 0 and bool((places.document[:, :n] < 0).any()):
            break
    mask = parts.split_mask(rule, places.part(0, n), places.part(n), torch.float64)
    assert mask.pieces[0].mask is None
    assert mask.tiles.slot is None
    assert_same(to_dense(rule, places), mask, places.document >= 0, inputs(3, view.tokens.shape[1]))
    assert bool((places.document < 0).any())


def test_no_piece_spans_keys_that_none_of_its_queries_sees():
    slots = slots_of_row(make_rows([[[20], [20]]], 40), 0, 4, noised=(1,))
    noised, clean = (places_of([slot for slot in slots if (slot.view > 0) == wanted]) for wanted in (True, False))
    mask = parts.split_mask(block_diffusion_rule(), noised.part(20), clean, torch.float32, cached=True)
    assert [(piece.keys.start, piece.keys.stop) for piece in mask.pieces] == [(20, 36)]


def losses_of(model, view, soft=False):
    rule = block_diffusion_rule()
    sums = TwoViewLoss(Decoder(model))(view, rule, soft=soft)
    model.zero_grad()
    sums.total(0.5).backward()
    return sums, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_training_pass_has_the_losses_and_gradients_of_the_dense_mask(family_model):
    view = view_of(4, views=2, complementary=True)
    model = family_model.double()
    dense, dense_grads = losses_of(model, view)
    run_in_parts(Decoder(model))
    assert Decoder(model).attention == parts.SPLIT
    split, split_grads = losses_of(model, view)
    torch.testing.assert_close(split[:4], dense[:4], rtol=1e-6, atol=0)
    scale = max(float(grad.abs().max()) for grad in dense_grads.values())
    for name, grad in dense_grads.items():
        torch.testing.assert_close(split_grads[name], grad, rtol=1e-5, atol=1e-6 * scale)


def test_sliding_windows_shorter_than_the_row():
    model = tiny_model("gemma3", sliding_window=6).double()
    view = view_of(4)
    dense, _ = losses_of(model, view)
    run_in_parts(Decoder(model))
    split, _ = losses_of(model, view)
    torch.testing.assert_close(split[:4], dense[:4], rtol=1e-6, atol=0)


def test_recomputed_activations_and_low_precision_passes(llama):
    view = view_of(4)
    _, plain = losses_of(llama, view)
    run_in_parts(Decoder(llama))
    recompute_activations(llama)
    _, again = losses_of(llama, view)
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low, _ = losses_of(llama, view)
    high, _ = losses_of(llama, view)
    torch.testing.assert_close(low.diffusion, high.diffusion, rtol=0.05, atol=0)


def test_a_draft_adapters_noised_pass_on_cached_clean_keys(llama):
    model = llama.double()
    adapter = DraftAdapter(model, DraftAdapterConfig(rank=3)).double()
    with torch.no_grad():
        for parameter in adapter.lora_B:
            parameter.normal_(std=0.2)
    view, decoder, rule = view_of(4, views=2), Decoder(model, adapter), block_diffusion_rule()

    def run() -> tuple[Tensor, list[Tensor]]:
        total = TwoViewLoss(decoder)(view, rule, soft=True).total(0.0, 2, 0.5)
        return total, list(torch.autograd.grad(total, list(adapter.parameters())))

    dense, dense_grads = run()
    run_in_parts(decoder)
    assert decoder.attention == parts.SPLIT
    split, split_grads = run()
    torch.testing.assert_close(split, dense, rtol=1e-6, atol=0)
    for ours, theirs in zip(split_grads, dense_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


def test_layers_that_parts_cannot_compute_keep_the_dense_mask(llama, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("sinks")

    monkeypatch.setitem(parts.AttentionInterface._global_mapping, parts.SPLIT, refuse)
    run_in_parts(Decoder(llama))
    assert Decoder(llama).attention == "sdpa"
    eager = tiny_model("llama")
    eager.set_attn_implementation("eager")
    run_in_parts(Decoder(eager))
    assert Decoder(eager).attention == "eager"


def test_ordinary_masks_are_those_of_sdpa(llama):
    tokens = torch.randint(3, 90, (2, 9))
    plain = llama(input_ids=tokens).logits
    run_in_parts(Decoder(llama))
    torch.testing.assert_close(llama(input_ids=tokens).logits, plain)
    position = torch.arange(2)[None]
    noised, clean = (
        Places(torch.full((1, 2), view), position * 0, position, position * 0, position[:, :1]) for view in (1, 0)
    )
    mask = parts.split_mask(block_diffusion_rule(), noised, clean, torch.float64)
    query, key, value = inputs(1, 4)
    for bad in ({"dropout": 0.1}, {"softcap": 3.0}):
        with pytest.raises(ValueError, match="no dropout, soft cap"):
            parts.split_attention(nn.Module(), query, key, value, mask, **bad)


@pytest.mark.parametrize("grouped", [("cpu",), ()], ids=["by the kernel", "folded"])
@pytest.mark.parametrize("mask_rows", [1, 3])
def test_grouped_heads_attend_as_in_sdpa_without_copies(monkeypatch, grouped, mask_rows):
    query = torch.randn(3, 6, 5, 8, requires_grad=True)
    key, value = (torch.randn(3, 2, 9, 8, requires_grad=True) for _ in range(2))
    mask = torch.zeros(mask_rows, 1, 5, 9).masked_fill_(torch.rand(mask_rows, 1, 5, 9) > 0.7, -torch.inf)
    module, weights = nn.Module(), torch.randn(3, 5, 6, 8)
    module.num_key_value_groups = 3  # type: ignore[assignment]
    expected = sdpa_attention.sdpa_attention_forward(module, query, key, value, mask)[0]
    open_expected = sdpa_attention.sdpa_attention_forward(module, query, key, value, torch.zeros_like(mask))[0]
    gradients = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    monkeypatch.setattr(sdpa_attention, "repeat_kv", lambda *_: pytest.fail("keys were copied"))
    monkeypatch.setattr(parts, "GROUPED", grouped)
    found = parts.split_attention(module, query, key, value, mask)[0]
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad((found * weights).sum(), (query, key, value)), gradients, strict=True):
        torch.testing.assert_close(a, b)
    nothing = parts.split_attention(module, query, key, value, torch.zeros(1, 1, 1, 1))[0]
    torch.testing.assert_close(nothing, open_expected)


def test_what_the_kernels_cannot_do_is_refused_or_done_by_sdpa():
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)
    module = nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    bias, mask = torch.randn(1, 4, 3, 3), torch.zeros(1, 1, 3, 3)
    found = parts.split_attention(module, query, key, key, mask, position_bias=bias)[0]
    assert torch.equal(
        found, sdpa_attention.sdpa_attention_forward(module, query, key, key, mask, position_bias=bias)[0]
    )
    with pytest.raises(ValueError, match="softcap"):
        parts.split_attention(module, query, key, key, mask, softcap=30.0)
