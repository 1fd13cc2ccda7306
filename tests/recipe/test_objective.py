"""The two losses against plain computations: Eq. 1, Eq. 2 and Eq. 5, identity 3, and the chunk loop."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from families import EOS_ID, MASK_ID, tiny_model
from layouts import CHAT, PLAIN, PROMPTED, make_rows
from nextblock.attention.rule import block_diffusion_rule
from nextblock.config.sections import BlockDiffusionSettings, RecipeConfig
from nextblock.data.rows import Rows
from nextblock.measure.likelihood import bits_per_byte
from nextblock.model.decoder import Decoder
from nextblock.recipe import cross_entropy as cross_entropy_module
from nextblock.recipe.corruption import TwoView, corrupt
from nextblock.recipe.cross_entropy import cross_entropy
from nextblock.recipe.objective import LossSums, TwoViewLoss

ROWS = make_rows([PLAIN, PROMPTED, CHAT], 28)
AR_WEIGHT = 0.5


def view_of(rows: Rows, block_size: int, **options: Any) -> TwoView:
    recipe = RecipeConfig(fill_last_block=False, **options)
    return corrupt(rows, block_size, mask_token_id=MASK_ID, end_token_id=EOS_ID, recipe=recipe, seed=1, step=0)


def losses(model: PreTrainedModel, view: TwoView, context: Any = "context_causal") -> LossSums:
    return TwoViewLoss(Decoder(model))(view, block_diffusion_rule(context))


def negative_log_likelihoods(logits: Tensor, tokens: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def ar_cross_entropy(model: PreTrainedModel, rows: Rows) -> tuple[Tensor, int]:
    """-sum log p(x_i | x_<i) over generated tokens that have a token before them, document by document."""
    total, count = torch.zeros((), dtype=model.dtype), 0
    for row in range(len(rows)):
        for number in range(int(rows.document[row].max()) + 1):
            own = rows.document[row] == number
            tokens, offset = rows.tokens[row, own], rows.offset[row, own]
            logits = model(input_ids=tokens[None], use_cache=False).logits[0]
            scored = offset[1:] >= 0
            total = total + negative_log_likelihoods(logits[:-1][scored], tokens[1:][scored]).sum()
            count += int(scored.sum())
    return total, count


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_at_block_size_one_objective_and_gradient_are_lambda_times_ar_cross_entropys(family_model):
    model = family_model.double()
    global_tokens = int((ROWS.offset >= 0).sum())
    sums = losses(model, view_of(ROWS, 1))
    objective_value = sums.total(AR_WEIGHT) / global_tokens
    plain, count = ar_cross_entropy(model, ROWS)
    plain_value = AR_WEIGHT * plain / global_tokens
    # Not 1e-12: some families compute parts of a layer in float32 whatever the model's dtype is.
    torch.testing.assert_close(objective_value, plain_value, rtol=1e-6, atol=0)
    assert (int(sums.ar_tokens), int(sums.diffusion_tokens)) == (count, 0)
    ours, theirs = gradients(model, objective_value), gradients(model, plain_value)
    assert ours.keys() == theirs.keys()
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("block_size", [2, 4, 28])
@torch.no_grad()
def test_the_ar_loss_is_the_same_beside_any_noised_half(family_model, block_size):
    plain, count = ar_cross_entropy(family_model, ROWS)
    sums = losses(family_model, view_of(ROWS, block_size))
    torch.testing.assert_close(sums.ar, plain, rtol=1e-4, atol=1e-4)
    assert int(sums.ar_tokens) == count


@torch.no_grad()
def block_by_block(
    model: PreTrainedModel, view: TwoView, rows: Rows, shifted: bool, counts: Callable[[int], float] = lambda k: 1.0
) -> tuple[float, int]:
    """Eq. 5 as decoding would meet it: each noised block behind its clean prefix, in a pass of its own.

    The loss of the token at offset k of a block counts `counts(k)`.
    """
    total, count, places = 0.0, 0, view.places
    for row in range(len(rows)):
        real = (places.view[row] == 1) & (places.document[row] >= 0)
        blocks = {(int(places.document[row, i]), int(places.block_start[row, i])) for i in torch.nonzero(real)}
        for document, start in blocks:
            own = real & (places.document[row] == document) & (places.block_start[row] == start)
            clean = rows.tokens[row][rows.document[row] == document]
            noised = view.tokens[row][own]
            tokens = torch.cat([clean[:start], noised])
            length = len(tokens)
            mask = torch.ones(length, length, dtype=torch.bool).tril()
            mask[start:, start:] = True
            logits = model(input_ids=tokens[None], attention_mask=mask[None, None], use_cache=False).logits[0]
            for k in range(len(noised)):
                if noised[k] == MASK_ID:
                    at = start + k - 1 if shifted else start + k
                    nats = float(negative_log_likelihoods(logits[at : at + 1], clean[start + k : start + k + 1]))
                    total += counts(k) * nats
                    count += 1
    return total, count


@pytest.mark.parametrize("block_size", [2, 4, 28])
@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
def test_the_diffusion_loss_is_that_of_each_block_behind_its_clean_prefix(family_model, block_size, prediction):
    view = view_of(ROWS, block_size, prediction=prediction)
    total, count = block_by_block(family_model, view, ROWS, prediction == "shifted")
    with torch.no_grad():
        sums = losses(family_model, view)
    assert count == int(sums.diffusion_tokens) > 0
    assert float(sums.diffusion) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("elements", [97 * 3, 97 * 10_000])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
def test_early_tokens_of_a_block_count_more_with_an_offset_decay(prediction, soft, elements, llama, monkeypatch):
    monkeypatch.setattr(cross_entropy_module, "LOGIT_ELEMENTS", elements)
    view = view_of(ROWS, 4, prediction=prediction, offset_decay=2.0)
    first = 1 if prediction == "shifted" else 0  # the first token of a block that is ever masked
    mean = sum(math.exp(-(k - first) / 2) for k in range(first, 4)) / (4 - first)
    wanted, count = block_by_block(
        llama, view, ROWS, prediction == "shifted", lambda k: math.exp(-(k - first) / 2) / mean
    )
    with torch.no_grad():
        sums = TwoViewLoss(Decoder(llama))(view, block_diffusion_rule(), soft=soft)
    assert count == int(sums.diffusion_tokens) > 0
    assert float(sums.diffusion) == pytest.approx(wanted, rel=1e-4)
    plain = view_of(ROWS, 4, prediction=prediction)
    assert plain.masked.weight is None
    assert torch.equal(plain.tokens, view.tokens)


def test_at_block_size_one_aligned_prediction_is_masked_next_token_prediction(llama):
    view = view_of(make_rows([[[40]]], 40), 1, prediction="aligned")
    total, count = block_by_block(llama, view, make_rows([[[40]]], 40), False)
    with torch.no_grad():
        sums = losses(llama, view)
    assert count == int(sums.diffusion_tokens) > 0
    assert float(sums.diffusion) == pytest.approx(total, rel=1e-4)


def test_lambda_zero_leaves_the_clean_half_unscored_and_the_diffusion_loss_as_it_was(llama):
    view = view_of(ROWS, 4)
    both = losses(llama, view)
    alone = TwoViewLoss(Decoder(llama))(view, block_diffusion_rule(), score_ar=False)
    assert int(alone.ar_tokens) == 0
    assert float(alone.ar.detach()) == 0.0
    torch.testing.assert_close(alone.diffusion, both.diffusion, rtol=0, atol=0)
    torch.testing.assert_close(alone.total(0.0), both.diffusion, rtol=0, atol=0)


def test_the_total_is_the_diffusion_sum_plus_lambda_times_the_ar_sum():
    sums = LossSums(*(torch.tensor(value) for value in (3.0, 8.0, 2, 5, 6.0)))
    assert float(sums.total(0.5)) == 7.0
    assert float(sums.total(0.0)) == 3.0


def test_soft_targets_join_the_total_with_their_weight_and_are_averaged_over_views_like_the_diffusion_loss():
    sums = LossSums(*(torch.tensor(value) for value in (3.0, 8.0, 2, 5, 6.0)))
    assert float(sums.total(0.5, views=3, soft_weight=2.0)) == (3.0 + 2.0 * 6.0) / 3 + 0.5 * 8.0


@torch.no_grad()
def divergence_by_document(model: PreTrainedModel, view: TwoView, rows: Rows, shifted: bool) -> float:
    """sum over masked tokens of KL(p(x_i | x_<i) || p(x_i | x_t, x)), from two full tensors of logits.

    The teacher's are those of each document alone in a plain causal pass.
    """
    decoder = Decoder(model)
    places = view.places
    mask = decoder.masks(block_diffusion_rule(), places)
    student = decoder.logits(decoder.hidden(view.tokens, places.position, mask)).softmax(-1)
    total = 0.0
    for row in range(len(rows)):
        causal = {}
        for number in range(int(rows.document[row].max()) + 1):
            tokens = rows.tokens[row, rows.document[row] == number]
            causal[number] = model(input_ids=tokens[None], use_cache=False).logits[0].softmax(-1)
        for slot in range(view.noised_length):
            document, position = int(places.document[row, slot]), int(places.position[row, slot])
            if document < 0 or view.tokens[row, slot] != MASK_ID:
                continue
            own = (rows.document[row] == document) & (rows.position[row] == position)
            offset = int(rows.offset[row][own]) if own.any() else -1
            filled = offset < 0 or position - offset % 4 != int(places.block_start[row, slot])
            if filled or not position:
                continue
            p, q = causal[document][position - 1], student[row, slot - 1 if shifted else slot]
            total += float((p * (p.log() - q.log())).sum())
    return total


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
@pytest.mark.parametrize("elements", [1, 97 * 9, 97 * 10_000])
def test_soft_targets_are_the_divergence_from_each_documents_own_causal_predictions(prediction, elements, monkeypatch):
    monkeypatch.setattr(cross_entropy_module, "LOGIT_ELEMENTS", elements)
    model = tiny_model("qwen3").double()
    rows = make_rows([PLAIN, PROMPTED, CHAT], 28, ended=True)
    recipe = RecipeConfig(prediction=prediction, views=2)  # filled last blocks: their end tokens have no teacher
    view = corrupt(rows, 4, mask_token_id=MASK_ID, end_token_id=EOS_ID, recipe=recipe, seed=1, step=0)
    assert not bool(view.masked.has_teacher.all())
    loss = TwoViewLoss(Decoder(model))
    soft, hard = loss(view, block_diffusion_rule(), soft=True), loss(view, block_diffusion_rule())
    wanted = divergence_by_document(model, view, rows, prediction == "shifted")
    # Norms and rotary angles are float32 inside, whatever the model's dtype.
    assert float(soft.soft.detach()) == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(soft.diffusion, hard.diffusion, rtol=1e-12, atol=0)
    assert (int(soft.diffusion_tokens), float(hard.soft)) == (int(hard.diffusion_tokens), 0.0)


@pytest.mark.parametrize("weight", [None, torch.linspace(0.1, 3, 50)])
def test_divergence_and_its_gradient_equal_the_plain_computation_and_the_teacher_gets_none(weight, monkeypatch):
    model = tiny_model("llama").double()
    target, taught = torch.randint(0, 97, (50,)), torch.rand(50) < 0.7
    results = []
    for elements in (97 * 7, None):
        generator = torch.Generator().manual_seed(3)
        hidden = torch.randn(50, 32, dtype=torch.float64, generator=generator).requires_grad_(True)
        teacher = torch.randn(50, 32, dtype=torch.float64, generator=generator).requires_grad_(True)
        if elements:
            monkeypatch.setattr(cross_entropy_module, "LOGIT_ELEMENTS", elements)
            scores = cross_entropy(Decoder(model), hidden, target, weight, teacher=(teacher, taught))
            sums = torch.stack([scores.total, scores.soft])
        else:
            q, p = model.lm_head(hidden).softmax(-1), model.lm_head(teacher).softmax(-1).detach()
            counts = torch.ones(50) if weight is None else weight
            hard = -(q[torch.arange(50), target].log() * counts).sum()
            sums = torch.stack([hard, ((p * (p / q).log()).sum(-1) * counts)[taught].sum()])
        results.append(
            (sums.detach(), gradients(model, sums @ sums.new_tensor([1.0, 0.3]))["lm_head.weight"], hidden.grad)
        )
        assert teacher.grad is None
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def lost_by_block(model: PreTrainedModel, view: TwoView, rows: Rows) -> Tensor:
    """sum over blocks masked whole and their drafts j of 1 - prod_(i <= j) sum_v min(p_AR(v), q_i(v)), written out.

    From two full tensors of logits; the teacher's are those of each document alone in a plain causal pass.
    """
    decoder, places = Decoder(model), view.places
    q = decoder.logits(decoder.hidden(view.tokens, places.position, decoder.masks(block_diffusion_rule(), places)))
    q, total = q.softmax(-1), torch.zeros((), dtype=model.dtype)
    for row in range(len(rows)):
        blocks: dict[tuple[int, ...], list[int]] = {}
        for slot in range(view.noised_length):
            if (document := int(places.document[row, slot])) >= 0:
                key = int(places.view[row, slot]), document, int(places.block_start[row, slot])
                blocks.setdefault(key, []).append(slot)
        for (_, document, start), slots in blocks.items():
            if any(view.tokens[row, slot] != MASK_ID for slot in slots[1:]):
                continue
            own = rows.document[row] == document
            tokens, length = rows.tokens[row, own], int(own.sum())
            # A span ends where the next token is context, or where the document does.
            spans = rows.offset[row, own]
            kept = torch.ones((), dtype=model.dtype)
            p = model(input_ids=tokens[None], use_cache=False).logits[0].softmax(-1).detach()
            for depth, slot in enumerate(slots[1:-1], 2):  # the AR head itself decides the token at 1
                at = start + depth
                if at >= length or spans[at] < spans[start]:
                    break  # what fills up a last block follows no text
                kept = kept * torch.minimum(p[at - 1], q[row, slot]).sum()
                total = total + 1 - kept
    return total


@pytest.mark.parametrize("elements", [1, 97 * 9, 97 * 10_000])
@pytest.mark.parametrize("options", [{}, {"full_mask_share": 0.7, "random_start_share": 1.0}])
def test_the_drafts_expected_to_be_lost_and_their_gradient_are_those_of_the_formula(options, elements, monkeypatch):
    monkeypatch.setattr(cross_entropy_module, "LOGIT_ELEMENTS", elements)
    model = tiny_model("qwen3").double()
    rows = make_rows([PLAIN, PROMPTED, CHAT], 28, ended=True)
    recipe = RecipeConfig(views=2, accept_weight=1.0, **options)
    view = corrupt(rows, 4, mask_token_id=MASK_ID, end_token_id=EOS_ID, recipe=recipe, seed=1, step=0)
    drafts = view.masked.drafts
    assert drafts is not None
    partly = (drafts == len(view.masked)).any(1)  # filled blocks: their end tokens follow no text
    assert partly.any()
    assert not partly.all()
    found = TwoViewLoss(Decoder(model))(view, block_diffusion_rule(), soft=True)
    wanted = lost_by_block(model, view, rows)
    assert found.lost is not None
    assert float(found.lost.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    ours, theirs = gradients(model, found.lost), gradients(model, wanted)
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6 * scale)


def test_the_drafts_expected_to_be_lost_join_the_total_with_their_weight():
    sums = LossSums(*(torch.tensor(value) for value in (3.0, 8.0, 2, 5, 6.0)), lost=torch.tensor(4.0))
    assert float(sums.total(0.5, views=2, accept_weight=3.0)) == (3.0 + 3.0 * 4.0) / 2 + 0.5 * 8.0
    plain = view_of(ROWS, 4)
    assert plain.masked.drafts is None


class Wrapped(nn.Module):
    """A head that is not a plain linear layer: it has something of its own to train."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.shift = nn.Parameter(torch.linspace(-1, 1, 97, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.shift


HEADS = ("plain", "bias", "scaled", "capped", "wrapped", "frozen", "weighted", "weighted wrapped")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("elements", [1, 97 * 7, 97 * 10_000])
def test_the_chunk_loop_equals_plain_cross_entropy_and_its_gradient_in_float64(elements, head, monkeypatch):
    monkeypatch.setattr(cross_entropy_module, "LOGIT_ELEMENTS", elements)
    model = tiny_model("llama").double()
    if head == "bias":
        model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 97, dtype=torch.float64))
    elif head == "scaled":
        model.config.logit_scale, model.config.logits_scaling = 0.7, 3.0
    elif head == "capped":
        model.config.final_logit_softcapping = 1.5
    elif head.endswith("wrapped"):
        model.lm_head = Wrapped(model.lm_head)
    elif head == "frozen":
        model.lm_head.requires_grad_(False)
    target = torch.randint(0, 97, (50,))
    weight = torch.rand(50) if head.startswith("weighted") else None
    results = []
    for chunked in (True, False):
        hidden = torch.randn(50, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        hidden.requires_grad_(True)
        if chunked:
            loss = cross_entropy(Decoder(model), hidden, target, weight).total
        else:
            logits = model.lm_head(hidden)
            logits = logits * 0.7 / 3.0 if head == "scaled" else logits
            logits = 1.5 * torch.tanh(logits / 1.5) if head == "capped" else logits
            nats = functional.cross_entropy(logits, target, reduction="none")
            loss = nats.sum() if weight is None else (nats * weight).sum()
        found = gradients(model, loss / 7)  # not 1: what follows the loss has a part in the gradient
        results.append((loss.detach(), hidden.grad, *(found[name] for name in sorted(found))))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head", ["plain", "bias", "capped", "frozen"])
def test_ligers_loss_and_gradient_are_those_of_our_loop(head, monkeypatch):
    """On a CPU this needs Triton's interpreter: TRITON_INTERPRET=1."""
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        pytest.skip("Liger's kernel needs CUDA, or TRITON_INTERPRET=1")
    if head == "capped" and not torch.cuda.is_available():
        pytest.skip("Triton's interpreter cannot run Liger's soft cap")
    model: Any = tiny_model("llama")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    if head == "bias":
        model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 97, device=model.device))
    elif head == "capped":
        model.config.final_logit_softcapping = 1.5
    elif head == "frozen":
        model.lm_head.requires_grad_(False)
    target, results = torch.randint(0, 97, (50,), device=model.device), []
    for liger in (True, False):
        monkeypatch.setattr(cross_entropy_module, "takes_liger", lambda decoder, hidden, liger=liger: liger)
        hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(3)).to(model.device).requires_grad_(True)
        loss = cross_entropy(Decoder(model), hidden, target).total
        found = gradients(model, loss / 7)
        results.append((loss.detach(), hidden.grad, *(found[name] for name in sorted(found))))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


def test_no_chunk_holds_more_logits_than_the_limit_and_none_is_computed_twice(monkeypatch):
    monkeypatch.setattr(cross_entropy_module, "LOGIT_ELEMENTS", 97 * 8)
    model = tiny_model("llama")
    sizes: list[int] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.mm.out, torch.ops.aten.mm.default) and out.shape[1] == 97:
                sizes.append(out.numel())
            return out

    hidden = torch.randn(50, 32, requires_grad=True)
    with Seen():
        cross_entropy(Decoder(model), hidden, torch.randint(0, 97, (50,))).total.backward()
    assert max(sizes) <= 97 * 8
    assert sum(sizes) == 50 * 97


def of_each_head(model: Any, head: str) -> None:
    """Give the model a head of another kind."""
    if head == "wrapped":
        model.lm_head = Wrapped(model.lm_head)
    elif head == "capped":
        model.config.final_logit_softcapping = 1.5


@pytest.mark.parametrize("head", ["plain", "capped", "wrapped"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_losses_of_single_tokens_add_up_to_the_sum_with_or_without_gradients(head, soft, weighted, monkeypatch):
    monkeypatch.setattr(cross_entropy_module, "LOGIT_ELEMENTS", 97 * 7)
    model = tiny_model("llama").double()
    of_each_head(model, head)
    decoder, target, weight = Decoder(model), torch.randint(0, 97, (50,)), torch.rand(50) if weighted else None
    hidden = torch.randn(50, 32, dtype=torch.float64)
    teacher = (torch.randn(50, 32, dtype=torch.float64), torch.rand(50) < 0.7) if soft else None
    wanted = functional.cross_entropy(decoder.logits(hidden), target, reduction="none").detach()
    for train in (True, False):
        with torch.set_grad_enabled(train):
            found = cross_entropy(decoder, hidden, target, weight, teacher=teacher, each=True)
        assert not found.nats.requires_grad
        torch.testing.assert_close(found.nats, wanted)
        torch.testing.assert_close(found.total.detach(), wanted.sum() if weight is None else (wanted * weight).sum())
        assert (float(found.soft.detach()) > 0) == soft


class Widest(TorchDispatchMode):
    """The most elements of a tensor as wide as the vocabulary, but for the head's matrix and its gradient."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.matrix, self.elements = model.lm_head.weight.T.shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor) and one.shape[-1:] == self.matrix[-1:] and one.shape != self.matrix:
                self.elements = max(self.elements, one.numel())
        return out


@pytest.mark.parametrize("head", ["plain", "wrapped"])
@pytest.mark.parametrize("what", ["training", "profile", "soft targets", "evaluation", "bits per byte"])
def test_no_more_logits_than_the_limit_are_made_at_a_time_whatever_is_scored(what, head, monkeypatch):
    monkeypatch.setattr(cross_entropy_module, "LOGIT_ELEMENTS", 97 * 8)
    model = tiny_model("llama").double()
    widest = Widest(model)
    of_each_head(model, head)
    loss, view = TwoViewLoss(Decoder(model)), view_of(ROWS, 4)
    settings = BlockDiffusionSettings(block_size=4, mask_token_id=MASK_ID)
    tokenizer: Any = SimpleNamespace(eos_token_id=EOS_ID, decode=lambda ids, **_: "x" * len(ids))
    with widest:
        if what == "bits per byte":
            bits_per_byte(Decoder(model), tokenizer, ROWS, settings, draws=1)
        elif what == "evaluation":
            with torch.no_grad():
                loss(view, block_diffusion_rule())
        else:
            profile, soft = what == "profile", what == "soft targets"
            loss(view, block_diffusion_rule(), soft=soft, profile=profile).total(0.5, soft_weight=1.0).backward()
    assert 0 < widest.elements <= 97 * 8


def test_autocast_scores_as_the_plain_computation_does():
    model, results = tiny_model("llama"), []
    target = torch.randint(0, 97, (50,))
    for chunked in (True, False):
        hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(3)).requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            if chunked:
                loss = cross_entropy(Decoder(model), hidden, target).total
            else:
                loss = functional.cross_entropy(model.lm_head(hidden).float(), target, reduction="sum")
        results.append((loss.detach(), gradients(model, loss)["lm_head.weight"], hidden.grad))
    for ours, plain in zip(*results, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, rtol=2e-2, atol=2e-2)


def test_bfloat16_hidden_states_are_scored_in_float32():
    model = tiny_model("llama").bfloat16()
    hidden, target = torch.randn(9, 32, dtype=torch.bfloat16), torch.randint(0, 97, (9,))
    loss = cross_entropy(Decoder(model), hidden, target).total
    plain = functional.cross_entropy(model.lm_head(hidden).float(), target, reduction="sum")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain)
