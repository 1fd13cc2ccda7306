"""`nextblock plan`: what a run takes, from its configuration alone: parameters, memory, FLOPs and time.

Memory is counted rather than guessed: one training step runs on fake tensors, which have shapes and no values, and
every storage that it makes is added up while it lives. Time is FLOPs over a stated share of the device's peak.

Letters: B rows, L clean tokens of a row, N noised ones, b block size, k views.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from nextblock import schedules
from nextblock.adapter import DraftAdapter, target_names
from nextblock.config import AdaptConfig, Context, ModelConfig, UsageError, nearest, stage_configs
from nextblock.launcher import check_sharding
from nextblock.lora import TiedHead
from nextblock.model import (
    Decoder,
    check_architecture,
    choose_attention,
    recompute_activations,
    replace_values,
    resolve,
    scratch_config,
)
from nextblock.objective import chunk_rows, cross_entropy_sum, soft_cross_entropy_sums
from nextblock.shapes import DEVICES, HUB_IDS, shape_values
from nextblock.sources import one_line
from nextblock.split_attention import PIECE, SPLIT, TILE, Piece, SplitMask, Tiles

GIB = 2**30
USABLE = 0.92
"""Share of a GPU's memory that a step may take; the rest is for the driver, libraries and fragments."""

PARALLEL = ("ddp", "fsdp2")


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one optimizer step over the global batch, matrix products alone.

    clean, noised, head: what the method needs, forward and backward. recomputed: what gradient checkpointing adds.
    """

    clean: float
    noised: float
    head: float
    recomputed: float

    @property
    def useful(self) -> float:
        """All but what is computed twice; MFU counts these."""
        return self.clean + self.noised + self.head


@dataclass(frozen=True)
class Plan:
    """What a run takes. Bytes and FLOPs are numbers of one device and of one step; `seconds` of the whole run.

    memory: kind -> bytes on one device at the moment of the step's peak; they add up to `peak_bytes`.
    largest_row: longest row that fits, up to the model's positions; None where memory is not known.
    """

    model: str
    trained: str
    parameters: int
    trained_parameters: int
    trained_share: float
    row_length: int
    batch_rows: int
    micro_batch_rows: int
    block_size: int
    noised_tokens: int
    device: str
    devices: int
    parallel: str | None
    memory: dict[str, int]
    peak_bytes: int
    fits: bool | None
    largest_row: int | None
    flops: Flops
    mfu: float
    tokens_per_second: float | None
    step_seconds: float | None
    seconds: float | None
    device_hours: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"useful_flops": self.flops.useful}


@dataclass(frozen=True)
class StagePlan:
    """One stage of a run: the plan of its configuration, its optimizer steps, and the useful FLOPs of all of them."""

    name: str
    steps: int
    run_flops: float
    plan: Plan


@dataclass(frozen=True)
class StagedPlan:
    """What a run in stages takes. A device needs the memory of the largest stage; all else adds up."""

    stages: tuple[StagePlan, ...]

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def run_flops(self) -> float:
        """Useful FLOPs of the whole run."""
        return sum(stage.run_flops for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """Bytes on one device at the peak of the stage that takes most."""
        return max(stage.plan.peak_bytes for stage in self.stages)

    @property
    def fits(self) -> bool | None:
        """Whether every stage fits; None where memory is not known."""
        fits = [stage.plan.fits for stage in self.stages]
        return None if None in fits else all(fits)

    @property
    def seconds(self) -> float | None:
        """Of the whole run; None where the device's speed is not known."""
        return _sum(stage.plan.seconds for stage in self.stages)

    @property
    def device_hours(self) -> float | None:
        """Of the whole run; None where the device's speed is not known."""
        return _sum(stage.plan.device_hours for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: each stage's as its plan's, and the totals."""
        totals = ("steps", "run_flops", "peak_bytes", "fits", "seconds", "device_hours")
        own = [
            {"name": stage.name, "steps": stage.steps, "run_flops": stage.run_flops} | stage.plan.as_dict()
            for stage in self.stages
        ]
        return {"stages": own} | {name: getattr(self, name) for name in totals}


def _sum(values: Iterable[float | None]) -> float | None:
    """None where one is not known."""
    found = list(values)
    return None if None in found else sum(cast(list[float], found))


# ----------------------------------------------------------------------------------------------- entry


def plan(
    config: AdaptConfig, *, device: str = "h100", devices: int = 1, parallel: str | None = None, mfu: float = 0.4
) -> Plan:
    """Say what a run without stages, or one stage of another, takes, at the largest block size.

    Args:
        config: checked configuration, without stages; of the model only its shape is read.
        device: a name in `DEVICES`; "cpu": a step with attention in parts, no time.
        devices: how many there are.
        parallel: with more than one device: "ddp" copies everything, "fsdp2" shards weights, gradients and optimizer;
            None: as `training.fsdp` says.
        mfu: share of the device's peak that useful FLOPs reach.
    Raises:
        UsageError: unknown device, a batch that does not divide, a model whose shape is not known, or what `adapt`
            refuses on such devices.
        ValueError: a configuration with stages, which are for `plan_stages`.
    """
    if config.stages:
        raise ValueError("this run has stages, which plan_stages plans")
    check_machine(device, parallel, mfu)
    rows = config.training.batch_rows
    if devices < 1 or rows % devices:
        raise UsageError(
            f"training.batch_rows={rows} does not divide over {devices} devices; "
            f"use {max(1, rows // max(1, devices)) * max(1, devices)} rows"
        )
    shape = model_shape(config.model)
    longest = getattr(shape, "max_position_embeddings", None)
    if longest is not None and config.data.row_length > longest:
        raise UsageError(
            f"data.row_length={config.data.row_length} is over the model's {longest} positions; use at most {longest}"
        )
    if config.model.attention == "flex_attention" and device == "cpu":
        raise UsageError("model.attention=flex_attention has no backward pass on CPU; use sdpa, or auto")
    if config.model.quantization and device == "cpu":
        raise UsageError(f"model.quantization={config.model.quantization} needs a CUDA device; leave it out on cpu")
    parallel = parallel or ("fsdp2" if config.training.fsdp else "ddp")
    sharding = devices if parallel == "fsdp2" else 1
    if sharding > 1:
        check_sharding(config)
    kinds = step_memory(config, shape, device=device, devices=devices, sharding=sharding)
    peak, room = sum(kinds.values()), DEVICES[device].memory_gib
    counts = count_parameters(config, shape)
    flops, tflops = step_flops(config, shape, counts, config.growth.b_max), DEVICES[device].tflops
    step_seconds = seconds = None
    if tflops is not None:
        speed = tflops * 1e12 * mfu * devices
        step_seconds, seconds = flops.useful / speed, run_flops(config, shape, counts) / speed
    return Plan(
        model=config.model.path if config.model.scratch is None else "random weights",
        trained=kind_of_training(config),
        parameters=counts.parent,
        trained_parameters=counts.trained,
        trained_share=counts.trained / counts.parent,
        row_length=config.data.row_length,
        batch_rows=rows,
        micro_batch_rows=micro_rows(config, devices),
        block_size=config.growth.b_max,
        noised_tokens=noised_tokens(config, config.growth.b_max, config.data.row_length),
        device=device,
        devices=devices,
        parallel=parallel if devices > 1 else None,
        memory=kinds,
        peak_bytes=peak,
        fits=None if room is None else peak <= USABLE * room * GIB,
        largest_row=None if room is None else largest_row(config, shape, device, devices, sharding, peak),
        flops=flops,
        mfu=mfu,
        tokens_per_second=None if step_seconds is None else rows * config.data.row_length / step_seconds,
        step_seconds=step_seconds,
        seconds=seconds,
        device_hours=None if seconds is None else seconds * devices / 3600,
    )


def plan_stages(
    config: AdaptConfig, *, device: str = "h100", devices: int = 1, parallel: str | None = None, mfu: float = 0.4
) -> StagedPlan:
    """Say what each stage of a run takes, and all of them. Arguments as of `plan`.

    Raises:
        UsageError: as `plan`, with the stage's name.
    """
    check_machine(device, parallel, mfu)
    found = []
    for number, (stage, own) in enumerate(zip(config.stages, stage_configs(config), strict=True)):
        try:
            one = plan(own, device=device, devices=devices, parallel=parallel, mfu=mfu)
        except UsageError as error:
            raise UsageError(f"stages.{number} ({stage.name}): {error}") from None
        shape = model_shape(own.model)
        flops = run_flops(own, shape, count_parameters(own, shape))
        found.append(StagePlan(stage.name, own.training.steps, flops, one))
    return StagedPlan(tuple(found))


def check_machine(device: str, parallel: str | None, mfu: float) -> None:
    """UsageError for an unknown device or way of sharing, or a share of the peak that is none."""
    if device not in DEVICES:
        raise UsageError(f"gpu '{device}' is unknown{nearest(device, list(DEVICES))}")
    if parallel is not None and parallel not in PARALLEL:
        raise UsageError(f"parallel '{parallel}' is unknown{nearest(parallel, PARALLEL)}")
    if not 0 < mfu <= 1:
        raise UsageError(f"mfu={mfu} is a share of the peak; use more than 0 and at most 1")


def model_shape(config: ModelConfig) -> PreTrainedConfig:
    """The parent's Hugging Face config without the network: `scratch`, a folder, the local cache, or a known shape.

    Raises:
        UsageError: a model that is none of these.
    """
    shape = _shape(config)
    replace_values(shape, config.override)
    return shape


def _shape(config: ModelConfig) -> PreTrainedConfig:
    if config.scratch is not None:
        return scratch_config(config.scratch)
    source = resolve(config.path)
    try:
        code = config.trust_remote_code
        shape = AutoConfig.from_pretrained(
            source, revision=config.revision, local_files_only=True, trust_remote_code=code
        )
    except Exception as error:  # transformers raises many kinds here; each means that there is no config to read
        if Path(source).is_dir():
            raise UsageError(f"cannot read the config of model {config.path}: {one_line(error)}") from None
        if config.path not in HUB_IDS:
            raise UsageError(
                f"model {config.path} is not on this machine and its shape is not among those known "
                f"({', '.join(sorted(set(HUB_IDS.values())))}); download its config.json, or set model.scratch"
            ) from None
        shape = scratch_config(shape_values(HUB_IDS[config.path]))
    check_architecture(shape)
    return shape


def kind_of_training(config: AdaptConfig) -> str:
    """ "full", "lora" or "draft adapter"."""
    if config.draft_adapter is not None:
        return "draft adapter"
    return "full" if config.lora is None else "lora"


def micro_rows(config: AdaptConfig, devices: int) -> int:
    """Rows in one forward pass on one device."""
    share = config.training.batch_rows // devices
    return min(config.training.micro_batch_rows or share, share)


def noised_tokens(config: AdaptConfig, block_size: int, row_length: int) -> int:
    """Expected slots of the noised half: of each view the blocks in which something is masked.

    With t ~ Uniform[0, 1] none of m maskable tokens is masked with probability 1 / (m + 1).
    """
    recipe = config.recipe
    maskable = block_size - (recipe.prediction == "shifted")
    share = maskable / (maskable + 1)
    if maskable:  # of a block that is masked whole, a complementary view masks nothing
        whole = 0.5 if recipe.complementary else 1.0
        share += recipe.full_mask_share * (whole - share)
    return round(recipe.views * row_length * share)


def scored_tokens(config: AdaptConfig, block_size: int, row_length: int) -> int:
    """Expected masked tokens, all views together: half of those that can be, but for blocks that are masked whole."""
    recipe = config.recipe
    maskable = block_size - (recipe.prediction == "shifted")
    share = 0.5 if recipe.complementary else 0.5 + recipe.full_mask_share / 2
    return round(recipe.views * row_length * maskable / block_size * share)


# ---------------------------------------------------------------------------------------------- memory


class Live(TorchDispatchMode):
    """Adds up the storages that live, by the phase in which they were made.

    peak: kind -> bytes at the moment when they were most, over the kinds in `counted` (None: all).
    """

    def __init__(self, counted: set[str] | None = None) -> None:
        super().__init__()
        self.phase = "weights"
        self.counted = counted
        self.live: dict[str, int] = defaultdict(int)
        self.kinds: dict[int, str] = {}
        self.most, self.peak = 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and book what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.book(tensor, self.phase)
        return out

    def book(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's storage from now on as `kind`, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self.kinds.get(key)
        if known is None:
            weakref.finalize(storage, self.forget, key, size)
        elif kind == "gradients":
            self.live[known] -= size
        else:
            return
        self.kinds[key] = kind
        self.live[kind] += size
        counted = {k: n for k, n in self.live.items() if n and (self.counted is None or k in self.counted)}
        if (total := sum(counted.values())) > self.most:
            self.most, self.peak = total, counted

    def forget(self, key: int, size: int) -> None:
        """A storage was freed."""
        self.live[self.kinds.pop(key)] -= size


def step_memory(
    config: AdaptConfig,
    shape: PreTrainedConfig,
    *,
    device: str,
    devices: int = 1,
    sharding: int = 1,
    row_length: int | None = None,
) -> dict[str, int]:
    """Bytes by kind at the peak of one optimizer step on one device; `sharding` devices share weights and optimizer.

    Not in it: what torch.compile saves by fusing, and what kernels take inside themselves.
    """
    length, rows = row_length or config.data.row_length, micro_rows(config, devices)
    autocast = config.training.mixed_precision == "bf16"
    # Sharded, weights are gathered in the low precision itself, layer by layer: no autocast copies of all of them.
    dtype = torch.bfloat16 if autocast and sharding > 1 else getattr(torch, config.model.dtype)
    transient = {"mask", "activations", "head", "backward"} if sharding > 1 else None
    live = Live(transient)
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        decoder, trained = fake_decoder(config, shape, device, dtype)
        live.most = 0  # what only loading takes is over
        for parameter in trained.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: live.book(cast(Tensor, p.grad), "gradients"))
        cast_to = torch.autocast("cpu", torch.bfloat16) if autocast and sharding == 1 else nullcontext()
        if config.training.batch_rows // devices > rows:  # later micro-batches meet the gradients of the first
            for parameter in trained.parameters():
                parameter.grad = torch.zeros_like(parameter)
                live.book(parameter.grad, "gradients")
        with cast_to:
            loss, *kept = _fake_losses(config, decoder, rows, length, live, device)
        live.phase = "backward"
        loss.backward()
        del loss, kept
        states = _optimizer_bytes(config, trained.parameters())
        gradients = _bytes(trained.parameters())
        held = _bytes(decoder.model.parameters()) + (_bytes(trained.parameters()) if decoder.adapter else 0)
    kinds = dict(live.peak)
    if sharding == 1:
        kinds["optimizer"] = states
        if devices > 1:
            kinds["ddp buckets"] = gradients
        return kinds
    wide = torch.empty((), dtype=getattr(torch, config.model.dtype)).element_size() / dtype.itemsize
    root, layer = _gathered_bytes(decoder)
    kinds["weights"] = round(held * wide / sharding)
    kinds["gradients"] = round(gradients * wide / sharding)
    kinds["optimizer"] = round(states * wide / sharding)
    # The root's weights stay gathered; of the layers one is at work and one on its way. As many gradients, if trained.
    kinds["gathered"] = (root + 2 * layer) * (2 if kind_of_training(config) == "full" else 1)
    return kinds


def _fake_losses(
    config: AdaptConfig, decoder: Decoder, rows: int, length: int, live: Live, device: str
) -> list[Tensor]:
    """The forward pass of a training step with tensors of the right shapes   (see `TwoViewLoss`, `DraftLoss`).

    Returns:
        The loss, and what lives as long as it does.
    """
    count = noised_tokens(config, config.growth.b_max, length)
    scored = rows * scored_tokens(config, config.growth.b_max, length)
    recipe, drafting = config.recipe, config.draft_adapter is not None

    def hidden(tokens: int, keys: int, cache: Any = None, gate: bool = False) -> Tensor:
        live.phase = "mask"
        mask = _fake_mask(decoder, rows, tokens, keys, noised=keys - length)
        live.phase = "activations"
        ids = torch.zeros(rows, tokens, dtype=torch.int64)
        return decoder.hidden(ids, torch.zeros_like(ids), mask, cache, gate)

    def head(states: Tensor, first: int, targets: int, teacher: Tensor | None = None) -> list[Tensor]:
        live.phase = "head"
        chunk = chunk_rows(decoder, device)
        some = min(targets, 2 * chunk)  # further chunks take no more
        flat = states[:, first:].reshape(-1, states.shape[-1])
        chosen, wanted = flat[torch.zeros(some, dtype=torch.int64)], torch.zeros(some, dtype=torch.int64)
        # Other states and gradients, and other states of the teacher.
        rest = torch.zeros(2 if teacher is None else 3, targets - some, states.shape[-1], dtype=states.dtype)
        if teacher is None:
            return [cross_entropy_sum(decoder, chosen, wanted, rows=chunk), rest]
        taught = teacher.reshape(-1, teacher.shape[-1])[wanted]
        sums = soft_cross_entropy_sums(decoder, chosen, wanted, taught, wanted == 0, rows=chunk // 2)
        return [sums.sum(), rest]

    if drafting:
        cache = DynamicCache()
        with torch.no_grad():
            parent = hidden(length, length, cache)
        states = hidden(count, length + count, cache, gate=True)
        return head(states, 0, scored, parent if recipe.soft_weight else None)
    states = hidden(count + length, count + length)
    teacher = states[:, count:] if recipe.soft_weight else None
    diffusion = head(states, 0, scored, teacher) if scored else [torch.zeros(())]
    if not recipe.ar_weight and not recipe.ar_weight_final:
        return diffusion
    ar = head(states, count, rows * (length - 1))
    return [diffusion[0] + ar[0], *diffusion[1:], *ar[1:]]


def fake_decoder(
    config: AdaptConfig, shape: PreTrainedConfig, device: str, dtype: torch.dtype
) -> tuple[Decoder, nn.Module]:
    """The model in fake tensors, and what of it is trained."""
    attention = choose_attention(shape, config.model.attention, torch.device("cpu" if device == "cpu" else "cuda"))
    if attention == "flex_attention":
        attention = _SPARSE
    elif device == "cpu" and attention == "sdpa" and not config.training.compile:
        attention = SPLIT
    model = _bare_model(shape, dtype, attention)
    if config.model.quantization:
        for name in target_names(model, "all-linear"):  # as transformers does: all but the head
            model.set_submodule(name, _FourBitLinear(model.get_submodule(name)))
    if config.training.gradient_checkpointing:
        recompute_activations(model, preserve_rng_state=False)
    adapter = low_rank_updates(config, model)
    if adapter is None:
        return Decoder(model), model
    return (Decoder(model) if config.lora else Decoder(model, adapter)), adapter


def low_rank_updates(config: AdaptConfig, model: PreTrainedModel) -> DraftAdapter | None:
    """What `draft_adapter` or `lora` trains: LoRA's mask row is as large as the mask vector."""
    if config.lora is None:
        return None if config.draft_adapter is None else DraftAdapter(model, config.draft_adapter)
    target_names(
        model, config.lora.target_modules, section="lora"
    )  # so that what matches nothing is called by its name
    adapter = DraftAdapter(model, config.lora)
    adapter.gate = True  # for good: at every position, and when activations are computed again
    embedding, head = cast(nn.Embedding, model.get_input_embeddings()), cast(nn.Linear, model.get_output_embeddings())
    if config.masks and head.weight is embedding.weight:
        embedding.mask_row = adapter.mask_vector
        model.set_output_embeddings(TiedHead(head, embedding, 0))
    return adapter


def _bare_model(shape: PreTrainedConfig, dtype: torch.dtype, attention: str = "eager") -> Any:
    """The model of a shape, in eval mode; no time is spent on its first weights."""
    with no_init_weights():
        model = cast(Any, AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=attention))
    model.tie_weights()  # left out with the weights
    return model.eval()


def _fake_mask(decoder: Decoder, rows: int, queries: int, keys: int, noised: int) -> Any:
    """A dense mask for each kind of layer, in parts where the model computes in parts; of a BlockMask its tables."""
    if decoder.attention == _SPARSE:
        _SparseAttention.tables = torch.zeros(4, rows, -(-queries // 128), -(-keys // 128), dtype=torch.int32)
        return None

    def mask() -> Tensor:
        if decoder.attention == SPLIT and noised:
            return _fake_split_mask(rows, queries, keys, noised, decoder.model.dtype)
        return torch.zeros(rows, 1, queries, keys, dtype=decoder.model.dtype)

    masks = {window: mask() for window in {None if w is None or w >= keys else w for w in decoder.windows.values()}}
    first = next(iter(masks.values()))
    return decoder.by_kind({kind: masks.get(window, first) for kind, window in decoder.windows.items()})


def _fake_split_mask(rows: int, queries: int, keys: int, noised: int, dtype: torch.dtype) -> SplitMask:
    """As large as can be: every query sees every clean key, and no piece of a row is plain causal."""
    clean, width = keys - noised, -(-noised // TILE) * TILE
    pieces = []
    for start in range(0, queries, PIECE):
        part = slice(start, min(queries, start + PIECE))
        pieces.append(Piece(part, slice(0, clean), torch.zeros(rows, 1, part.stop - start, clean, dtype=dtype)))
    tiles = Tiles(
        slot=torch.zeros(rows * width, dtype=torch.int64),
        place=torch.zeros(rows * noised, dtype=torch.int64),
        present=torch.ones(rows, 1, noised, dtype=torch.bool),
        mask=torch.zeros(rows * width // TILE, 1, TILE, TILE, dtype=dtype),
    )
    return SplitMask(pieces, tiles, clean)


class _SparseAttention(torch.autograd.Function):
    """What FlexAttention keeps and makes on a GPU: inputs, output and log-sum-exp; no scores."""

    tables: Tensor | None = None

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, H, Q, D] like the query."""
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the shapes of query, key and value."""
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _sparse_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    return _SparseAttention.apply(query, key, value).transpose(1, 2).contiguous(), None  # type: ignore[union-attr]


class _FourBitProduct(torch.autograd.Function):
    """bitsandbytes' product with a 4-bit matrix: forward and backward, a whole copy of it lives meanwhile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: int) -> Tensor:
        """[..., in] -> [..., out]."""
        ctx.like, ctx.outputs = x.shape, outputs
        _copy = x.new_empty(outputs, x.shape[-1])
        return x.new_empty(*x.shape[:-1], outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        """[..., out] -> [..., in]."""
        _copy = upstream[0].new_empty(ctx.outputs, ctx.like[-1])
        return upstream[0].new_empty(ctx.like), None


class _FourBitLinear(nn.Linear):
    """A frozen layer as bitsandbytes holds it in nf4: two values a byte, a float32 scale for each 64 values."""

    def __init__(self, of: nn.Module) -> None:
        weight, bias = cast(Tensor, of.weight), cast(Tensor | None, of.bias)
        sizes = weight.shape if isinstance(of, Conv1D) else weight.shape[::-1]
        with torch.device("meta"):
            super().__init__(*sizes, bias=False)
        self.compute = weight.dtype
        self.weight = nn.Parameter(torch.empty(-(-weight.numel() // 2), dtype=torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(-(-weight.numel() // 64)), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of the input."""
        out = cast(Tensor, _FourBitProduct.apply(input.to(self.compute), self.out_features)).to(input.dtype)
        return out if self.bias is None else out + self.bias


_SPARSE = "nextblock_plan"
AttentionInterface.register(_SPARSE, _sparse_attention)


def _bytes(parameters: Iterator[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _optimizer_bytes(config: AdaptConfig, parameters: Iterator[nn.Parameter]) -> int:
    """AdamW's two states; in 8 bits a byte a value and a float32 scale for each 256, in tensors of 4,096 or more."""
    if config.optimizer.name == "adamw":
        return 2 * _bytes(parameters)
    sizes = [p.numel() for p in parameters]
    return 2 * sum(4 * size if size < 4096 else size + 4 * -(-size // 256) for size in sizes)


def _gathered_bytes(decoder: Decoder) -> tuple[int, int]:
    """Bytes of the weights outside the layers, and of one layer."""
    layers = max((m for m in decoder.model.modules() if isinstance(m, nn.ModuleList)), key=len)
    inside = _bytes(layers.parameters())
    return _bytes(decoder.model.parameters()) - inside, inside // len(layers)


def largest_row(
    config: AdaptConfig, shape: PreTrainedConfig, device: str, devices: int, sharding: int, peak: int
) -> int | None:
    """The longest row, in whole blocks and within about 3 %, whose step fits; None if not even one block does."""
    unit = config.growth.b_max
    room = USABLE * cast(float, DEVICES[device].memory_gib) * GIB
    longest = getattr(shape, "max_position_embeddings", None)

    def size(length: int) -> int:
        memory = step_memory(config, shape, device=device, devices=devices, sharding=sharding, row_length=length)
        return sum(memory.values())

    low, high = (config.data.row_length, None) if peak <= room else (unit, config.data.row_length)
    low_size, high_size = (peak, 0) if high is None else (size(low), peak)
    if low_size > room:
        return None
    while high is None:  # the whole context, or doubling where the model names no limit
        length = 2 * low if longest is None else longest // unit * unit
        found = size(length) if length > low else low_size
        if found > room:
            high, high_size = length, found
        elif longest is not None:
            return length
        else:
            low, low_size = length, found
    while high - low > max(unit, 0.03 * low):
        # Memory is a maximum of straight lines of the row's length, so below its chord: what the chord allows, fits.
        length = low + int((room - low_size) / (high_size - low_size) * (high - low)) // unit * unit
        if length - low <= 0.03 * low:
            return length
        low, low_size = length, size(length)
    return low


# ------------------------------------------------------------------------------------ parameters, FLOPs


@dataclass
class Counts:
    """Numbers of parameters, and multiply-adds of one token in all linear layers but the head."""

    parent: int = 0
    trained: int = 0
    linear: int = 0
    low_rank: int = 0
    layers: int = 0
    heads_times_size: int = 0


def count_parameters(config: AdaptConfig, shape: PreTrainedConfig) -> Counts:
    """Read off the model's modules, on the meta device."""
    with torch.device("meta"):
        model = _bare_model(shape, torch.float32)
        counts = Counts(parent=sum(p.numel() for p in model.parameters()))
        head = model.get_output_embeddings()
        linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]
        counts.linear = sum(m.weight.numel() for m in linear)
        counts.trained = counts.parent
        adapter = low_rank_updates(config, model)
        if adapter is not None:
            counts.trained = sum(p.numel() for p in adapter.parameters())
            counts.low_rank = counts.trained - adapter.mask_vector.numel()
    counts.layers = shape.num_hidden_layers
    heads = shape.num_attention_heads
    counts.heads_times_size = heads * (getattr(shape, "head_dim", None) or shape.hidden_size // heads)
    return counts


def step_flops(config: AdaptConfig, shape: PreTrainedConfig, counts: Counts, block_size: int) -> Flops:
    """Matrix products of one step at block size b: 2 per multiply-add; backward twice forward, or once if frozen.

    Attention counts the pairs that the mask allows in rows of one document, so an upper bound for packed ones.
    """
    length, rows = config.data.row_length, config.training.batch_rows
    noised = noised_tokens(config, block_size, length)
    pair = 4 * counts.heads_times_size * counts.layers
    kind = kind_of_training(config)
    passes = 3 if kind == "full" else 2  # of frozen weights no gradient is computed
    updates = 6 * counts.low_rank

    def half(tokens: int, pairs: float, weight_passes: int, attention_passes: int, extra: int) -> float:
        return rows * (tokens * (2 * counts.linear * weight_passes + extra) + pairs * pair * attention_passes)

    clean_pairs, noised_pairs = attention_pairs(noised, length, block_size, config.recipe.context)
    drafting = kind == "draft adapter"
    clean = half(length, clean_pairs, 1 if drafting else passes, 1 if drafting else 3, 0 if drafting else updates)
    noisy = half(noised, noised_pairs, passes, 3, updates)
    logits = rows * 2 * shape.vocab_size * shape.hidden_size
    scored = scored_tokens(config, block_size, length) * logits
    ar = 0 if drafting or not scores_ar(config, block_size) else (length - 1) * logits
    taught = scored if config.recipe.soft_weight else 0  # the teacher's logits
    head = (scored + ar) * passes + taught
    tied = kind == "lora" and config.masks and getattr(shape, "tie_word_embeddings", False)
    # The head, where its gradient is not computed along with the loss.
    recomputed = float((scored + taught if taught or tied else 0) + (ar if tied else 0))
    if config.training.gradient_checkpointing:
        recomputed += half(noised, noised_pairs, 1, 1, updates // 3) + half(length, clean_pairs, 1, 1, updates // 3)
    return Flops(clean, noisy, head, recomputed)


def scores_ar(config: AdaptConfig, block_size: int) -> bool:
    """Whether the AR loss counts at a block size of the run: lambda may begin or end at 0."""
    changes = schedules.growth_steps(config.growth, config.training.steps)
    return schedules.ar_weight(next(step for step, size in changes if size == block_size), config) > 0


def attention_pairs(
    noised: int, length: int, block_size: int, context: Context = "context_causal"
) -> tuple[float, float]:
    """Pairs (query, key) that the mask of one row allows: of clean queries, and of noised ones on average."""
    seen = block_size if context == "block_causal" else 1
    return length * (length + seen) / 2, noised * ((length - block_size) / 2 + block_size)


def run_flops(config: AdaptConfig, shape: PreTrainedConfig, counts: Counts) -> float:
    """Useful FLOPs of the whole run, block growth included."""
    changes = schedules.growth_steps(config.growth, config.training.steps)
    ends = [step for step, _ in changes[1:]] + [config.training.steps]
    return sum(
        (end - start) * step_flops(config, shape, counts, size).useful
        for (start, size), end in zip(changes, ends, strict=True)
    )


# ----------------------------------------------------------------------------------------------- table


def plan_table(found: Plan) -> Table:
    """What `nextblock plan` prints."""
    table = Table(box=SIMPLE_HEAD, show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", style="dim")
    share = f"{100 * found.trained_share:.2f} % of the parent" if found.trained != "full" else ""
    table.add_row("parameters", _count(found.parameters), found.model)
    table.add_row("trained", _count(found.trained_parameters), f"{found.trained} {share}".strip(), end_section=True)
    for kind, size in sorted(found.memory.items(), key=lambda item: -item[1]):
        table.add_row(kind, _gib(size), "")
    room = DEVICES[found.device].memory_gib
    verdict = "" if room is None else f"{'fits' if found.fits else 'does not fit'} {USABLE:.0%} of {room:.0f} GiB"
    table.add_row("memory at the peak", _gib(found.peak_bytes), verdict, style="bold")
    rows = f"{found.micro_batch_rows} x ({found.row_length} tokens + {found.noised_tokens} noised)"
    table.add_row("a pass on one device", "", f"{rows}, b = {found.block_size}")
    if room is not None:
        longest = "none" if found.largest_row is None else str(found.largest_row)
        table.add_row("longest row that fits", longest, "tokens")
    table.add_section()
    for name in ("clean", "noised", "head", "recomputed"):
        value = getattr(found.flops, name)
        if value:
            label = {"clean": "clean half", "noised": "noised half", "recomputed": "computed twice"}.get(name, name)
            table.add_row(f"FLOPs a step, {label}", f"{value:.3g}", "")
    table.add_row("useful FLOPs a step", f"{found.flops.useful:.3g}", "clean half, noised half and head", style="bold")
    if found.seconds is None or found.step_seconds is None:
        return table
    table.add_section()
    where = f"{found.devices} x {found.device}" + (f", {found.parallel}" if found.parallel else "")
    table.add_row("tokens per second", f"{found.tokens_per_second:,.0f}", f"{where} at {found.mfu:.0%} MFU, assumed")
    table.add_row("a step", f"{found.step_seconds:,.2f} s", f"{found.batch_rows} rows")
    table.add_row("the run", f"{found.seconds / 86400:,.2f} days", "with block growth")
    table.add_row("", f"{found.device_hours:,.1f} h", "GPU-hours")
    return table


def stages_table(found: StagedPlan) -> Table:
    """What `nextblock plan` prints of a run in stages: a column for each, and one for the whole."""
    plans = [stage.plan for stage in found.stages]
    first, room = plans[0], DEVICES[plans[0].device].memory_gib
    where = f"{first.devices} x {first.device}" + (f", {first.parallel}" if first.parallel else "")
    table = Table(box=SIMPLE_HEAD, caption=f"{first.model}, {_count(first.parameters)} parameters; {where}")
    table.add_column("", no_wrap=True)
    for name in (*(stage.name for stage in found.stages), "all"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("steps", *(f"{stage.steps:,}" for stage in found.stages), f"{found.steps:,}")
    table.add_row("tokens a row", *(str(one.row_length) for one in plans))
    table.add_row("rows a step", *(str(one.batch_rows) for one in plans))
    table.add_row("rows a pass on one device", *(str(one.micro_batch_rows) for one in plans))
    table.add_row("block size", *(str(one.block_size) for one in plans), end_section=True)
    kinds = sorted(
        {kind for one in plans for kind in one.memory}, key=lambda k: -max(p.memory.get(k, 0) for p in plans)
    )
    for kind in kinds:
        table.add_row(kind, *(_gib(one.memory[kind]) if one.memory.get(kind) else "" for one in plans))
    table.add_row("memory at the peak", *(_gib(one.peak_bytes) for one in plans), _gib(found.peak_bytes), style="bold")
    if room is not None:
        verdicts = ("yes" if fits else "no" for fits in (*(one.fits for one in plans), found.fits))
        table.add_row(f"fits {USABLE:.0%} of {room:.0f} GiB", *verdicts)
        longest = ("none" if one.largest_row is None else str(one.largest_row) for one in plans)
        table.add_row("longest row that fits", *longest)
    table.add_section()
    table.add_row("useful FLOPs a step", *(f"{one.flops.useful:.3g}" for one in plans))
    flops = [stage.run_flops for stage in found.stages]
    table.add_row("useful FLOPs", *(f"{n:.3g}" for n in (*flops, found.run_flops)), style="bold")
    if found.seconds is None:
        return table
    table.add_section()
    table.add_row(
        f"tokens per second at {first.mfu:.0%} MFU, assumed", *(f"{one.tokens_per_second:,.0f}" for one in plans)
    )
    table.add_row("seconds a step", *(f"{one.step_seconds:,.2f}" for one in plans))
    table.add_row("days", *(f"{cast(float, of.seconds) / 86400:,.2f}" for of in (*plans, found)))
    table.add_row("GPU-hours", *(f"{of.device_hours:,.1f}" for of in (*plans, found)), style="bold")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
