"""The correction head: its formula, its files, and that it changes drafts and nothing else."""

from __future__ import annotations

import copy
import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import nextblock as nb
from families import EOS_ID, tiny_model
from layouts import CHAT, PLAIN, PROMPTED, make_rows
from nextblock.attention.rule import block_diffusion_rule
from nextblock.config.errors import UsageError
from nextblock.config.run import load_config
from nextblock.config.sections import (
    BlockDiffusionSettings,
    CorrectionConfig,
    DraftAdapterConfig,
    RecipeConfig,
)
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.model.adapter_files import fingerprint, save_adapter
from nextblock.model.correction import Correction, save_correction
from nextblock.model.decoder import Decoder
from nextblock.model.draft_adapter import new_adapter
from nextblock.model.loading import weights_folder
from nextblock.model.parent import byte_tokenizer
from nextblock.recipe import cross_entropy as cross_entropy_module
from nextblock.recipe.corruption import corrupt
from nextblock.recipe.objective import TwoViewLoss
from nextblock.training.export import export

CONFIG = CorrectionConfig(rank=3, candidates=5)


def wild(head: Any, std: float = 0.5) -> Any:
    """Large random weights."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return head


def by_hand(head: Correction, logits: Tensor, previous: Tensor) -> Tensor:
    """One place after the other, one candidate after the other."""
    lines = []
    for line, token in zip(logits, previous.tolist(), strict=True):
        likeliest = sorted(range(len(line)), key=lambda v: -float(line[v].detach()))[: head.config.candidates]
        bias = [
            head.previous[token] @ head.following[v] if v in likeliest else line.new_zeros(())
            for v in range(len(line))
        ]
        lines.append(line + torch.stack(bias))
    return torch.stack(lines)


@pytest.mark.parametrize("candidates", [1, 5, 11, 200])
def test_the_likeliest_candidates_gain_what_the_token_before_tells_and_others_stay(candidates):
    head = wild(Correction(11, CorrectionConfig(rank=3, candidates=candidates))).double()
    logits, previous = torch.randn(9, 11, dtype=torch.float64), torch.randint(0, 11, (9,))
    torch.testing.assert_close(head(logits, previous), by_hand(head, logits, previous))


@torch.no_grad()
@pytest.mark.parametrize("candidates", [1, 5, 11, 200])
@pytest.mark.parametrize("std", [0.3, 3.0])  # weak, and so strong that tokens beside the candidates win
def test_the_likeliest_chain_is_that_of_one_place_after_the_other(candidates, std):
    head = wild(Correction(11, CorrectionConfig(rank=3, candidates=candidates)), std).double()
    logits, previous = torch.randn(40, 6, 11, dtype=torch.float64), torch.randint(0, 11, (40,))
    lines, chain, before = [], [], previous
    for place in logits.unbind(1):
        lines.append(by_hand(head, place, before))
        before = lines[-1].argmax(-1)
        chain.append(before)
    for found in (
        head.likeliest_in_order(logits, previous),
        head.in_order(logits, previous, lambda number, own: own.argmax(-1)),
    ):
        torch.testing.assert_close(found[0], torch.stack(lines, 1))
        assert torch.equal(found[1], torch.stack(chain, 1))
    assert torch.equal(head.likeliest_in_order(logits[:, :0], previous)[1], chain[0].new_empty(40, 0))


def test_an_untrained_head_changes_nothing():
    logits = torch.randn(4, 11)
    assert torch.equal(Correction(11, CONFIG)(logits, torch.arange(4)), logits)


@pytest.mark.parametrize("elements", [1, 97 * 9, 97 * 10_000])
def test_losses_and_gradients_of_corrected_logits_are_those_of_a_plain_computation(elements, monkeypatch):
    monkeypatch.setattr(cross_entropy_module, "LOGIT_ELEMENTS", elements)
    model = tiny_model("llama").double()
    adapter = wild(new_adapter(model, DraftAdapterConfig(rank=2), CONFIG), 0.2).double()
    decoder, rule = Decoder(model, adapter), block_diffusion_rule()
    rows = make_rows([PLAIN, PROMPTED, CHAT], 28)
    recipe = RecipeConfig(fill_last_block=False, full_mask_share=0.5, accept_weight=1.0)
    view = corrupt(rows, 4, mask_token_id=adapter.mask_token_id, end_token_id=EOS_ID, recipe=recipe, seed=1, step=0)
    n, masked, places = view.noised_length, view.masked, view.places
    results = []
    for chunked in (True, False):
        adapter.zero_grad()
        if chunked:
            sums = TwoViewLoss(decoder)(view, rule, soft=True)
            assert sums.lost is not None
            found = torch.stack([sums.diffusion, sums.soft, sums.lost])
        else:
            hidden = decoder.hidden(view.tokens, places.position, decoder.masks(rule, places), noised=places.view > 0)
            assert adapter.correction is not None
            logits = decoder.logits(hidden[masked.row, masked.slot])
            # The token before is the one at the hidden state's own position: prediction is shifted.
            own = {
                (int(d), int(p)): int(t)
                for d, p, t in zip(
                    *(
                        x[:, n:].flatten()
                        for x in (places.document + 100 * torch.arange(3)[:, None], places.position, view.tokens)
                    ),
                    strict=True,
                )
            }
            at = zip(masked.row, masked.slot, strict=True)
            before = torch.tensor(
                [own[int(places.document[r, s] + 100 * r), int(places.position[r, s])] for r, s in at]
            )
            q = by_hand(adapter.correction, logits, before).softmax(-1)
            p = decoder.logits(hidden[:, n:][masked.row, masked.teacher]).softmax(-1).detach()
            nats = -q[torch.arange(len(masked)), masked.token].log().sum()
            soft = (p * (p / q).log()).sum(-1)[masked.has_teacher].sum()
            alpha, lost = torch.minimum(p, q).sum(-1), torch.zeros((), dtype=torch.float64)
            assert masked.drafts is not None
            for block in masked.drafts.tolist():
                kept = torch.ones((), dtype=torch.float64)
                for target in block:
                    if target < len(masked):
                        kept = kept * alpha[target]
                        lost = lost + 1 - kept
            found = torch.stack([nats, soft, lost])
        (found @ found.new_tensor([1.0, 0.7, 2.0])).backward()
        results.append([found.detach(), *(p.grad for p in adapter.parameters())])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)


@pytest.fixture
def folders(tmp_path):
    """A parent, and an adapter with a correction head for it, both with random weights."""
    parent, out = tmp_path / "parent", tmp_path / "adapter"
    export(parent, tiny_model("llama", vocab_size=264), byte_tokenizer(), None)
    adapter = wild(new_adapter(nb.load(parent).model, DraftAdapterConfig(rank=3), CONFIG))
    settings = BlockDiffusionSettings(block_size=8, mask_token_id=adapter.mask_token_id)
    save_adapter(out, adapter, settings, str(parent), parent, torch.float32)
    return parent, out


def test_greedy_answers_are_the_parents_whatever_the_head_has_learned(folders):
    parent, out = folders
    lm, bare = nb.load(parent, draft_adapter=out), nb.load(parent)
    assert lm.adapter is not None
    assert lm.adapter.correction is not None
    prompts = ["Q: two", "a longer prompt, of other length", "x"]
    wanted = bare.generate(prompts, mode="ar", max_new_tokens=20).answers
    drafting: tuple[dict[str, Any], ...] = ({}, {"draft_ahead": 2}, {"draft_length": "auto"}, {"draft_paths": 3})
    for how in drafting:
        assert lm.generate(prompts, mode="speculative", max_new_tokens=20, **how).answers == wanted, how
        alone = [
            lm.generate(p, mode="speculative", max_new_tokens=20, seed=i, temperature=1.0, **how)
            for i, p in enumerate(prompts)
        ]
        together = lm.generate(prompts, mode="speculative", max_new_tokens=20, seed=0, temperature=1.0, **how)
        assert together.answers == [one.answers[0] for one in alone], how


def test_a_head_that_knows_the_text_has_its_drafts_kept():
    """A parent that counts upwards: only the head can tell its drafts, each from the one before."""
    model = tiny_model("llama", vocab_size=97)
    with (
        torch.no_grad()
    ):  # logits of token v + 1 after v: embedding v is a unit vector, the head its shifted transpose
        for layer in model.model.layers:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                part.weight.zero_()
        size = model.config.hidden_size
        model.model.embed_tokens.weight.copy_(torch.nn.functional.pad(torch.eye(size), (0, 0, 0, 97 - size)))
        model.lm_head.weight.copy_(model.model.embed_tokens.weight.roll(1, 0))
        model.lm_head.weight[size:] = 0
    kept = []
    for corrected in (False, True):
        adapter = new_adapter(model, DraftAdapterConfig(rank=2), CorrectionConfig(rank=97, candidates=97))
        head = adapter.correction
        assert head is not None
        with torch.no_grad():
            head.previous.copy_(torch.eye(97))
            head.following.copy_(9 * torch.eye(97).roll(1, 0) * corrected)
        section = BlockDiffusionSettings(block_size=8, mask_token_id=adapter.mask_token_id)
        out = BlockDiffusionLM(model, None, section, adapter).generate(
            torch.tensor([[3]]), mode="speculative", max_new_tokens=20, eos_token_id=[]
        )
        assert out.answers[0] == [*range(4, 24)]
        kept.append(out.stats.tokens_per_forward)
        adapter.detach(model)
    assert kept[1] > 2.5 > kept[0]


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("correction.json", {"fingerprint": "0123456789abcdef"}, r"belongs to .*parent \(weights 01234567\)"),
        (
            "correction.json",
            {"block_size": 16},
            "blocks of 16, not to .* blocks of 8; delete .*correction, or bring",
        ),
        ("correction.json", {"rank": 4}, "holds no whole correction head"),
        ("correction.json", {"candidates": 0}, "holds no whole correction head"),
        ("correction.json", None, "holds no whole correction head"),
        ("correction.safetensors", None, "holds no whole correction head"),
    ],
)
def test_a_head_of_another_parent_or_block_size_or_a_cut_one_is_refused_in_one_line(folders, name, change, words):
    parent, out = folders
    out = out / "correction"
    if change is None:
        (out / name).write_bytes(b"\x10")
    else:
        (out / name).write_text(json.dumps(json.loads((out / name).read_text()) | change))
    with pytest.raises(UsageError, match=words) as refused:
        nb.load(parent, draft_adapter=out.parent)
    assert "\n" not in str(refused.value)


@pytest.fixture
def corrected(tmp_path):
    """The folder of a full model with a head beside it."""
    folder, settings = tmp_path / "full", BlockDiffusionSettings(block_size=8, mask_token_id=5)
    export(folder, tiny_model("llama", vocab_size=264), byte_tokenizer(), settings)
    head = wild(Correction(264, CONFIG))
    save_correction(folder, head, settings, "full", fingerprint(folder), torch.float32)
    return folder


def test_a_model_that_is_saved_again_keeps_its_head_beside_plain_weights(corrected, tmp_path):
    lm = nb.load(corrected)
    copy.deepcopy(lm.model).save_pretrained(tmp_path / "copy")
    lm.model.save_pretrained(tmp_path / "again")
    for name in ("again", "copy"):
        assert (
            load_file(tmp_path / name / "model.safetensors").keys()
            == load_file(corrected / "model.safetensors").keys()
        )
        own = nb.load(tmp_path / name).decoder.correction
        assert own is not None
        assert torch.equal(own.following, lm.decoder.correction.following)  # pyright: ignore[reportOptionalMemberAccess]


def test_weights_that_hold_a_head_are_told(corrected):
    weights = load_file(corrected / "model.safetensors")
    more = {f"correction.{name}": torch.zeros(264, 3) for name in ("previous", "following")}
    save_file(weights | more, corrected / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(corrected / "correction")
    with pytest.warns(UserWarning, match="hold a correction head that cannot be read from there"):
        assert nb.load(corrected).decoder.correction is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"correction.rank": 4}, "growth.b_0=1 has no drafts that a correction head could learn from"),
        (
            {"correction.rank": 4, "lora.rank": 2, "growth.b_0": 4},
            "correction is trained beside a draft adapter or a frozen",
        ),
        (
            {"correction.rank": 4, "draft_adapter.rank": 2, "growth.b_0": 4, "recipe.prediction": "aligned"},
            "correction needs recipe.prediction=shifted",
        ),
    ],
)
def test_a_head_that_could_not_be_trained_is_refused_in_one_line(overrides, words):
    with pytest.raises(UsageError, match=words):
        load_config({"data": {"sources": [{"path": "task:algebra"}]}}, overrides)


def test_a_head_alone_is_trained_beside_a_model_that_stays_as_it_is(tmp_path):
    overrides = {
        "model.path": "tiny-bd",
        "model.export_dtype": "bfloat16",
        "correction.rank": 8,
        "growth.b_0": 16,
        "growth.b_max": 16,
        "recipe.full_mask_share": 1.0,
        "recipe.accept_weight": 1.0,
        "optimizer.lr": 0.02,
        "training.steps": 6,
        "training.batch_rows": 2,
        "training.evaluate_rows": 0,
        "data.row_length": 96,
    }
    config = load_config({"data": {"sources": [{"path": "task:word_problems"}]}}, overrides)
    result = nb.adapt(config.model_copy(update={"output": str(tmp_path / "out")}))
    before, after = (load_file(folder / "model.safetensors") for folder in (weights_folder("tiny-bd"), result.output))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    lm, plain = nb.load(result.output), nb.load("tiny-bd")
    assert plain.decoder.correction is None
    assert lm.decoder.correction is not None
    assert lm.decoder.correction.following.any()
    prompt = "Q: Leo has 8 bags with 7 coins in each. He loses 13. How many coins does Leo have?\nA:"
    for mode in ("ar", "diffusion", "speculative"):
        both = [model.generate(prompt, mode=mode, max_new_tokens=48) for model in (lm, plain)]
        assert both[0].answers == both[1].answers, mode
    own: Any = AutoModelForCausalLM.from_pretrained(result.output)  # transformers' own way in
    ids = torch.tensor([lm.tokenizer(prompt).input_ids])
    out = own.generate(ids, custom_generate=nb.block_diffusion, mode="speculative", max_new_tokens=48, do_sample=False)
    assert torch.equal(own.correction.following, lm.decoder.correction.following)
    assert out[0, ids.shape[1] :].tolist() == both[0].answers[0]
