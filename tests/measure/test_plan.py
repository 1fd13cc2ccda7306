"""The plan against the real thing: bytes that torch's allocator handed out, FLOPs that torch counted, real views."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from layouts import make_rows
from nextblock.attention.masks import to_dense
from nextblock.attention.rule import block_diffusion_rule
from nextblock.cli.main import app
from nextblock.config.errors import UsageError
from nextblock.config.run import AdaptConfig, load_config, stage_configs
from nextblock.config.sections import BlockDiffusionSettings, DraftAdapterConfig
from nextblock.measure.likelihood import bits_per_byte, evaluation_rows
from nextblock.measure.plan import USABLE, StagedPlan, largest_row, plan, plan_stages
from nextblock.measure.plan.memory import evaluation_memory, step_memory
from nextblock.measure.plan.table import plan_table
from nextblock.measure.plan.work import (
    attention_pairs,
    noised_tokens,
    run_flops,
    scored_tokens,
    step_flops,
)
from nextblock.model.draft_adapter import DraftAdapter
from nextblock.model.parent import load_parent, model_shape, scratch_config
from nextblock.model.shapes import shape_values
from nextblock.recipe.corruption import UNSCORED, corrupt
from nextblock.training.checkpoint import list_checkpoints
from nextblock.training.devices import DEVICES, GIB
from nextblock.training.flops import Products, kind_of_training
from nextblock.training.footprint import count_parameters
from nextblock.training.launcher import check_sharding
from nextblock.training.loop import train
from nextblock.training.setup import prepare
from nextblock.training.step import train_step
from runs import config_of as short_run

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
SHAPES = {
    "many layers": {**LLAMA, "num_hidden_layers": 8},
    "a large vocabulary": {**LLAMA, "vocab_size": 40_000, "hidden_size": 32, "tie_word_embeddings": True},
    "wide, of another family": {**LLAMA, "model_type": "qwen3", "head_dim": 16, "intermediate_size": 512},
}


def config_of(shape: dict[str, Any] | None, folder: Path, **overrides: Any) -> AdaptConfig:
    """A run over one long text, so that rows are full and noised blocks whole."""
    (folder / "long.txt").write_text(" ".join(f"{n} and {n + 1} are {2 * n + 1}." for n in range(2000)))
    values = {
        "model": {"scratch": shape, "tokenizer": "bytes", "path": "tiny-ar"},
        "data": {"sources": [{"path": str(folder / "long.txt")}], "row_length": 256, "held_out": 0.0},
        "growth": {"b_0": 16, "b_max": 16},
        "training": {"steps": 3, "batch_rows": 4},
    }
    return load_config(values, {key.replace("__", "."): value for key, value in overrides.items()})


def measured_peak(config: AdaptConfig) -> int:
    """Bytes held at the peak of a second step: of weights and optimizer, and of what torch's CPU allocator handed out.

    The profiler records every allocation and release of the allocator itself, so the inside of kernels too.
    """
    run = prepare(config)
    train_step(run, 0)
    tensors = [*run.decoder.model.parameters(), *(run.trained.parameters() if run.decoder.adapter else ())]
    tensors += [v for state in run.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    held = sum(t.numel() * t.element_size() for t in tensors)
    return held + allocated(lambda: train_step(run, 1))


def allocated(work: Callable[[], Any]) -> int:
    """Most bytes that lived at a time of those that torch's CPU allocator handed out meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    recorded: Any = profile.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    most = now = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


CASES = [(name, {}) for name in SHAPES] + [
    ("many layers", {"training__gradient_checkpointing": True}),
    ("many layers", {"training__micro_batch_rows": 1}),
    ("a large vocabulary", {"recipe__views": 2, "recipe__complementary": True}),
    ("a large vocabulary", {"recipe__soft_weight": 0.5}),
    ("wide, of another family", {"growth__b_0": 1, "growth__b_max": 1}),
]


@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_planned_memory_is_within_15_per_cent_of_the_measured_peak(name, overrides, tmp_path):
    config = config_of(SHAPES[name], tmp_path, **overrides)
    planned = sum(step_memory(config, model_shape(config.model), device="cpu").values())
    assert planned == pytest.approx(measured_peak(config), rel=0.15)


@pytest.mark.parametrize("again", [False, True])
def test_planned_memory_of_a_draft_adapter_is_within_15_per_cent_of_the_measured_peak(again, tmp_path):
    options = {"training__batch_rows": 2, "training__gradient_checkpointing": again}
    config = config_of(None, tmp_path, draft_adapter={"rank": 8}, **options)
    planned = sum(step_memory(config, model_shape(config.model), device="cpu").values())
    assert planned == pytest.approx(measured_peak(config), rel=0.15)


def test_planned_memory_of_lora_under_a_tied_head_is_within_15_per_cent_of_the_measured_peak(tmp_path):
    parent = load_parent(config_of(SHAPES["a large vocabulary"], tmp_path).model, "cpu").model
    parent.save_pretrained(tmp_path / "parent")
    config = config_of(None, tmp_path, lora={"rank": 8}, model__path=str(tmp_path / "parent"))
    planned = sum(step_memory(config, model_shape(config.model), device="cpu").values())
    assert planned == pytest.approx(measured_peak(config), rel=0.15)


@pytest.mark.parametrize("name", ["many layers", "a large vocabulary"])
@pytest.mark.parametrize("section", [{}, {"draft_adapter": {"rank": 2}}])
def test_planned_memory_of_the_final_evaluation_is_within_15_per_cent_of_the_measured_peak(name, section, tmp_path):
    parent = load_parent(config_of(SHAPES[name], tmp_path).model, "cpu").model
    parent.save_pretrained(tmp_path / "parent")
    sizes = {"data__held_out": 0.5, "training__micro_batch_rows": 2}
    config = config_of(None, tmp_path, model__path=str(tmp_path / "parent"), **sizes, **section)
    run = prepare(config)
    run.loss.eval()
    rows = make_rows([[[256]]] * 2, 256)
    tensors = [*run.decoder.model.parameters(), *(run.trained.parameters() if section else ())]

    def measure() -> None:
        settings = BlockDiffusionSettings(block_size=16, mask_token_id=run.mask_token_id or 0)
        size = evaluation_rows(config)
        bits_per_byte(run.decoder, run.tokenizer, rows, settings, draws=1, batch_rows=size)

    recorded = allocated(measure)
    planned = sum(evaluation_memory(config, model_shape(config.model), device="cpu").values())
    assert planned == pytest.approx(recorded + sum(t.numel() * t.element_size() for t in tensors), rel=0.15)


@pytest.mark.parametrize("nothing", [{"data__held_out": 0.0}, {"training__evaluate_rows": 0}])
def test_the_peak_is_that_of_the_final_evaluation_where_that_takes_more_and_there_is_one(nothing, tmp_path):
    sharded = {"training__fsdp": True, "data__held_out": 0.1}
    found = plan(config_of(SHAPES["many layers"], tmp_path, **sharded), device="l4", devices=4)
    assert found.evaluation_bytes > 4 * found.parameters  # one device holds the whole model, without an optimizer
    assert found.peak_bytes == max(found.evaluation_bytes, sum(found.memory.values()))
    without = plan(config_of(SHAPES["many layers"], tmp_path, **(sharded | nothing)), device="l4", devices=4)
    assert (without.evaluation_bytes, without.memory) == (0, found.memory)
    assert without.peak_bytes == sum(without.memory.values())


# ------------------------------------------------------------------------------------ tokens and FLOPs


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"views": 2, "complementary": True},
        {"prediction": "aligned"},
        {"full_mask_share": 0.6},
        {"views": 2, "complementary": True, "full_mask_share": 0.6},
        {"context": "block_causal"},
    ],
)
def test_expected_noised_tokens_and_pairs_are_those_of_real_views(recipe, tmp_path):
    overrides = {f"recipe__{key}": value for key, value in recipe.items()}
    config = config_of(LLAMA, tmp_path, recipe__fill_last_block=False, **overrides)
    rows = make_rows([[[256]]] * 200, 256)
    view = corrupt(rows, 16, mask_token_id=96, end_token_id=None, recipe=config.recipe, seed=0, step=0)
    real = (view.places.view > 0) & (view.places.document >= 0)
    expected = noised_tokens(config, 16, 256)
    assert float(real.sum()) / 200 == pytest.approx(expected, rel=0.02)
    scored = (view.target[:, : view.noised_length] != UNSCORED).sum()
    assert float(scored) / 200 == pytest.approx(scored_tokens(config, 16, 256), rel=0.03)
    mask = to_dense(block_diffusion_rule(config.recipe.context), view.places)[:, 0]
    clean, noised = attention_pairs(expected, 256, 16, config.recipe.context)
    assert float(mask[:, view.noised_length :].sum()) / 200 == clean
    assert float((mask & real.unsqueeze(-1)).sum()) / 200 == pytest.approx(noised, rel=0.03)


def test_multiply_adds_of_the_linear_layers_are_those_that_torch_counts(tmp_path):
    config = config_of(LLAMA, tmp_path)
    counts = count_parameters(config, model_shape(config.model))
    decoder = load_parent(config.model, "cpu")
    tokens = torch.zeros(2, 50, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        decoder.hidden(tokens, torch.arange(50).expand(2, -1), None)
    counted = sum(n for name, n in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    assert counted == 2 * counts.products.linear * tokens.numel()


def test_full_training_is_three_forward_passes_and_a_drafts_clean_half_is_one(tmp_path):
    full, draft = config_of(LLAMA, tmp_path), config_of(None, tmp_path, draft_adapter={"rank": 1})
    shape = model_shape(draft.model)
    ours, theirs = (step_flops(c, shape, count_parameters(c, shape), 16) for c in (full, draft))
    assert ours.clean == 3 * theirs.clean
    assert theirs.noised < ours.noised
    assert ours.recomputed == 0
    again = config_of(LLAMA, tmp_path, training__gradient_checkpointing=True)
    assert step_flops(again, shape, count_parameters(again, shape), 16).recomputed == pytest.approx(
        (ours.clean + ours.noised) / 3
    )


@pytest.mark.parametrize("section", [{}, {"lora": {"rank": 4}}, {"draft_adapter": {"rank": 4}}])
@pytest.mark.parametrize("recipe", [{}, {"views": 2, "soft_weight": 0.5, "ar_weight": 0.0}])
def test_a_plan_expects_the_operations_that_a_run_counts(section, recipe, tmp_path):
    overrides = {f"recipe__{key}": value for key, value in recipe.items()}
    config = config_of(None, tmp_path, recipe__fill_last_block=False, training__batch_rows=100, **overrides, **section)
    shape = model_shape(config.model)
    planned = step_flops(config, shape, count_parameters(config, shape), 16)
    run = prepare(config)
    rows = make_rows([[[256]]] * 100, 256)
    view = corrupt(rows, 16, mask_token_id=96, end_token_id=None, recipe=config.recipe, seed=0, step=0)
    kind = kind_of_training(config)
    products = Products.of(run.decoder.model, run.trained.parameters() if section else ())
    counted = products.of_view(kind, view, config.recipe.ar_weight > 0, config.recipe.soft_weight > 0)
    assert counted.clean == planned.clean
    assert counted.noised == pytest.approx(planned.noised, rel=0.03)
    assert counted.head == pytest.approx(planned.head, rel=0.03)


def test_soft_targets_take_the_teachers_logits_and_those_of_both_again(tmp_path):
    plain, soft = config_of(LLAMA, tmp_path), config_of(LLAMA, tmp_path, recipe__soft_weight=0.5)
    shape = model_shape(plain.model)
    ours, theirs = (step_flops(c, shape, count_parameters(c, shape), 16) for c in (soft, plain))
    logits = 4 * 120 * 2 * 512 * 64  # 4 rows, of 256 tokens 15 in 16 can be masked and half are
    assert (ours.clean, ours.noised) == (theirs.clean, theirs.noised)
    assert ours.head - theirs.head == logits
    assert ours.recomputed == 2 * logits


@pytest.mark.parametrize(
    ("recipe", "unscored"),
    [
        ({}, []),
        ({"ar_weight": 0.0}, [1, 4, 16]),
        ({"ar_weight_final": 0.0}, [16]),
        ({"ar_weight": 0.0, "ar_weight_final": 0.5}, [1]),
    ],
)
def test_the_ar_loss_is_counted_while_its_weight_is_above_0(recipe, unscored, tmp_path):
    growth = {"growth__b_0": 1, "growth__delta": 3, "growth__r": 4, "training__steps": 10}
    config = config_of(LLAMA, tmp_path, **growth, **{f"recipe__{key}": value for key, value in recipe.items()})
    shape = model_shape(config.model)
    counts = count_parameters(config, shape)
    for size in (1, 4, 16):
        diffusion = scored_tokens(config, size, 256)
        targets = diffusion + (0 if size in unscored else 255)
        assert step_flops(config, shape, counts, size).head == 3 * 2 * 4 * targets * 512 * 64
    never = recipe.get("ar_weight", 0.5) == recipe.get("ar_weight_final", 0.0) == 0
    parts = [step_memory(c, shape, device="l4")["head"] for c in (config, config_of(LLAMA, tmp_path))]
    assert (parts[0] < parts[1]) == never


def test_lora_computes_a_tied_heads_logits_and_its_own_updates_twice(tmp_path):
    tied = {**LLAMA, "tie_word_embeddings": True}
    shape = model_shape(config_of(tied, tmp_path).model)
    once, twice = (
        config_of(None, tmp_path, lora={"rank": 2}, training__gradient_checkpointing=again) for again in (False, True)
    )
    counts = count_parameters(once, shape)
    found, again = (step_flops(c, shape, counts, 16) for c in (once, twice))
    assert found.recomputed == found.head / 2  # a frozen head: logits, and the gradient of what enters it
    tokens = 4 * (256 + noised_tokens(once, 16, 256))
    updates = 2 * tokens * counts.products.low_rank
    forward = config_of(tied, tmp_path, training__gradient_checkpointing=True)
    layers = step_flops(forward, shape, count_parameters(forward, shape), 16).recomputed
    assert again.recomputed == found.recomputed + layers + updates


def test_a_run_is_its_steps_each_at_its_own_block_size(tmp_path):
    config = config_of(LLAMA, tmp_path, growth__b_0=1, growth__delta=3, growth__r=4, training__steps=10)
    shape = model_shape(config.model)
    counts = count_parameters(config, shape)
    one, four, sixteen = (step_flops(config, shape, counts, size).useful for size in (1, 4, 16))
    assert run_flops(config, shape, counts) == pytest.approx(3 * one + 3 * four + 4 * sixteen)


# ------------------------------------------------------------------------------------------- the plan


GEMMA = {**LLAMA, "model_type": "gemma2", "head_dim": 16}  # with soft-capped scores


@pytest.mark.parametrize(
    ("shape", "overrides", "device", "dense"),
    [
        (GEMMA, {}, "l4", False),
        (LLAMA, {}, "l4", False),
        (LLAMA, {"model__attention": "sdpa"}, "l4", True),
        (LLAMA, {"training__compile": True}, "cpu", True),
        (LLAMA, {"training__compile": True}, "l4", False),
    ],
)
def test_masks_are_dense_where_a_run_has_dense_ones(shape, overrides, device, dense, tmp_path):
    config = config_of(shape, tmp_path, **overrides)
    found = step_memory(config, model_shape(config.model), device=device)["mask"]
    size = 4 * 4 * (240 + 256) ** 2  # 4 rows in float32, of 256 tokens and as many noised but for a block in 16
    assert (found == size) if dense else (found < size / 100)


def test_8_bit_states_are_a_byte_a_value_and_a_scale_for_each_256_where_tensors_are_large(tmp_path):
    whole, small = (config_of(LLAMA, tmp_path, optimizer__name=name) for name in ("adamw", "adamw_8bit"))
    shape = model_shape(small.model)
    plain, found = (step_memory(c, shape, device="l4") for c in (whole, small))
    # Of 3 layers query and output [64, 64], key and value [32, 64], gate, up and down [192, 64]; embedding and head
    # [512, 64]; 7 norms of 64. Keys and values have 2,048 values, so they stay in 32 bits as the norms do.
    large = 3 * (2 * 64 * 64 + 3 * 192 * 64) + 2 * 512 * 64
    below = 3 * 2 * 32 * 64 + 7 * 64
    assert plain["optimizer"] == 2 * 4 * (large + below)
    assert found["optimizer"] == 2 * (large + 4 * large // 256 + 4 * below)
    assert {**found, "optimizer": 0} == {**plain, "optimizer": 0}


QLORA = {"model__path": "Qwen/Qwen3-8B-Base", "model__tokenizer": None, "model__dtype": "bfloat16"}


@pytest.mark.parametrize("section", ["lora", "draft_adapter"])
def test_a_4_bit_parent_is_half_a_byte_a_value_and_a_scale_for_each_64(section, tmp_path):
    overrides = {**QLORA, section: {"rank": 2, "target_modules": ["q_proj"]}, "training__micro_batch_rows": 1}
    whole, small = (config_of(None, tmp_path, **overrides, model__quantization=q) for q in (None, "4bit"))
    shape = model_shape(small.model)
    plain, found = (step_memory(c, shape, device="h100") for c in (whole, small))
    # Qwen3-8B: 36 layers; query and output [4096, 4096], key and value [1024, 4096], gate, up and down [12288, 4096].
    linear = 36 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 12288)
    assert plain["weights"] - found["weights"] == 2 * linear - linear // 2 - 4 * linear // 64
    assert 0.33 < found["weights"] / plain["weights"] < 0.45
    copies = {kind: found.get(kind, 0) - plain.get(kind, 0) for kind in ("activations", "backward")}
    assert 0 <= sum(copies.values()) <= 2 * 12288 * 4096 * 2  # of one matrix, not of all
    assert step_flops(small, shape, count_parameters(small, shape), 16) == step_flops(
        whole, shape, count_parameters(whole, shape), 16
    )


def test_a_4_bit_parent_is_refused_on_a_cpu_as_a_run_refuses_it(tmp_path):
    config = config_of(None, tmp_path, lora={}, model__quantization="4bit")
    with pytest.raises(UsageError, match=r"^model\.quantization=4bit needs a CUDA device; leave it out on cpu"):
        plan(config, device="cpu")


def test_an_adapters_share_is_its_real_size(tmp_path):
    config = config_of(None, tmp_path, draft_adapter={"rank": 8})
    decoder = load_parent(config.model, "cpu")
    parent = sum(p.numel() for p in decoder.model.parameters())
    adapter = DraftAdapter(decoder.model, DraftAdapterConfig(rank=8))
    found = plan(config, device="cpu")
    assert found.trained_parameters == sum(p.numel() for p in adapter.parameters())
    assert found.trained_share == found.trained_parameters / parent


def test_the_longest_row_fits_and_a_longer_one_does_not(tmp_path):
    config = config_of({**LLAMA, "max_position_embeddings": 2**20}, tmp_path, training__batch_rows=1)
    shape = model_shape(config.model)

    def size(length: int) -> int:
        return sum(step_memory(config, shape, device="l4", row_length=length).values())

    found = largest_row(config, shape, "l4", 1, 1, size(256))
    assert found is not None
    assert found % 16 == 0
    assert size(found) <= USABLE * 22.5 * GIB < size(int(1.05 * found) // 16 * 16)


def test_sharding_divides_what_lasts_and_ddp_adds_its_buckets(tmp_path):
    config = config_of(LLAMA, tmp_path)
    shape = model_shape(config.model)
    one, ddp, fsdp = (
        step_memory(config, shape, device="h100", devices=n, sharding=s) for n, s in ((1, 1), (4, 1), (4, 4))
    )
    assert ddp["ddp buckets"] == one["weights"] - _buffers(one, config)
    assert fsdp["optimizer"] == one["optimizer"] / 4
    assert fsdp["activations"] < one["activations"]  # a quarter of the rows


@pytest.mark.parametrize(("fsdp", "expected"), [(True, "fsdp2"), (False, "ddp")])
def test_without_parallel_the_configuration_decides_whether_weights_are_shared_out(fsdp, expected, tmp_path):
    config = config_of(LLAMA, tmp_path, training__fsdp=fsdp)
    found = plan(config, device="l4", devices=4)
    assert found == plan(config, device="l4", devices=4, parallel=expected)
    assert found.parallel == expected
    assert plan(config, device="l4").parallel is None


@pytest.mark.parametrize(
    "key", [{"lora": {"rank": 2}}, {"draft_adapter": {"rank": 2}}, {"optimizer__name": "adamw_8bit"}]
)
def test_fsdp_is_refused_in_the_words_of_a_run(key, tmp_path):
    config = config_of(None, tmp_path, **key)
    with pytest.raises(UsageError) as of_a_run:
        check_sharding(config)
    with pytest.raises(UsageError, match="^" + re.escape(str(of_a_run.value)) + "$"):
        plan(config, device="l4", devices=4, parallel="fsdp2")
    assert plan(config, device="l4", parallel="fsdp2").fits  # on one device there is nothing to share out


def _buffers(kinds: dict[str, int], config: AdaptConfig) -> int:
    """What is held beside the parameters."""
    return kinds["weights"] - 4 * count_parameters(config, model_shape(config.model)).parent


def test_overridden_values_of_a_shape_are_planned(tmp_path):
    values = {"num_hidden_layers": 5, "max_position_embeddings": 512}
    overridden = config_of(LLAMA, tmp_path, model__override=values)
    found = plan(overridden, device="l4")
    assert found == plan(config_of({**LLAMA, **values}, tmp_path), device="l4")
    assert found.largest_row == 512
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64 + 2 * 64
    assert found.parameters == 5 * layer + 2 * 512 * 64 + 64
    with pytest.raises(UsageError, match=r"^model\.override\.num_hiden_layers: .*did you mean 'num_hidden_layers'"):
        plan(config_of(LLAMA, tmp_path, model__override={"num_hiden_layers": 5}), device="l4")


def test_a_known_hub_id_needs_no_network_and_an_unknown_one_is_refused(tmp_path):
    known = config_of(None, tmp_path, model__path="Qwen/Qwen3-8B-Base", model__tokenizer=None)
    assert model_shape(known.model).hidden_size == shape_values("qwen3-8b")["hidden_size"]
    offline = r"not on this machine and its shape is not among those known .*; the Hub is not asked \(HF_HUB_OFFLINE\)"
    with pytest.raises(UsageError, match=offline):
        model_shape(config_of(None, tmp_path, model__path="someone/else").model)


def test_online_a_config_is_downloaded_alone_and_that_of_a_known_model_is_not(tmp_path, monkeypatch):
    asked: list[tuple[str, bool]] = []

    def stored(source: str, *, local_files_only: bool, **_: Any) -> Any:
        asked.append((source, local_files_only))
        if local_files_only:
            raise OSError("not in the cache")
        return scratch_config(LLAMA)

    monkeypatch.setattr("nextblock.model.parent.config_as_stored", stored)
    found = plan(config_of(None, tmp_path, model__path="someone/else"), device="l4")
    assert found.parameters == plan(config_of(LLAMA, tmp_path), device="l4").parameters
    model_shape(config_of(None, tmp_path, model__path="Qwen/Qwen3-8B-Base").model)
    assert asked == [("someone/else", False), ("Qwen/Qwen3-8B-Base", True)]


def test_a_run_that_does_not_fit_is_said_so_in_one_line_with_what_helps_and_status_1(tmp_path):
    config = tmp_path / "run.yaml"
    values = {"machine": {"gpu": "rtx4090", "gpus": 2}, "model": {"path": "Qwen/Qwen3-8B-Base"}}
    values |= {"data": {"sources": [{"path": "task:algebra"}], "row_length": 512}, "growth": {"b_0": 32}}
    config.write_text(json.dumps(values))
    small = ["--model.override", "{num_hidden_layers: 16}"]
    result = CliRunner().invoke(app, ["plan", str(config), *small])
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert re.match(
        r"this run does not fit on 2 x rtx4090: [\d.]+ GiB at the peak of one are over 92% of its 24 GiB", line
    )
    for cure in ("training.fsdp=true", "training.gradient_checkpointing=true", "training.micro_batch_rows=1"):
        assert cure in line


@pytest.mark.parametrize("section", ["lora", "draft_adapter"])
def test_target_modules_that_match_nothing_are_called_by_their_section(section, tmp_path):
    config = config_of(None, tmp_path, **{section: {"target_modules": ["nope"]}})
    with pytest.raises(UsageError, match=rf"^{section}\.target_modules=\['nope'\] match nothing"):
        plan(config, device="l4")


def test_dropout_in_front_of_the_updates_takes_memory(tmp_path):
    none, some = (
        step_memory(config, model_shape(config.model), device="l4")
        for config in (config_of(None, tmp_path, lora={"rank": 2, "dropout": share}) for share in (0.0, 0.1))
    )
    assert some["activations"] > none["activations"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "h10"], "did you mean 'h100'"),
        (["--parallel", "fsdp"], "did you mean 'fsdp2'"),
        (["--gpus", "3"], "training.batch_rows=4 does not divide over 3 devices; use 3"),
        (["--gpu", "cpu", "--model.attention", "flex_attention"], "has no backward pass on CPU; use sdpa"),
        (["--mfu", "40"], "mfu=40.0 is a share of the peak"),
        (["--data.row_length", "4096"], "data.row_length=4096 is over the model's 2048 positions"),
    ],
)
def test_the_command_refuses_bad_input(options, message):
    result = CliRunner().invoke(app, ["plan", "smoke", *options])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


# ----------------------------------------------------------------------------------------- stages


@pytest.fixture
def staged(tmp_path) -> AdaptConfig:
    """Growth, longer rows of another batch under more positions, then other steps."""
    stages = [
        {"name": "base", "training": {"steps": 9}, "growth": {"b_0": 1, "delta": 1}},
        {
            "name": "long",
            "model": {"override": {"max_position_embeddings": 4096}},
            "data": {"row_length": 512},
            "training": {"batch_rows": 2},
        },
        {"name": "sft", "training": {"steps": 5, "micro_batch_rows": 1}},
    ]
    return config_of(LLAMA, tmp_path, stages=stages)


def test_each_stage_is_planned_as_its_configuration_alone(staged):
    machine: dict[str, Any] = {"device": "l4", "devices": 2, "parallel": "fsdp2", "mfu": 0.3}
    found = plan_stages(staged, **machine)
    assert [(stage.name, stage.plan.steps) for stage in found.stages] == [("base", 9), ("long", 3), ("sft", 5)]
    for stage, config in zip(found.stages, stage_configs(staged), strict=True):
        alone = load_config(config.model_dump(mode="json"))  # as from a file of its own
        assert stage.plan == plan(alone, **machine)
        shape = model_shape(alone.model)
        assert stage.plan.run_flops == run_flops(alone, shape, count_parameters(alone, shape))
    assert [stage.plan.row_length for stage in found.stages] == [256, 512, 256]
    assert [stage.plan.largest_row for stage in found.stages] == [2048, 4096, 4096]


def test_a_run_in_stages_takes_the_sum_of_its_stages_and_the_memory_of_the_largest(staged):
    found = plan_stages(staged, device="l4", devices=2)
    plans = [stage.plan for stage in found.stages]
    assert found.steps == 17
    assert found.run_flops == sum(stage.plan.run_flops for stage in found.stages)
    assert found.seconds is not None
    assert found.seconds == sum(one.seconds or 0 for one in plans)
    assert found.seconds == pytest.approx(found.run_flops / (2 * 0.4 * (DEVICES["l4"].tflops or 0) * 1e12))
    assert found.device_hours == pytest.approx(found.seconds * 2 / 3600)
    assert found.peak_bytes == max(one.peak_bytes for one in plans)
    assert found.fits
    on_cpu = plan_stages(staged, device="cpu")
    assert (on_cpu.seconds, on_cpu.device_hours, on_cpu.fits) == (None, None, None)
    assert on_cpu.run_flops == found.run_flops


def test_one_stage_that_does_not_fit_is_enough_for_the_run_not_to(staged):
    found = plan_stages(staged, device="l4")
    small = replace(found.stages[1].plan, fits=False)
    assert not StagedPlan((found.stages[0], replace(found.stages[1], plan=small))).fits


def test_a_stage_that_cannot_be_planned_is_named(staged):
    config = load_config(staged.model_dump(mode="json"), {"stages.1.training.batch_rows": 3})
    with pytest.raises(UsageError, match=r"stages\.1 \(long\): training\.batch_rows=3 does not divide over 2 devices"):
        plan_stages(config, device="l4", devices=2)
    with pytest.raises(UsageError, match=r"^gpu 'h10' is unknown"):
        plan_stages(staged, device="h10")


def test_the_command_prints_all_stages_as_a_table_and_as_json(staged, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(staged.model_dump(mode="json")))
    command = ["plan", str(config), "--gpu", "l4"]
    found = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).stdout)
    assert [(stage["name"], stage["row_length"]) for stage in found["stages"]] == [
        ("base", 256),
        ("long", 512),
        ("sft", 256),
    ]
    assert found["device_hours"] == sum(stage["device_hours"] for stage in found["stages"])
    assert found["fits"]
    table = CliRunner().invoke(app, command, catch_exceptions=False).stdout
    cells = [re.split(r" {2,}", line.strip()) for line in table.splitlines()]
    rows = {label: values for label, *values in cells}
    assert rows["steps"] == ["9", "3", "5", "17"]
    assert rows["longest row that fits"] == ["2048", "4096", "4096"]
    assert len(rows["GPU-hours"]) == 4


@pytest.mark.parametrize("name", ["m[/x]", "m[v2]"])
def test_a_model_is_shown_by_its_name_whatever_that_holds(name, tmp_path):
    found = replace(plan(config_of(LLAMA, tmp_path), device="l4"), model=name)
    console = Console(width=140)
    with console.capture() as captured:
        console.print(plan_table(found))
    assert captured.get().count(name) == 2  # beside the parameters, and below the table


def test_the_command_prints_the_plan_as_json():
    result = CliRunner().invoke(app, ["plan", "smoke", "--gpu", "l4", "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found["peak_bytes"] == max(sum(found["memory"].values()), found["evaluation_bytes"])
    assert found["fits"]
    assert found["largest_row"] == 2048
    assert found["device_hours"] == pytest.approx(found["seconds"] / 3600)


def test_a_checkpoint_takes_the_planned_bytes_and_a_store_the_ids_of_all_steps(place, tmp_path):
    config = short_run(place, tmp_path / "run", training__steps=9)
    found = plan(config, device="cpu", bandwidth=0.5)
    train(config)
    folder = list_checkpoints(tmp_path / "run")[-1]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    tensors = 4 * len(load_file(tmp_path / "run" / "model.safetensors"))  # weights, two moments, steps
    assert 0 < size - found.checkpoint_bytes < 2500 * tensors  # headers and the state beside
    assert found.checkpoint_seconds == found.checkpoint_bytes / 0.5e9
    assert found.store_bytes == 9 * 4 * 32 * 2
    assert found.feed_tokens_per_second is None
    on_gpus = plan(load_config(config.model_dump(mode="json")), device="h100", devices=2)
    assert on_gpus.feed_tokens_per_second == pytest.approx((on_gpus.tokens_per_second or 0) / 2)
    with pytest.raises(UsageError, match="bandwidth=0 is GB/s; use a number above 0"):
        plan(config, bandwidth=0)
