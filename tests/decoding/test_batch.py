"""The forward pass that rows of unequal length share."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from families import MASK_ID, tiny_model
from nextblock.attention import split as split_attention
from nextblock.config.sections import BlockDiffusionSettings, validate
from nextblock.decoding import batch as batch_module
from nextblock.decoding import masks as masks_module
from nextblock.decoding.batch import Batch
from nextblock.decoding.events import Stats
from nextblock.decoding.options import DecodingConfig
from nextblock.decoding.rows import Row
from nextblock.model.decoder import Decoder


@torch.no_grad()
def test_scratch_tokens_behind_the_committed_ones_leave_no_trace(family_model):
    """prefill, denoise, denoise, commit = plain causal logits, for rows of unequal length."""
    decoder = Decoder(family_model)
    settings = BlockDiffusionSettings(block_size=4, mask_token_id=MASK_ID)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 96, (n + 4,), generator=generator).tolist() for n in (7, 3, 5)]
    rows = [Row(i, text[:-4], limit=4) for i, text in enumerate(texts)]
    batch = Batch(decoder, settings, validate(DecodingConfig, {"block_size": 4}), rows, Stats())
    last = batch.prefill()
    starts = [len(text) - 4 for text in texts]
    for noise in (MASK_ID, 5):
        batch.forward(torch.full((3, 4), noise), starts, [False, False, True])
    hidden = batch.forward(torch.tensor([text[-4:] for text in texts]), starts, [True] * 3)
    for i, text in enumerate(texts):
        plain = family_model(torch.tensor([text])).logits[0]
        torch.testing.assert_close(decoder.logits(last[i]), plain[-5], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(decoder.logits(hidden[i]), plain[-4:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_noised_block_of_the_parallel_pass_equals_its_cached_denoising_step(family_model):
    """Identity 2, the parallel side written from Eq. 4: [noised ; clean], prompt of 3, blocks of 4."""
    prompt, block, count = 3, 4, 3
    length = prompt + block * count
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(3, 96, (length,), generator=generator)
    noised = torch.where(torch.rand(length, generator=generator) < 0.6, MASK_ID, clean)
    noised[:prompt] = clean[:prompt]
    own = [(i - prompt) // block if i >= prompt else -1 for i in range(length)]
    allowed = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for q in range(2 * length):
        for k in range(2 * length):
            i, j = q % length, k % length
            if q < length and k < length:
                allowed[q, k] = own[i] == own[j] and (own[i] >= 0 or i == j)  # M_BD
            elif q < length:
                allowed[q, k] = own[j] < own[i]  # M_OBC
            elif k >= length:
                allowed[q, k] = j <= i  # M_CC
    position = torch.arange(length).repeat(2)[None]
    tokens = torch.cat([noised, clean])[None]
    parallel = family_model(tokens, position_ids=position, attention_mask=allowed[None, None], use_cache=False)

    decoder = Decoder(family_model)
    settings = BlockDiffusionSettings(block_size=block, mask_token_id=MASK_ID)
    rows = [Row(0, clean[:prompt].tolist(), limit=block * count)]
    batch = Batch(decoder, settings, validate(DecodingConfig, {"block_size": block}), rows, Stats())
    batch.prefill()
    for n in range(count):
        start = prompt + n * block
        step = batch.forward(noised[None, start : start + block], [start], [False])
        expected = parallel.logits[0, start : start + block]
        torch.testing.assert_close(decoder.logits(step)[0], expected, rtol=1e-4, atol=1e-4)
        batch.forward(clean[None, start : start + block], [start], [True])


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 6])
def test_a_pass_brings_a_mask_only_where_a_query_is_kept_from_a_key_and_copies_no_key(monkeypatch, window):
    model = tiny_model("mistral", sliding_window=window)  # two query heads for each key head
    settings = BlockDiffusionSettings(block_size=4, mask_token_id=MASK_ID)
    prompts = torch.randint(3, 96, (2, 9)).tolist()

    def passes(starts: list[int]) -> list[torch.Tensor]:
        rows = [Row(i, prompt, limit=8) for i, prompt in enumerate(prompts)]
        batch = Batch(Decoder(model), settings, validate(DecodingConfig, {"block_size": 4}), rows, Stats())
        widths = (4, 4, 1)
        tokens = torch.arange(8).view(2, 4) + 5
        kinds = zip(widths, (False, True, True), strict=True)
        return [batch.prefill()] + [batch.forward(tokens[:, :w], starts, [causal] * 2) for w, causal in kinds]

    def masks_of(starts: list[int]) -> list[int]:
        seen.clear()
        found = passes(starts)
        for a, b in zip(found, expected[tuple(starts)], strict=True):
            torch.testing.assert_close(a, b)
        return seen[:: model.config.num_hidden_layers]

    expected: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for starts in ([9, 9], [9, 7]):
        with monkeypatch.context() as patch:  # as transformers does it, every mask written out
            patch.setattr(masks_module, "can_run_split", lambda model: False)
            patch.setattr(batch_module, "running_split", nullcontext)
            expected[tuple(starts)] = passes(starts)
    seen: list[int] = []
    attend = split_attention.scaled_dot_product_attention

    def look(query, key, value, attn_mask=None, **options):
        assert key.shape[1] == 2
        seen.append(0 if attn_mask is None else attn_mask.numel())
        return attend(query, key, value, attn_mask=attn_mask, **options)

    monkeypatch.setattr(split_attention, "scaled_dot_product_attention", look)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    windowed = 0 if window is None else 1
    assert masks_of([9, 9]) == [windowed * 2 * 81, windowed * 4 * 13, 4 * 13, windowed * 10]
    assert masks_of([9, 7])[1:] == [2 * 4 * 13, 2 * 4 * 13, 2 * 10]
