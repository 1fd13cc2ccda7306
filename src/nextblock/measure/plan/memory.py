"""The memory of a step: one training step on fake tensors, every storage of which is added up while it lives.

Letters: B rows, L clean tokens of a row, N noised ones, b block size, k views.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from nextblock.config.run import AdaptConfig
from nextblock.measure.likelihood import evaluation_rows
from nextblock.measure.plan.work import noised_tokens, scored_tokens
from nextblock.model.decoder import Decoder
from nextblock.model.fakes import fake_decoder, fake_mask
from nextblock.recipe.cross_entropy import chunk_rows, cross_entropy
from nextblock.recipe.objective import CleanCache
from nextblock.training.flops import kind_of_training
from nextblock.training.footprint import micro_rows


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
        again = config.training.batch_rows // devices > rows  # later micro-batches meet the gradients of the first
        if again:
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
    lasting = {"weights": held, "gradients": gradients, "optimizer": states}
    kinds |= {kind: round(size * wide / sharding) for kind, size in lasting.items()}
    # The root's weights stay gathered; of the layers one is at work and one on its way. As many gradients, if trained.
    whole_gradients = again and config.machine.hold_gradients
    kinds["gathered"] = (root + 2 * layer) * (2 if kind_of_training(config) == "full" and not whole_gradients else 1)
    if whole_gradients:  # in the dtype in which they are summed over ranks, and shared out group by group at the end
        kinds["gradients"] = round(gradients * wide)
    return kinds


def evaluation_memory(
    config: AdaptConfig, shape: PreTrainedConfig, *, device: str, row_length: int | None = None
) -> dict[str, int]:
    """Bytes by kind at the peak of the final evaluation: one process, whole weights in their own dtype, no gradient.

    Empty where nothing is measured.
    """
    if not (config.training.evaluate_rows and config.data.held_out):
        return {}
    length, rows = row_length or config.data.row_length, evaluation_rows(config)
    live, noised = Live(), length if config.masks else 0
    with FakeTensorMode(allow_non_fake_inputs=True), live, torch.no_grad():
        decoder, _ = fake_decoder(config, shape, device, getattr(torch, config.model.dtype))
        decoder.model.eval()
        live.most = 0  # what only loading takes is over
        live.phase = "mask"
        mask = fake_mask(decoder, rows, noised + length, noised + length, noised=0)  # not in parts
        live.phase = "activations"
        ids = torch.zeros(rows, noised + length, dtype=torch.int64)
        states = decoder.hidden(ids, torch.zeros_like(ids), mask, noised=decoder.adapter is not None).flatten(0, 1)
        live.phase = "head"
        chosen, chunk = states[torch.zeros(len(states), dtype=torch.int64)], chunk_rows(decoder, device)
        some = chosen[: 2 * chunk]  # further chunks take no more
        cross_entropy(decoder, some, torch.zeros(len(some), dtype=torch.int64), each=True, rows=chunk)
    return dict(live.peak)


def _fake_losses(
    config: AdaptConfig, decoder: Decoder, rows: int, length: int, live: Live, device: str
) -> list[Tensor]:
    """The forward pass of a training step with tensors of the right shapes   (see `TwoViewLoss`).

    Returns:
        The loss, and what lives as long as it does.
    """
    count = noised_tokens(config, config.growth.b_max, length)
    scored = rows * scored_tokens(config, config.growth.b_max, length)
    recipe, drafting = config.recipe, config.draft_adapter is not None

    def hidden(tokens: int, keys: int, cache: Any = None, gate: bool = False) -> Tensor:
        live.phase = "mask"
        mask = fake_mask(decoder, rows, tokens, keys, noised=keys - length)
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
            return [cross_entropy(decoder, chosen, wanted, previous=wanted, rows=chunk).total, rest]
        taught = teacher.reshape(-1, teacher.shape[-1])[wanted], wanted == 0
        scores = cross_entropy(decoder, chosen, wanted, teacher=taught, previous=wanted, rows=max(1, chunk // 2))
        return [scores.total + scores.soft + cast(Tensor, scores.agreement).sum(), rest]

    if drafting:
        cache = CleanCache()
        with torch.no_grad():
            parent = hidden(length, length, cache)
        cache.written = True
        states = hidden(count, length + count, cache, gate=True)
        return head(states, 0, scored, parent if recipe.taught else None)
    states = hidden(count + length, count + length)
    teacher = states[:, count:] if recipe.taught else None
    diffusion = head(states, 0, scored, teacher) if scored else [torch.zeros(())]
    if decoder.correction is not None or (not recipe.ar_weight and not recipe.ar_weight_final):
        return diffusion
    ar = head(states, count, rows * (length - 1))
    return [diffusion[0] + ar[0], *diffusion[1:], *ar[1:]]


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
