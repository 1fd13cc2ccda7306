"""The three modes against an independent reading of the paper's sampler, transformers, and each other.

The reference below keeps no cache and knows no batch: it runs the whole sequence through the model for every
step, under a dense mask written from the rules.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from families import EOS_ID, FAMILIES, MASK_ID, tiny_model
from nextblock.config.sections import BlockDiffusionSettings, validate
from nextblock.decoding.batch import Batch, Row
from nextblock.decoding.cache import SlotCache
from nextblock.decoding.check import _check_tree
from nextblock.decoding.draft_ahead import _check_and_draft, _drafted_ahead
from nextblock.decoding.drafts import Draft, _known
from nextblock.decoding.events import BlockFinished, Committed, Rejected, Stats
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.decoding.options import DecodingConfig

LENGTHS = (5, 11, 1, 7)


def language_model(model, block_size=8, **section):
    return BlockDiffusionLM(
        model, None, BlockDiffusionSettings(block_size=block_size, mask_token_id=MASK_ID, **section)
    )


def prompt(length, seed=0):
    return torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(100 * seed + length))


def padded(prompts, left=False) -> dict[str, Any]:
    """One [B, T] batch and its attention mask."""
    longest = max(p.shape[1] for p in prompts)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, p in enumerate(prompts):
        place = slice(longest - p.shape[1], None) if left else slice(0, p.shape[1])
        tokens[i, place], mask[i, place] = p[0], 1
    return {"prompts": tokens, "attention_mask": mask}


# ------------------------------------------------------------------------------------------ reference


@torch.no_grad()
def full_logits(model, tokens, prompt_length, block, block_causal, denoising):
    """Logits [T, V] of the whole sequence: context causal, its last block open while it is being denoised."""
    length = len(tokens)
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            seen = j <= i
            if i >= prompt_length:
                start = prompt_length + (i - prompt_length) // block * block
                last_block = i >= length - block
                if block_causal or (denoising and last_block):
                    seen = j < start + block
            allowed[i, j] = seen
    logits = model(torch.tensor([tokens]), attention_mask=allowed[None, None], use_cache=False).logits[0].float()
    logits[:, MASK_ID] = -torch.inf
    return logits


def reference(
    model, prompt_ids, new, block, sub_blocks, rule, threshold=None, block_causal=False, shifted=True, steps=None
):
    """Greedy answer of the paper's sampler: rule is "entropy", "margin", "top" or "bound"."""
    done = list(prompt_ids)
    first = None
    if shifted:
        first = int(full_logits(model, done, len(done), block, False, False)[-1].argmax())
    start = len(prompt_ids)
    while len(done) - start < new:
        current = ([first] if shifted else [MASK_ID]) + [MASK_ID] * (block - 1)
        width = block // sub_blocks
        for sub in range(sub_blocks):
            places = range(sub * width, (sub + 1) * width)
            step = 0
            ends = [i for i in range(block) if current[i] == EOS_ID] or [block]
            while masked := [i for i in places if current[i] == MASK_ID and i < ends[0]]:
                logits = full_logits(model, done + current, start, block, block_causal, True)
                here = {i: logits[len(done) + i - (1 if shifted else 0)].softmax(-1) for i in masked}
                entropy = {i: float(-(p[p > 0] * p[p > 0].log()).sum()) for i, p in here.items()}
                two = {i: p.topk(2).values.tolist() for i, p in here.items()}
                margin = {i: t[0] - t[1] for i, t in two.items()}
                top = {i: t[0] for i, t in two.items()}
                key = {"top": top, "margin": margin}.get(rule) or {i: -e for i, e in entropy.items()}
                ranked = sorted((-key[i], i) for i in masked)
                ranked = [i for _, i in ranked]
                count = 1 if steps is None else -(-len(masked) // (steps // sub_blocks - step))
                chosen = set(ranked[:count])
                if threshold is not None and rule == "bound":
                    chosen |= {
                        i for n, i in enumerate(ranked) if sum(entropy[j] for j in ranked[: n + 1]) <= threshold
                    }
                elif threshold is not None:
                    sure = margin if rule == "margin" else top
                    chosen |= {i for i in masked if sure[i] > threshold}
                for i in chosen:
                    current[i] = int(here[i].argmax())
                ends = [i for i in range(block) if current[i] == EOS_ID] or [block]
                step += 1
        done += current
        if EOS_ID in done[start:]:
            break
        if shifted:
            first = int(full_logits(model, done, start, block, block_causal, False)[-1].argmax())
    answer = done[start:][:new]
    return answer[: answer.index(EOS_ID) + 1] if EOS_ID in answer else answer


# ------------------------------------------------------------------------------------------ diffusion

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


# ------------------------------------------------------------------------------- ar and speculative


def test_ar_mode_gives_the_tokens_of_transformers(family_model):
    ids = prompt(9)
    plain = family_model.generate(ids, max_new_tokens=24, do_sample=False, suppress_tokens=[MASK_ID])
    out = language_model(family_model).generate(ids, mode="ar", max_new_tokens=24)
    assert torch.equal(out.sequences, plain)


def test_speculative_mode_gives_the_tokens_of_ar_mode(family_model):
    lm = language_model(family_model)
    batch = padded([prompt(n) for n in LENGTHS])
    ar = lm.generate(**batch, mode="ar", max_new_tokens=30)
    for paths in (1, 3):
        speculative = lm.generate(**batch, mode="speculative", max_new_tokens=30, draft_paths=paths)
        assert speculative.answers == ar.answers
        assert speculative.finish == ar.finish


@given(
    seed=st.integers(0, 1000),
    block=st.sampled_from([1, 2, 3, 8, 16]),
    draft_length=st.sampled_from([None, 1, 4, "auto"]),
    draft_ahead=st.sampled_from([0, 0, 1, 3, 9]),
    draft_paths=st.sampled_from([1, 2, 5, 40]),
    prediction=st.sampled_from(["shifted", "aligned"]),
    repeats=st.booleans(),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_speculative_mode_is_lossless_whatever_the_draft(
    seed, block, draft_length, draft_ahead, draft_paths, prediction, repeats
):
    draft_ahead = draft_ahead if block > 2 else 0
    draft_paths = 1 if draft_ahead else draft_paths
    # A weak model repeats itself, so that drafts are often right; a wild one rejects most of them.
    model = tiny_model("llama", seed=seed, std=0.02 if repeats else 0.25)
    lm = language_model(model, block, prediction=prediction)
    batch = padded([prompt(n, seed) for n in LENGTHS])
    ar = lm.generate(**batch, mode="ar", max_new_tokens=[9, 20, 1, 14])
    out = lm.generate(
        **batch,
        mode="speculative",
        max_new_tokens=[9, 20, 1, 14],
        draft_length=draft_length,
        draft_ahead=draft_ahead,
        draft_paths=draft_paths,
    )
    assert out.answers == ar.answers


def test_right_drafts_are_kept_whole():
    """A model that always says the same token: each cycle of two passes yields a whole block."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    out = language_model(model, 8).generate(prompt(3), mode="speculative", max_new_tokens=25)
    assert out.answers == [[0] * 25]
    assert out.stats.row_forwards == {"prefill": 1, "denoise": 3, "check": 3}
    assert out.stats.tokens_per_forward == 25 / 7


@pytest.mark.parametrize("ahead", [0, 2])
def test_drafts_of_automatic_length_are_shorter_where_few_are_kept(ahead):
    """A wild model rejects most: of 7 drafts a cycle soon 2 or 3 are made."""
    lm, ids = language_model(tiny_model("llama", std=0.25)), prompt(9)
    rejected = []
    for length in (None, "auto"):
        stream = lm.stream(ids, mode="speculative", max_new_tokens=30, draft_length=length, draft_ahead=ahead)
        rejected.append(sum(isinstance(event, Rejected) for event in stream))
    assert rejected[1] < 0.7 * rejected[0]


# ------------------------------------------------------------------------------------------- filters


FILTERED = [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}]


@pytest.mark.parametrize("filtered", FILTERED, ids=str)
@pytest.mark.parametrize(
    "how",
    [{"mode": "ar"}]
    + [
        {"mode": "diffusion", "sampler": sampler, "threshold": level, "sub_blocks": 2}
        for sampler, level in (("confidence", 0.1), ("entropy", 0.1), ("margin", 0.05), ("entropy_bound", 1.0))
    ]
    + [
        {"mode": "speculative", **more}
        for more in ({}, {"draft_ahead": 2}, {"draft_paths": 3}, {"draft_length": "auto"})
    ],
    ids=str,
)
def test_a_draw_that_has_no_choice_decides_what_greedy_decoding_decides_at_the_same_cost(llama, how, filtered):
    """How sure the model is does not depend on what a filter leaves to draw from."""
    lm, batch = language_model(llama), padded([prompt(n) for n in LENGTHS])
    greedy = lm.stream(**batch, max_new_tokens=25, **how)
    seen = [event for event in greedy if isinstance(event, Committed)]
    drawn = lm.stream(**batch, max_new_tokens=25, seed=1, **{"temperature": 1.0, **filtered}, **how)
    found = [event for event in drawn if isinstance(event, Committed)]
    assert [row.answer for row in drawn.rows] == [row.answer for row in greedy.rows]
    if how["mode"] == "diffusion":  # each token in the same pass
        assert [(e.row, e.offset, e.step) for e in found] == [(e.row, e.offset, e.step) for e in seen]
        assert drawn.stats.row_forwards == greedy.stats.row_forwards
    confidences = {(e.row, e.offset): e.confidence for e in seen}
    assert {(e.row, e.offset): e.confidence for e in found} == pytest.approx(confidences, abs=1e-5)


# ------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("mode", ["ar", "diffusion", "speculative"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_row_of_a_batch_gets_what_it_gets_alone(family_model, mode, temperature):
    lm = language_model(family_model)
    prompts = [prompt(n) for n in LENGTHS]
    options: dict[str, Any] = {"mode": mode, "temperature": temperature, "threshold": 0.3}
    limits = [30, 7, 18, 25]
    batch = lm.generate(**padded(prompts), max_new_tokens=limits, seed=5, **options)
    for i, ids in enumerate(prompts):
        alone = lm.generate(ids, max_new_tokens=limits[i], seed=5 + i, **options)
        assert batch.answers[i] == alone.answers[0]
        assert batch.finish[i] == alone.finish[0]


def test_drafting_ahead_for_all_points_needs_no_pass_of_its_own():
    """The same model: after the first pass, each one keeps six drafts, gains a seventh token and drafts again."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    out = language_model(model, 8).generate(
        prompt(3), mode="speculative", max_new_tokens=23, draft_ahead=8, eos_token_id=[]
    )
    assert out.answers == [[0] * 23]
    assert out.stats.row_forwards == {"prefill": 1, "check": 4}


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "window"), [*((name, None) for name in FAMILIES), ("mistral", 4), ("gemma3", 4), ("phi3", 4)]
)
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
    hidden = _check_and_draft(both, draft, [[0, 2], [3, 1]])
    drafted = _drafted_ahead(both, hidden, [4, 10])  # row 0: no draft was kept; row 1: one was
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
                assert drafted[index].tokens == logits.argmax(-1).tolist()


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "window"), [*((name, None) for name in FAMILIES), ("mistral", 4), ("gemma3", 4), ("phi3", 4)]
)
def test_a_tree_of_drafts_gives_each_path_what_a_plain_causal_pass_gives_it(family, window):
    """Both its logits, and, once its own part is moved, the cache that the next pass reads."""
    family_model: Any = tiny_model(family, **({} if window is None else {"sliding_window": window}))
    lm = language_model(family_model, 6)
    options = validate(DecodingConfig, {"mode": "speculative", "block_size": 6, "draft_paths": 3})
    texts = [prompt(11)[0].tolist(), prompt(7)[0].tolist()]
    # The last six tokens: one known and five drafts, of which the second row has four.
    branches = [[(1, 41), (3, 42)], [(0, 43), (2, 44)]]
    for number in range(3):
        rows = [Row(i, text[:-6], limit=40, answer=text[-6:-5]) for i, text in enumerate(texts)]
        draft = Draft(torch.tensor([text[-5:] for text in texts]), [5, 4], branches=branches)
        batch = Batch(lm.decoder, lm.settings, options, rows, Stats())
        batch.prefill()
        known, starts = _known(batch)
        logits = lm.decoder.logits(_check_tree(batch, known, starts, draft))
        paths = [found[number] for found in draft.paths]
        for index, (row, start, path) in enumerate(zip(rows, starts, paths, strict=True)):
            row.answer += path.tokens
            plain = family_model(torch.tensor([row.prompt + row.answer])).logits[0, start:]
            torch.testing.assert_close(logits[index, path.nodes], plain, rtol=1e-4, atol=1e-4)
            if number:
                kept = len(path.tokens) - path.shared
                batch.cache.move(index, start + path.nodes[path.shared + 1], start + path.shared + 1, kept)
            row.answer.append(50 + index)
        hidden = batch.forward(*_known(batch), [True, True])
        for index, row in enumerate(rows):
            plain = family_model(torch.tensor([row.prompt + row.answer])).logits[0, -1]
            torch.testing.assert_close(lm.decoder.logits(hidden[index, 0]), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_second_path_is_kept_where_the_first_one_is_wrong(temperature):
    """The event names it, what it overrules is rejected, and greedy answers take fewer passes than with one path."""
    lm = language_model(tiny_model("llama", seed=1, std=0.05))
    batch = padded([prompt(n, 1) for n in LENGTHS])
    passes = []
    for paths in (1, 2):
        stream = lm.stream(
            **batch,
            mode="speculative",
            max_new_tokens=40,
            draft_paths=paths,
            temperature=temperature,
            seed=0,
            eos_token_id=[],
        )
        overruled, second = [], 0
        for event in stream:
            if isinstance(event, Rejected):
                overruled.append(event)
            elif isinstance(event, BlockFinished):
                # The last token gained is the head's own; what differs before it was another path's.
                answer = stream.rows[event.row].answer
                other = [e for e in overruled if e.offset < event.end - 1]
                assert all(answer[e.offset] != e.token for e in other)
                assert other or not event.path or len(answer) == 40
                second += event.path
                overruled = []
        assert bool(second) == (paths == 2)
        passes.append(sum(stream.stats.row_forwards.values()))
    assert temperature or passes[1] < passes[0]


@pytest.mark.parametrize("mode", ["diffusion", "speculative"])
def test_a_batch_costs_each_row_the_passes_that_it_takes_alone(llama, mode):
    lm = language_model(llama)
    prompts = [prompt(n) for n in LENGTHS]
    batch = lm.generate(**padded(prompts), mode=mode, max_new_tokens=20, temperature=1.0, seed=0)
    alone = [lm.generate(p, mode=mode, max_new_tokens=20, temperature=1.0, seed=i) for i, p in enumerate(prompts)]
    total = {}
    for out in alone:
        for kind, count in out.stats.row_forwards.items():
            total[kind] = total.get(kind, 0) + count
    assert batch.stats.row_forwards == total
    assert batch.stats.forwards == max(out.stats.forwards for out in alone)


@pytest.mark.parametrize(
    "options",
    [
        {"draft_ahead": 1},
        {"draft_ahead": 3},
        {"draft_length": "auto"},
        {"draft_length": "auto", "draft_ahead": 2},
        {"draft_paths": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_row_gets_the_same_and_pays_the_same_however_it_is_drafted(llama, options, temperature):
    lm = language_model(llama)
    prompts = [prompt(n) for n in LENGTHS]
    options = {"mode": "speculative", "temperature": temperature, **options}
    batch = lm.generate(**padded(prompts), max_new_tokens=25, seed=5, **options)
    alone = [lm.generate(p, max_new_tokens=25, seed=5 + i, **options) for i, p in enumerate(prompts)]
    assert batch.answers == [out.answers[0] for out in alone]
    if temperature:  # greedy batches may check more of a draft than a row alone needs, never less
        paid = [sum(out.stats.row_forwards.values()) for out in alone]
        assert sum(batch.stats.row_forwards.values()) == sum(paid)


@pytest.mark.parametrize("mode", ["ar", "diffusion", "speculative"])
def test_memory_goes_by_what_is_decoded_not_by_what_might_be(monkeypatch, mode):
    """One long answer beside seven short ones, and a limit that is never reached."""
    model: Any = tiny_model("llama", max_position_embeddings=10**7)
    allocated = []

    def recorded(self, layer, part, states, allocate=SlotCache.allocate):
        slots = allocate(self, layer, part, states)
        allocated.append(slots.shape[0] * slots.shape[2])
        return slots

    monkeypatch.setattr(SlotCache, "allocate", recorded)
    tokens = prompt(5).expand(8, -1)
    out = language_model(model).generate(tokens, mode=mode, max_new_tokens=[400] + [4] * 7, eos_token_id=[])
    assert [len(answer) for answer in out.answers] == [400] + [4] * 7
    assert max(allocated) < 8 * 100
    first = language_model(model).generate(tokens, mode=mode, max_new_tokens=1, eos_token_id=[]).answers[0][0]
    allocated.clear()
    language_model(model).generate(tokens[:1], mode=mode, max_new_tokens=10**7 - 5, eos_token_id=[first])
    assert max(allocated) < 100


@pytest.mark.parametrize(
    ("mode", "more"), [("ar", {}), ("diffusion", {}), ("speculative", {}), ("speculative", {"draft_paths": 3})]
)
def test_answers_end_at_the_model_s_last_position(mode, more):
    for family in ("llama", "gpt2"):
        sizes = {"n_positions": 24} if family == "gpt2" else {"max_position_embeddings": 24}
        model: Any = tiny_model(family, **sizes)
        lm = language_model(model)
        long, short = prompt(19), prompt(2)
        out = lm.generate(
            **padded([long, short]), mode=mode, max_new_tokens=50, eos_token_id=[], threshold=None, **more
        )
        assert [len(a) for a in out.answers] == [5, 22]
        assert out.answers[0] == lm.generate(long, mode=mode, eos_token_id=[], threshold=None, **more).answers[0]
        assert out.answers[1] == lm.generate(short, mode=mode, eos_token_id=[], threshold=None, **more).answers[0]
        if mode == "diffusion":  # the last block is as short as what is left of the context
            assert out.answers[0] == reference(model, long[0].tolist(), 5, 5, 1, "top")
        else:
            plain = model.generate(
                short, max_new_tokens=22, do_sample=False, suppress_tokens=[MASK_ID], eos_token_id=None
            )
            assert out.answers[1] == plain[0, 2:].tolist()


@pytest.mark.parametrize("mode", ["ar", "diffusion", "speculative"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_mask_token_is_never_generated(llama, mode, temperature):
    with torch.no_grad():  # a head that wants nothing else
        llama.lm_head.weight[MASK_ID] *= 20
    out = language_model(llama).generate(
        **padded([prompt(n) for n in LENGTHS]), mode=mode, temperature=temperature, seed=0, max_new_tokens=30
    )
    assert all(MASK_ID not in answer for answer in out.answers)
