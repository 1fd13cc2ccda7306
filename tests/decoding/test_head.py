"""What is told of a decided token, against a plain forward pass of transformers' own model."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

from decoders import language_model, prompt
from families import MASK_ID
from nextblock.decoding.events import Committed
from nextblock.decoding.request import make_request

HOW: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "speculative"},
    {"mode": "speculative", "draft_paths": 3},
    {"mode": "speculative", "draft_ahead": 2},
]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("drawn", [{}, {"temperature": 1.2, "top_k": 9}], ids=["greedy", "drawn"])
def test_log_probabilities_and_the_likeliest_tokens_are_those_of_a_plain_forward_pass(llama, how, drawn):
    """Before temperature and filters, and without the mask token."""
    lm, ids = language_model(llama), torch.cat([prompt(7), prompt(7, seed=1), prompt(7, seed=2)])
    request = make_request(lm.decoder, None, lm.settings, ids, {**how, **drawn, "max_new_tokens": 15, "seed": 3})
    for row, count in zip(request.rows, (4, 0, 1), strict=True):
        row.top = count
    told: dict[int, list[Committed]] = {0: [], 1: [], 2: []}
    for event in lm.run(request, time.perf_counter(), confidence=True):
        if isinstance(event, Committed):
            told[event.row].append(event)
    for row, events in zip(request.rows, told.values(), strict=True):
        assert [event.token for event in events] == row.answer
        with torch.no_grad():
            logits = llama(torch.tensor([row.prompt + row.answer])).logits[0, len(row.prompt) - 1 : -1]
        logits[:, MASK_ID] = -math.inf
        expected = logits.log_softmax(-1)
        for event, line in zip(events, expected, strict=True):
            assert math.log(event.confidence) == pytest.approx(float(line[event.token]), abs=1e-4)
            assert [token for token, _ in event.top] == line.topk(row.top or 1).indices.tolist()[: row.top]
            assert [value for _, value in event.top] == pytest.approx(
                line.topk(row.top or 1).values.tolist()[: row.top], abs=1e-4
            )
