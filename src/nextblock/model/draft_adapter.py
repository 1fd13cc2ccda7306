"""Draft adapter: low-rank updates and a mask vector that act on noised positions alone.

The parent stays frozen and, wherever the gate is closed, computes exactly what it computes without the
adapter. So the clean half of a training pass, and every causal pass of decoding, is the parent itself.

Letters: B rows, T tokens, D hidden size, r rank.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nextblock.config.errors import UsageError, nearest
from nextblock.config.sections import BlockDiffusionSettings, DraftAdapterConfig, validate

WEIGHTS, PEFT_CONFIG, SETTINGS = "adapter_model.safetensors", "adapter_config.json", "draft_adapter.json"
MASK_VECTOR = "mask_vector.safetensors"
PEFT_PREFIX = "base_model.model."
ROUTER = re.compile(r"[Rr]outer|[Gg]ating$|Gate$|^gate$|_gate$")
"""Names of modules, and of their classes, that choose or weigh experts; `gate_proj` of an MLP is none."""
SAMPLED = 4096
"""Bytes of each tensor that enter the fingerprint."""

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

    def __init__(self, base: nn.Module, lora_A: nn.Parameter, lora_B: nn.Parameter, owner: DraftAdapter) -> None:
        super().__init__()
        self.base = base
        # The owner holds the parameters; listing them here too would save and count them twice.
        self.__dict__.update(lora_A=lora_A, lora_B=lora_B, owner=owner)
        self.merged: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen layer's own, which some models read beside calling the layer."""
        return cast(Tensor, self.base.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; x is [B, T, in], or [B * T, in], where the gate is a tensor."""
        owner = cast(DraftAdapter, self.owner)
        gate, opens_at = owner.always or _running.gate, _running.opens_at
        if gate is False:
            return self.base(x)
        if self.merged is not None and opens_at is not None and (x.ndim == 3 or opens_at == 0):
            bias = getattr(self.base, "bias", None)
            if opens_at == 0:
                return functional.linear(x, self.merged, bias)
            closed, noised = x[:, :opens_at].contiguous(), x[:, opens_at:]
            return torch.cat([self.base(closed), functional.linear(noised, self.merged, bias)], dim=1)
        low = functional.linear(functional.dropout(x, owner.dropout, owner.training), self.lora_A.to(x.dtype))
        update = functional.linear(low, self.lora_B.to(x.dtype)) * owner.scale
        if isinstance(gate, Tensor):
            update = update * gate.reshape(*x.shape[:-1], 1)
        return self.base(x) + update


class DraftAdapter(nn.Module):
    """The trained part: A and B of every adapted layer, and the vector that embeds the mask token.

    always: it acts in every pass, wherever `open` would have it.
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
        self.mask_token_id = embedding.num_embeddings
        self.names = target_names(model, config.target_modules)
        self.lora_A = nn.ParameterList()
        self.lora_B = nn.ParameterList()
        self.layers: list[GatedLinear] = []
        for name in self.names:
            base = model.get_submodule(name)
            inputs, outputs = _features(base)
            first = torch.empty(config.rank, inputs, device=device, dtype=dtype)
            nn.init.kaiming_uniform_(first, a=math.sqrt(5))
            self.lora_A.append(nn.Parameter(first))
            self.lora_B.append(nn.Parameter(torch.zeros(outputs, config.rank, device=device, dtype=dtype)))
        with torch.no_grad():
            mean = model.get_input_embeddings()(torch.arange(self.mask_token_id, device=device)).float().mean(0)
        self.mask_vector = nn.Parameter(mean.clone())
        self.attach(model)

    def attach(self, model: PreTrainedModel) -> None:
        """Put the gated layers in place of the parent's own; its weights are not touched."""
        model.requires_grad_(False)
        for name, first, second in zip(self.names, self.lora_A, self.lora_B, strict=True):
            layer = GatedLinear(model.get_submodule(name), first, second, self)
            model.set_submodule(name, layer)
            self.layers.append(layer)
        self._hook_embedding(model)

    def detach(self, model: PreTrainedModel) -> None:
        """Put the parent's own layers back."""
        for name, layer in zip(self.names, self.layers, strict=True):
            model.set_submodule(name, layer.base)
        self.layers = []
        self.hook.remove()

    @contextmanager
    def removed(self, model: PreTrainedModel) -> Iterator[None]:
        """The bare parent inside the `with` block."""
        layers = self.layers
        self.detach(model)
        try:
            yield
        finally:
            self.layers = layers
            for name, layer in zip(self.names, layers, strict=True):
                model.set_submodule(name, layer)
            self._hook_embedding(model)

    def merge(self) -> None:
        """Refused: merged weights would no longer be the parent's, and its output neither."""
        raise UsageError("a draft adapter cannot be merged: it would change the parent; load it beside the parent")

    def open(self, gate: Gate) -> AbstractContextManager[None]:
        """Let the adapter act at `gate` in the passes of this thread inside the `with` block."""
        return _opened(gate, self._first_open(gate))

    def _first_open(self, gate: Gate) -> int | None:
        """Where a gate opens for the rest of every row, if it does; looked up only where copies are merged."""
        if gate is False or not self.layers or self.layers[0].merged is None:
            return None
        if gate is True:
            return 0
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

    def _hook_embedding(self, model: PreTrainedModel) -> None:
        """Let the model's input embedding give the mask vector where a pass has mask tokens."""

        def embed(module: Any, inputs: Any, embedded: Tensor) -> Tensor:
            if _running.at_mask is None:
                return embedded
            return torch.where(_running.at_mask.unsqueeze(-1), self.mask_vector.to(embedded.dtype), embedded)

        self.hook = cast(nn.Embedding, model.get_input_embeddings()).register_forward_hook(embed)

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


def target_names(model: PreTrainedModel, targets: str | Sequence[str], section: str = "draft_adapter") -> list[str]:
    """Names of the linear layers to adapt: `all-linear`, a regular expression, or name endings.

    All are the projections in the text decoder's layers, experts among them where they are linear layers; never the
    head, a router, or the gate of an expert.

    Raises:
        UsageError: they match nothing, one of the endings does not, or no regular expression.
    """
    decoder, head = set(model.get_decoder().modules()), model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module in decoder and module is not head
        if not _is_router(model, name)
    ]
    if targets == "all-linear":
        return linear
    wanted: dict[str, list[str]] = {}
    if isinstance(targets, str):
        try:
            wanted[targets] = [name for name in linear if re.fullmatch(targets, name)]
        except re.error as error:
            raise UsageError(
                f"{section}.target_modules={targets!r} is no regular expression ({error}); repair it, or give a "
                "list of endings"
            ) from None
    else:
        wanted = {t: [name for name in linear if name == t or name.endswith(f".{t}")] for t in targets}
    missed = [target for target, names in wanted.items() if not names]
    if missed or not wanted:
        ends = sorted({name.rsplit(".", 1)[-1] for name in linear})
        close = nearest(missed[0], ends) if missed else f"; choose from {', '.join(ends)}"
        raise UsageError(f"{section}.target_modules={missed or list(targets)} match nothing{close}")
    found = {name for names in wanted.values() for name in names}
    return [name for name in linear if name in found]


def _is_router(model: nn.Module, name: str) -> bool:
    """Whether a module or what it is part of is called a router or a gate, by its name or its class's."""
    parts = name.split(".")
    owners = [type(model.get_submodule(".".join(parts[:depth]))).__name__ for depth in range(1, len(parts) + 1)]
    return any(ROUTER.search(word) for word in (*parts, *owners))


def _features(layer: nn.Module) -> tuple[int, int]:
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    return cast(nn.Linear, layer).in_features, cast(nn.Linear, layer).out_features


def fingerprint(folder: Path) -> str:
    """A digest of the parent's weight files: name, shape, dtype and a sample of the bytes of every tensor."""
    digest = hashlib.blake2b(digest_size=16)
    tensors: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as handle:
            tensors |= dict.fromkeys(handle.keys(), file)
    for name in sorted(tensors):
        with safe_open(str(tensors[name]), framework="pt") as handle:
            part = handle.get_slice(name)
            shape = part.get_shape()
            rows = max(1, SAMPLED // max(1, math.prod(shape[1:]) * 2)) if shape else 0
            sample = part[:rows] if shape else handle.get_tensor(name)
        digest.update(f"{name} {shape} {sample.dtype}".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_adapter(
    folder: Path,
    adapter: DraftAdapter,
    settings: BlockDiffusionSettings,
    parent: str,
    parent_folder: Path,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a peft-format folder, with the mask vector, the settings, and the parent's name and fingerprint."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name, first, second in zip(adapter.names, adapter.lora_A, adapter.lora_B, strict=True):
        weights[f"{PEFT_PREFIX}{name}.lora_A.weight"] = first.detach().to("cpu", dtype).contiguous()
        weights[f"{PEFT_PREFIX}{name}.lora_B.weight"] = second.detach().to("cpu", dtype).contiguous()
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    save_file({"mask_vector": adapter.mask_vector.detach().cpu().to(dtype)}, folder / MASK_VECTOR)
    peft_config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": parent,
        "r": adapter.config.rank,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": adapter.config.dropout,
        "target_modules": adapter.names,
        "bias": "none",
        "inference_mode": True,
    }
    own = {"block_diffusion": settings.model_dump(), "parent": parent, "fingerprint": fingerprint(parent_folder)}
    (folder / PEFT_CONFIG).write_text(json.dumps(peft_config, indent=2), encoding="utf-8")
    (folder / SETTINGS).write_text(json.dumps(own, indent=2), encoding="utf-8")


def load_adapter(
    folder: Path, model: PreTrainedModel, parent_folder: Path
) -> tuple[DraftAdapter, BlockDiffusionSettings]:
    """Attach a saved adapter to its parent.

    Raises:
        UsageError: no adapter there, or one of another parent.
    """
    try:
        own: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        peft_config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
        mask_vector = load_file(folder / MASK_VECTOR)["mask_vector"]
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{folder} holds no draft adapter ({reason}); make one with `nextblock adapt`") from None
    found = fingerprint(parent_folder)
    if own["fingerprint"] != found:
        raise UsageError(
            f"draft adapter {folder} belongs to {own['parent']} (weights {own['fingerprint'][:8]}), not to this model "
            f"(weights {found[:8]}); load it with its own parent"
        )
    config = DraftAdapterConfig(
        rank=peft_config["r"],
        alpha=peft_config["lora_alpha"],
        dropout=peft_config["lora_dropout"],
        target_modules=tuple(peft_config["target_modules"]),
    )
    adapter = DraftAdapter(model, config)
    with torch.no_grad():
        for name, first, second in zip(adapter.names, adapter.lora_A, adapter.lora_B, strict=True):
            first.copy_(weights[f"{PEFT_PREFIX}{name}.lora_A.weight"])
            second.copy_(weights[f"{PEFT_PREFIX}{name}.lora_B.weight"])
        adapter.mask_vector.copy_(mask_vector)
    adapter.requires_grad_(False).eval()
    if adapter.mask_vector.device.type == "cpu":
        adapter.merge_copies()
    adapter.settings = validate(BlockDiffusionSettings, own["block_diffusion"])
    return adapter, adapter.settings


def attached_adapter(model: nn.Module) -> DraftAdapter | None:
    """The draft adapter that is attached to a model, if there is one."""
    layer = next((module for module in model.modules() if isinstance(module, GatedLinear)), None)
    return None if layer is None else cast(DraftAdapter, layer.owner)
