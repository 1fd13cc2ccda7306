"""What is measured beside the loss: its course over noise and block, speed, memory, MFU; and where it is written.

Letters: B rows, N slots of the noised half, S masked tokens, b block size.
"""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nextblock.config.run import AdaptConfig
from nextblock.model.positions import text_config
from nextblock.model.shapes import device_named
from nextblock.recipe.corruption import NOISE_LEVELS, UNSCORED, TwoView

PROJECT, TRACKERS = "nextblock", "trackers"
OFFSETS = 64
"""Most places of a block that the loss is told apart by; those of a larger block are pooled."""


class LossProfile:
    """Sums of the masked tokens' cross-entropy by noise level of the block and by offset in it.

    Kept on the model's device: nothing is read back before `record`.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self.block_size = block_size
        self.noise = torch.zeros(2, NOISE_LEVELS, device=device)
        self.offset = torch.zeros(2, min(block_size, OFFSETS), device=device)

    def add(self, view: TwoView, nats: Tensor, shifted: bool) -> None:
        """Take in a micro-batch: `nats` [S] of its masked tokens, in the order of `view.target`."""
        n = view.noised_length
        scored = view.target[:, :n] != UNSCORED
        offset = (view.places.position - view.places.block_start)[:, :n][scored] + int(shifted)
        places = self.offset.shape[1]
        pairs = torch.stack([nats, torch.ones_like(nats)])
        self.noise.index_add_(1, view.noise[scored], pairs)
        self.offset.index_add_(1, offset * places // self.block_size, pairs)

    def record(self, accelerator: Accelerator, step: int) -> dict[str, Any] | None:
        """A log record with means in nats over all ranks' tokens; None where nothing was masked."""
        over_ranks: list[Any] = [accelerator.reduce(sums) for sums in (self.noise, self.offset)]
        record: dict[str, Any] = {"kind": "profile", "step": step, "block_size": self.block_size}
        for name, (sums, counts) in zip(("noise", "offset"), (both.tolist() for both in over_ranks), strict=True):
            record[f"loss_by_{name}"] = [s / c if c else None for s, c in zip(sums, counts, strict=True)]
            record[f"tokens_by_{name}"] = [int(c) for c in counts]
        return record if sum(record["tokens_by_noise"]) else None


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of matrix products alone.

    clean, noised, head: what the method needs, forward and backward. recomputed: what gradient checkpointing adds.
    """

    clean: float
    noised: float
    head: float
    recomputed: float = 0.0

    @property
    def useful(self) -> float:
        """All but what is computed twice; MFU counts these."""
        return self.clean + self.noised + self.head


@dataclass(frozen=True)
class Products:
    """Multiply-adds of a forward pass.

    linear: of a token in all linear layers but the head. low_rank: of a token in their updates.
    head: of a scored token. pair: of a query and a key that it may see, scores and values together.
    """

    linear: int
    low_rank: int
    head: int
    pair: int

    @classmethod
    def of(cls, model: PreTrainedModel, updates: Iterable[nn.Parameter] = ()) -> Products:
        """Read off a model's modules. `updates`: what an adapter or LoRA trains; a vector of it is an embedding."""
        config: Any = text_config(model.config)
        head, updates = cast(Any, model.get_output_embeddings()), list(updates)
        apart = {id(head.weight), *map(id, updates)}
        linear = 0
        for layer in model.get_decoder().modules():  # by their sizes: weights in 4 bit have fewer elements
            if isinstance(layer, nn.Linear) and id(layer.weight) not in apart:
                linear += layer.in_features * layer.out_features
            elif isinstance(layer, Conv1D):
                linear += layer.nx * layer.nf
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        embedding = cast(nn.Embedding, model.get_input_embeddings())
        return cls(
            linear=linear,
            low_rank=sum(p.numel() for p in updates if p.ndim == 2),
            head=config.hidden_size * embedding.num_embeddings,
            pair=2 * width * config.num_hidden_layers,
        )

    def flops(
        self,
        kind: str,
        tokens: tuple[float, float],
        pairs: tuple[float, float],
        scored: float,
        taught: float = 0,
        again: bool = False,
    ) -> Flops:
        """Of training: 2 for a multiply-add; a backward pass is twice a forward one, or as much if weights are frozen.

        Args:
            kind: of `kind_of_training`. A draft adapter's clean half has no gradient.
            tokens, pairs: of the clean half, and of the noised one.
            scored: targets. taught: those that have a teacher, whose logits are computed, too.
            again: with gradient checkpointing.
        """
        passes, drafting = 3 if kind == "full" else 2, kind == "draft adapter"

        def half(which: int, weights: int, attention: int, updates: int) -> float:
            own = self.linear * weights + self.low_rank * updates
            return 2.0 * (tokens[which] * own + pairs[which] * self.pair * attention)

        clean = half(0, 1, 1, 0) if drafting else half(0, passes, 3, 3)
        recomputed = (half(1, 1, 1, 1) + (0 if drafting else half(0, 1, 1, 1))) if again else 0.0
        return Flops(clean, half(1, passes, 3, 3), 2.0 * self.head * (scored * passes + taught), recomputed)

    def of_view(self, kind: str, view: TwoView, score_ar: bool, soft: bool = False) -> Flops:
        """What training on this view needs, best on the CPU; padding does not count. Arguments as of `TwoViewLoss`."""
        places, n = view.places, view.noised_length
        real = places.document >= 0
        block = int((places.position - places.block_start)[:, :n][real[:, :n]].max()) + 1 if n else 1
        pairs = torch.where(places.view == 0, places.position + 1, places.block_start + block) * real
        tokens, seen, targets = (
            (int(x[:, n:].sum()), int(x[:, :n].sum())) for x in (real, pairs, view.target != UNSCORED)
        )
        ar = targets[0] if score_ar and kind != "draft adapter" else 0
        return self.flops(kind, tokens, seen, ar + targets[1], targets[1] if soft else 0)


def kind_of_training(config: AdaptConfig) -> str:
    """ "full", "lora" or "draft adapter"."""
    if config.draft_adapter is not None:
        return "draft adapter"
    return "full" if config.lora is None else "lora"


def peak_flops(device: torch.device) -> float | None:
    """The device's bfloat16 peak, where it is known."""
    if device.type != "cuda":
        return None
    found = device_named(torch.cuda.get_device_name(device))
    return None if found is None or found.tflops is None else found.tflops * 1e12


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on a CUDA device, resident in the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@contextmanager
def run_log(
    accelerator: Accelerator, path: Path, config: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that appends one record to the log of a run and hands its numbers to the trackers.

    Args:
        accelerator: with the trackers asked for; they are opened and closed here. Only its main process writes.
        path: a JSONL file; trackers that write files have the folder `trackers` beside it.
        config: the resolved configuration as dotted keys, for the trackers.
    """
    if accelerator.log_with:
        plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in config.items()}
        accelerator.project_configuration.logging_dir = str(path.parent / TRACKERS)  # not that of the first stage
        accelerator.init_trackers(PROJECT, config=plain)
    with (path if accelerator.is_main_process else Path("/dev/null")).open("a", encoding="utf-8") as log:

        def write(record: Mapping[str, Any]) -> None:
            log.write(json.dumps(_finite(record)) + "\n")
            log.flush()
            if accelerator.log_with:
                accelerator.log(scalars(record), step=record["step"])

        try:
            yield write
        finally:
            if accelerator.is_main_process:
                for tracker in accelerator.trackers:
                    tracker.finish()


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not know: there is no loss where nothing is masked."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scalars(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a tracker takes it: known numbers and texts under one name each, lists entry by entry."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{record['kind']}/{key}" if "kind" in record else key
        if isinstance(value, list | tuple):
            found |= {f"{name}/{i}": entry for i, entry in enumerate(value)}
        elif key not in ("kind", "step"):
            found[name] = value
    return {k: v for k, v in found.items() if isinstance(v, str) or (v is not None and math.isfinite(v))}
