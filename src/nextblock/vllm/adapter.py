"""A draft adapter at vLLM's layers: low-rank updates that act inside draft passes alone.

vLLM joins layers of the checkpoint (q, k and v; gate and up) to one. Their updates are joined likewise: A one below
the other, B along the diagonal.

Letters: T tokens, D hidden size, r rank of an adapted layer, R that of a joined one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nextblock.config.errors import UsageError
from nextblock.model.adapter_files import StoredAdapter


class VllmAdapter:
    """A stored draft adapter, attached to a model of vLLM; closed, the model is its parent."""

    def __init__(self, model: nn.Module, stored: StoredAdapter) -> None:
        """UsageError for a layer that vLLM's model does not have."""
        weight = next(model.parameters())
        self.model, self.is_open = model, False
        self.mask_token_id = stored.settings.mask_token_id
        self.mask_vector = stored.mask_vector.to(weight)
        scale = stored.config.alpha / stored.config.rank
        modules, packed = dict(model.named_modules()), getattr(model, "packed_modules_mapping", {})
        left = dict(stored.weights)
        while left:
            name = next(iter(left))
            before, _, last = name.rpartition(".")
            joined = next((one for one, parts in packed.items() if last in parts), last)
            parts = [f"{before}.{part}" for part in packed.get(joined, [last])]
            module: Any = modules.get(f"{before}.{joined}")
            if module is None:
                raise UsageError(f"draft adapter {stored.folder} acts on {name}, which vLLM's model does not have")
            pairs = [left.pop(part, None) for part in parts]
            first = torch.cat([pair[0] for pair in pairs if pair is not None]).to(weight)
            blocks = [
                pair[1] if pair is not None else torch.zeros(module.output_sizes[n], 0) for n, pair in enumerate(pairs)
            ]
            second = (torch.block_diag(*(block.float() for block in blocks)) * scale).to(weight)
            module.register_forward_hook(self._update(first, second))

    def _update(self, first: Tensor, second: Tensor) -> Any:
        """A hook that adds x A B to what a layer gives: A [R, in], B [out, R]."""

        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Any) -> Any:
            if not self.is_open:
                return None
            update = functional.linear(functional.linear(given[0], first), second)
            return (output[0] + update, *output[1:]) if isinstance(output, tuple) else output + update

        return hook

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let it act in the passes inside the `with` block."""
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False

    def embed(self, tokens: Tensor) -> dict[str, Any]:
        """int64 [T] -> the model's arguments: embeddings [T, D], the mask vector where there is a mask token."""
        masked = tokens == self.mask_token_id
        embedded = self.model.embed_input_ids(tokens.masked_fill(masked, 0))  # type: ignore[operator]
        return {"input_ids": None, "inputs_embeds": torch.where(masked[:, None], self.mask_vector, embedded)}
