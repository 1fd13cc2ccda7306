"""The draft adapter's laws: the parent's own output, whatever the adapter has learned, and nothing leaks."""

from __future__ import annotations

import json
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import nextblock as nb
from families import EOS_ID, FAMILIES, tiny_model
from layouts import PLAIN, PROMPTED, make_rows
from nextblock.attention.rule import block_diffusion_rule
from nextblock.config.errors import UsageError
from nextblock.config.run import load_config
from nextblock.config.sections import BlockDiffusionSettings, DraftAdapterConfig, ModelConfig, RecipeConfig
from nextblock.data.stream import RowStream
from nextblock.model.adapter_files import fingerprint, load_adapter, save_adapter
from nextblock.model.decoder import Decoder
from nextblock.model.draft_adapter import DraftAdapter, GatedLinear
from nextblock.model.parent import byte_tokenizer, load_parent
from nextblock.model.probe import probe_adapter
from nextblock.model.targets import target_names
from nextblock.model.training_mode import recompute_activations, without_dropout
from nextblock.recipe.corruption import corrupt
from nextblock.recipe.objective import TwoViewLoss
from nextblock.training.export import export
from nextblock.training.loop import train

BLOCK = 4
PROMPTS = ["Q: two", "a longer prompt, of other length", "x"]


@pytest.fixture(params=FAMILIES)
def parent(request, tmp_path):
    """A parent's folder, saved from random weights."""
    folder = tmp_path / "parent"
    model = tiny_model(request.param, vocab_size=264)
    model.config.eos_token_id = model.generation_config.eos_token_id = 256
    export(folder, model, byte_tokenizer(), None)
    return folder


def wild_adapter(folder, out, rank=3):
    """An adapter with large random weights, saved beside its parent."""
    lm = nb.load(folder)
    adapter = DraftAdapter(lm.model, DraftAdapterConfig(rank=rank))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    settings = BlockDiffusionSettings(block_size=BLOCK, mask_token_id=adapter.mask_token_id)
    save_adapter(out, adapter, settings, str(folder), folder, torch.float32)
    return out


def rows_of(tokenizer, length=192):
    config = load_config({"data": {"sources": [{"path": "task:word_problems"}], "row_length": length}}).data
    return RowStream(config, tokenizer, seed=0).next(2)


def test_greedy_output_is_that_of_generate_on_the_untouched_parent(parent, tmp_path):
    from transformers import AutoModelForCausalLM

    wild = wild_adapter(parent, tmp_path / "adapter")
    lm = nb.load(parent, draft_adapter=wild)
    untouched: Any = AutoModelForCausalLM.from_pretrained(parent)
    drafting: tuple[dict[str, Any], ...] = ({}, {"draft_ahead": 2}, {"draft_length": 2}, {"draft_paths": 3})
    for prompt in PROMPTS:
        tokens = lm.tokenizer(prompt, return_tensors="pt").input_ids
        expected = untouched.generate(tokens, max_new_tokens=20, do_sample=False, pad_token_id=256)
        for options in drafting:
            out = lm.generate(tokens, mode="speculative", max_new_tokens=20, **options)
            assert torch.equal(out.sequences, expected)


def test_rows_of_a_batch_get_what_they_get_alone(parent, tmp_path):
    lm = nb.load(parent, draft_adapter=wild_adapter(parent, tmp_path / "adapter"))
    modes: tuple[dict[str, Any], ...] = (
        {"mode": "speculative"},
        {"mode": "speculative", "draft_ahead": 2},
        {"mode": "speculative", "draft_paths": 3},
        {"mode": "diffusion"},
    )
    for options in modes:
        together = lm.generate(PROMPTS, max_new_tokens=12, **options).answers
        assert together == [lm.generate(p, max_new_tokens=12, **options).answers[0] for p in PROMPTS]


def test_custom_generate_drafts_with_the_adapter_that_load_put_on_the_model(tmp_path):
    folder = tmp_path / "parent"
    tiny_model("llama").save_pretrained(folder)
    lm = nb.load(folder, draft_adapter=wild_adapter(folder, tmp_path / "adapter"))
    tokens = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
    generate: Any = lm.model.generate
    plain = generate(tokens, **options)
    assert torch.equal(generate(tokens, custom_generate=nb.block_diffusion, mode="speculative", **options), plain)
    denoised = generate(tokens, custom_generate=nb.block_diffusion, mode="diffusion", **options)
    own = lm.generate(tokens, mode="diffusion", max_new_tokens=20)
    assert torch.equal(denoised, own.sequences)


def test_the_adapter_acts_in_denoising(tmp_path):
    folder = tmp_path / "parent"
    export(folder, tiny_model("llama", vocab_size=264), byte_tokenizer(), None)
    out = [
        nb.load(folder, draft_adapter=wild_adapter(folder, tmp_path / str(rank), rank)).generate(
            PROMPTS, mode="diffusion", max_new_tokens=24
        )
        for rank in (2, 5)
    ]
    assert out[0].answers != out[1].answers


def test_removing_the_adapter_leaves_the_parents_weights_bit_for_bit(parent, tmp_path):
    lm = nb.load(parent, draft_adapter=wild_adapter(parent, tmp_path / "adapter"))
    lm.generate(PROMPTS[0], mode="speculative", max_new_tokens=8)
    assert lm.adapter is not None
    lm.adapter.detach(lm.model)
    before, after = nb.load(parent).model.state_dict(), lm.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    lm.model.save_pretrained(tmp_path / "again")
    files = [load_file(folder / "model.safetensors") for folder in (parent, tmp_path / "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.parametrize("rows", [[range(6)] * 2, [range(4, 6)] * 2, [range(2, 4), range(4, 6)], [range(0)] * 2])
def test_a_merged_copy_computes_what_base_and_update_compute(parent, rows):
    lm = nb.load(parent)
    adapter = DraftAdapter(lm.model, DraftAdapterConfig(rank=3)).eval()
    with torch.no_grad():
        for parameter in adapter.lora_B:
            parameter.normal_(std=0.2)
    decoder = Decoder(lm.model, adapter)
    tokens, position = torch.arange(12).view(2, 6) + 40, torch.arange(6).expand(2, -1)
    gates: list[Any] = [torch.tensor([[slot in noised for slot in range(6)] for noised in rows])]
    gates += [True] if gates[0].all() else []
    with torch.no_grad():
        apart = decoder.hidden(tokens, position, None, noised=gates[0])
        adapter.merge_copies()
        for gate in gates:
            merged = decoder.hidden(tokens, position, None, noised=gate)
            torch.testing.assert_close(apart, merged, atol=1e-4, rtol=1e-4)


def test_the_two_passes_give_the_loss_of_one_gated_pass(parent):
    """Clean half first without gradient, then the noised half on its keys and values: nothing changes."""
    lm = nb.load(parent, dtype=torch.float64)
    adapter = DraftAdapter(lm.model, DraftAdapterConfig(rank=3)).double()
    with torch.no_grad():
        for parameter in adapter.lora_B:
            parameter.normal_(std=0.2)
    recipe = load_config({"data": {"sources": [{"path": "x"}]}}, {"recipe.views": 2}).recipe
    view = corrupt(
        rows_of(lm.tokenizer),
        BLOCK,
        mask_token_id=adapter.mask_token_id,
        end_token_id=256,
        recipe=recipe,
        seed=0,
        step=0,
    )
    decoder, rule = Decoder(lm.model, adapter), block_diffusion_rule()
    two = TwoViewLoss(decoder)(view, rule)
    mask = decoder.masks(rule, view.places)
    hidden = decoder.hidden(view.tokens, view.places.position, mask, noised=view.places.view > 0)
    n = view.noised_length
    scored = view.target[:, :n] >= 0
    one = torch.nn.functional.cross_entropy(
        decoder.logits(hidden[:, :n][scored]), view.target[:, :n][scored], reduction="sum"
    )
    torch.testing.assert_close(two.diffusion, one, atol=1e-4, rtol=1e-5)
    two.diffusion.backward()
    assert all(p.grad is None for p in lm.model.parameters() if not p.requires_grad)
    assert adapter.mask_vector.grad is not None
    assert adapter.mask_vector.grad.abs().sum() > 0
    assert all(p.grad is not None for p in adapter.parameters())


def test_soft_targets_of_a_draft_adapter_are_the_frozen_parents_predictions(llama):
    model = llama.double()
    tokens = rows_of(byte_tokenizer())
    tokens = type(tokens)(
        tokens.tokens % 90 + 3, *(getattr(tokens, n) for n in ("document", "position", "offset", "epoch", "number"))
    )
    adapter = DraftAdapter(model, DraftAdapterConfig(rank=3)).double()
    with torch.no_grad():
        for parameter in adapter.lora_B:
            parameter.normal_(std=0.2)
    recipe = load_config({"data": {"sources": [{"path": "x"}]}}).recipe
    view = corrupt(tokens, BLOCK, mask_token_id=97, end_token_id=256, recipe=recipe, seed=0, step=0)
    decoder, rule, n = Decoder(model, adapter), block_diffusion_rule(), view.noised_length
    sums = TwoViewLoss(decoder)(view, rule, soft=True)
    with torch.no_grad():
        mask = decoder.masks(rule, view.places)
        hidden = decoder.hidden(view.tokens, view.places.position, mask, noised=view.places.view > 0)
        student, parent = decoder.logits(hidden[:, :n]).softmax(-1), decoder.logits(hidden[:, n:]).softmax(-1)
        wanted = torch.zeros((), dtype=torch.float64)
        for row, slot in (view.target[:, :n] >= 0).nonzero().tolist():
            document, position = view.places.document[row, slot], view.places.position[row, slot]
            clean = (tokens.document[row] == document) & (tokens.position[row] == position)
            p, q = parent[row][clean], student[row, slot]
            wanted += (p * (p / q).log()).sum()
    torch.testing.assert_close(sums.soft.detach(), wanted, rtol=1e-5, atol=0)
    sums.soft.backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert any(bool(p.grad.abs().sum() > 0) for p in adapter.lora_A if p.grad is not None)


def test_an_untrained_adapter_is_the_parent_with_a_mean_mask_embedding(llama):
    adapter = DraftAdapter(llama, DraftAdapterConfig(rank=2))
    tokens, position = torch.tensor([[5, 6, 7]]), torch.arange(3)[None]
    decoder = Decoder(llama, adapter)
    with torch.no_grad():
        assert torch.equal(decoder.hidden(tokens, position, None), decoder.hidden(tokens, position, None, noised=True))


def test_training_saves_resumes_and_leaves_the_parent_alone(tmp_path):
    folder = tmp_path / "parent"
    export(folder, tiny_model("qwen3", vocab_size=264), byte_tokenizer(), None)
    before = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
    values = {
        "model": {"path": str(folder)},
        "draft_adapter": {"rank": 2},
        "data": {"sources": [{"path": "task:algebra"}], "row_length": 128},
        "growth": {"b_0": 4, "b_max": 4},
        "optimizer": {"lr": 0.02},
        "training": {"steps": 12, "batch_rows": 2, "checkpoint_every": 6},
    }
    losses: list[float] = []
    run = train(load_config({**values, "output": str(tmp_path / "a")}), on_step=lambda m: losses.append(m.loss))
    assert losses[-1] < losses[0]
    assert before == {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
    assert run.decoder.adapter is not None
    run.decoder.adapter.detach(run.decoder.model)
    file, trained = load_file(folder / "model.safetensors"), run.decoder.model.state_dict()
    assert all(torch.equal(file[name], trained[name]) for name in file)
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    again = train(load_config({**values, "output": str(tmp_path / "a")}), resume=True)
    assert all(torch.equal(a, b) for a, b in zip(run.trained.parameters(), again.trained.parameters(), strict=True))
    lm = nb.load(folder, draft_adapter=tmp_path / "a")
    assert lm.settings is not None
    assert lm.settings.block_size == 4
    assert lm.settings.mask_token_id == lm.decoder.vocabulary


MIXTURES: dict[str, dict[str, Any]] = {
    "phimoe": {"num_local_experts": 4},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
    "longcat_flash": {
        "num_layers": 1,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "moe_topk": 2,
        "zero_expert_num": 1,
        "expert_ffn_hidden_size": 16,
        "ffn_hidden_size": 64,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
    },
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 32},
    "gemma4_text": {  # no mixture, but it looks up more than the input embedding by the ids
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 264,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
    },
}


def mixture(kind: str) -> Any:
    """A tiny random model with experts."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 264, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(kind, **{**sizes, "eos_token_id": 256, **MIXTURES[kind]})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_all_linear_leaves_alone_what_leads_into_the_layers_and_out_of_them():
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "num_hidden_layers": 1, "vocab_size": 99}
    config = AutoConfig.for_model("opt", **sizes, num_attention_heads=4, max_position_embeddings=64)
    model = AutoModelForCausalLM.from_config(config)
    assert {"model.decoder.project_in", "model.decoder.project_out"} <= {name for name, _ in model.named_modules()}
    names = {name.rpartition(".")[2] for name in target_names(model, "all-linear")}
    assert names == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("recipe", ["draft_adapter", "lora"])
def test_all_linear_leaves_routers_alone_and_trains(kind, recipe, tmp_path):
    if recipe == "lora":
        pytest.importorskip("peft")
    model = mixture(kind)
    words = {word for name in target_names(model, "all-linear") for word in name.split(".")}
    assert {"q_proj", "o_proj"} <= words or "q_b_proj" in words
    assert not words & {"gate", "router", "wg", "shared_expert_gate"}
    with pytest.raises(UsageError, match="match nothing"):
        target_names(model, ("router", "wg", "shared_expert_gate"))
    export(tmp_path / "parent", model, byte_tokenizer(), None)
    values = {
        "model": {"path": str(tmp_path / "parent")},
        recipe: {"rank": 4},
        "data": {"sources": [{"path": "task:algebra"}], "row_length": 64},
        "growth": {"b_0": 4, "b_max": 4},
        "training": {"steps": 1, "batch_rows": 2},
        "output": str(tmp_path / "out"),
    }
    run = train(load_config(values))
    assert all(p.isfinite().all() for p in run.trained.parameters())
    if recipe == "draft_adapter":
        lm = nb.load(tmp_path / "parent", draft_adapter=tmp_path / "out")
        tokens = torch.arange(3, 13)[None]
        answers = [lm.generate(tokens, mode=mode, max_new_tokens=8).answers for mode in ("ar", "speculative")]
        assert answers[0] == answers[1]


@pytest.mark.parametrize("kind", ["qwen2_moe", "gemma4_text"])
def test_the_gate_opens_the_same_positions_in_layers_that_see_a_flattened_batch(kind):
    model = mixture(kind)
    adapter = DraftAdapter(model, DraftAdapterConfig(rank=2))
    decoder, generator = Decoder(model, adapter), torch.Generator().manual_seed(0)
    tokens, position = torch.randint(3, 250, (2, 7), generator=generator), torch.arange(7).expand(2, 7)
    tokens[0, 5] = adapter.mask_token_id
    gate = position > 2
    with torch.no_grad():
        for second in adapter.lora_B:
            second.normal_(0, 0.1, generator=generator)
        both = decoder.hidden(tokens, position, None, noised=gate)
        alone = [decoder.hidden(tokens[i : i + 1], position[:1], None, noised=gate[:1]) for i in range(2)]
        torch.testing.assert_close(both, torch.cat(alone))
        adapter.merge_copies()
        torch.testing.assert_close(decoder.hidden(tokens, position, None, noised=gate), both, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(both[:, :3], decoder.hidden(tokens[:, :3], position[:, :3], None))


def test_a_model_that_cannot_run_with_a_draft_adapter_is_refused_before_training(llama):
    decoder = Decoder(llama, DraftAdapter(llama, DraftAdapterConfig(rank=2)))
    probe_adapter(decoder)
    forward = llama.model.forward

    def without_ids(*arguments, input_ids=None, **options):
        if input_ids is not None:
            raise ValueError("no ids here")
        return forward(*arguments, **options)

    llama.model.forward = without_ids
    with pytest.raises(UsageError, match=r"'llama' cannot run with a draft adapter .*no ids here"):
        probe_adapter(decoder)


def test_peft_reads_the_folder(tmp_path):
    peft = pytest.importorskip("peft")

    folder = tmp_path / "parent"
    export(folder, tiny_model("llama", vocab_size=264), byte_tokenizer(), None)
    wild = wild_adapter(folder, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), wild).eval()
    ours = nb.load(folder, draft_adapter=wild)
    tokens = torch.tensor([[70, 71, 72, 73]])
    with torch.no_grad():
        expected = theirs(tokens).logits
        hidden = ours.decoder.hidden(tokens, torch.arange(4)[None], None, noised=True)
        torch.testing.assert_close(ours.decoder.logits(hidden), expected, atol=1e-4, rtol=1e-4)


def test_the_mask_vector_is_no_row_of_the_head(llama):
    """Tied weights: what embeds the mask token must not become a token that can be predicted."""
    adapter = DraftAdapter(llama, DraftAdapterConfig(rank=2))
    decoder = Decoder(llama, adapter)
    with torch.no_grad():
        hidden = decoder.hidden(torch.tensor([[adapter.mask_token_id]]), torch.zeros(1, 1).long(), None, noised=True)
        assert decoder.logits(hidden).shape[-1] == adapter.mask_token_id


def test_with_tied_embeddings_training_the_mask_vector_leaves_the_head_as_it_was():
    model = tiny_model("llama", tie_word_embeddings=True)
    head = model.get_parameter("lm_head.weight")
    assert head is model.get_input_embeddings().weight
    tokens, position = torch.tensor([[5, 6, 7]]), torch.arange(3)[None]
    with torch.no_grad():
        weights, clean = head.clone(), model(tokens).logits
    adapter = DraftAdapter(model, DraftAdapterConfig(rank=2))
    decoder, masked = Decoder(model, adapter), torch.tensor([[5, adapter.mask_token_id, adapter.mask_token_id]])
    before = adapter.mask_vector.detach().clone()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=10.0)
    decoder.logits(decoder.hidden(masked, position, None, noised=True))[..., 9].sum().backward()
    optimizer.step()
    assert not torch.equal(adapter.mask_vector, before)
    assert head.grad is None
    assert torch.equal(head, weights)
    with torch.no_grad():
        assert torch.equal(decoder.logits(decoder.hidden(tokens, position, None)), clean)


def test_bad_adapters_are_refused_in_one_line(tmp_path, llama):
    one, other = tmp_path / "one", tmp_path / "other"
    export(one, tiny_model("llama", vocab_size=264), byte_tokenizer(), None)
    export(other, tiny_model("llama", vocab_size=264, seed=5), byte_tokenizer(), None)
    wild = wild_adapter(one, tmp_path / "adapter")
    assert fingerprint(one) != fingerprint(other)
    with pytest.raises(UsageError, match=r"belongs to .*one.*, not to this model"):
        nb.load(other, draft_adapter=wild)
    with pytest.raises(UsageError, match="is not a folder"):
        nb.load(one, draft_adapter=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no draft adapter"):
        load_adapter(one, nb.load(one).model, one)
    lm = nb.load(one, draft_adapter=wild)
    with warnings.catch_warnings(action="error"), pytest.raises(UsageError, match="larger than the 4"):
        lm.generate("a", mode="speculative", block_size=8)
    with pytest.warns(UserWarning, match="no effect"):
        lm.generate("a", mode="ar", max_new_tokens=2)
    assert lm.adapter is not None
    with pytest.raises(UsageError, match="cannot be merged"):
        lm.adapter.merge()
    with pytest.raises(UsageError, match="match nothing; choose from down_proj"):
        target_names(llama, ("nothing",))
    with pytest.raises(UsageError, match=r"target_modules=\['key'\] match nothing"):
        target_names(llama, ("q_proj", "key"))
    with pytest.raises(UsageError, match="is no regular expression"):
        target_names(llama, "(q_proj")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_model.safetensors", b"\x10"),
        ("mask_vector.safetensors", b""),
        ("draft_adapter.json", b"[]"),
        ("draft_adapter.json", b"{}"),
        ("adapter_config.json", b"{}"),
        ("adapter_config.json", b'{"r": 2, "lora_alpha": 4, "lora_dropout": 0, "target_modules": ["other"]}'),
    ],
)
def test_a_file_of_an_adapter_that_is_cut_or_of_another_program_is_refused_in_one_line(tmp_path, llama, name, content):
    llama.save_pretrained(tmp_path / "parent")
    adapter = DraftAdapter(llama, DraftAdapterConfig(rank=2))
    settings = BlockDiffusionSettings(mask_token_id=adapter.mask_token_id)
    save_adapter(tmp_path / "adapter", adapter, settings, "parent", tmp_path / "parent")
    (tmp_path / "adapter" / name).write_bytes(content)
    with pytest.raises(UsageError, match="holds no draft adapter") as refused:
        nb.load(tmp_path / "parent", draft_adapter=tmp_path / "adapter")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: {"r": 3}, "do not fit r=3"),
        (lambda config: {"target_modules": config["target_modules"][1:]}, "is of no layer in target_modules"),
    ],
)
def test_an_adapter_whose_config_names_other_updates_than_it_holds_is_refused(tmp_path, llama, change, words):
    llama.save_pretrained(tmp_path / "parent")
    adapter = DraftAdapter(llama, DraftAdapterConfig(rank=2))
    settings = BlockDiffusionSettings(mask_token_id=adapter.mask_token_id)
    save_adapter(tmp_path / "adapter", adapter, settings, "parent", tmp_path / "parent")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | change(config)))
    with pytest.raises(UsageError, match=words) as refused:
        nb.load(tmp_path / "parent", draft_adapter=tmp_path / "adapter")
    assert "\n" not in str(refused.value)


def test_the_fingerprint_reads_weights_of_every_shape(tmp_path):
    weights = {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 3), "vector": torch.arange(3).bfloat16()}
    found = []
    for value in (1.0, 2.0):
        save_file({**weights, "scalar": torch.tensor(value)}, tmp_path / "model.safetensors")
        found.append(fingerprint(tmp_path))
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("growth.b_0", 1, "nothing to learn"),
        ("recipe.context", "block_causal", "changes the clean half"),
        ("model.scratch", {"model_type": "llama"}, "no weights"),
    ],
)
def test_settings_without_sense_for_an_adapter_are_refused(key, value, words):
    base = {"data": {"sources": [{"path": "x"}]}, "draft_adapter": {}, "growth": {"b_0": 32}}
    with pytest.raises(UsageError, match=words):
        load_config(base, {key: value})


def test_calls_in_two_threads_get_what_each_gets_alone():
    lm = nb.load("tiny-ar", draft_adapter="tiny-draft")
    prompts = [
        f"Q: Leo has {n} bags with 7 coins in each. He loses 13. How many coins does Leo have?\nA:" for n in "89"
    ]

    def answer(prompt: str) -> list[list[int]]:
        return [lm.generate(prompt, mode="speculative", max_new_tokens=24).answers[0] for _ in range(4)]

    expected = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(answer, prompts)) == expected


@pytest.mark.parametrize("gate", [True, torch.tensor([[False, True, True, False]])], ids=["all", "some"])
def test_a_layer_that_is_computed_again_has_the_gate_of_its_pass_on_whatever_thread(llama, gate):
    adapter = DraftAdapter(llama, DraftAdapterConfig(rank=3))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0.0, 0.3)
    tokens = torch.tensor([[5, 6, 7, adapter.mask_token_id]])

    def gradients() -> list[torch.Tensor]:
        adapter.zero_grad()
        hidden = Decoder(llama, adapter).hidden(tokens, torch.arange(4)[None], None, noised=gate)
        thread = threading.Thread(target=hidden.square().sum().backward)
        thread.start()
        thread.join()
        return [parameter.grad.clone() for parameter in adapter.parameters() if parameter.grad is not None]

    expected = gradients()
    recompute_activations(llama)
    found = gradients()
    assert len(found) == len(expected) == len(list(adapter.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_model_sees_the_gate_of_each_pass(llama):
    adapter = DraftAdapter(llama, DraftAdapterConfig(rank=3)).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0.0, 0.3)
    decoder, tokens, position = Decoder(llama, adapter), torch.tensor([[5, 6, 7, 8]]), torch.arange(4)[None]
    gates: list[Any] = [False, True, torch.tensor([[False, False, True, True]]), False]

    def hidden() -> list[torch.Tensor]:
        with torch.no_grad():
            return [decoder.hidden(tokens, position, None, noised=gate) for gate in gates]

    expected = hidden()
    torch._dynamo.reset()
    llama.base_model.compile(backend="eager")
    for a, b in zip(hidden(), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activations_computed_again_give_the_same_loss_and_gradients(family_model, dropout):
    without_dropout(family_model.train())
    adapter = DraftAdapter(family_model, DraftAdapterConfig(rank=3, dropout=dropout))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0.0, 0.3)
    recipe = RecipeConfig(views=2, soft_weight=0.5)
    rows, mask = make_rows([PLAIN, PROMPTED], 28), adapter.mask_token_id
    view = corrupt(rows, 4, mask_token_id=mask, end_token_id=EOS_ID, recipe=recipe, seed=1, step=0)
    results = []
    for again in (False, True):
        if again:
            recompute_activations(family_model)
        adapter.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        ran: list[int] = []
        hook = adapter.layers[0].base.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        loss = TwoViewLoss(Decoder(family_model, adapter))(view, block_diffusion_rule(), soft=True)
        loss.total(0.0, 2, 0.5).backward()
        hook.remove()
        assert len(ran) == (3 if again else 2)  # the clean half once, the noised one once or twice
        results.append([loss.diffusion.detach(), loss.soft.detach(), *(p.grad for p in adapter.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_the_gate_decides_position_by_position(llama):
    plain = Decoder(llama)
    tokens, position = torch.tensor([[5, 6, 7, 8]]), torch.arange(4)[None]
    with torch.no_grad():
        expected = plain.hidden(tokens, position, None)
    adapter = DraftAdapter(llama, DraftAdapterConfig(rank=2))
    with torch.no_grad():
        for parameter in adapter.lora_B:
            parameter.normal_()
        gate = torch.tensor([[False, False, True, True]])
        found = Decoder(llama, adapter).hidden(tokens, position, None, noised=gate)
    torch.testing.assert_close(found[:, :2], expected[:, :2])  # causal: later positions do not reach them
    assert not torch.allclose(found[:, 2:], expected[:, 2:])
    assert any(isinstance(module, GatedLinear) for module in llama.modules())


@pytest.mark.parametrize(
    ("device", "words"),
    [("cpu", "needs a CUDA device"), ("cuda", "requires bitsandbytes|not compiled with CUDA|NVIDIA")],
)
def test_a_parent_in_4_bits_says_in_one_line_what_is_missing(tmp_path, monkeypatch, device, words):
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    export(tmp_path, tiny_model("llama", vocab_size=264), byte_tokenizer(), None)
    with pytest.raises(UsageError, match=words) as error:
        load_parent(ModelConfig(path=str(tmp_path), quantization="4bit"), device)
    assert "\n" not in str(error.value)


def test_only_the_parent_of_a_draft_adapter_can_be_in_4_bits():
    with pytest.raises(UsageError, match="is for a frozen parent"):
        load_config({"data": {"sources": [{"path": "x"}]}}, {"model.quantization": "4bit"})
