"""Any causal decoder as the rest of the package runs it: hidden states and logits apart, masks as its layers
read them.

No family is known by name: what differs between them is read from the config, and tried by `probe`.

Letters: B rows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel

from nextblock.attention.masks import additive, to_block_mask, to_dense
from nextblock.attention.rule import Places, Rule, within_window
from nextblock.attention.split import SPLIT, split_mask
from nextblock.model.correction import Correction
from nextblock.model.draft_adapter import DraftAdapter, Gate
from nextblock.model.positions import layer_windows, steady_positions, text_config

AttentionMask = Tensor | BlockMask | dict[str, Tensor | BlockMask]

FLEX_KERNEL = {"BACKEND": "TRITON"}
"""Not the kernel for few queries, which FlexAttention takes by itself below 128 of them: it is not there for some."""


@dataclass(frozen=True)
class Decoder:
    """A causal LM, and the draft adapter that acts at its noised positions, if there is one."""

    model: PreTrainedModel
    adapter: DraftAdapter | None = None

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, so where token ids must be."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[union-attr]

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding; token ids are below it."""
        return cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings

    @property
    def config(self) -> Any:
        """The config of the text model."""
        return text_config(self.model.config)

    @property
    def max_positions(self) -> int | None:
        """Longest sequence whose positions mean the same in every pass, if the config says."""
        return steady_positions(self.model.config)

    def context(self, shortest: int) -> int | None:
        """Positions that a call may use whose shortest prompt has `shortest` tokens, if the config says.

        Where that one is beyond `max_positions`, so is every pass: all run with the factors of long sequences.
        """
        steady = self.max_positions
        return steady if steady is None or shortest <= steady else self.config.max_position_embeddings

    @property
    def correction(self) -> Correction | None:
        """The head that corrects drafts, if there is one. It stands beside a full model, so it follows that here."""
        head = getattr(self.model if self.adapter is None else self.adapter, "correction", None)
        if head is not None and head.previous.device != self.device:
            head.to(self.device)
        return head

    @property
    def attention(self) -> str:
        """Name of the attention implementation that transformers runs."""
        return cast(str, self.model.config._attn_implementation)

    @property
    def windows(self) -> dict[str, int | None]:
        """Kind of layer -> its sliding window in positions, None for full attention."""
        return layer_windows(self.model.config)

    def hidden(
        self,
        tokens: Tensor,
        position: Tensor,
        mask: AttentionMask | None,
        cache: Any = None,
        noised: Gate = False,
        opens_at: int | None = None,
    ) -> Tensor:
        """Final hidden states, after the last norm.

        Args:
            tokens, position: int64 [B, T].
            mask: from `masks` or `decode_masks`; None: plain causal.
            cache: a transformers cache to read and write; None: none.
            noised: which positions are noised (bool [B, T], or all, or none): there a draft adapter acts.
            opens_at: as `DraftAdapter.open`.
        Returns:
            [B, T, D] in the model's dtype.
        """
        common = {
            "position_ids": position,
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        if self.attention == "flex_attention" and tokens.is_cuda:
            common["kernel_options"] = FLEX_KERNEL
        if self.adapter is None or noised is False:
            return self.model.base_model(input_ids=tokens, **common).last_hidden_state
        with self.adapter.open(noised, opens_at), self.adapter.masked(tokens) as readable:
            return self.model.base_model(input_ids=readable, **common).last_hidden_state

    @property
    def logit_scale(self) -> float:
        """What the config has logits multiplied by."""
        config = self.config
        return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)

    @property
    def logit_cap(self) -> float | None:
        """Soft cap c of the logits, c * tanh(logits / c), if the config names one."""
        return getattr(self.config, "final_logit_softcapping", None)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V] in the head's dtype, with the scaling and soft cap that the config names."""
        logits = cast(nn.Module, self.model.get_output_embeddings())(hidden)
        if (scale := self.logit_scale) != 1:
            logits = logits * scale
        if (cap := self.logit_cap) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def masks(self, rule: Rule, query: Places, key: Places | None = None, longest: int | None = None) -> AttentionMask:
        """The rule in the form this model's layers read: dense or BlockMask, one for each kind of layer.

        Args:
            longest: positions are below it; None: read from the keys, for which the device has to be waited for.
        """
        build = to_block_mask if self.attention == "flex_attention" else to_dense
        if longest is None:
            longest = int((query if key is None else key).position.max()) + 1
        return self._of_each_kind(rule, longest, lambda rule: self.prepare_dense(build(rule, query, key)))

    def two_view_masks(self, rule: Rule, noised: Places, clean: Places, cached: bool = False) -> AttentionMask:
        """The rule over [noised ; clean]; in parts where the model runs `split_attention`.

        Args:
            noised: [B, N], clean: [B, L], both of positions below L.
            cached: only noised queries pass, and the clean keys, which lie in front of theirs, are cached.
        """
        longest = clean.view.shape[1]
        if self.attention == SPLIT and noised.view.shape[1]:
            dtype = torch.promote_types(self.model.dtype, torch.float32)  # that of the scores
            return self._of_each_kind(rule, longest, lambda rule: split_mask(rule, noised, clean, dtype, cached))
        if cached:
            return self.masks(rule, noised, clean.followed_by(noised), longest)
        return self.masks(rule, noised.followed_by(clean), longest=longest)

    def _of_each_kind(self, rule: Rule, longest: int, build: Callable[[Rule], Any]) -> AttentionMask:
        """What `build` makes of the rule within each kind of layer's window; positions are below `longest`."""
        built: dict[int | None, Any] = {}
        for window in self.windows.values():
            window = None if window is None or window >= longest else window
            if window not in built:
                built[window] = build(within_window(rule, window))
        return self.by_kind({k: built.get(w, built.get(None)) for k, w in self.windows.items()})

    def prepare_dense(self, mask: Tensor | BlockMask) -> Tensor | BlockMask:
        """A dense mask as numbers to add to the scores: of a bool one, SDPA would keep such a copy for every layer."""
        if isinstance(mask, BlockMask):
            return mask
        return additive(mask, self.model.dtype)

    def dense_mask_bytes(self, rows: int, queries: int, keys: int) -> int:
        """What a dense mask of [rows, 1, queries, keys] takes in all; 0 for FlexAttention and attention in parts."""
        if self.attention in ("flex_attention", SPLIT):
            return 0
        return rows * queries * keys * self.model.dtype.itemsize * len(set(self.windows.values()))

    def by_kind(self, masks: dict[str, Any]) -> AttentionMask:
        """One mask for a model with one kind of layer, a dict by kind for the others."""
        return next(iter(masks.values())) if len(masks) == 1 else masks


def end_tokens(decoder: Decoder, tokenizer: Any) -> list[int]:
    """The model's end tokens: of its generation config, its config or its tokenizer."""
    for source in (getattr(decoder.model, "generation_config", None), decoder.model.config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return list(found) if isinstance(found, list | tuple) else [int(found)]
    return []
