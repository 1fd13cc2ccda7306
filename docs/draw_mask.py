"""Draw `docs/mask.svg`: the attention mask of one packed row, entry by entry from the rule that training uses.

python docs/draw_mask.py > docs/mask.svg
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nextblock.attention.masks import to_dense
from nextblock.attention.rule import block_diffusion_rule
from nextblock.config.sections import RecipeConfig
from nextblock.data.rows import Document, Rows, collate
from nextblock.recipe.corruption import TwoView, corrupt

BLOCK_SIZE = 4
TEXT = ["the", "cat", "sat", "on", "the", "mat", ".", "END"]
WORDS = [*TEXT, "how", "many", "?", "it", "is", "four", "END"]  # one token each
DOCUMENTS = (("text", 0, 8), ("prompt + completion", 3, 4))  # name, context tokens, generated tokens
END, MASK = 100, 101
MASKED = ((0, 1, 0, 1), (0, 1, 1, 0), (0, 0, 1, 1))  # which tokens of each block the noise took

CELL, LEFT, TOP = 22, 138, 118
COLOURS = {"M_BD": "#e07b39", "M_OBC": "#3f78b5", "M_CC": "#4f9d69"}
EMPTY, INK, FAINT = "#eeeeee", "#222222", "#777777"
LEGEND = {
    "M_BD": "noised → noised: same block, both directions",
    "M_OBC": "noised → clean: earlier blocks and context",
    "M_CC": "clean → clean: itself and earlier tokens",
}


def row() -> Rows:
    """The packed row: a text of two blocks, then a prompt with a completion of one block."""
    tokens = np.array([END if word == "END" else number for number, word in enumerate(WORDS)])
    documents, start = [], 0
    for _, context, generated in DOCUMENTS:
        length = context + generated
        offset = np.concatenate([np.full(context, -1), np.arange(generated)])
        documents.append(Document(tokens[start : start + length], offset))
        start += length
    return collate([documents], start, pad=END, epoch=0, number=0)


def two_views() -> TwoView:
    """[noised ; clean] of the row, as `corrupt` lays it out."""
    return corrupt(
        row(),
        BLOCK_SIZE,
        mask_token_id=MASK,
        end_token_id=END,
        recipe=RecipeConfig(),
        seed=0,
        step=0,
        draw=lambda generator, maskable: [maskable & np.array(MASKED, dtype=bool)],
    )


def regions(view: TwoView) -> tuple[Tensor, list[list[str | None]]]:
    """The mask, bool [T, T], and for each entry that is allowed the name of its part of Eq. 4."""
    allowed = to_dense(block_diffusion_rule(), view.places)[0, 0]
    noised = (view.places.view[0] > 0).tolist()

    def part(query: int, key: int) -> str | None:
        if not allowed[query, key]:
            return None
        if noised[query]:
            return "M_BD" if noised[key] else "M_OBC"
        assert not noised[key], "a clean token never sees a noised one"
        return "M_CC"

    length = len(noised)
    return allowed, [[part(query, key) for key in range(length)] for query in range(length)]


def draw() -> str:
    """The picture as SVG."""
    view = two_views()
    _, parts = regions(view)
    length, size = len(parts), len(parts) * CELL
    width, height = LEFT + size + 20, TOP + size + 96
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="DejaVu Sans, Verdana, sans-serif" fill="{INK}">',
        "<title>Attention mask of the parallel pass over [noised ; clean], block size 4</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for part, colour in {None: EMPTY, **COLOURS}.items():
        cells = [(query, key) for query in range(length) for key in range(length) if parts[query][key] == part]
        side = CELL - 2
        path = "".join(f"M{LEFT + k * CELL + 1} {TOP + q * CELL + 1}h{side}v{side}h-{side}z" for q, k in cells)
        out.append(f'<path fill="{colour}" d="{path}"/>')
    out += _tokens(view) + _groups(view) + _borders(view, size) + _legend(size)
    return "\n".join([*out, "</svg>"]) + "\n"


def _text(x: float, y: float, words: str, size: int, anchor: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{style}>{words}</text>'


def _turned(x: float, y: float, words: str, size: int, anchor: str, style: str = "") -> str:
    return _text(x, y, words, size, anchor, f'{style} transform="rotate(-90 {x:g} {y:g})"')


def _tokens(view: TwoView) -> list[str]:
    """The row's words beside and above the cells; the mask token as M."""
    names = {MASK: "M", END: "[end]"}
    out = []
    for slot, token in enumerate(view.tokens[0].tolist()):
        word, middle = names.get(token, WORDS[token] if token < len(WORDS) else ""), slot * CELL + CELL / 2 + 4
        style = ' font-weight="bold"' if token == MASK else ""
        out += [
            _text(LEFT - 6, TOP + middle, word, 12, "end", style),
            _turned(LEFT + middle, TOP - 6, word, 12, "start", style),
        ]
    return out


def _groups(view: TwoView) -> list[str]:
    """Names of the halves and of the documents in them."""
    out, length = [], view.tokens.shape[1]
    halves = (("noised x_t", 0, view.noised_length), ("clean x", view.noised_length, length))
    for name, low, high in halves:
        middle = (low + high) / 2 * CELL
        style = ' font-weight="bold"'
        out.append(_text(LEFT + middle, 18, name, 15, "middle", style))
        out.append(_turned(20, TOP + middle, name, 15, "middle", style))
        for number, (document, _, _) in enumerate(DOCUMENTS):
            own = [s for s in range(low, high) if view.places.document[0, s] == number]
            start, stop = own[0] * CELL, (own[-1] + 1) * CELL
            # Of a prompt and its completion the noised half holds the completion alone.
            words = document if low or number == 0 else "completion"
            at = (start + stop) / 2
            out += [_text(LEFT + at, 42, words, 12, "middle"), _turned(44, TOP + at, words, 12, "middle")]
            line = f'stroke="{FAINT}" stroke-width="1.5"'
            out.append(f'<line x1="{LEFT + start + 3}" y1="49" x2="{LEFT + stop - 3}" y2="49" {line}/>')
            out.append(f'<line x1="51" y1="{TOP + start + 3}" x2="51" y2="{TOP + stop - 3}" {line}/>')
    out.append(_text(LEFT - 14, 86, "keys →", 12, "end", f' fill="{FAINT}"'))
    out.append(_text(LEFT - 14, 104, "queries ↓", 12, "end", f' fill="{FAINT}"'))
    return out


def _borders(view: TwoView, size: int) -> list[str]:
    """Thin lines between blocks and documents, a thick one between the halves."""
    out, places = [], view.places
    in_block = (row().offset[0] >= 0).tolist()
    slots = [(int(places.view[0, s]), int(places.document[0, s])) for s in range(view.tokens.shape[1])]
    for slot in range(1, len(slots)):
        clean = slot - view.noised_length
        context = clean > 0 and not in_block[clean] and not in_block[clean - 1]
        same = slots[slot] == slots[slot - 1]
        if same and (context or places.block_start[0, slot] == places.block_start[0, slot - 1]):
            continue
        thick = slots[slot][0] != slots[slot - 1][0]
        stroke = f'stroke="{INK}" stroke-width="{3 if thick else 1}"' + ("" if thick else ' stroke-dasharray="2 3"')
        at = slot * CELL
        out.append(f'<line x1="{LEFT + at}" y1="{TOP}" x2="{LEFT + at}" y2="{TOP + size}" {stroke}/>')
        out.append(f'<line x1="{LEFT}" y1="{TOP + at}" x2="{LEFT + size}" y2="{TOP + at}" {stroke}/>')
    out.append(f'<rect x="{LEFT}" y="{TOP}" width="{size}" height="{size}" fill="none" stroke="{INK}"/>')
    return out


def _legend(size: int) -> list[str]:
    out = []
    for line, (part, meaning) in enumerate(LEGEND.items()):
        y = TOP + size + 18 + line * 25
        out.append(f'<rect x="{LEFT}" y="{y}" width="16" height="16" fill="{COLOURS[part]}"/>')
        out.append(_text(LEFT + 25, y + 13, part, 13, "start", ' font-weight="bold"'))
        out.append(_text(LEFT + 92, y + 13, meaning, 13, "start"))
    x = LEFT + size - 186
    out.append(f'<rect x="{x}" y="{TOP + size + 18}" width="16" height="16" fill="{EMPTY}"/>')
    out.append(_text(x + 25, TOP + size + 31, "not allowed", 13, "start"))
    out.append(_text(x, TOP + size + 56, "M: the mask token", 13, "start"))
    out.append(_text(x, TOP + size + 81, f"block size {BLOCK_SIZE}", 13, "start"))
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(draw(), end="")
