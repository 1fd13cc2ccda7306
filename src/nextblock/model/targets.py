"""Which linear layers a draft adapter or LoRA adapts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nextblock.config.errors import UsageError, nearest

ROUTER = re.compile(r"[Rr]outer|[Gg]ating$|Gate$|^gate$|_gate$")
"""Names of modules, and of their classes, that choose or weigh experts; `gate_proj` of an MLP is none."""


def target_names(model: PreTrainedModel, targets: str | Sequence[str], section: str = "draft_adapter") -> list[str]:
    """Names of the linear layers to adapt: `all-linear`, a regular expression, or name endings.

    All are the projections in the text decoder's layers, experts among them where they are linear layers; never what
    leads into the layers or out of them, a router, or the gate of an expert.

    Raises:
        UsageError: they match nothing, one of the endings does not, or no regular expression.
    """
    lists = (part for part in model.get_decoder().modules() if isinstance(part, nn.ModuleList))
    layers = set(max(lists, key=lambda part: sum(p.numel() for p in part.parameters())).modules())
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module in layers and not _is_router(model, name)
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
