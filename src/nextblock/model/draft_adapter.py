"""Draft adapter: low-rank updates and a mask vector that act on noised positions alone.

The parent stays frozen and, wherever the gate is closed, computes exactly what it computes without the
adapter. So the clean half of a training pass, and every causal pass of decoding, is the parent itself.

Letters: B rows, T tokens, D hidden size, r rank.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nextblock.config.errors import UsageError
from nextblock.config.sections import BlockDiffusionSettings, CorrectionConfig, DraftAdapterConfig
from nextblock.model.correction import Correction
from nextblock.model.targets import target_names

Gate = bool | Tensor
"""Where the adapter acts: nowhere, everywhere, or at the True entries of a bool tensor [B, T]."""


class _Pass(threading.local):
    """Where adapters act in the pass that this thread runs: of the pass, because a model may run several at once.

    opens_at: the position from which on they act in every row, where merged copies exist and there is one.
    at_mask: bool [B, T], where the pass has mask tokens; None for none.
    """

    def __init__(self) -> None:
        self.gate: Gate = False
        self.opens_at: int | None = None
        self.at_mask: Tensor | None = None


_running = _Pass()


@contextmanager
def _opened(gate: Gate, opens_at: int | None) -> Iterator[None]:
    before = _running.gate, _running.opens_at
    _running.gate, _running.opens_at = gate, opens_at
    try:
        yield
    finally:
        _running.gate, _running.opens_at = before


def recomputation() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of torch's checkpoint: a layer is computed again, on whatever thread, with the gate of its pass."""
    return nullcontext(), _opened(_running.gate, _running.opens_at)


class GatedLinear(nn.Module):
    """A frozen linear layer plus, where the gate is open, a low-rank update: x W + gate * scale * (x A) B."""

    lora_A: Tensor
    lora_B: Tensor
    owner: DraftAdapter
    closed: nn.Module

    def __init__(self, base: nn.Module, lora_A: nn.Parameter, lora_B: nn.Parameter, owner: DraftAdapter) -> None:
        super().__init__()
        self.base = base
        # The owner holds the parameters; listing them here too would save and count them twice. `closed` is `base`
        # without the look-up among modules, for the passes of the parent.
        self.__dict__.update(lora_A=lora_A, lora_B=lora_B, owner=owner, closed=base)
        self.merged: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen layer's own, which some models read beside calling the layer."""
        return cast(Tensor, self.base.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Where the gate is closed the frozen layer at once: of a small model's step every detour is a part."""
        if _running.gate is False and not self.owner.always:
            return self.closed(x)
        return super().__call__(x)

    def forward(self, x: Tensor) -> Tensor:
        """Where the gate is open: [..., in] -> [..., out]; x is [B, T, in], or [B * T, in], if it is a tensor."""
        owner = self.owner
        gate, opens_at = owner.always or _running.gate, _running.opens_at
        if isinstance(gate, Tensor) and gate.numel() * x.shape[-1] != x.numel():
            return self.base(x)  # what it sees are other tokens than the pass's: routed or cached ones
        if self.merged is not None and opens_at is not None and (x.ndim == 3 or opens_at == 0):
            bias = getattr(self.base, "bias", None)
            if opens_at == 0:
                return functional.linear(x, self.merged, bias)
            # One product for all, then the few closed places anew: on small models operations cost more than work.
            out = functional.linear(x, self.merged, bias)
            out[:, :opens_at] = self.base(x[:, :opens_at].contiguous())
            return out
        low = functional.linear(functional.dropout(x, owner.dropout, owner.training), self.lora_A.to(x.dtype))
        update = functional.linear(low, self.lora_B.to(x.dtype)) * owner.scale
        if isinstance(gate, Tensor):
            update = update * gate.reshape(*x.shape[:-1], 1)
        return self.base(x) + update


class DraftAdapter(nn.Module):
    """The trained part: A and B of every adapted layer, and the vector that embeds the mask token.

    always: it acts in every pass, wherever `open` would have it.
    correction: its correction head, if it has one.
    mask_token_id: one past the parent's vocabulary, so no token of it and no row of its head.
    settings: what a sampler needs to know; None until it is loaded.
    """

    settings: BlockDiffusionSettings | None = None

    def __init__(self, model: PreTrainedModel, config: DraftAdapterConfig) -> None:
        """Build and attach an adapter that changes nothing yet (B = 0, the mask vector at the mean embedding).

        Raises:
            UsageError: target modules that match nothing.
        """
        super().__init__()
        embedding = cast(nn.Embedding, model.get_input_embeddings())
        device, dtype = embedding.weight.device, torch.float32
        self.config = config
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.always = False
        self.correction: Correction | None = None
        self.mask_token_id = embedding.num_embeddings
        self.names = target_names(model, config.target_modules)
        self.lora_A = nn.ParameterList()
        self.lora_B = nn.ParameterList()
        self.layers: list[GatedLinear] = []
        for name in self.names:
            base: Any = model.get_submodule(name)  # whose weight has another shape in 4 bits
            inputs, outputs = (base.nx, base.nf) if isinstance(base, Conv1D) else (base.in_features, base.out_features)
            first = nn.Parameter(torch.empty(config.rank, inputs, device=device, dtype=dtype))
            second = nn.Parameter(torch.zeros(outputs, config.rank, device=device, dtype=dtype))
            nn.init.kaiming_uniform_(first, a=math.sqrt(5))
            self.lora_A.append(first)
            self.lora_B.append(second)
            self.layers.append(GatedLinear(base, first, second, self))
        with torch.no_grad():
            mean = model.get_input_embeddings()(torch.arange(self.mask_token_id, device=device)).float().mean(0)
        self.mask_vector = nn.Parameter(mean.clone())
        model.requires_grad_(False)
        self.attach(model)

    def attach(self, model: PreTrainedModel) -> None:
        """Put the gated layers in place of the parent's own, and the mask vector where a pass has mask tokens."""
        for name, layer in zip(self.names, self.layers, strict=True):
            model.set_submodule(name, layer)

        def embed(module: Any, inputs: Any, embedded: Tensor) -> Tensor:
            if _running.at_mask is None:
                return embedded
            return torch.where(_running.at_mask.unsqueeze(-1), self.mask_vector.to(embedded.dtype), embedded)

        self.hook = cast(nn.Embedding, model.get_input_embeddings()).register_forward_hook(embed)

    def detach(self, model: PreTrainedModel) -> None:
        """Put the parent's own layers back."""
        for name, layer in zip(self.names, self.layers, strict=True):
            model.set_submodule(name, layer.base)
        self.hook.remove()

    @contextmanager
    def removed(self, model: PreTrainedModel) -> Iterator[None]:
        """The bare parent inside the `with` block."""
        self.detach(model)
        try:
            yield
        finally:
            self.attach(model)

    def merge(self) -> None:
        """Refused: merged weights would no longer be the parent's, and its output neither."""
        raise UsageError("a draft adapter cannot be merged: it would change the parent; load it beside the parent")

    def open(self, gate: Gate, opens_at: int | None = None) -> AbstractContextManager[None]:
        """Let the adapter act at `gate` in the passes of this thread inside the `with` block.

        opens_at: from `first_open`, if that was asked already: inside torch.compile it has no answer for a tensor.
        """
        return _opened(gate, self.first_open(gate) if opens_at is None else opens_at)

    def first_open(self, gate: Gate) -> int | None:
        """Where a gate opens for the rest of every row, if it does; looked up only where copies are merged."""
        if gate is False or not self.layers or self.layers[0].merged is None:
            return None
        if gate is True:
            return 0
        if torch.compiler.is_compiling():
            return None
        closed = int((~gate[0]).sum())
        rest = torch.arange(gate.shape[1], device=gate.device) >= closed
        return closed if torch.equal(gate, rest.expand_as(gate)) else None

    @contextmanager
    def masked(self, tokens: Tensor) -> Iterator[Tensor]:
        """Embed mask tokens of int64 `tokens` [B, T] by the mask vector inside the `with` block.

        Yields the ids to give to the model, token 0 in place of the mask token: some families look up more than the
        input embedding by them.
        """
        _running.at_mask = at_mask = tokens == self.mask_token_id
        try:
            yield tokens.masked_fill(at_mask, 0)
        finally:
            _running.at_mask = None

    @torch.no_grad()
    def merge_copies(self) -> None:
        """Keep, beside the parent's weights, a copy of each with its update added, for passes that are all noised.

        Faster where small matrix products cost more than memory (CPU); the parent's own weights stay as they are.
        """
        for layer in self.layers:
            weight = cast(Tensor, layer.base.weight)
            weight = weight.T if isinstance(layer.base, Conv1D) else weight
            update = layer.lora_B @ layer.lora_A * self.scale
            layer.merged = (weight.float() + update).to(weight.dtype).contiguous()


def new_adapter(
    model: PreTrainedModel, config: DraftAdapterConfig, correction: CorrectionConfig | None = None
) -> DraftAdapter:
    """An adapter that changes nothing yet, attached, with its correction head if it is to have one."""
    adapter = DraftAdapter(model, config)
    if correction is not None:
        adapter.correction = Correction(adapter.mask_token_id, correction, adapter.mask_vector.device)
    return adapter


def attached_adapter(model: nn.Module) -> DraftAdapter | None:
    """The draft adapter that is attached to a model, if there is one."""
    layer = next((module for module in model.modules() if isinstance(module, GatedLinear)), None)
    return None if layer is None else cast(DraftAdapter, layer.owner)
