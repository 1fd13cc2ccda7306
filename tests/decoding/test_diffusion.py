"""Diffusion mode against an independent reading of the paper's sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoders import language_model, padded, prompt, reference
from families import EOS_ID, MASK_ID, tiny_model
from nextblock.decoding.events import Committed

RULES: dict[str, Any] = {"top": "confidence", "entropy": "entropy", "margin": "margin", "bound": "entropy_bound"}


@pytest.mark.parametrize("rule", ["top", "entropy"])
def test_diffusion_gives_the_tokens_of_the_released_sampler(family_model, rule):
    ids = prompt(6)
    expected = reference(family_model, ids[0].tolist(), 20, 8, 2, rule)
    out = language_model(family_model).generate(
        ids, max_new_tokens=20, sub_blocks=2, sampler=RULES[rule], threshold=None
    )
    assert out.answers == [expected]


@given(
    seed=st.integers(0, 1000),
    block=st.sampled_from([1, 2, 4, 6, 12]),
    sub_blocks=st.sampled_from([1, 2, 3]),
    rule=st.sampled_from(sorted(RULES)),
    threshold=st.sampled_from([None, 0.05, 0.3, 0.9]),
    length=st.integers(1, 9),
    new=st.integers(1, 17),
    block_causal=st.booleans(),
    shifted=st.booleans(),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_diffusion_gives_the_tokens_of_the_uncached_reference(
    seed, block, sub_blocks, rule, threshold, length, new, block_causal, shifted
):
    sub_blocks = sub_blocks if block % sub_blocks == 0 else 1
    model = tiny_model("llama", seed=seed)
    ids = prompt(length, seed)
    expected = reference(model, ids[0].tolist(), new, block, sub_blocks, rule, threshold, block_causal, shifted)
    lm = language_model(
        model,
        block,
        context="block_causal" if block_causal else "context_causal",
        prediction="shifted" if shifted else "aligned",
    )
    out = lm.generate(ids, max_new_tokens=new, sub_blocks=sub_blocks, sampler=RULES[rule], threshold=threshold)
    assert out.answers == [expected]


@pytest.mark.parametrize(("steps", "sub_blocks"), [(1, 1), (3, 1), (4, 2), (8, 1)])
def test_a_number_of_steps_spreads_the_tokens_evenly(llama, steps, sub_blocks):
    ids = prompt(4)
    expected = reference(llama, ids[0].tolist(), 16, 8, sub_blocks, "top", steps=steps)
    out = language_model(llama).generate(
        ids, max_new_tokens=16, steps=steps, sub_blocks=sub_blocks, threshold=None, eos_token_id=[]
    )
    if EOS_ID not in out.answers[0]:
        assert out.answers == [expected]
        assert out.stats.row_forwards["denoise"] == 2 * min(steps, 7)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma3", "phi3"])
@pytest.mark.parametrize("mode", ["ar", "diffusion", "speculative"])
def test_sliding_windows_hold_at_lengths_over_the_window(family, mode):
    options: dict[str, Any] = {"use_sliding_window": True, "max_window_layers": 1} if family == "qwen2" else {}
    model: Any = tiny_model(family, sliding_window=5, **options)
    ids = prompt(13)
    lm = language_model(model, 4)
    batch = lm.generate(**padded([ids, prompt(3)]), mode=mode, max_new_tokens=14, threshold=None)
    alone = lm.generate(ids, mode=mode, max_new_tokens=14, threshold=None)
    assert batch.answers[0] == alone.answers[0]
    if mode == "speculative":
        tree = lm.generate(**padded([ids, prompt(3)]), mode=mode, max_new_tokens=14, draft_paths=3)
        assert tree.answers == batch.answers
    if mode == "diffusion":
        expected = windowed_reference(model, ids[0].tolist(), 14, 4, window=5)
    else:
        plain = model.generate(ids, max_new_tokens=14, do_sample=False, suppress_tokens=[MASK_ID], pad_token_id=0)
        expected = plain[0, ids.shape[1] :].tolist()
    assert alone.answers[0] == expected


def windowed_reference(model, prompt_ids, new, block, window):
    """`reference` by top probability, with each kind of layer's own window in the mask."""
    from nextblock.model.positions import layer_windows

    windows = layer_windows(model.config)

    def logits(tokens, start, denoising):
        length = len(tokens)
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        allowed = j <= i
        if denoising:
            allowed = allowed | ((i >= length - block) & (j >= length - block))
        masks = {kind: (allowed & (j > i - w) if w else allowed)[None, None] for kind, w in windows.items()}
        mask = next(iter(masks.values())) if len(masks) == 1 else masks
        with torch.no_grad():
            found = model(torch.tensor([tokens]), attention_mask=mask, use_cache=False).logits[0].float()
        found[:, MASK_ID] = -torch.inf
        return found

    done, start = list(prompt_ids), len(prompt_ids)
    while len(done) - start < new:
        current = [int(logits(done, start, False)[-1].argmax())] + [MASK_ID] * (block - 1)
        while masked := [i for i in range(block) if current[i] == MASK_ID]:
            found = logits(done + current, start, True)[len(done) - 1 :].softmax(-1)
            best = max(masked, key=lambda i: (float(found[i].max()), -i))
            current[best] = int(found[best].argmax())
        done += current
        if EOS_ID in done[start:]:
            break
    answer = done[start:][:new]
    return answer[: answer.index(EOS_ID) + 1] if EOS_ID in answer else answer


def test_behind_a_decided_end_token_nothing_is_denoised(llama):
    lm, ids = language_model(llama), prompt(6)

    def decided(ends):
        stream = lm.stream(ids, eos_token_id=ends, threshold=None, max_new_tokens=8)
        return [event for event in stream if isinstance(event, Committed)], stream.rows[0]

    free, _ = decided([])
    # A token that is decided while one before it is not.
    early = next(e for n, e in enumerate(free) if e.offset > len({before.offset for before in free[:n]}))
    seen, row = decided([early.token])
    place = next(e for e in seen if e.token == early.token)
    assert place.offset == early.offset
    assert all(e.offset < place.offset for e in seen if e.step > place.step)
    assert row.finish == "end_token"
    assert row.passes < 8  # prefill and a pass for each of the other tokens of the block
