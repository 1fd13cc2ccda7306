"""What runs on CUDA alone gives what the CPU gives.

The body of a test takes the device. On a CPU it runs where that is cheap, so that a mistake in it shows without a GPU;
`benchmarks/gpu.sh` runs all of it on one. A test whose packages are not installed is skipped with that reason.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import nn

from families import MASK_ID, PAD_ID, tiny_model
from layouts import CHAT, PLAIN, PROMPTED, Spans, make_rows
from nextblock.attention import masks
from nextblock.attention.rule import block_diffusion_rule
from nextblock.config.run import load_config
from nextblock.config.sections import BlockDiffusionSettings, DraftAdapterConfig, RecipeConfig
from nextblock.data.rows import Rows
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.model.decoder import Decoder
from nextblock.model.draft_adapter import DraftAdapter
from nextblock.model.training_mode import recompute_activations
from nextblock.recipe import cross_entropy
from nextblock.recipe.corruption import TwoView, corrupt
from nextblock.recipe.objective import LossSums, TwoViewLoss
from nextblock.training import launcher
from nextblock.training.loop import train
from runs import config_of

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # FlexAttention's kernel takes heads of 16
RECIPE = RecipeConfig(views=2, complementary=True)
ROWS: list[list[Spans]] = [PLAIN, PROMPTED, CHAT, [[28]]]
CPU, GPU = pytest.param("cpu", id="cpu"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)
CLOSE: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-4}


def wide_model(family: str = "llama", **options: Any) -> Any:
    """A tiny random model with heads that GPU kernels take."""
    heads = {"head_dim": 16, "query_pre_attn_scalar": 16} if family == "gemma3" else {"head_dim": 16}
    return tiny_model(family, **{**SIZES, **({} if family in ("phi3", "gpt_neox") else heads), **options})


def view_of(rows: Rows, block_size: int, step: int = 0, recipe: RecipeConfig = RECIPE) -> TwoView:
    return corrupt(rows, block_size, mask_token_id=MASK_ID, end_token_id=2, recipe=recipe, seed=1, step=step)


def step_of(
    model: Any, rows: Rows, block_size: int, device: str, *, adapter: DraftAdapter | None = None, soft: bool = False
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The sums of the losses and the gradients of one step on a device, on the CPU."""
    decoder = Decoder(model.to(device), adapter if adapter is None else adapter.to(device))
    view = view_of(rows, block_size).to(torch.device(device))
    sums: LossSums = TwoViewLoss(decoder)(view, block_diffusion_rule("context_causal"), True, soft)
    total = sums.total(0.5, RECIPE.views, 1.0 if soft else 0.0) / int((rows.offset >= 0).sum())
    total.backward()
    trained: nn.Module = adapter or model
    gradients = {name: p.grad.float().cpu() for name, p in trained.named_parameters() if p.grad is not None}
    return [sums.diffusion.detach().cpu(), sums.ar.detach().cpu(), sums.soft.detach().cpu()], gradients


def assert_close(found: Any, wanted: Any) -> None:
    """Equal losses, and gradients equal against the largest entry of each."""
    torch.testing.assert_close(found[0], wanted[0], **CLOSE)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        scale = float(gradient.abs().max()) or 1.0
        torch.testing.assert_close(found[1][name] / scale, gradient / scale, msg=name, **CLOSE)


def attention_of(device: str) -> str:
    """FlexAttention where it has a backward pass, as a run chooses it."""
    return "flex_attention" if device == "cuda" else "sdpa"


# ------------------------------------------------------------------------------------------ a training step


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("block_size", [1, 4, 32])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_a_two_view_step_and_its_gradients_are_the_cpus(device, block_size, family):
    if device == "cpu" and family != "llama":
        pytest.skip("the body runs on the CPU for one family")
    rows = make_rows(ROWS, 32, ended=True)
    model = wide_model(family, **({"sliding_window": 8} if family == "gemma3" else {}))
    other = copy.deepcopy(model)
    other.set_attn_implementation(attention_of(device))
    assert_close(
        step_of(other, rows, block_size, device, soft=True), step_of(model, rows, block_size, "cpu", soft=True)
    )


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_step_of_a_draft_adapter_is_the_cpus(device, recompute):
    rows, found = make_rows(ROWS, 32), []
    for place in ("cpu", device):
        model = wide_model().to(place)
        model.set_attn_implementation(attention_of(place))
        adapter = DraftAdapter(model, DraftAdapterConfig(rank=4))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(3)
            for parameter in adapter.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        if recompute:
            recompute_activations(model)
        found.append(step_of(model, rows, 8, place, adapter=adapter))
    assert_close(found[1], found[0])


@pytest.mark.parametrize("device", [CPU, GPU])
def test_a_packed_row_gives_each_document_what_it_gets_alone(device):
    model = wide_model()
    model.set_attn_implementation(attention_of(device))
    packed = make_rows([PLAIN], 32)
    alone = []
    for number in range(len(PLAIN)):
        inside = packed.document[0] == number
        columns = {name: getattr(packed, name)[:, inside] for name in ("tokens", "document", "position", "offset")}
        alone.append(Rows(**columns, epoch=packed.epoch, number=packed.number))
    half = {"full_mask_share": 1.0, "views": 1}  # no draw depends on the row's length then
    sums = []
    for rows in (packed, *alone):
        view = view_of(rows, 4, recipe=RecipeConfig(**half)).to(torch.device(device))
        sums.append(TwoViewLoss(Decoder(model.to(device)))(view, block_diffusion_rule("context_causal")))
    for name in ("diffusion", "ar"):
        parts = torch.stack([getattr(one, name) for one in sums[1:]]).sum()
        torch.testing.assert_close(getattr(sums[0], name), parts, **CLOSE)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), GPU])
def test_a_compiled_block_mask_is_the_rule_and_growth_compiles_little_again(device, monkeypatch):
    """Block size, lengths and the share of the annealed mask change from step to step; kernels must not."""
    torch._dynamo.reset()
    if device == "cpu":  # where the mask is built without the compiler: only to see that the body is right
        monkeypatch.setattr(masks, "create_block_mask", torch.compile(masks.create_block_mask, backend="eager"))
    compiled: list[int] = []
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    for step, block_size in enumerate((2, 4, 4, 8, 8, 16, 16, 32, 32, 32)):
        rows = make_rows([PLAIN, PROMPTED, CHAT], 32, seed=step)
        view = view_of(rows, block_size, step).to(torch.device(device))
        rule = block_diffusion_rule("context_causal", None if step < 5 else step / 10)
        blocks = masks.to_block_mask(rule, view.places)
        dense = masks.to_dense(rule, view.places)[:, 0]
        compiled.append(counters["unique_graphs"])
        queries, keys = (torch.arange(view.tokens.shape[1], device=device) for _ in range(2))
        for row in range(len(rows)):
            entry = blocks.mask_mod(torch.tensor(row, device=device), torch.tensor(0), queries[:, None], keys[None])
            assert torch.equal(entry, dense[row])
            wanted = nn.functional.pad(dense[row], (0, -len(keys) % 128, 0, -len(keys) % 128))
            tiles = wanted.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(3).any(1)
            assert torch.equal(blocks.to_dense()[row, 0].bool(), tiles)
    assert compiled[-1] <= 6, compiled
    assert compiled[-1] == compiled[-3], compiled


@pytest.mark.gpu
def test_growth_does_not_compile_flex_attention_again_and_again():
    torch._dynamo.reset()
    model = wide_model().cuda()
    model.set_attn_implementation("flex_attention")
    compiled: list[int] = []
    torch._dynamo.utils.counters["stats"].clear()
    for step, block_size in enumerate((1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 32, 32, 32)):
        rows = make_rows(ROWS, 32, seed=step)
        sums = TwoViewLoss(Decoder(model))(view_of(rows, block_size, step).to(model.device), block_diffusion_rule())
        sums.total(0.5, RECIPE.views).backward()
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compiled[-1] <= 12, compiled
    assert compiled[-1] == compiled[-4], compiled


@pytest.mark.gpu
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_with_ligers_kernel_is_the_cpus(tied, monkeypatch):
    pytest.importorskip("liger_kernel", reason="needs liger-kernel")
    taken: list[bool] = []
    real = cross_entropy.takes_liger
    monkeypatch.setattr(cross_entropy, "takes_liger", lambda *a: taken.append(real(*a)) or taken[-1])
    rows, model = make_rows(ROWS, 32), wide_model(tie_word_embeddings=tied)
    other = copy.deepcopy(model)
    other.set_attn_implementation("flex_attention")
    assert_close(step_of(other, rows, 8, "cuda"), step_of(model, rows, 8, "cpu"))
    assert any(taken)


# ------------------------------------------------------------------------------------------ whole runs


def run_on(device: str, values: Mapping[str, Any], sharded: bool = False) -> None:
    """Body of a training process; `sharded`: FSDP2 in a group of one process, over NCCL on a GPU, else over gloo."""
    torch.set_num_threads(1)
    if sharded:
        one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        os.environ |= one
        PartialState(cpu=device == "cpu")
        state = launcher.process_state()
        assert torch.distributed.get_backend() == ("nccl" if device == "cuda" else "gloo")

        class Several:
            """Shards are made for several processes alone."""

            num_processes = 2

            def __getattr__(self, name: str) -> Any:
                return getattr(state, name)

            def __setattr__(self, name: str, value: Any) -> None:
                setattr(state, name, value)

        launcher.process_state = Several  # pyright: ignore
    run = train(load_config(values))
    assert run.accelerator.device.type == device
    assert run.is_sharded == sharded
    assert all(p.dtype == torch.float32 for p in run.trained.parameters())


def losses(config: Any, device: str, **how: Any) -> torch.Tensor:
    """The loss of each step of a run in a process of its own, which has not been forked: CUDA forbids that."""
    values = config.model_dump(mode="json")
    process = multiprocessing.get_context("spawn").Process(target=run_on, args=(device, values), kwargs=how)
    hidden = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"} if device == "cpu" else {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hidden.items():
            patch.setenv(name, value)  # before the process looks for devices
        process.start()
    process.join()
    assert process.exitcode == 0
    lines = (Path(config.output) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return torch.tensor([record["loss"] for line in lines if "kind" not in (record := json.loads(line))])


@pytest.fixture(scope="session")
def wide_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `place`, with heads that GPU kernels take."""
    folder = tmp_path_factory.mktemp("wide")
    wide_model(vocab_size=260, std=0.08).save_pretrained(folder / "llama")
    texts = [f"{a} plus {b} is {a + b}." for a in range(12) for b in range(12)]
    (folder / "sums.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cpu_losses(wide_place: Path, tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """Of the run that all others are compared with: float32, one process, on the CPU."""
    return losses(config_of(wide_place, tmp_path_factory.mktemp("cpu") / "run"), "cpu")


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {  # options, how to start, largest relative difference
    "float32": ({}, {}, 2e-3),
    "bf16 over float32 weights": ({"training__mixed_precision": "bf16"}, {}, 3e-2),
    "compiled": ({"training__compile": True}, {}, 2e-3),
    "recomputed activations": ({"training__gradient_checkpointing": True}, {}, 2e-3),
    "micro-batches": ({"training__micro_batch_rows": 1}, {}, 2e-3),
    "a dense mask": ({"model__attention": "sdpa"}, {}, 2e-3),
    "FSDP2": ({"training__fsdp": True}, {"sharded": True}, 2e-3),
    "FSDP2, bf16": ({"training__fsdp": True, "training__mixed_precision": "bf16"}, {"sharded": True}, 3e-2),
    "8-bit states": ({"optimizer__name": "adamw_8bit"}, {}, 5e-2),
}


@pytest.mark.gpu
@pytest.mark.parametrize("what", RUNS)
def test_a_run_has_the_losses_of_the_cpus(wide_place, cpu_losses, tmp_path, what):
    options, how, most = RUNS[what]
    if "8-bit" in what:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    found = losses(config_of(wide_place, tmp_path, **options), "cuda", **how)
    assert ((found - cpu_losses) / cpu_losses).abs().max() < most, (found, cpu_losses)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["bf16 over float32 weights", "FSDP2"])
def test_the_body_of_a_run_on_a_gpu_runs_on_a_cpu(wide_place, cpu_losses, tmp_path, what):
    options, how, most = RUNS[what]
    found = losses(config_of(wide_place, tmp_path, **options), "cpu", **how)
    assert ((found - cpu_losses) / cpu_losses).abs().max() < most, (found, cpu_losses)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["draft_adapter", "lora"])
def test_training_beside_a_parent_in_4_bits_is_near_that_beside_the_whole_one(wide_place, tmp_path, kind):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    if kind == "lora":
        pytest.importorskip("peft", reason="needs peft")
    options = {f"{kind}.rank": 4, "growth.b_0": 4, "model.dtype": "bfloat16", "training.mixed_precision": "bf16"}
    found = []
    for quantization in (None, "4bit"):
        config = config_of(wide_place, tmp_path / str(quantization), **options, model__quantization=quantization)
        found.append(losses(config, "cuda"))
    assert ((found[1] - found[0]) / found[0]).abs().max() < 0.15, found


# ------------------------------------------------------------------------------------------ decoding


DECODING: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "diffusion", "threshold": 0.3},
    {"mode": "diffusion", "threshold": None},
    {"mode": "speculative"},
]


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("options", DECODING, ids=str)
def test_decoding_gives_the_tokens_of_the_cpu(device, options):
    """On CUDA passes are compiled and recorded as graphs: three calls compile, record and replay."""
    torch._dynamo.reset()
    settings = BlockDiffusionSettings(block_size=8, mask_token_id=MASK_ID)
    tokens = torch.randint(3, 96, (3, 11), generator=torch.Generator().manual_seed(0))
    kept = (torch.arange(11) >= torch.tensor([0, 4, 9])[:, None]).long()
    calls: list[Sequence[Any]] = []
    for place, times in (("cpu", 1), (device, 3)):
        lm = BlockDiffusionLM(wide_model().to(place), None, settings)
        batch = {"prompts": tokens.masked_fill(kept == 0, PAD_ID).to(place), "attention_mask": kept.to(place)}
        for _ in range(times):
            out = lm.generate(**batch, max_new_tokens=24, eos_token_id=[], **options)
            calls.append(out.sequences.cpu().tolist())
        if place == "cuda":
            assert lm.passes is not None
            assert not lm.passes.failed
    assert all(call == calls[0] for call in calls[1:])


@pytest.mark.gpu
def test_greedy_speculative_decoding_of_a_parent_in_4_bits_is_ar_decoding(wide_place):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from nextblock.model.loading import load_model

    model, adapter = (
        load_model(str(wide_place / "llama"), device="cuda", dtype=torch.bfloat16, quantization="4bit"),
        None,
    )
    adapter = DraftAdapter(model, DraftAdapterConfig(rank=4)).eval()
    lm = BlockDiffusionLM(
        model, None, BlockDiffusionSettings(block_size=8, mask_token_id=adapter.mask_token_id), adapter
    )
    tokens = torch.randint(3, 200, (1, 9), generator=torch.Generator().manual_seed(0)).cuda()
    ar, speculative = (
        lm.generate(tokens, mode=mode, max_new_tokens=32, eos_token_id=[]).sequences for mode in ("ar", "speculative")
    )
    same = (ar == speculative).float().mean()
    assert same > 0.9  # not lossless in bfloat16: passes of other widths round otherwise
