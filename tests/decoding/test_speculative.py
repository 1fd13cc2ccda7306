"""Drafting beside the free token, and in the check's own pass."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from decoders import language_model, prompt
from families import FAMILIES, MASK_ID, tiny_model
from nextblock.config.sections import BlockDiffusionSettings, DraftAdapterConfig, validate
from nextblock.decoding.batch import Batch
from nextblock.decoding.drafts import Draft, free_block, lay_out, masked_block, with_masks
from nextblock.decoding.events import Stats
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.decoding.options import DecodingConfig
from nextblock.decoding.rows import Row
from nextblock.decoding.speculative import drafted
from nextblock.model.draft_adapter import DraftAdapter
from nextblock.model.trees import likeliest_points


def test_drafting_ahead_for_all_points_needs_no_pass_of_its_own():
    """The same model: after the first pass, each one keeps six drafts, gains a seventh token and drafts again."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    out = language_model(model, 8).generate(
        prompt(3), mode="speculative", max_new_tokens=23, draft_ahead=8, eos_token_id=[]
    )
    assert out.answers == [[0] * 23]
    assert out.stats.row_forwards == {"prefill": 1, "denoise": 1, "check": 3}


FAMILIES_AND_WINDOWS = [*((name, None) for name in FAMILIES), ("mistral", 4), ("gemma3", 4), ("phi3", 4)]


@torch.no_grad()
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("family", "window"), FAMILIES_AND_WINDOWS)
def test_the_free_token_is_the_ar_head_s_and_the_block_beside_it_is_denoised_as_it_is_alone(family, window, adapted):
    """The first place is a plain causal pass, which commits its keys; the block sees nothing of it."""
    model: Any = tiny_model(family, **({} if window is None else {"sliding_window": window}))
    texts, adapter, mask = [prompt(9)[0].tolist(), prompt(6)[0].tolist()], None, MASK_ID
    plain = [model(torch.tensor([text])).logits[0] for text in texts]
    if adapted:
        adapter = DraftAdapter(model, DraftAdapterConfig(rank=3)).eval()
        for parameter in adapter.parameters():
            parameter.normal_(std=0.2)
        adapter.merge_copies()
        mask = adapter.mask_token_id
    lm = BlockDiffusionLM(model, None, BlockDiffusionSettings(block_size=5, mask_token_id=mask), adapter)
    options = validate(DecodingConfig, {"mode": "speculative", "block_size": 5})

    def batch(rows):
        made = Batch(lm.decoder, lm.settings, options, rows, Stats())
        made.prefill()
        return made

    # Rows of unequal length, and one alone, whose mask is a template's part; whole blocks and part of one.
    for chosen, width in itertools.product(([0, 1], [1], [0]), (5, 3)):
        both = batch([Row(i, texts[i][:-2], limit=40, answer=texts[i][-2:-1]) for i in chosen])
        known, starts = both.known()
        tokens, groups = masked_block(both, known, width), free_block(both, width)
        hidden = both.forward(tokens, starts, [True] * len(chosen), groups)
        after = both.forward(
            torch.tensor([texts[i][-1:] for i in chosen]), [n + 1 for n in starts], [True] * len(chosen)
        )
        for index, i in enumerate(chosen):
            found = lm.decoder.logits(torch.cat([hidden[index, :1], after[index]]))
            torch.testing.assert_close(found, plain[i][-2:], rtol=1e-4, atol=1e-4)
            alone = batch([Row(0, texts[i][:-2], limit=40)])
            block = torch.tensor([[texts[i][-2]] + [mask] * (width - 1)])
            expected = alone.forward(block, [len(texts[i]) - 2], [False])[0]
            torch.testing.assert_close(hidden[index, 1:], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("family", "window"), FAMILIES_AND_WINDOWS)
def test_what_is_drafted_ahead_is_what_a_denoising_pass_drafts(family, window):
    """A group's hidden states equal those of a block that starts at the point of acceptance."""
    family_model: Any = tiny_model(family, **({} if window is None else {"sliding_window": window}))
    lm = language_model(family_model, 6)
    options = validate(DecodingConfig, {"mode": "speculative", "block_size": 6, "draft_ahead": 2})
    texts = [prompt(9)[0].tolist(), prompt(5)[0].tolist()]

    def batch(rows):
        made = Batch(lm.decoder, lm.settings, options, rows, Stats())
        made.prefill()
        return made

    # The last four tokens: one known and three drafts to be checked.
    rows = [Row(i, text[:-4], limit=40, answer=text[-4:-3]) for i, text in enumerate(texts)]
    draft = Draft(torch.tensor([text[-3:] for text in texts]), [3, 3])
    both = batch(rows)
    known, starts = both.known()
    tree = lay_out(both, draft, known)
    tokens, groups = with_masks(both, tree.tokens, torch.tensor([[0, 2], [3, 1]]))
    hidden = both.forward(tokens, starts, [True, True], groups)
    ahead = drafted(both, hidden, [0, 1], 4)  # row 0: no draft was kept; row 1: one was
    for index, points in enumerate(([0, 2], [3, 1])):
        text = texts[index]
        plain = family_model(torch.tensor([text])).logits[0, -4:]
        torch.testing.assert_close(lm.decoder.logits(hidden[index, :4]), plain, rtol=1e-4, atol=1e-4)
        for group, point in enumerate(points):
            length = len(text) - 4 + point
            alone = batch([Row(0, text[:length], limit=40)])
            block = torch.tensor([[text[length]] + [MASK_ID] * 5])
            expected = alone.forward(block, [length], [False])[0]
            found = hidden[index, 4 + 6 * group : 10 + 6 * group]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            if (index, group) in ((0, 0), (1, 1)):
                # Hidden state 0 predicts what the check decides; 1 to 4 predict the four tokens behind it.
                logits = lm.decoder.logits(expected[1:5])
                logits[:, MASK_ID] = -torch.inf
                assert ahead.tokens[index].tolist() == logits.argmax(-1).tolist()


def test_the_likeliest_points_are_those_of_a_table_of_all_of_them():
    """Kept are exactly n drafts: the first n, and not the one behind; all of them, where none is behind."""
    chances = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
    lengths = [n % 7 for n in range(40)]
    found = likeliest_points(chances, lengths, 3, chances.device)
    for line, length, points in zip(chances.double().tolist(), lengths, found.tolist(), strict=True):
        odds = [math.prod(line[:n]) * (1 - line[n] if n < length else 1) for n in range(length + 1)]
        ranked = sorted(range(length + 1), key=lambda n: -odds[n])[:3]
        assert points == ranked + ranked[:1] * (3 - len(ranked))
