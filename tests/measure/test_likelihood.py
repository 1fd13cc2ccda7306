"""Bits per byte against plain sums of log-probabilities, and task scores against answers graded one by one."""

from __future__ import annotations

import itertools
import math
import weakref
from importlib import import_module
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

import nextblock as nb
from families import EOS_ID, MASK_ID, tiny_model
from layouts import CHAT, PLAIN, PROMPTED, make_rows
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.data.rows import Rows
from nextblock.measure.accuracy import score_task
from nextblock.measure.likelihood import BitsPerByte, bits_per_byte, likelihood_table
from nextblock.model.decoder import Decoder
from nextblock.recipe.likelihood import ar_nats as row_nats
from nextblock.recipe.likelihood import bound_nats
from nextblock.tasks import get_task
from nextblock.workflows import held_out

ROWS = make_rows([PLAIN, PROMPTED, CHAT], 28)
workflow: Any = import_module("nextblock.workflows.adapt")  # its function has the same name


class TwoBytes:
    """A tokenizer whose every token is one character of two bytes."""

    eos_token_id = EOS_ID

    def decode(self, ids: list[int], **_: Any) -> str:
        return "é" * len(ids)


def documents(rows: Rows) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, offset) of each document."""
    found = []
    for row in range(len(rows)):
        for number in range(int(rows.document[row].max()) + 1):
            own = rows.document[row] == number
            found.append((rows.tokens[row][own], rows.offset[row][own]))
    return found


def nats(model: PreTrainedModel, tokens: torch.Tensor, at: int, target: int, seen_from: int) -> float:
    """-log p(target) at position `at`; positions from `seen_from` on see each other, those before are causal."""
    length = len(tokens)
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[seen_from:, seen_from:] = True
    logits = model(input_ids=tokens[None], attention_mask=mask[None, None], use_cache=False).logits[0]
    return -float(logits[at].log_softmax(-1)[target])


@torch.no_grad()
def ar_nats(model: PreTrainedModel, only_first_of: int = 1) -> tuple[float, int]:
    """Sum over generated tokens with a token before them, at offsets that are multiples of `only_first_of`; count."""
    total, count = 0.0, 0
    for tokens, offset in documents(ROWS):
        for i in range(1, len(tokens)):
            if offset[i] >= 0 and offset[i] % only_first_of == 0:
                total, count = total + nats(model, tokens[: i + 1], i - 1, int(tokens[i]), i + 1), count + 1
    return total, count


@torch.no_grad()
def test_the_ar_measure_is_exact_and_of_the_tokens_that_have_one_before_them():
    model = tiny_model("qwen3")
    total, count = ar_nats(model)
    (found,) = bits_per_byte(Decoder(model), TwoBytes(), ROWS)
    assert (found.measure, found.bytes) == ("AR (exact)", 2 * count)
    assert found.value == pytest.approx(total / math.log(2) / (2 * count), rel=1e-4)


@torch.no_grad()
def test_at_two_tokens_a_block_the_bound_is_the_ar_head_and_one_masked_token_in_turns():
    """Shifted prediction masks all but a block's first token: at b = 2 nothing is left to chance."""
    model = tiny_model("qwen3")
    total, _ = ar_nats(model, only_first_of=2)
    count = ar_nats(model)[1]
    for tokens, offset in documents(ROWS):
        for i in range(len(tokens)):
            if offset[i] >= 0 and offset[i] % 2 == 1:
                noised = torch.cat([tokens[:i], torch.tensor([MASK_ID])])
                total += nats(model, noised, i - 1, int(tokens[i]), i - 1)
    settings = BlockDiffusionSettings(block_size=2, mask_token_id=MASK_ID)
    found = bits_per_byte(Decoder(model), TwoBytes(), ROWS, settings, draws=2)[1]
    assert (found.measure, found.block_size, found.bytes) == ("diffusion (bound)", 2, 2 * count)
    assert found.value == pytest.approx(total / math.log(2) / (2 * count), rel=1e-4)


@torch.no_grad()
def test_aligned_prediction_pays_for_the_first_token_of_a_text_as_well_and_counts_its_bytes():
    model = tiny_model("qwen3")
    total, count = 0.0, 0
    for tokens, offset in documents(ROWS):
        for i in range(len(tokens)):
            if offset[i] >= 0:
                noised = torch.cat([tokens[:i], torch.tensor([MASK_ID])])
                total, count = total + nats(model, noised, i, int(tokens[i]), i), count + 1
    settings = BlockDiffusionSettings(block_size=1, mask_token_id=MASK_ID, prediction="aligned")
    found = bits_per_byte(Decoder(model), TwoBytes(), ROWS, settings, draws=1)
    assert found[1].bytes == 2 * count > found[0].bytes
    assert found[1].value == pytest.approx(total / math.log(2) / (2 * count), rel=1e-4)


@torch.no_grad()
def test_a_model_that_was_trained_without_filled_blocks_is_measured_without():
    """b = 8, shifted: of the last block the AR head gives 41, and the end token is the only one that is masked."""
    model, tokens = tiny_model("qwen3"), torch.tensor([40, 41, EOS_ID])
    rows = make_rows([[[-1, 2]]], 16)
    rows.tokens[0, :3] = tokens
    noised = torch.tensor([40, 41, MASK_ID])
    expected = nats(model, tokens[:2], 0, 41, 2) + nats(model, noised, 1, EOS_ID, 1)
    settings = BlockDiffusionSettings(block_size=8, mask_token_id=MASK_ID)
    found, filled = (
        bits_per_byte(Decoder(model), TwoBytes(), rows, settings, fill_last_block=fill)[1].value * math.log(2) * 4
        for fill in (False, True)
    )
    assert found == pytest.approx(expected, rel=1e-4)
    assert filled > 2 * found  # it pays for six end tokens more


@torch.no_grad()
def test_the_bound_averages_over_how_many_tokens_of_a_block_are_masked():
    """b = 3, shifted, one block: m = 1 or 2 of two tokens, weighed 2 / m; the mean over many draws."""
    model, tokens = tiny_model("qwen3"), torch.tensor([40, 41, 42, 43])
    rows = make_rows([[[-1, 3]]], 4)
    rows.tokens[0, :4] = tokens

    def noised_nats(masked: tuple[int, ...]) -> float:
        noised = tokens.clone()
        noised[list(masked)] = MASK_ID
        return sum(nats(model, noised, i - 1, int(tokens[i]), 1) for i in masked)

    one = (noised_nats((2,)) + noised_nats((3,))) / 2
    expected = nats(model, tokens[:2], 0, 41, 2) + (2 * one + noised_nats((2, 3))) / 2
    settings = BlockDiffusionSettings(block_size=3, mask_token_id=MASK_ID)
    found = bits_per_byte(Decoder(model), TwoBytes(), rows, settings, draws=3000)[1].value * math.log(2) * 6
    spread = max(abs(2 * noised_nats((i,)) - expected) for i in (2, 3)) + abs(noised_nats((2, 3)) - expected)
    assert found == pytest.approx(expected, abs=5 * spread / math.sqrt(3000) + 1e-3)


def test_a_bad_bound_is_shown_in_a_few_digits():
    bad = BitsPerByte("diffusion (bound)", 32, 200.0, 900, 300, 3.21e60, 1.5)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(likelihood_table([bad, BitsPerByte("AR (exact)", None, 2.0, 900, 300, 1234.5)]))
    assert "3.21e+60" in captured.get()
    assert "1,234.50" in captured.get()


def test_a_task_score_is_that_of_the_answers_graded_one_by_one():
    lm, task = nb.load("tiny-bd"), get_task("word_problems")
    cases = [task.example("test", index) for index in range(5)]
    done: list[int] = []
    ar, answers = score_task(lm, task, mode="ar", examples=5, batch_size=2, on_example=done.append)
    alone = [lm.generate(case.prompt, mode="ar", max_new_tokens=160).texts[0] for case in cases]
    assert answers == alone
    assert ar.accuracy == sum(task.grade(text, case) for text, case in zip(alone, cases, strict=True)) / 5
    assert (ar.tokens_per_forward, ar.equal_to_ar, ar.block_size, done) == (1.0, None, 1, [2, 2, 1])
    fast, same = score_task(lm, task, mode="speculative", examples=5, reference=answers)
    assert (same, fast.equal_to_ar, fast.accuracy) == (answers, 1.0, ar.accuracy)
    stats = lm.generate([case.prompt for case in cases], mode="speculative", max_new_tokens=160).stats
    assert fast.tokens_per_forward == pytest.approx(stats.tokens_per_forward)
    later = score_task(lm, task, mode="ar", examples=2, first=3)[1]
    assert later == answers[3:]
    changed = [answers[0] + "!", *answers[1:]]
    assert score_task(lm, task, mode="speculative", examples=5, reference=changed)[0].equal_to_ar == 0.8


@pytest.mark.parametrize("section", [{}, {"draft_adapter": {"rank": 2}}, {"lora": {"rank": 2}}])
def test_the_final_evaluation_holds_one_model_at_a_time_and_no_optimizer(section, tmp_path, monkeypatch):
    tiny_model("llama", vocab_size=260, std=0.08).save_pretrained(tmp_path / "parent")
    alive: dict[str, Any] = {}
    seen: list[str] = []
    homes = {"train": workflow, "bits_per_byte": held_out, "load_parent": held_out}
    real = {name: getattr(home, name) for name, home in homes.items()}

    def train(*arguments: Any, **options: Any) -> Any:
        run = real["train"](*arguments, **options)
        moments = next(iter(run.optimizer.state.values()))["exp_avg"]
        alive.update(adapted=weakref.ref(run.decoder.model), optimizer=weakref.ref(moments))
        return run

    def bits(*arguments: Any, **options: Any) -> Any:
        assert alive["optimizer"]() is None
        seen.append("parent" if alive["adapted"]() is None else "adapted")
        return real["bits_per_byte"](*arguments, **options)

    def load_parent(*arguments: Any) -> Any:
        assert alive["adapted"]() is None
        return real["load_parent"](*arguments)

    for own in (train, bits, load_parent):
        name = "bits_per_byte" if own is bits else own.__name__
        monkeypatch.setattr(homes[name], name, own)
    config = {
        "model": {"path": str(tmp_path / "parent"), "tokenizer": "bytes"},
        "data": {"sources": [{"path": "task:algebra", "examples": 60}], "row_length": 64, "held_out": 0.3},
        "growth": {"b_0": 4, "b_max": 4},
        "training": {"steps": 1, "batch_rows": 2, "evaluate_rows": 2},
        "output": str(tmp_path / "run"),
        **section,
    }
    found = workflow.adapt(config).results["bits_per_byte"]
    assert seen == ["adapted", "parent"]
    assert [(one["model"], one["measure"]) for one in found] == [
        ("parent", "AR (exact)"),
        ("adapted", "AR (exact)"),
        ("adapted", "diffusion (bound)"),
    ]
    if "draft_adapter" in section:  # the clean half is the parent
        assert found[0]["value"] == pytest.approx(found[1]["value"])


def toy_rows(sequences: list[tuple[int, ...]]) -> Rows:
    """A given token 0, then the sequence, which is generated."""
    rows = make_rows([[[-1, len(sequences[0])]]] * len(sequences), 1 + len(sequences[0]))
    rows.tokens[:] = torch.tensor([(0, *sequence) for sequence in sequences])
    return rows


@torch.no_grad()
def test_over_all_texts_of_a_toy_vocabulary_probabilities_sum_to_one_and_the_bound_is_no_less_than_its_price():
    """As AR, and in blocks of two, where the bound is the exact price; in larger ones it allows no more than one."""
    model = tiny_model("qwen3", vocab_size=5, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    rows = toy_rows(list(itertools.product(range(5), repeat=4)))
    exact = row_nats(Decoder(model), rows).sum(1)
    for sequence, price in list(zip(rows.tokens, exact, strict=True))[::97]:
        plain = sum(nats(model, sequence, i - 1, int(sequence[i]), len(sequence)) for i in range(1, 5))
        assert float(price) == pytest.approx(plain, rel=1e-4)
    for size in (1, 2, 4):
        settings = BlockDiffusionSettings(block_size=size, mask_token_id=4)
        price = exact if size == 1 else bound_nats(Decoder(model), settings, rows, 24).mean(0)
        total = float(torch.exp(-price.double()).sum())
        assert total == pytest.approx(1, abs=1e-4) if size < 4 else 0 < total < 1


@torch.no_grad()
def test_the_bound_is_its_enumerated_expectation_within_the_error_it_states():
    """One block of four, shifted: m of its three maskable tokens, m and the subset uniform."""
    model, sequence = tiny_model("qwen3"), (40, 41, 42, 43)
    tokens = torch.tensor([0, *sequence])
    expected = nats(model, tokens[:2], 0, 40, 2)
    for m in (1, 2, 3):
        subsets = list(itertools.combinations((2, 3, 4), m))
        for subset in subsets:
            noised = tokens.clone()
            noised[list(subset)] = MASK_ID
            price = sum(nats(model, noised, i - 1, int(tokens[i]), 1) for i in subset)
            expected += 3 / m * price / len(subsets) / 3
    settings = BlockDiffusionSettings(block_size=4, mask_token_id=MASK_ID)
    drawn = bound_nats(Decoder(model), settings, toy_rows([sequence] * 2), 300, views=10)
    errors = drawn.std(0) / 300**0.5
    assert bool(((drawn.mean(0) - expected).abs() < 4 * errors).all())
    assert not torch.equal(drawn[:, 0], drawn[:, 1])  # rows of other numbers draw anew
    alone = bound_nats(Decoder(model), settings, toy_rows([sequence] * 2).slice(1, 2), 300, views=10)
    assert torch.allclose(alone[:, 0], drawn[:, 1])
