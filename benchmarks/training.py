"""`python benchmarks/training.py`: this project's training step against the plain way and an ordinary AR step.

All take turns on one model, one optimizer and the same clean rows. The plain way is written here, on its own, as
block diffusion is often trained; the AR step is the floor, which no pass over two views can reach.

Letters: B rows, L clean tokens of a row, V vocabulary.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Annotated, Any, cast

import torch
import typer
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from nextblock.config.run import AdaptConfig, load_config
from nextblock.config.sections import DraftAdapterConfig
from nextblock.data.rows import Rows
from nextblock.measure.bench.forwards import random_model
from nextblock.measure.machine import environment, synchronize
from nextblock.model.decoder import Decoder
from nextblock.model.draft_adapter import DraftAdapter
from nextblock.model.loading import load_model, read_settings
from nextblock.model.training_mode import run_in_parts, without_dropout
from nextblock.recipe.objective import TwoViewLoss
from nextblock.training.devices import GIB, peak_memory_gib, reset_peak_memory
from nextblock.training.run import Run
from nextblock.training.step import train_step

MEMORY_MEANING = {
    "cuda": "peak of torch's CUDA allocator over one step, less what it held before the step",
    "cpu": "one step in a fresh process: peak resident memory, less the resident memory before the step",
}
AR_WEIGHT = 0.5


@dataclass(frozen=True)
class Workload:
    """What every contestant trains on.

    model: path or shipped name; with `random_weights` the name of a shape.
    rows, row_length: B and L of a step; tokens are random, each row one document.
    block_size: b, from the first step on.
    threads: of torch, for the fresh processes that measure memory.
    """

    model: str
    random_weights: bool = False
    row_length: int = 256
    rows: int = 8
    block_size: int = 16
    compile: bool = False
    threads: int = 1


@dataclass(frozen=True)
class Method:
    """A way to train: `kind` is "nextblock", "plain", "ar" or "draft adapter"; `views` noised views (k)."""

    kind: str
    views: int = 1

    @property
    def name(self) -> str:
        """For tables."""
        named = {"plain": "plain way", "ar": "AR step", "nextblock": "this step"}.get(self.kind, self.kind)
        return named if self.views == 1 else f"{named}, {self.views} views"


# ------------------------------------------------------------------------------------------ contestants


class Comparison:
    """The model, its optimizer and the rows that all contestants share."""

    def __init__(self, workload: Workload, methods: Sequence[Method]) -> None:
        """Load or make the model. Only what `methods` train gets an optimizer, whose state exists before any step."""
        torch.manual_seed(0)
        self.workload = workload
        self.decoder = _open(workload)
        self.device = self.decoder.device
        self.two_view_attention = self.decoder.attention
        self.tokens = _random_tokens(self.decoder, workload)
        without_dropout(self.decoder.model)
        if workload.compile:
            self.decoder.model.base_model.compile()
        else:
            run_in_parts(self.decoder)
        kinds = {method.kind for method in methods}
        self.optimizer = None
        if kinds - {"draft adapter"}:
            self.optimizer = _optimizer(list(self.decoder.model.parameters()))
        self.adapter, self.adapter_optimizer = None, None
        if "draft adapter" in kinds:
            self.adapter = DraftAdapter(self.decoder.model, DraftAdapterConfig())
            self.adapter_optimizer = _optimizer(list(self.adapter.parameters()))
        self.steps = {method: self._step(method) for method in methods}

    def run(self, method: Method, number: int) -> float:
        """One optimizer step; seconds. `number` decides the noise."""
        model, drafting = self.decoder.model, method.kind == "draft adapter"
        attention = self.two_view_attention if method.kind in ("nextblock", "draft adapter") else "sdpa"
        if attention != self.decoder.attention and self.two_view_attention == "flex_attention":
            model.set_attn_implementation(attention)
        model.requires_grad_(not drafting)
        if self.adapter is not None:
            self.adapter.requires_grad_(drafting)
        hidden = nullcontext() if self.adapter is None or drafting else self.adapter.removed(model)
        with hidden:
            synchronize(self.device)
            began = time.perf_counter()
            self.steps[method](number)
            synchronize(self.device)
            return time.perf_counter() - began

    def _step(self, method: Method) -> Callable[[int], Any]:
        if method.kind in ("nextblock", "draft adapter"):
            run = self._training_run(method)
            return lambda number: train_step(run, number)
        model, tokens = self.decoder.model, self.tokens.to(self.device)
        optimizer = cast(torch.optim.Optimizer, self.optimizer)

        def step(number: int) -> None:
            if method.kind == "ar":
                loss = cast(Any, model)(input_ids=tokens, labels=tokens, use_cache=False).loss
            else:
                masked = random_masks(tokens, self.workload.block_size, number)
                loss = plain_loss(self.decoder, tokens, masked, self.workload.block_size)
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def _training_run(self, method: Method) -> Run:
        """What `train_step` needs, with the same rows at every step."""
        drafting = method.kind == "draft adapter"
        decoder = Decoder(self.decoder.model, self.adapter if drafting else None)
        settings = read_settings(self.decoder.model.config)
        own_mask = self.decoder.vocabulary - 1 if settings is None else settings.mask_token_id
        mask = decoder.adapter.mask_token_id if decoder.adapter is not None else own_mask
        rows = partial(whole_rows, self.tokens)
        return Run(
            config=_configuration(self.workload, method.views),
            accelerator=Accelerator(),
            tokenizer=SimpleNamespace(eos_token_id=None),
            decoder=decoder,
            loss=TwoViewLoss(decoder),
            optimizer=cast(torch.optim.Optimizer, self.adapter_optimizer if drafting else self.optimizer),
            feed=cast(Any, SimpleNamespace(next=rows, peek=rows)),
            mask_token_id=mask,
            output=Path(),
        )


def _open(workload: Workload) -> Decoder:
    return Decoder(
        random_model(workload.model, attention="auto").model if workload.random_weights else load_model(workload.model)
    )


def _optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Fused AdamW after a step with gradient 0: the state is there, the weights are as they were."""
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _configuration(workload: Workload, views: int) -> AdaptConfig:
    return load_config(
        {
            "data": {"sources": [{"path": "bench"}], "row_length": workload.row_length},
            "growth": {"b_0": workload.block_size, "b_max": workload.block_size},
            "recipe": {"ar_weight": AR_WEIGHT, "views": views, "complementary": views % 2 == 0},
            "optimizer": {"lr": 1e-6, "weight_decay": 0.0},
            "training": {"steps": 1_000_000, "batch_rows": workload.rows},
        }
    )


def _random_tokens(decoder: Decoder, workload: Workload) -> Tensor:
    """int64 [B, L]; neither the mask token nor the last id, which stands in for it, is among them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, decoder.vocabulary - 1, (workload.rows, workload.row_length), generator=generator)
    settings = read_settings(decoder.model.config)
    return tokens if settings is None else tokens.masked_fill(tokens == settings.mask_token_id, 0)


def whole_rows(tokens: Tensor) -> Rows:
    """Rows [B, L] of one generated document each."""
    count, length = tokens.shape
    position = torch.arange(length).expand(count, length).contiguous()
    number = torch.arange(count)
    return Rows(tokens, torch.zeros_like(tokens), position, position, torch.zeros_like(number), number)


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


def compare(workload: Workload, methods: Sequence[Method], rounds: int) -> dict[str, Any]:
    """Let the methods take turns, one step each in a round after one that warms up, and measure the memory of each.

    Args:
        methods: the plain way and the AR step among them.
    Returns:
        What is written as JSON. `train` holds medians over rounds of each method: `tokens_per_second` of clean tokens,
        `speedup` over the plain way in the same round, `ar_steps`, its time over the AR step's in the same round, and
        `peak_memory_gib` as `MEMORY_MEANING` says, None where it could not be measured.
    """
    comparison = Comparison(workload, methods)
    seconds: dict[Method, list[float]] = {method: [] for method in methods}
    for number in range(rounds + 1):
        for method in methods:
            took = comparison.run(method, number)
            seconds[method] += [took] if number else []
    found = {
        "model": workload.model,
        "parameters": sum(p.numel() for p in comparison.decoder.model.parameters()),
        "dtype": str(comparison.decoder.model.dtype).removeprefix("torch."),
        "environment": environment(comparison.device),
        "memory": MEMORY_MEANING.get(comparison.device.type),
    }
    if comparison.device.type == "cuda":
        memory = {method: _cuda_peak_gib(comparison, method) for method in methods}
    else:
        del comparison  # makes room for the fresh processes;
        gc.collect()  # needed, as its steps refer to it
        memory = {method: fresh_process_peak_gib(workload, method) for method in methods}
    plain, ar = seconds[Method("plain")], seconds[Method("ar")]
    found["train"] = [
        {
            "name": method.name,
            "seconds": median(own),
            "tokens_per_second": workload.rows * workload.row_length / median(own),
            "speedup": median(p / s for s, p in zip(own, plain, strict=True)),
            "ar_steps": median(s / a for s, a in zip(own, ar, strict=True)),
            "peak_memory_gib": memory[method],
        }
        for method, own in seconds.items()
    ]
    return found


def _cuda_peak_gib(comparison: Comparison, method: Method) -> float:
    before = torch.cuda.memory_allocated(comparison.device) / GIB
    reset_peak_memory(comparison.device)
    comparison.run(method, 1)
    return peak_memory_gib(comparison.device) - before


def fresh_process_peak_gib(workload: Workload, method: Method) -> float | None:
    """`MEMORY_MEANING["cpu"]`; None where the system cannot tell, or ended the process for want of memory."""
    context = multiprocessing.get_context("forkserver")  # imports once, and forks a bare process each time
    # By name what takes long; this file is no module of a package, and each process reads it from its path.
    context.set_forkserver_preload(
        ["nextblock.training.loop", "nextblock.workflows.adapt", "nextblock.measure.bench.forwards"]
    )
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(step_peak_gib, workload, method).result()
        except BrokenProcessPool:
            return None


def step_peak_gib(workload: Workload, method: Method) -> float | None:
    """Peak resident memory of one step above the resident memory before it, of this process."""
    torch.set_num_threads(workload.threads)
    comparison = Comparison(workload, [method])
    if workload.compile:
        comparison.run(method, 0)  # compiling takes memory of its own
    if not reset_peak_memory(comparison.device):
        return None
    before = peak_memory_gib(comparison.device)
    comparison.run(method, 1)
    return peak_memory_gib(comparison.device) - before


def main(
    model: Annotated[str, typer.Argument(help="local folder, Hub id, tiny-ar or tiny-bd")] = "tiny-ar",
    shape: Annotated[
        str | None, typer.Option(help="random weights instead of MODEL: large-vocabulary, qwen3-0.6b, ...")
    ] = None,
    row_length: Annotated[int, typer.Option(help="clean tokens in a row; a multiple of the block")] = 256,
    rows: Annotated[int, typer.Option(min=1, help="rows in a step")] = 8,
    block_size: Annotated[int, typer.Option(help="tokens in a block")] = 16,
    views: Annotated[list[int] | None, typer.Option(help="noised views of a step; may be given again")] = None,
    draft_adapter: Annotated[
        bool, typer.Option("--draft-adapter", help="also time a draft adapter's step, at the same numbers of views")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="steps of each; medians are taken over them")] = 5,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile the model for all of them")] = False,
    output: Annotated[Path | None, typer.Option(help="write the figures as JSON")] = None,
) -> None:
    """Time a training step against the plain way and an ordinary AR step, in turns, on the same rows."""
    kinds = ["nextblock", *(["draft adapter"] if draft_adapter else [])]
    methods = [Method("plain"), Method("ar"), *(Method(kind, k) for kind in kinds for k in views or [1])]
    threads = torch.get_num_threads()
    workload = Workload(shape or model, shape is not None, row_length, rows, block_size, compile, threads)
    found = compare(workload, methods, rounds)
    print(f"{rows} x {row_length} clean tokens a step, blocks of {block_size}; memory: {found['memory']}")
    print(f"{'step':26}{'tokens/s':>10}{'× plain way':>13}{'seconds':>10}{'time / AR step':>16}{'memory':>12}")
    for entry in found["train"]:
        memory = entry["peak_memory_gib"]
        held = "-" if memory is None else f"{1024 * memory:,.0f} MiB"
        print(
            f"{entry['name']:26}{entry['tokens_per_second']:>10,.0f}{entry['speedup']:>13.2f}{entry['seconds']:>10.3f}"
            f"{entry['ar_steps']:>16.2f}{held:>12}"
        )
    if output is not None:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
