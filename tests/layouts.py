"""Packed rows for tests, and a slow reading of the attention rule, both written straight from the rule.

A document is a list of counts: 5 stands for a generated span of five tokens, -5 for five of context.
`[13]` is plain text, `[-5, 9]` a prompt and its completion, `[-4, 6, -3, 7]` a chat of two turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from families import EOS_ID, MASK_ID
from nextblock.attention.rule import Places
from nextblock.data.rows import Rows

Spans = list[int]

PLAIN: list[Spans] = [[13], [6], [1]]
PROMPTED: list[Spans] = [[-5, 9], [-1, 4]]
CHAT: list[Spans] = [[-4, 6, -3, 7], [5]]
LAYOUTS = {"plain text": PLAIN, "prompt and completion": PROMPTED, "two-turn chat": CHAT}


def make_rows(
    documents: Sequence[Sequence[Spans]], length: int, *, seed: int = 0, ended: bool = False, first_number: int = 0
) -> Rows:
    """One packed row for each entry of `documents`, random tokens; `ended`: each span closes with the end token."""
    generator = torch.Generator().manual_seed(seed)
    count = len(documents)
    tokens = torch.zeros(count, length, dtype=torch.int64)
    document, offset = torch.full_like(tokens, -1), torch.full_like(tokens, -1)
    position = torch.zeros_like(tokens)
    for row, packed in enumerate(documents):
        at = 0
        for number, spans in enumerate(packed):
            start = at
            for span in spans:
                for k in range(abs(span)):
                    tokens[row, at] = torch.randint(EOS_ID + 1, MASK_ID, (), generator=generator)
                    document[row, at], position[row, at] = number, at - start
                    offset[row, at] = k if span > 0 else -1
                    at += 1
                if ended and span > 0:
                    tokens[row, at - 1] = EOS_ID
    numbers = torch.arange(first_number, first_number + count)
    return Rows(tokens, document, position, offset, torch.zeros_like(numbers), numbers)


@dataclass(frozen=True)
class Slot:
    """One token of the two-view sequence, described without block arithmetic.

    `block` lists the (document, position) of the block's tokens; None for context and padding.
    """

    view: int
    document: int
    position: int
    block: tuple[tuple[int, int], ...] | None


def slots_of_row(rows: Rows, row: int, block_size: int, noised: Sequence[int] = ()) -> list[Slot]:
    """The clean row's slots, and before them the generated ones once for each view named in `noised`."""
    blocks: list[list[tuple[int, int]]] = []
    block_of: dict[int, int] = {}
    for at in range(rows.tokens.shape[1]):
        place = (int(rows.document[row, at]), int(rows.position[row, at]))
        offset = int(rows.offset[row, at])
        if offset < 0:
            continue
        if offset == 0 or len(blocks[-1]) == block_size:
            blocks.append([])
        blocks[-1].append(place)
        block_of[at] = len(blocks) - 1

    def slot(at: int, view: int) -> Slot:
        block = tuple(blocks[block_of[at]]) if at in block_of else None
        return Slot(view, int(rows.document[row, at]), int(rows.position[row, at]), block)

    everywhere = range(rows.tokens.shape[1])
    return [slot(at, v) for v in noised for at in everywhere if at in block_of] + [slot(at, 0) for at in everywhere]


def may_look(query: Slot, key: Slot, context: str = "context_causal") -> bool:
    """Eq. 4 for one pair of real tokens: M_BD, M_OBC, M_CC, and nothing from clean to noised."""
    if query.document != key.document:
        return False
    if query.view and key.view:  # M_BD: same noised view, same block
        return query.view == key.view and query.block == key.block
    if query.view:  # M_OBC: clean tokens before the first of the own block
        assert query.block is not None
        return key.position < query.block[0][1]
    if key.view:
        return False
    if key.position <= query.position:  # M_CC
        return True
    return context == "block_causal" and query.block is not None and query.block == key.block


def places_of(slots: Sequence[Slot], seed: int = 5) -> Places:
    """The same slots as the program's tensors [1, T]."""
    start = [slot.block[0][1] if slot.block else slot.position for slot in slots]
    columns = {
        "view": [slot.view for slot in slots],
        "document": [slot.document for slot in slots],
        "position": [slot.position for slot in slots],
        "block_start": start,
        "seed": [seed],
    }
    return Places(**{field.name: torch.tensor([columns[field.name]]) for field in fields(Places)})
