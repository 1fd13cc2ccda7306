"""From rows to [noised ; clean]: what is masked, what it is scored against, and where the randomness comes from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from families import EOS_ID, MASK_ID
from layouts import CHAT, LAYOUTS, Spans, make_rows
from nextblock.config.sections import RecipeConfig
from nextblock.data.rows import Rows
from nextblock.recipe.corruption import UNSCORED, TwoView, corrupt

SHIFTED = RecipeConfig(fill_last_block=False)
ALIGNED = RecipeConfig(fill_last_block=False, prediction="aligned")


def view_of(rows: Rows, block_size: int, recipe: RecipeConfig = SHIFTED, *, seed: int = 0, step: int = 0) -> TwoView:
    return corrupt(rows, block_size, mask_token_id=MASK_ID, end_token_id=EOS_ID, recipe=recipe, seed=seed, step=step)


Slots = list[dict[str, int]]


def noised_slots(view: TwoView, row: int) -> Slots:
    """The noised half's real slots, in order."""
    columns = {
        "token": view.tokens,
        "target": view.target,
        "view": view.places.view,
        "document": view.places.document,
        "position": view.places.position,
        "block_start": view.places.block_start,
    }
    kept = [i for i in range(view.noised_length) if view.places.document[row, i] >= 0]
    return [{name: int(values[row, i]) for name, values in columns.items()} for i in kept]


def masked_counts(view: TwoView, row: int, blocks: int) -> list[int]:
    """Masked tokens of each block of a row of plain text; blocks that were left out count 0."""
    counts: dict[int, int] = {}
    for slot in noised_slots(view, row):
        counts[slot["block_start"]] = counts.get(slot["block_start"], 0) + (slot["token"] == MASK_ID)
    return list(counts.values()) + [0] * (blocks - len(counts))


def clean_token(rows: Rows, row: int, document: int, position: int) -> tuple[int, int]:
    """(token, offset) at a place of a row."""
    at = (rows.document[row] == document) & (rows.position[row] == position)
    assert int(at.sum()) == 1
    return int(rows.tokens[row][at]), int(rows.offset[row][at])


random_documents = st.lists(
    st.one_of(
        st.integers(1, 20).map(lambda n: [n]),
        st.tuples(st.integers(1, 6), st.integers(1, 12)).map(lambda p: [-p[0], p[1]]),
        st.tuples(*[st.integers(1, 7)] * 4).map(lambda p: [-p[0], p[1], -p[2], p[3]]),
    ),
    min_size=1,
    max_size=4,
)


def packed(documents: list[Spans]) -> Rows:
    return make_rows([documents], sum(abs(n) for spans in documents for n in spans) + 3)


# ------------------------------------------------------------------------------- what is masked


@settings(max_examples=60, deadline=None)
@given(random_documents, st.sampled_from([1, 2, 3, 4, 8, 32]), st.sampled_from(["shifted", "aligned"]))
def test_a_noised_slot_shows_the_mask_token_or_its_clean_token_and_only_generated_ones_are_noised(
    documents, block_size, prediction
):
    rows = packed(documents)
    view = view_of(rows, block_size, replace_recipe(SHIFTED, prediction=prediction), seed=block_size)
    for slot in noised_slots(view, 0):
        token, offset = clean_token(rows, 0, slot["document"], slot["position"])
        assert offset >= 0
        assert slot["token"] in (token, MASK_ID)
        assert slot["block_start"] == slot["position"] - offset % block_size
        if prediction == "shifted" and offset % block_size == 0:
            assert slot["token"] == token


@settings(max_examples=60, deadline=None)
@given(random_documents, st.sampled_from([2, 3, 4, 8, 32]))
def test_with_shifted_prediction_the_slot_before_a_masked_one_predicts_it_and_no_other_slot_is_scored(
    documents, block_size
):
    rows = packed(documents)
    slots = noised_slots(view_of(rows, block_size), 0)
    after: list[dict[str, int] | None] = [*slots[1:], None]
    for before, slot in zip(slots, after, strict=False):
        if slot is not None and slot["token"] == MASK_ID:
            assert slot["block_start"] == before["block_start"]
            assert slot["position"] == before["position"] + 1
            assert before["target"] == clean_token(rows, 0, slot["document"], slot["position"])[0]
        else:
            assert before["target"] == UNSCORED


@settings(max_examples=60, deadline=None)
@given(random_documents, st.sampled_from([1, 2, 3, 8]), st.sampled_from([1, 2]))
def test_first_tokens_from_the_noised_half_are_predicted_by_the_last_slot_of_the_noised_block_before(
    documents, block_size, views
):
    rows = packed(documents)
    recipe = RecipeConfig(fill_last_block=False, first_token="noised", views=views)
    slots = noised_slots(view_of(rows, block_size, recipe), 0)
    assert len(slots) == views * int((rows.offset >= 0).sum())  # every block of every view is there
    for before, slot in zip([None, *slots], slots, strict=False):
        token, offset = clean_token(rows, 0, slot["document"], slot["position"])
        if slot["token"] != MASK_ID:
            assert before is None or before["target"] == UNSCORED
            continue
        assert offset > 0  # the first token of a span is never masked
        assert before is not None
        assert (before["view"], before["document"]) == (slot["view"], slot["document"])
        assert before["position"] == slot["position"] - 1
        assert before["target"] == token
    assert slots == [] or slots[-1]["target"] == UNSCORED


def test_first_tokens_from_the_noised_half_are_masked_as_often_as_others():
    rows = make_rows([[[32]]], 32)
    recipe = RecipeConfig(fill_last_block=False, first_token="noised")
    counts = torch.zeros(4)
    for step in range(400):
        view = view_of(rows, 4, recipe, step=step)
        counts += (view.tokens[0, 4:32] == MASK_ID).view(7, 4).sum(0)
    assert counts.min() / counts.max() > 0.9
    assert counts.sum() / (400 * 28) == pytest.approx(0.5, abs=0.03)


@settings(max_examples=60, deadline=None)
@given(random_documents, st.sampled_from([1, 2, 4, 32]))
def test_with_aligned_prediction_a_masked_slot_predicts_itself_and_no_other_slot_is_scored(documents, block_size):
    rows = packed(documents)
    for slot in noised_slots(view_of(rows, block_size, ALIGNED), 0):
        wanted = clean_token(rows, 0, slot["document"], slot["position"])[0]
        assert slot["target"] == (wanted if slot["token"] == MASK_ID else UNSCORED)


def test_with_aligned_prediction_first_tokens_are_masked_too():
    slots = noised_slots(view_of(make_rows([[[64]]], 64), 4, ALIGNED), 0)
    assert any(slot["token"] == MASK_ID and slot["position"] % 4 == 0 for slot in slots)


@settings(max_examples=40, deadline=None)
@given(random_documents, st.sampled_from([2, 4, 8]), st.sampled_from(["shifted", "aligned"]))
def test_every_noised_block_is_whole_and_has_something_masked(documents, block_size, prediction):
    rows = packed(documents)
    view = view_of(rows, block_size, replace_recipe(SHIFTED, prediction=prediction))
    blocks: dict[tuple[int, int], Slots] = {}
    for slot in noised_slots(view, 0):
        blocks.setdefault((slot["document"], slot["block_start"]), []).append(slot)
    for (document, start), slots in blocks.items():
        assert any(slot["token"] == MASK_ID for slot in slots)
        same = (rows.document[0] == document) & (rows.offset[0] >= 0)
        position, offset = rows.position[0][same], rows.offset[0][same]
        members = position[position - offset % block_size == start].tolist()
        assert [slot["position"] for slot in slots] == members


def test_at_block_size_one_shifted_training_has_no_noised_half():
    for documents in LAYOUTS.values():
        view = view_of(make_rows([documents], 28), 1)
        assert view.noised_length == 0
        assert view.tokens.shape[1] == 28


# ------------------------------------------------------------------------------- the clean half


@settings(max_examples=40, deadline=None)
@given(random_documents, st.sampled_from([1, 4]))
def test_the_clean_half_is_the_row_and_each_token_predicts_the_next_generated_one_of_its_document(
    documents, block_size
):
    rows = packed(documents)
    view = view_of(rows, block_size)
    assert torch.equal(view.tokens[:, view.noised_length :], rows.tokens)
    assert not view.places.view[:, view.noised_length :].any()
    target, length = view.target[0, view.noised_length :], rows.tokens.shape[1]
    for at in range(length):
        following = at + 1 < length and bool(rows.document[0, at] == rows.document[0, at + 1])
        scored = following and rows.offset[0, at + 1] >= 0
        assert int(target[at]) == (int(rows.tokens[0, at + 1]) if scored else UNSCORED)


def test_in_a_block_causal_clean_half_only_the_first_token_of_a_block_is_predicted():
    rows = make_rows([CHAT], 28)
    view = view_of(rows, 4, replace_recipe(SHIFTED, context="block_causal"))
    target = view.target[0, view.noised_length :]
    scored = [at + 1 for at in range(28) if target[at] != UNSCORED]
    firsts = [
        at
        for at in range(1, 28)
        if rows.offset[0, at] >= 0 and rows.offset[0, at] % 4 == 0 and rows.position[0, at] > 0
    ]
    assert scored == firsts


# ------------------------------------------------------------------------------- the last block


def test_the_last_block_of_an_ended_span_is_filled_with_end_tokens_and_they_are_noised_like_others():
    rows = make_rows([[[-3, 6]]], 32, ended=True)
    whole = RecipeConfig(full_mask_share=1.0)
    slots = noised_slots(view_of(rows, 4, whole), 0)
    assert [slot["position"] for slot in slots] == list(range(3, 11))
    assert [slot["token"] == MASK_ID for slot in slots] == [False, True, True, True] * 2
    text = rows.tokens[0, 3:9].tolist()
    wanted = [*text[1:4], UNSCORED, text[5], EOS_ID, EOS_ID, UNSCORED]
    assert [slot["target"] for slot in slots] == wanted
    assert text[5] == EOS_ID


def test_a_span_that_another_end_token_ends_is_filled_with_that_one():
    rows, whole = make_rows([[[-3, 6]]], 32, ended=True), RecipeConfig(full_mask_share=1.0)
    turn_end = EOS_ID + 1
    rows.tokens[0, 8] = turn_end
    ends = [EOS_ID, turn_end]
    view = corrupt(rows, 4, mask_token_id=MASK_ID, end_token_id=ends, recipe=whole, seed=0, step=0)
    slots = noised_slots(view, 0)
    assert [slot["position"] for slot in slots] == list(range(3, 11))
    assert [slot["target"] for slot in slots][-4:] == [turn_end] * 3 + [UNSCORED]


def test_a_span_without_an_end_token_is_not_filled():
    rows = make_rows([[[-3, 6]]], 32)
    slots = noised_slots(view_of(rows, 4, RecipeConfig(full_mask_share=1.0)), 0)
    assert [slot["position"] for slot in slots] == list(range(3, 9))


def test_filling_stops_at_the_row_length_which_the_positions_are_known_to_allow():
    rows = make_rows([[[10]]], 10, ended=True)
    slots = noised_slots(view_of(rows, 8, RecipeConfig(full_mask_share=1.0)), 0)
    assert max(slot["position"] for slot in slots) == 9


# ------------------------------------------------------------------------------- noise levels


def chi_square(counts: list[int], outcomes: int) -> float:
    expected = len(counts) / outcomes
    observed = [sum(count == k for count in counts) for k in range(outcomes)]
    return sum((n - expected) ** 2 / expected for n in observed)


def test_uniform_noise_per_block_masks_every_number_of_a_blocks_tokens_equally_often():
    """t ~ U[0, 1] makes the number of masked among m maskable tokens uniform on 0 .. m.

    Pearson's statistic with 7 degrees of freedom is above 40.5 with probability 1e-6.
    """
    rows = make_rows([[[512]]] * 24, 512)
    view = view_of(rows, 8)
    counts = [count for row in range(24) for count in masked_counts(view, row, 64)]
    assert chi_square(counts, 8) < 40.5


def test_uniform_noise_per_row_masks_every_number_of_a_rows_tokens_equally_often():
    """As above over the 14 maskable tokens of a row; 14 degrees of freedom exceed 54.7 with probability 1e-6."""
    rows = make_rows([[[16]]] * 2000, 16)
    view = view_of(rows, 8, replace_recipe(SHIFTED, noise_per="row"))
    masked = (view.tokens[:, : view.noised_length] == MASK_ID).sum(dim=1)
    assert chi_square(masked.tolist(), 15) < 54.7


def test_within_a_block_no_position_is_masked_more_often_than_another():
    """Each of 7 rates over 1,536 blocks lies within 5 standard errors of 1/2, but with probability 4e-6."""
    view = view_of(make_rows([[[512]]] * 24, 512), 8)
    noised = view.places.view > 0
    masked = noised & (view.tokens == MASK_ID)
    slot = view.places.position - view.places.block_start
    for k in range(1, 8):
        rate = int((masked & (slot == k)).sum()) / (24 * 64)
        assert abs(rate - 0.5) < 5 * 0.5 / (24 * 64) ** 0.5


def test_full_mask_share_masks_that_share_of_blocks_whole():
    """Whole blocks: share + (1 - share) / 8 of 1,536; 5 standard errors fail with probability 6e-7."""
    view = view_of(make_rows([[[512]]] * 24, 512), 8, replace_recipe(SHIFTED, full_mask_share=0.4))
    whole = sum(count == 7 for row in range(24) for count in masked_counts(view, row, 64))
    rate, blocks = 0.4 + 0.6 / 8, 24 * 64
    assert abs(whole / blocks - rate) < 5 * (rate * (1 - rate) / blocks) ** 0.5


def test_random_starts_shift_all_blocks_of_a_span_by_one_draw_and_leave_the_rest_as_it_is():
    rows = make_rows([[[64], [-5, 64]]] * 16, 133)
    late = replace_recipe(SHIFTED, random_start_share=1.0, full_mask_share=1.0)
    view, plain = view_of(rows, 8, late), view_of(rows, 8)
    drawn = []
    for row in range(16):
        slots = noised_slots(view, row)
        for document, start in ((0, 0), (1, 5)):
            blocks = {slot["block_start"] - start for slot in slots if slot["document"] == document}
            first = min(blocks)
            assert 0 <= first < 8
            assert blocks <= set(range(first, 64, 8))  # a last block of one token has nothing to mask
            assert len(blocks) >= (64 - first) // 8
            drawn.append(first)
        assert all(slot["position"] - slot["block_start"] < 8 for slot in slots)
    assert len(set(drawn)) > 4
    assert torch.equal(view.target[:, view.noised_length :], plain.target[:, plain.noised_length :])


def test_random_starts_hold_for_their_share_of_spans():
    """1 of 8 late starts is a start on time: 0.5 * 7 / 8 of 512; 5 standard errors fail with probability 6e-7."""
    rows = make_rows([[[16]] * 8] * 64, 128)
    view = view_of(rows, 8, replace_recipe(SHIFTED, random_start_share=0.5, full_mask_share=1.0))
    late = {
        (row, slot["document"]) for row in range(64) for slot in noised_slots(view, row) if slot["block_start"] % 8
    }
    assert abs(len(late) / 512 - 7 / 16) < 5 * (7 / 16 * 9 / 16 / 512) ** 0.5


# ------------------------------------------------------------------------------- several views


def test_complementary_views_score_every_maskable_token_exactly_once():
    rows = make_rows([CHAT], 28)
    recipe = replace_recipe(SHIFTED, views=2, complementary=True)
    for step in range(5):
        slots = noised_slots(view_of(rows, 4, recipe, step=step), 0)
        masked = sorted((s["document"], s["position"]) for s in slots if s["token"] == MASK_ID)
        maskable = [
            (int(rows.document[0, at]), int(rows.position[0, at]))
            for at in range(28)
            if rows.offset[0, at] >= 0 and rows.offset[0, at] % 4
        ]
        assert masked == sorted(maskable)


def test_each_view_has_its_own_number_and_whole_blocks():
    slots = noised_slots(view_of(make_rows([[[32]]], 32), 4, replace_recipe(SHIFTED, views=3)), 0)
    assert {slot["view"] for slot in slots} == {1, 2, 3}
    places = [(slot["view"], slot["position"]) for slot in slots]
    assert len(places) == len(set(places))


# ------------------------------------------------------------------------------- randomness


def row_content(view: TwoView, row: int) -> list[Tensor]:
    """Everything random of one row, without the padding to the batch's longest."""
    real = view.places.document[row, : view.noised_length] >= 0
    columns = (view.tokens, view.target, view.places.view, view.places.position, view.places.block_start)
    return [column[row, : view.noised_length][real] for column in columns] + [view.places.seed[row]]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("recipe", [SHIFTED, ALIGNED, RecipeConfig(noise_per="row")])
def test_a_rows_corruption_does_not_depend_on_the_rows_beside_it(recipe):
    rows = make_rows([[[64]], CHAT, [[-9, 30]], [[3], [50]]], 64)
    together = view_of(rows, 4, recipe, step=3)
    for row in range(4):
        alone = view_of(rows.slice(row, row + 1), 4, recipe, step=3)
        assert same(row_content(together, row), row_content(alone, 0))
    reverse = Rows(*(getattr(rows, name).flip(0) for name in Rows.__dataclass_fields__))
    assert same(row_content(view_of(reverse, 4, recipe, step=3), 0), row_content(together, 3))


def test_corruption_changes_with_each_of_seed_epoch_number_and_step_and_with_nothing_else():
    rows = make_rows([[[64]]], 64)
    base = row_content(view_of(rows, 4, seed=1, step=1), 0)
    torch.manual_seed(123)
    assert same(base, row_content(view_of(rows, 4, seed=1, step=1), 0))
    one = torch.ones(1, dtype=torch.int64)
    others = [
        view_of(rows, 4, seed=2, step=1),
        view_of(rows, 4, seed=1, step=2),
        view_of(replace(rows, epoch=one), 4, seed=1, step=1),
        view_of(replace(rows, number=one), 4, seed=1, step=1),
    ]
    contents = [base, *(row_content(view, 0) for view in others)]
    for i, content in enumerate(contents):
        for other in contents[:i]:
            assert not torch.equal(content[-1], other[-1])
            assert not same(content[:-1], other[:-1])


def replace_recipe(recipe: RecipeConfig, **changes: object) -> RecipeConfig:
    """A copy of a recipe with some options changed, checked again."""
    return RecipeConfig.model_validate(recipe.model_dump() | changes)
