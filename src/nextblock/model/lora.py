"""LoRA for the full recipe, through peft: low-rank updates of linear layers, and the mask token's own row.

peft's `trainable_token_indices` copies the whole embedding in every forward pass, and again with every chunk of
scored positions where the head is tied to it. So the one row is trained here, beside the frozen matrix, and
saved in the form in which peft reads it.

Letters: B rows, T tokens, D hidden size, V vocabulary, S scored positions.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nextblock.config.sections import LoraConfig
from nextblock.model.adapter_files import PEFT_PREFIX, WEIGHTS
from nextblock.model.targets import target_names


class TiedHead(nn.Module):
    """A head whose matrix is the embedding's, with the mask token's trained row in place of the frozen one."""

    def __init__(self, head: nn.Linear, embedding: nn.Embedding, mask_token_id: int) -> None:
        super().__init__()
        self.head, self.mask_token_id = head, mask_token_id
        self.__dict__["embedding"] = embedding  # the model has it as a module already

    @property
    def weight(self) -> Tensor:
        """The frozen matrix [V, D]."""
        return self.head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        logits = self.head(hidden)
        change = cast(Any, self.embedding).mask_row - self.weight[self.mask_token_id]
        logits[..., self.mask_token_id] += hidden @ change.to(hidden.dtype)
        return logits


class LoraAdapter:
    """peft's updates in the model's linear layers, and the mask token's row in its embedding (and a tied head).

    weights: what is trained, and so what a checkpoint holds; the model's own weights are frozen.
    """

    def __init__(self, model: PreTrainedModel, config: LoraConfig, mask_token_id: int | None, parent: str) -> None:
        """Freeze the model and add updates that change nothing yet.

        Args:
            model: the parent; changed in place until `merge`.
            config: the `lora` section.
            mask_token_id: None where nothing is masked (plain AR training).
            parent: name or folder of the parent, for `adapter_config.json`.
        Raises:
            UsageError: target modules that match nothing.
        """
        import peft

        names = target_names(model, config.target_modules, section="lora")
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=cast(int, config.alpha),
            lora_dropout=config.dropout,
            target_modules=names,
            task_type=peft.TaskType.CAUSAL_LM,
            fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
        )
        self.mask_token_id = mask_token_id
        self.embedding = cast(nn.Embedding, model.get_input_embeddings())
        self.embedding_name = next(name for name, module in model.named_modules() if module is self.embedding)
        self.wrapped: Any = peft.get_peft_model(model, settings)
        self.wrapped.peft_config["default"].base_model_name_or_path = parent
        self.tied_head: nn.Linear | None = None
        if mask_token_id is not None:
            self._train_mask_row(model, mask_token_id)
        trained = {name.replace(".", "/"): p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = nn.ParameterDict(trained)

    def _train_mask_row(self, model: PreTrainedModel, mask_token_id: int) -> None:
        """A parameter [D] of the embedding that stands in for its row, and for the head's where they are one."""
        embedding, head = self.embedding, cast(nn.Linear, model.get_output_embeddings())
        embedding.mask_row = nn.Parameter(embedding.weight[mask_token_id].detach().float().clone())

        def embed(module: Any, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
            row = (module.mask_row * getattr(module, "embed_scale", 1.0)).to(embedded.dtype)
            return torch.where((inputs[0] == mask_token_id).unsqueeze(-1), row, embedded)

        self.hook = embedding.register_forward_hook(embed)
        if head.weight is embedding.weight:
            self.tied_head = head
            model.set_output_embeddings(TiedHead(head, embedding, mask_token_id))

    def save(self, folder: Path) -> None:
        """Write a folder that `peft.PeftModel.from_pretrained(parent, folder)` reads.

        A mask token past the parent's vocabulary needs `parent.resize_token_embeddings` first.
        """
        import peft

        config = copy.copy(self.wrapped.peft_config["default"])
        config.inference_mode = True
        state = peft.get_peft_model_state_dict(self.wrapped, save_embedding_layers=False)
        state = {name: value for name, value in state.items() if not name.endswith(".mask_row")}
        if self.mask_token_id is not None:
            config.trainable_token_indices = [self.mask_token_id]
            row = cast(Tensor, self.embedding.mask_row).detach()
            state[f"{PEFT_PREFIX}{self.embedding_name}.token_adapter.trainable_tokens_delta"] = row.unsqueeze(0)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.cpu().contiguous() for k, v in state.items()}, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))

    @torch.no_grad()
    def merge(self) -> PreTrainedModel:
        """Add the updates to the model's own weights, in place; it is then an ordinary model of its family."""
        model = self.wrapped.merge_and_unload()
        if self.mask_token_id is not None:
            self.embedding.weight[self.mask_token_id] = cast(Tensor, self.embedding.mask_row)
            self.hook.remove()
            del self.embedding.mask_row
        if self.tied_head is not None:
            model.set_output_embeddings(self.tied_head)
        return model
