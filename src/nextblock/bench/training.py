"""`nextblock bench train`: this project's training step against the plain way and an ordinary AR step.

All take turns on one model, one optimizer and the same clean rows. The plain way is written here, on its own, as
block diffusion is often trained; the AR step is the floor, which no pass over two views can reach.

Letters: B rows, L clean tokens of a row, V vocabulary.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from nextblock.adapt import environment
from nextblock.adapter import DraftAdapter
from nextblock.bench.contest import GIB, high_water_mark_gib, synchronize
from nextblock.bench.forwards import random_model
from nextblock.bench.packing import PACKER_DATA, time_packer
from nextblock.config import AdaptConfig, DraftAdapterConfig, UsageError, load_config
from nextblock.data import Rows
from nextblock.model import Decoder, load_model, load_tokenizer, read_settings, run_in_parts, without_dropout
from nextblock.objective import DraftLoss, TwoViewLoss
from nextblock.train import Run, train_step

TRAIN_MEMORY_MEANING = {
    "cuda": "peak of torch's CUDA allocator over one step, less what it held before the step",
    "cpu": "one step in a fresh process: peak resident memory, less the resident memory before the step",
}
AR_WEIGHT = 0.5


@dataclass(frozen=True)
class Work:
    """What every contestant trains on.

    model: path or shipped name; with `random_weights` the name of a shape.
    rows, row_length: B and L of a step; tokens are random, each row one document.
    block_size: b, from the first step on.
    dtype: of the weights; None: float32 on CPU, bfloat16 elsewhere.
    threads: of torch, for the fresh processes that measure memory.
    """

    model: str
    random_weights: bool = False
    row_length: int = 256
    rows: int = 8
    block_size: int = 16
    dtype: torch.dtype | None = None
    compile: bool = False
    threads: int = 1


@dataclass(frozen=True)
class Way:
    """A way to train: `kind` is "nextblock", "plain", "ar" or "draft adapter"; `views` noised views (k)."""

    kind: str
    views: int = 1

    @property
    def name(self) -> str:
        """For tables."""
        named = {"plain": "plain way", "ar": "AR step", "nextblock": "this step"}.get(self.kind, self.kind)
        return named if self.views == 1 else f"{named}, {self.views} views"


@dataclass(frozen=True)
class StepTime:
    """What one way took; medians over rounds.

    tokens_per_second: clean tokens.
    speedup: over the plain way in the same round. ar_steps: step time over the AR step's in the same round.
    peak_memory_gib: as `TRAIN_MEMORY_MEANING` says; None where it could not be measured.
    memory_ratio: over the plain way's.
    """

    name: str
    views: int
    seconds: float
    tokens_per_second: float
    speedup: float
    ar_steps: float
    peak_memory_gib: float | None
    memory_ratio: float | None


# ------------------------------------------------------------------------------------------ contestants


class Contest:
    """The model, its optimizer and the rows that all contestants share."""

    def __init__(self, work: Work, ways: Sequence[Way]) -> None:
        """Load or make the model. Only what `ways` train gets an optimizer, whose state exists before any step.

        Raises:
            UsageError: rows that the model cannot take.
        """
        torch.manual_seed(0)
        self.work = work
        self.decoder = _open(work)
        check_length(self.decoder, work)
        self.device = self.decoder.device
        self.two_view_attention = self.decoder.attention
        self.tokens = _random_tokens(self.decoder, work)
        without_dropout(self.decoder.model)
        if work.compile:
            self.decoder.model.base_model.compile()
        else:
            run_in_parts(self.decoder)
        kinds = {way.kind for way in ways}
        self.optimizer = None
        if kinds - {"draft adapter"}:
            self.optimizer = _optimizer(list(self.decoder.model.parameters()))
        self.adapter, self.adapter_optimizer = None, None
        if "draft adapter" in kinds:
            self.adapter = DraftAdapter(self.decoder.model, DraftAdapterConfig())
            self.adapter_optimizer = _optimizer(list(self.adapter.parameters()))
        self.steps = {way: self._step(way) for way in ways}

    def run(self, way: Way, number: int) -> float:
        """One optimizer step; seconds. `number` decides the noise."""
        model, drafting = self.decoder.model, way.kind == "draft adapter"
        attention = self.two_view_attention if way.kind in ("nextblock", "draft adapter") else "sdpa"
        if attention != self.decoder.attention and self.two_view_attention == "flex_attention":
            model.set_attn_implementation(attention)
        model.requires_grad_(not drafting)
        if self.adapter is not None:
            self.adapter.requires_grad_(drafting)
        hidden = nullcontext() if self.adapter is None or drafting else self.adapter.removed(model)
        with hidden:
            synchronize(self.device)
            began = time.perf_counter()
            self.steps[way](number)
            synchronize(self.device)
            return time.perf_counter() - began

    def _step(self, way: Way) -> Callable[[int], Any]:
        if way.kind in ("nextblock", "draft adapter"):
            run = self._training_run(way)
            return lambda number: train_step(run, number)
        model, tokens = self.decoder.model, self.tokens.to(self.device)
        optimizer = cast(torch.optim.Optimizer, self.optimizer)

        def step(number: int) -> None:
            if way.kind == "ar":
                loss = cast(Any, model)(input_ids=tokens, labels=tokens, use_cache=False).loss
            else:
                masked = random_masks(tokens, self.work.block_size, number)
                loss = plain_loss(self.decoder, tokens, masked, self.work.block_size)
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _training_run(self, way: Way) -> Run:
        """What `train_step` needs, with the same rows at every step."""
        drafting = way.kind == "draft adapter"
        decoder = Decoder(self.decoder.model, self.adapter if drafting else None)
        settings = read_settings(self.decoder.model.config)
        own_mask = self.decoder.vocabulary - 1 if settings is None else settings.mask_token_id
        mask = decoder.adapter.mask_token_id if decoder.adapter is not None else own_mask
        return Run(
            config=_configuration(self.work, way.views),
            accelerator=Accelerator(),
            tokenizer=SimpleNamespace(eos_token_id=None),
            decoder=decoder,
            loss=DraftLoss(decoder) if drafting else TwoViewLoss(decoder),
            optimizer=cast(torch.optim.Optimizer, self.adapter_optimizer if drafting else self.optimizer),
            feed=cast(Any, SimpleNamespace(next=lambda: whole_rows(self.tokens))),
            mask_token_id=mask,
            output=Path(),
        )


def _open(work: Work) -> Decoder:
    if work.random_weights:
        return Decoder(random_model(work.model, dtype=work.dtype, attention="auto").model)
    return Decoder(load_model(work.model, dtype=work.dtype))


def _optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Fused AdamW after a step with gradient 0: the state is there, the weights are as they were."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _configuration(work: Work, views: int) -> AdaptConfig:
    return load_config(
        {
            "data": {"sources": [{"path": "bench"}], "row_length": work.row_length},
            "growth": {"b_0": work.block_size, "b_max": work.block_size},
            "recipe": {"ar_weight": AR_WEIGHT, "views": views, "complementary": views % 2 == 0},
            "optimizer": {"lr": 1e-6, "weight_decay": 0.0},
            "training": {"steps": 1_000_000, "batch_rows": work.rows},
        }
    )


def _random_tokens(decoder: Decoder, work: Work) -> Tensor:
    """int64 [B, L]; neither the mask token nor the last id, which stands in for it, is among them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, decoder.vocabulary - 1, (work.rows, work.row_length), generator=generator)
    settings = read_settings(decoder.model.config)
    return tokens if settings is None else tokens.masked_fill(tokens == settings.mask_token_id, 0)


def whole_rows(tokens: Tensor) -> Rows:
    """Rows [B, L] of one generated document each."""
    count, length = tokens.shape
    position = torch.arange(length).expand(count, length).contiguous()
    number = torch.arange(count)
    return Rows(tokens, torch.zeros_like(tokens), position, position, torch.zeros_like(number), number)


def check_length(decoder: Decoder, work: Work) -> None:
    """Refuse rows that the model has no positions for."""
    room = decoder.max_positions
    if min(work.rows, work.row_length, work.block_size) < 1:
        raise UsageError("rows, row_length and block_size must be at least 1")
    if room is not None and work.row_length > room:
        raise UsageError(f"row_length={work.row_length} is over the model's {room} positions; use at most {room}")
    if work.row_length % work.block_size:
        raise UsageError(
            f"row_length={work.row_length} is not a multiple of block_size={work.block_size}; "
            f"use {max(1, work.row_length // work.block_size) * work.block_size}"
        )


# -------------------------------------------------------------------------------------------- plain way


def random_masks(tokens: Tensor, block_size: int, seed: int) -> Tensor:
    """bool [B, L]: t ~ Uniform[0, 1] per block, each token masked with probability t but a block's first."""
    rows, length = tokens.shape
    generator = torch.Generator().manual_seed(seed)
    level = torch.rand(rows, length // block_size, generator=generator).repeat_interleave(block_size, dim=1)
    masked = torch.rand(rows, length, generator=generator) < level
    masked[:, ::block_size] = False
    return masked.to(tokens.device)


def plain_loss(
    decoder: Decoder, tokens: Tensor, masked: Tensor, block_size: int, mask_token_id: int | None = None
) -> Tensor:
    """(L_MDM + lambda L_AR) / N the plain way: a dense (2L)^2 mask, float32 logits of all 2L positions.

    Args:
        tokens: int64 [B, L], one document a row.
        masked: bool [B, L], what becomes the mask token in the noised half.
        mask_token_id: None: the last id.
    """
    rows, length = tokens.shape
    device = tokens.device
    mask_token_id = decoder.vocabulary - 1 if mask_token_id is None else mask_token_id
    position = torch.arange(length, device=device).repeat(2)
    clean, block = torch.arange(2 * length, device=device) >= length, position // block_size
    query, key = (slice(None), None), (None, slice(None))
    mask = torch.where(
        clean[query],
        clean[key] & (position[key] <= position[query]),
        torch.where(clean[key], block[key] < block[query], block[key] == block[query]),
    ).expand(rows, 1, -1, -1)
    if decoder.attention == "eager":
        mask = cast(Tensor, decoder.prepare_dense(mask))
    logits = cast(Any, decoder.model)(
        input_ids=torch.cat([tokens.masked_fill(masked, mask_token_id), tokens], dim=1),
        position_ids=position.expand(rows, -1),
        attention_mask=decoder.by_kind(dict.fromkeys(decoder.windows, mask)),
        use_cache=False,
    ).logits.float()
    target = torch.cat([tokens.masked_fill(~masked, -100), tokens], dim=1)[:, 1:]  # position i - 1 predicts i
    target[:, length - 1] = -100  # the noised half's last position has nothing after it
    halves = [(logits[:, : length - 1], target[:, : length - 1]), (logits[:, length:-1], target[:, length:])]
    diffusion, ar = (
        functional.cross_entropy(part.flatten(0, 1), wanted.flatten(), reduction="sum") for part, wanted in halves
    )
    return (diffusion + AR_WEIGHT * ar) / tokens.numel()


# -------------------------------------------------------------------------------------------- measuring


def bench_train(
    work: Work, views: Sequence[int] = (1,), *, draft_adapter: bool = False, packer: bool = False, rounds: int = 5,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """Let all ways take turns, one step each in a round, and measure the memory of each.

    Args:
        views: numbers of noised views (k) of this project's step, and of the draft adapter's.
        draft_adapter: also time the step of a draft adapter, rank 32 on all linear layers.
        packer: also time reading and packing, with the model's tokenizer.
        rounds: after one that warms up.
        on_step: called after each step, measurement of memory and round of the packer, `count_steps` times.
    Returns:
        What is written as JSON: `train` holds a `StepTime` for each way as plain values, `packer` a `PackerSpeed`
        for each data set.
    """
    if rounds < 1:
        raise UsageError(f"rounds={rounds} must be at least 1")
    if min(views, default=0) < 1:
        raise UsageError(f"views={list(views)}: give numbers of at least 1")
    tokenizer = load_tokenizer(work.model) if packer and not work.random_weights else None
    if packer and tokenizer is None:
        raise UsageError("--packer needs a tokenizer; give a MODEL that has one, or leave it out")
    ways = make_ways(views, draft_adapter)
    contest = Contest(work, ways)
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way in ways:
            took = contest.run(way, number)
            if number:
                seconds[way].append(took)
            on_step()
    found = {
        "model": work.model if not work.random_weights else f"random weights, shape {work.model}",
        "parameters": sum(p.numel() for p in contest.decoder.model.parameters()),
        "dtype": str(contest.decoder.model.dtype).removeprefix("torch."),
        "environment": environment(contest.device),
        "row_length": work.row_length,
        "rows": work.rows,
        "block_size": work.block_size,
        "compile": work.compile,
        "rounds": rounds,
        "memory": TRAIN_MEMORY_MEANING.get(contest.device.type),
    }
    if contest.device.type == "cuda":
        memory = {way: _cuda_peak_gib(contest, way) for way in ways}
    else:
        del contest  # the fresh processes need the room,
        gc.collect()  # and the steps hold the contest that holds them
        memory = {}
        for way in ways:
            memory[way] = fresh_process_peak_gib(work, way)
            on_step()
    packers = [
        time_packer(
            name,
            tokenizer,
            batch_rows=work.rows,
            row_length=work.row_length,
            step_seconds=median(seconds[ways[0]]),
            rounds=rounds,
            on_round=on_step,
        )
        for name in PACKER_DATA
        if tokenizer is not None
    ]
    plain, ar = ways[1], ways[2]
    tokens = work.rows * work.row_length
    return found | {
        "train": [
            asdict(
                StepTime(
                    name=way.name,
                    views=way.views,
                    seconds=median(own),
                    tokens_per_second=tokens / median(own),
                    speedup=median(p / s for s, p in zip(own, seconds[plain], strict=True)),
                    ar_steps=median(s / a for s, a in zip(own, seconds[ar], strict=True)),
                    peak_memory_gib=memory[way],
                    memory_ratio=_ratio(memory[way], memory[plain]),
                )
            )
            for way, own in seconds.items()
        ],
        "packer": [asdict(speed) for speed in packers],
    }


def make_ways(views: Sequence[int], draft_adapter: bool) -> list[Way]:
    """This step at the first number of views, the plain way, the AR step; then the other views, then drafts."""
    first, *others = [Way("nextblock", k) for k in dict.fromkeys(views)]
    drafts = [Way("draft adapter", k) for k in dict.fromkeys(views)] if draft_adapter else []
    return [first, Way("plain"), Way("ar"), *others, *drafts]


def count_steps(views: Sequence[int], draft_adapter: bool, rounds: int, packer: bool = False) -> int:
    """How often `bench_train` calls `on_step` on CPU."""
    return len(make_ways(views, draft_adapter)) * (rounds + 2) + (len(PACKER_DATA) * rounds if packer else 0)


def _ratio(own: float | None, other: float | None) -> float | None:
    return None if own is None or not other else own / other


def _cuda_peak_gib(contest: Contest, way: Way) -> float:
    before = torch.cuda.memory_allocated(contest.device)
    torch.cuda.reset_peak_memory_stats(contest.device)
    contest.run(way, 1)
    return (torch.cuda.max_memory_allocated(contest.device) - before) / GIB


def fresh_process_peak_gib(work: Work, way: Way) -> float | None:
    """`TRAIN_MEMORY_MEANING["cpu"]`; None where the system cannot tell, or ended the process for want of memory."""
    work = replace(work, threads=torch.get_num_threads())
    context = multiprocessing.get_context("forkserver")  # imports once, and forks a bare process each time
    context.set_forkserver_preload(["nextblock.bench.training"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(step_peak_gib, work, way).result()
        except BrokenProcessPool:
            return None


def step_peak_gib(work: Work, way: Way) -> float | None:
    """Peak resident memory of one step above the resident memory before it, of this process."""
    torch.set_num_threads(work.threads)
    contest = Contest(work, [way])
    if work.compile:
        contest.run(way, 0)  # compiling takes memory of its own
    with suppress(AttributeError, OSError, TypeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: sets the high-water mark back to what is held now
    except OSError:
        return None
    before = high_water_mark_gib()
    contest.run(way, 1)
    after = high_water_mark_gib()
    return None if before is None or after is None else after - before
