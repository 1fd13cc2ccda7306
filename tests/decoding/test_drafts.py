"""Drafts of several paths, and the pass that checks them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from decoders import LENGTHS, language_model, padded, prompt
from families import FAMILIES, tiny_model
from nextblock.config.sections import validate
from nextblock.decoding.batch import Batch
from nextblock.decoding.drafts import Branches, Draft, lay_out
from nextblock.decoding.events import BlockFinished, Rejected, Stats
from nextblock.decoding.options import DecodingConfig
from nextblock.decoding.rows import Row
from nextblock.model.trees import best_continuations, likeliest_tree, paths_of


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
    own = torch.tensor([[[0, 41, 31, 32, 33], [0, 0, 0, 42, 0]], [[43, 0, 0, 0, 0], [0, 0, 44, 34, 0]]])
    branches = Branches([[1, 3], [0, 2]], [[5, 5, 4], [3, 1, 4]], own)
    for number in range(3):
        rows = [Row(i, text[:-6], limit=40, answer=text[-6:-5]) for i, text in enumerate(texts)]
        draft = Draft(torch.tensor([text[-5:] for text in texts]), [5, 4], branches=branches)
        batch = Batch(lm.decoder, lm.settings, options, rows, Stats())
        batch.prefill()
        known, starts = batch.known()
        tree = lay_out(batch, draft, known)
        logits = lm.decoder.logits(batch.forward(tree.tokens, starts, [True, True], tree.groups))
        for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
            length = branches.ends[index][number]
            row.answer += tree.paths[index, number, :length].tolist()
            plain = family_model(torch.tensor([row.prompt + row.answer])).logits[0, start:]
            slots = tree.slots[index, number, : length + 1]
            torch.testing.assert_close(logits[index, slots], plain, rtol=1e-4, atol=1e-4)
            if number:
                assert tree.depth is not None
                slot, depth = draft.own_slots(index, number)
                assert (slot, depth) == (int(slots[depth + 1]), int(tree.depth[index, number]))
                batch.cache.move(index, start + slot, start + depth + 1, length - depth)
            row.answer.append(50 + index)
        hidden = batch.forward(*batch.known(), [True, True])
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
            max_new_tokens=60,
            draft_paths=paths,
            temperature=temperature,
            seed=3,
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
                assert other or not event.path or len(answer) == 60
                second += event.path
                overruled = []
        assert bool(second) == (paths == 2)
        passes.append(sum(stream.stats.row_forwards.values()))
    assert temperature or passes[1] < passes[0]


@pytest.mark.parametrize("before", [1, 3])
@pytest.mark.parametrize("budget", [1, 4, 9, 1000])
def test_a_grown_tree_is_the_likeliest_of_all_that_leave_the_likeliest_path_once(before, budget):
    """Against all of them, enumerated."""
    length, ranks = 4, 3
    scores = torch.rand(length, before, 3, generator=torch.Generator().manual_seed(budget)).log_softmax(-1)
    top = scores.topk(ranks)
    value, choice = top.values.tolist(), top.indices.tolist()

    def walk(place, rank):
        """The candidates and the log-probability of each path's beginning; rank `rank` at `place`, else the first."""
        candidates, chance, last = [], 0.0, 0
        for n in range(length):
            which = last if before > 1 else 0
            chance += value[n][which][rank if n == place else 0]
            last = choice[n][which][rank if n == place else 0]
            candidates.append(last)
            yield tuple(candidates), chance

    every = {}
    for place in range(length):
        for rank in range(ranks):
            every |= dict(walk(place, rank))
    wanted = sorted(every, key=lambda path: -every[path])[:budget]
    names = [[10 * n + candidate for candidate in range(3)] for n in range(length)]
    tree = likeliest_tree(names, value, choice, length, budget)
    assert len(tree) == len(wanted)
    for count in range(1, 1 + len(tree)):  # the first n are the likeliest n
        (tokens,), (depth,), (ends,) = paths_of([tree[:count]])
        found = set()
        for first, end, own in zip([0, *depth], ends, tokens, strict=True):
            path = [*tokens[0][:first], *own[first:end]]
            found |= {tuple(path[:n]) for n in range(first + 1, end + 1)}
        assert found == {tuple(10 * n + c for n, c in enumerate(path)) for path in wanted[:count]}
        assert sum(draft.chance for draft in tree[:count]) == pytest.approx(
            sum(math.exp(every[path]) for path in wanted[:count])
        )


def test_a_tree_of_greedy_drafts_keeps_more_than_a_path():
    """And the more, the more it may hold; the answer stays."""
    lm = language_model(tiny_model("llama", seed=1, std=0.05))
    batch, found = padded([prompt(n, 1) for n in LENGTHS]), []
    for paths in (1, 2, 6):
        out = lm.generate(**batch, mode="speculative", max_new_tokens=60, draft_paths=paths, eos_token_id=[])
        found.append((out.answers, sum(out.stats.row_forwards.values())))
    assert found[0][0] == found[1][0] == found[2][0]
    assert found[0][1] > found[1][1] > found[2][1]


def test_a_tree_has_no_token_that_cannot_come():
    """Such as the mask token, or what a processor forbids."""
    logits = torch.tensor([[[2.0, 1.0, -torch.inf], [-torch.inf, 0.0, -torch.inf]]])
    names, value, choice = (part.tolist()[0] for part in best_continuations(logits, torch.tensor([0]), None))
    tree = likeliest_tree(names, value, choice, 2, 100)
    assert paths_of([tree]) == ([[[0, 1], [1, 1]]], [[0]], [[2, 2]])
