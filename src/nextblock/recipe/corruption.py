"""From clean rows to the two-view sequence [noised ; clean] and the targets of its positions.

Corruption is a pure function of (seed, epoch, row number, step), never of rank, worker or batch split.
Letters: B rows, L tokens of a row, N slots of the noised half, T = N + L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from nextblock.attention.rule import Places
from nextblock.config.sections import Context, Prediction, RecipeConfig
from nextblock.data.rows import Rows

UNSCORED = -1
NOISE_LEVELS = 8


@dataclass(frozen=True)
class TwoView:
    """[noised ; clean], ready for one forward pass.

    tokens: int64 [B, T].
    places: where each token stands (what the attention rule reads); noised are those with view > 0.
    target: int64 [B, T], the token that the hidden state at this position predicts, UNSCORED if none.
    teacher: int64 [B, N], where in the clean half the AR prediction of that token is made, so one before it
        in its document; UNSCORED where there is no target or no token before it in the row.
    noise: int64 [B, N], noise level of the slot's block: k where over k and up to k + 1 in NOISE_LEVELS of the
        tokens that may be masked are.
    noised_length: N. The clean half starts there.
    weight: float32 [B, N], what the loss of the target counts (`recipe.offset_decay`); None: all count 1.
    """

    tokens: Tensor
    places: Places
    target: Tensor
    teacher: Tensor
    noise: Tensor
    noised_length: int
    weight: Tensor | None = None

    def to(self, device: torch.device) -> TwoView:
        """The same view on `device`."""
        places = Places(**{k: v.to(device, non_blocking=True) for k, v in vars(self.places).items()})
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, places=places, **tensors)


def block_starts(position: Tensor, offset: Tensor, block_size: int) -> Tensor:
    """`position - offset % b` where tokens are generated, the own position elsewhere (DESIGN, section 2)."""
    return torch.where(offset >= 0, position - offset % block_size, position)


def row_generator(seed: int, epoch: int, number: int, step: int) -> np.random.Generator:
    """The random stream of one row at one step."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, number, step])))


MaskDraw = Callable[[np.random.Generator, np.ndarray], list[np.ndarray]]
"""draw(generator, maskable bool [K, b]) -> masks of one or more views, bool [K, b], True = becomes the mask token."""


def draw_by_level(recipe: RecipeConfig) -> MaskDraw:
    """Noise of training: t ~ Uniform[0, 1] per block or row, each maskable token masked with probability t.

    Views come one by one, or in complementary pairs, of which the second masks what the first left, so that
    every maskable token is scored exactly once over the two   (paper, section 6.1; several views of one clean
    pass are ours).
    """

    def draw(generator: np.random.Generator, maskable: np.ndarray) -> list[np.ndarray]:
        blocks = len(maskable)
        level = generator.random(blocks)
        if recipe.noise_per == "row":
            level = np.broadcast_to(level[:1], (blocks,))
        level = np.where(generator.random(blocks) < recipe.full_mask_share, 1.0, level)
        masked = maskable & (generator.random(maskable.shape) < level[:, None])
        return [masked, maskable & ~masked] if recipe.complementary else [masked]

    return draw


def corrupt(
    rows: Rows,
    block_size: int,
    *,
    mask_token_id: int,
    end_token_id: int | Sequence[int] | None,
    recipe: RecipeConfig,
    seed: int,
    step: int,
    draw: MaskDraw | None = None,
) -> TwoView:
    """Noise rows at block size b and lay them out for the parallel pass   (paper, section 6.1 and Fig. 4).

    The noised half holds only blocks in which something was masked. With shifted prediction a block's
    first token is never masked, so that at b = 1 the noised half is empty and the pass is plain AR training.

    The last block of a span that ended with an end token is filled up to b slots with that token
    (`recipe.fill_last_block`): decoding always meets whole blocks, and cut ones would tell the model
    where the text ends.

    Args:
        rows: packed rows, [B, L].
        block_size: b.
        mask_token_id: its id in the model's vocabulary.
        end_token_id: one or several tokens that end a span (`encoding.span_ends`).
        recipe: noise and prediction options.
        seed, step: with each row's epoch and number, the whole source of randomness.
        draw: which tokens are masked; default: `draw_by_level(recipe)`. Called until there are `recipe.views` views.
    Returns:
        The two-view batch; rows with fewer noised slots are padded to the longest.
    """
    draw = draw or draw_by_level(recipe)
    halves, seeds = [], []
    for row in range(len(rows)):
        key = (seed, int(rows.epoch[row]), int(rows.number[row]), step)
        generator = row_generator(*key)
        grids = _grids(rows, row, block_size, end_token_id, recipe, generator)
        halves.append(_noised_half(grids, mask_token_id, recipe, draw, generator))
        seeds.append([int(np.random.SeedSequence([*key, 1]).generate_state(1)[0]) >> 1])
    noised_length = max((half["tokens"].size for half in halves), default=0)

    def stack(name: str, padding: int) -> Tensor:
        padded = [np.pad(half[name], (0, noised_length - half[name].size), constant_values=padding) for half in halves]
        return torch.from_numpy(np.stack(padded))

    noised_target, teacher = stack("target", UNSCORED), stack("teacher", UNSCORED)
    if recipe.prediction == "shifted":
        # The hidden state of slot i - 1 predicts slot i; first slots are unscored, so no target leaves its block.
        noised_target, teacher = noised_target.roll(-1, 1), teacher.roll(-1, 1)
    places = Places(
        view=torch.cat([stack("view", 1), torch.zeros_like(rows.tokens)], dim=1),
        document=torch.cat([stack("document", -1), rows.document], dim=1),
        position=torch.cat([stack("position", 0), rows.position], dim=1),
        block_start=torch.cat([stack("block_start", -1), block_starts(rows.position, rows.offset, block_size)], dim=1),
        seed=torch.tensor(seeds, dtype=torch.int64).reshape(len(rows), 1),
    )
    weight = None
    if recipe.offset_decay is not None:
        slot = (places.position - places.block_start)[:, :noised_length]
        weight = offset_weights(block_size, recipe.offset_decay, recipe.prediction)[slot.clamp(0, block_size - 1)]
    return TwoView(
        tokens=torch.cat([stack("tokens", 0), rows.tokens], dim=1),
        places=places,
        target=torch.cat([noised_target, next_token_targets(rows, block_size, recipe.context)], dim=1),
        teacher=teacher,
        noise=stack("noise", 0),
        noised_length=noised_length,
        weight=weight,
    )


def offset_weights(block_size: int, decay: float, prediction: Prediction) -> Tensor:
    """float32 [b]: what the loss of the target of a block's slot counts, exp(-slot / decay) with mean 1.

    A draft is of use only if all before it are kept, so in speculative decoding early tokens of a block count most.
    With shifted prediction the last slot has no target, and the mean is over the others.
    """
    weights = torch.exp(-torch.arange(block_size) / decay)
    scored = max(1, block_size - 1) if prediction == "shifted" else block_size
    return weights / weights[:scored].mean()


def next_token_targets(rows: Rows, block_size: int, context: Context) -> Tensor:
    """AR targets of the clean half   (Eq. 1): int64 [B, L], UNSCORED where the next token is not generated.

    In a block-causal clean half a token has seen the rest of its block, so only the first token of the
    next block is a prediction.
    """
    target = torch.full_like(rows.tokens, UNSCORED)
    scored = (rows.document[:, 1:] == rows.document[:, :-1]) & (rows.offset[:, 1:] >= 0)
    if context == "block_causal":
        scored = scored & (rows.offset[:, 1:] % block_size == 0)
    target[:, :-1] = torch.where(scored, rows.tokens[:, 1:], target[:, :-1])
    return target


@dataclass(frozen=True)
class BlockGrid:
    """One row's generated tokens as K blocks of b slots. Arrays [K, b]; slots that are not `present` are void.

    teacher: index in the row of the token before, UNSCORED at a document's first token and past a span's end.
    """

    clean: np.ndarray
    present: np.ndarray
    teacher: np.ndarray
    document: np.ndarray
    position: np.ndarray
    block_start: np.ndarray


def random_starts(offset: np.ndarray, block_size: int, share: float, generator: np.random.Generator) -> np.ndarray:
    """Offsets int64 [L] with which, in a `share` of spans, the first block starts up to b - 1 tokens late.

    Diffusion mode meets blocks at multiples of b only, speculative mode wherever the last check ended.
    Tokens before a late start are -1: not noised, and still scored by the AR loss.
    """
    if not share:
        return offset
    starts = offset == 0
    count = int(starts.sum())
    late = generator.integers(0, block_size, count) * (generator.random(count) < share)
    late = np.where(offset >= 0, np.append(late, 0)[np.cumsum(starts) - 1], 0)
    return np.where(offset >= late, offset - late, -1)


def block_grid(rows: Rows, row: int, offset: np.ndarray, block_size: int, ends: Sequence[int]) -> BlockGrid:
    """Cut a row's spans into blocks; the last block of a span that one of `ends` ends is filled up with that token."""
    tokens, document, position = (getattr(rows, name)[row].numpy() for name in ("tokens", "document", "position"))
    starts = (offset >= 0) & (offset % block_size == 0)
    first = np.flatnonzero(starts)
    block_of = np.where(offset >= 0, np.cumsum(starts) - 1, -1)
    length = np.bincount(block_of[block_of >= 0], minlength=first.size)

    slot = np.arange(block_size)
    real = slot < length[:, None]
    slot_position = position[first][:, None] + slot
    last = tokens[first + length - 1][:, None]
    # Not past the row's length, which the model's positions are known to allow.
    present = real | (np.isin(last, ends) & (slot_position < tokens.size))
    clean = np.where(real, tokens[np.minimum(first[:, None] + slot, tokens.size - 1)], last)
    return BlockGrid(
        clean=clean,
        present=present,
        teacher=np.where(real & (slot_position > 0), first[:, None] + slot - 1, UNSCORED),
        document=np.broadcast_to(document[first][:, None], clean.shape),
        position=slot_position,
        block_start=np.broadcast_to(position[first][:, None], clean.shape),
    )


def _grids(
    rows: Rows,
    row: int,
    block_size: int,
    end_token_id: int | Sequence[int] | None,
    recipe: RecipeConfig,
    generator: np.random.Generator,
) -> Iterator[BlockGrid]:
    """A row's blocks, with random starts drawn anew for each view or complementary pair of views."""
    ends = [end_token_id] if isinstance(end_token_id, int) else list(end_token_id or ())
    ends = ends if recipe.fill_last_block else []
    while True:
        offset = random_starts(rows.offset[row].numpy(), block_size, recipe.random_start_share, generator)
        yield block_grid(rows, row, offset, block_size, ends)


def _noised_half(
    grids: Iterator[BlockGrid],
    mask_token_id: int,
    recipe: RecipeConfig,
    draw: MaskDraw,
    generator: np.random.Generator,
) -> dict[str, np.ndarray]:
    """One row's noised slots, view after view, with unshifted targets (slot i's own clean token)."""
    parts: dict[str, list[np.ndarray]] = {}
    view = 0
    while view < recipe.views:
        grid = next(grids)
        maskable = grid.present.copy()
        if recipe.prediction == "shifted":
            maskable[:, :1] = False
        for masked in draw(generator, maskable):
            view += 1
            # A block in which nothing was masked carries no loss.
            keep = grid.present & masked.any(axis=1, keepdims=True)
            most = np.maximum(maskable.sum(axis=1), 1)
            level = (masked.sum(axis=1) * NOISE_LEVELS - 1) // most
            slots = {
                "tokens": np.where(masked, mask_token_id, grid.clean),
                "target": np.where(masked, grid.clean, UNSCORED),
                "teacher": np.where(masked, grid.teacher, UNSCORED),
                "noise": np.broadcast_to(level[:, None], grid.clean.shape),
                "view": np.full_like(grid.clean, view),
                "document": grid.document,
                "position": grid.position,
                "block_start": grid.block_start,
            }
            for name, values in slots.items():
                parts.setdefault(name, []).append(values[keep].astype(np.int64))
    return {name: np.concatenate(values) for name, values in parts.items()}
