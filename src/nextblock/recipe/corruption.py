"""From clean rows to the two-view sequence [noised ; clean] and the targets of its positions.

Corruption is a pure function of (seed, epoch, row number, step), never of rank, worker or batch split.
Letters: B rows, L tokens of a row, N slots of the noised half, T = N + L, S targets of a half,
K blocks of a row, b slots of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from nextblock.attention.rule import Places
from nextblock.config.sections import Context, Prediction, RecipeConfig
from nextblock.data.rows import Rows

UNSCORED = -1
NOISE_LEVELS = 8
PADDING = {"view": 1, "document": -1, "block_start": -1}
"""What fills up rows with fewer noised slots than the longest, where it is not 0."""


@dataclass(frozen=True)
class Targets:
    """The positions of one half that predict a token: S of them, row after row. Tensors int64 [S].

    Made on the CPU beside the batch, so that no step has to look for them or to ask the device how many they are.

    row, slot: where in the half, [B, N] or [B, L].
    token: what the hidden state there predicts.
    """

    row: Tensor
    slot: Tensor
    token: Tensor

    def __len__(self) -> int:
        return len(self.token)

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        return replace(self, **_moved(self, device))


@dataclass(frozen=True)
class MaskedTargets(Targets):
    """Those of the noised half, whose tokens are the masked ones.

    teacher: int64 [S], where in the clean half [B, L] the AR prediction of the token is made; 0 where there is none.
    has_teacher: bool [S], False for the first token of a document and for those that fill up a last block.
    noise: int64 [S], bin of the block's masked share, ceil(share * NOISE_LEVELS) - 1.
    offset: int64 [S], of the token in its block.
    previous: int64 [S], the clean token before it in its block; with aligned prediction of no meaning at offset 0.
    weight: float32 [S], what its loss counts by position decay (`recipe.offset_decay`); None: all count 1.
    drafts: int64 [K, b - 2], for each block that is masked whole its targets from offset 2 on, by number; S where
        there is none that the AR head would check. None: not asked for (`recipe.accept_weight`).
    """

    teacher: Tensor
    has_teacher: Tensor
    noise: Tensor
    offset: Tensor
    previous: Tensor
    weight: Tensor | None = None
    drafts: Tensor | None = None

    def none(self) -> MaskedTargets:
        """No target at all."""
        return replace(self, **{name: x[:0] for name, x in vars(self).items() if isinstance(x, Tensor)})


@dataclass(frozen=True)
class TwoView:
    """[noised ; clean], ready for one forward pass.

    tokens: int64 [B, T].
    places: where each token stands (what the attention rule reads); noised are those with view > 0.
    noised_length: N. The clean half starts there.
    masked: targets of the noised half. following: those of the clean half, each token's next.
    """

    tokens: Tensor
    places: Places
    noised_length: int
    masked: MaskedTargets
    following: Targets

    @property
    def target(self) -> Tensor:
        """int64 [B, T], the token that the hidden state at each position predicts, UNSCORED if none."""
        dense = torch.full_like(self.tokens, UNSCORED)
        for start, half in ((0, self.masked), (self.noised_length, self.following)):
            dense[half.row, half.slot + start] = half.token
        return dense

    def to(self, device: torch.device) -> TwoView:
        """The same view on `device`."""
        places = replace(self.places, **_moved(self.places, device))
        masked, following = self.masked.to(device), self.following.to(device)
        return TwoView(self.tokens.to(device, non_blocking=True), places, self.noised_length, masked, following)


def _moved(of: Any, device: torch.device) -> dict[str, Tensor]:
    return {name: x.to(device, non_blocking=True) for name, x in vars(of).items() if isinstance(x, Tensor)}


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
    `recipe.first_token: noised` is the other rule, for comparison: then it is masked like the others where a block of
    its span stands before it, and predicted by the last slot of that block in the noised half.

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
    ends = [end_token_id] if isinstance(end_token_id, int) else list(end_token_id or ())
    halves, seeds = [], []
    for row in range(len(rows)):
        key = (seed, int(rows.epoch[row]), int(rows.number[row]), step)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        halves.append(noised_half(rows, row, block_size, mask_token_id, ends, recipe, draw, generator))
        seeds.append([int(np.random.SeedSequence([*key, 1]).generate_state(1)[0]) >> 1])
    noised_length = max(half["tokens"].size for half in halves)
    noised = {name: padded([half[name] for half in halves], noised_length, PADDING.get(name, 0)) for name in halves[0]}
    clean = {
        "tokens": rows.tokens,
        "view": torch.zeros_like(rows.tokens),
        "document": rows.document,
        "position": rows.position,
        "block_start": torch.where(rows.offset >= 0, rows.position - rows.offset % block_size, rows.position),
    }
    both = {name: torch.cat([noised[name], values], dim=1) for name, values in clean.items()}
    return TwoView(
        tokens=both.pop("tokens"),
        places=Places(**both, seed=torch.tensor(seeds, dtype=torch.int64)),
        noised_length=noised_length,
        masked=masked_targets(noised, block_size, recipe),
        following=next_token_targets(rows, block_size, recipe.context),
    )


def padded(columns: Sequence[np.ndarray], length: int, padding: int) -> Tensor:
    """One column of each row as [B, length]."""
    return torch.from_numpy(np.stack([np.pad(x, (0, length - x.size), constant_values=padding) for x in columns]))


def masked_targets(noised: dict[str, Tensor], block_size: int, recipe: RecipeConfig) -> MaskedTargets:
    """Targets of the noised half, from its columns [B, N] (`noised_half`)."""
    row, slot = noised["masked"].nonzero(as_tuple=True)
    token, teacher, noise, offset = (noised[name][row, slot] for name in ("clean", "teacher", "noise", "offset"))
    previous = noised["clean"][row, (slot - 1).clamp_min(0)]
    # With shifted prediction the hidden state of slot i - 1 predicts slot i; first slots are never masked.
    before, weight = int(recipe.prediction == "shifted"), None
    if recipe.offset_decay is not None:
        weight = offset_weights(block_size, recipe.offset_decay, recipe.prediction)[offset - before]
    has_teacher, drafts = teacher != UNSCORED, None
    if recipe.accept_weight:
        drafts = draft_targets(offset, noised["whole"][row, slot] & has_teacher, block_size)
    taught = teacher.clamp_min(0), has_teacher
    return MaskedTargets(row, slot - before, token, *taught, noise, offset, previous, weight, drafts)


def draft_targets(offset: Tensor, counts: Tensor, block_size: int) -> Tensor:
    """`MaskedTargets.drafts` of targets with these offsets in their blocks, of which bool [S] `counts`.

    Prediction is shifted. Behind the known token, at offset 0, comes one that the AR head decides, so drafts stand at
    the offsets 2 to b - 1, those that count in front.
    """
    counts = counts & (offset > 1)
    first = counts & (offset == 2)
    drafts = torch.full((int(first.sum()), max(0, block_size - 2)), len(offset))
    drafts[first.cumsum(0)[counts] - 1, offset[counts] - 2] = counts.nonzero()[:, 0]
    return drafts


def offset_weights(block_size: int, decay: float, prediction: Prediction) -> Tensor:
    """float32 [b]: what the loss of the target of a block's slot counts, exp(-slot / decay) with mean 1.

    A draft is of use only if all before it are kept, so in speculative decoding early tokens of a block count most.
    With shifted prediction the last slot has no target, and the mean is over the others.
    """
    weights = torch.exp(-torch.arange(block_size) / decay)
    scored = max(1, block_size - 1) if prediction == "shifted" else block_size
    return weights / weights[:scored].mean()


def next_token_targets(rows: Rows, block_size: int, context: Context) -> Targets:
    """AR targets of the clean half   (Eq. 1): each token's next one in its document, where that is generated.

    In a block-causal clean half a token has seen the rest of its block, so only the first token of the
    next block is a prediction.
    """
    scored = (rows.document[:, 1:] == rows.document[:, :-1]) & (rows.offset[:, 1:] >= 0)
    if context == "block_causal":
        scored = scored & (rows.offset[:, 1:] % block_size == 0)
    row, slot = scored.nonzero(as_tuple=True)
    return Targets(row, slot, rows.tokens[row, slot + 1])


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


def block_grid(
    rows: Rows, row: int, offset: np.ndarray, block_size: int, ends: Sequence[int]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Cut a row's spans into K blocks; the last block of a span that one of `ends` ends is filled up with that token.

    Returns:
        bool [K, b], which slots exist; and int64 [K, b] by name: the `clean` token, `document`, `position`,
        `block_start`, `offset` in the block, and `teacher`, the index in the row of the token before, UNSCORED at a
        document's first token and past a span's end.
    """
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
    teacher = np.where(real & (slot_position > 0), first[:, None] + slot - 1, UNSCORED)
    own = {"clean": clean, "teacher": teacher, "document": document[first][:, None], "position": slot_position}
    own |= {"block_start": position[first][:, None], "offset": slot}
    return present, {name: np.broadcast_to(values, clean.shape) for name, values in own.items()}


def noised_half(
    rows: Rows,
    row: int,
    block_size: int,
    mask_token_id: int,
    ends: Sequence[int],
    recipe: RecipeConfig,
    draw: MaskDraw,
    generator: np.random.Generator,
) -> dict[str, np.ndarray]:
    """The columns of one row's noised slots, view after view: what `TwoView` and `MaskedTargets` tell of each slot.

    Random starts are drawn anew for each view or complementary pair of views.
    """
    parts: list[dict[str, np.ndarray]] = []
    while len(parts) < recipe.views:
        offset = random_starts(rows.offset[row].numpy(), block_size, recipe.random_start_share, generator)
        present, grid = block_grid(rows, row, offset, block_size, ends if recipe.fill_last_block else ())
        maskable = present.copy()
        if recipe.prediction == "shifted":
            # Behind a block of the same span the last slot of that block can predict it.
            starts = offset[(offset >= 0) & (offset % block_size == 0)]
            maskable[:, 0] = (starts > 0) & (recipe.first_token == "noised")
        most = np.maximum(maskable.sum(axis=1), 1)
        for masked in draw(generator, maskable):
            # A block in which nothing was masked carries no loss, unless it predicts the first token behind it.
            keep = present & (masked.any(axis=1, keepdims=True) | (recipe.first_token == "noised"))
            noise = (masked.sum(axis=1) * NOISE_LEVELS - 1) // most  # ceil(share * NOISE_LEVELS) - 1
            slots = {
                **grid,
                "tokens": np.where(masked, mask_token_id, grid["clean"]),
                "masked": masked,
                "view": np.full_like(grid["clean"], len(parts) + 1),
                "noise": np.broadcast_to(noise[:, None], masked.shape),
                "whole": np.broadcast_to((masked == maskable).all(axis=1, keepdims=True), masked.shape),
            }
            parts.append({name: values[keep] for name, values in slots.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
