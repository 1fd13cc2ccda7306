"""Models of fake tensors: the modules, masks and kernels of a run, without values.

Letters: B rows, L clean tokens of a row, N noised ones.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from nextblock.attention.split import PIECE, SPLIT, TILE, Piece, SplitMask, Tiles
from nextblock.config.run import AdaptConfig
from nextblock.model.correction import Correction
from nextblock.model.decoder import Decoder
from nextblock.model.draft_adapter import DraftAdapter, new_adapter
from nextblock.model.loading import choose_attention
from nextblock.model.lora import TiedHead
from nextblock.model.targets import target_names
from nextblock.model.training_mode import recompute_activations


def fake_decoder(
    config: AdaptConfig, shape: PreTrainedConfig, device: str, dtype: torch.dtype
) -> tuple[Decoder, nn.Module]:
    """The model in fake tensors, and what of it is trained."""
    attention = choose_attention(shape, config.model.attention, torch.device("cpu" if device == "cpu" else "cuda"))
    if attention == "flex_attention":
        attention = SPARSE
    elif device == "cpu" and attention == "sdpa" and not config.training.compile:
        attention = SPLIT
    model = bare_model(shape, dtype, attention)
    if config.model.quantization:
        for name in target_names(model, "all-linear"):  # as transformers does: all but the head
            model.set_submodule(name, FourBitLinear(model.get_submodule(name)))
    adapter = low_rank_updates(config, model)
    if config.training.gradient_checkpointing:
        recompute_activations(model, preserve_rng_state=False)
    if adapter is None and config.correction is not None:
        head = Correction(model.get_input_embeddings().num_embeddings, config.correction)
        model.requires_grad_(False).correction = head
        return Decoder(model), head
    if adapter is None:
        return Decoder(model), model
    return (Decoder(model) if config.lora else Decoder(model, adapter)), adapter


def low_rank_updates(config: AdaptConfig, model: PreTrainedModel) -> DraftAdapter | None:
    """What `draft_adapter` or `lora` trains: LoRA's mask row is as large as the mask vector."""
    if config.lora is None:
        return None if config.draft_adapter is None else new_adapter(model, config.draft_adapter, config.correction)
    target_names(model, config.lora.target_modules, section="lora")  # names the section where nothing matches
    adapter = DraftAdapter(model, config.lora)
    adapter.always = True
    embedding, head = cast(nn.Embedding, model.get_input_embeddings()), cast(nn.Linear, model.get_output_embeddings())
    if config.masks and head.weight is embedding.weight:
        embedding.mask_row = adapter.mask_vector
        model.set_output_embeddings(TiedHead(head, embedding, 0))
    return adapter


def bare_model(shape: PreTrainedConfig, dtype: torch.dtype, attention: str = "eager") -> Any:
    """The model of a shape, in eval mode; no time is spent on its first weights."""
    with no_init_weights():
        model = cast(Any, AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=attention))
    model.tie_weights()  # left out with the weights
    return model.eval()


def fake_mask(decoder: Decoder, rows: int, queries: int, keys: int, noised: int) -> Any:
    """A dense mask for each kind of layer, in parts where the model computes in parts; of a BlockMask its tables."""
    if decoder.attention == SPARSE:
        SparseAttention.tables = torch.zeros(4, rows, -(-queries // 128), -(-keys // 128), dtype=torch.int32)
        return None

    def mask() -> Tensor:
        if decoder.attention == SPLIT and noised:
            return fake_split_mask(rows, queries, keys, noised, torch.float32)
        return torch.zeros(rows, 1, queries, keys, dtype=decoder.model.dtype)

    masks = {window: mask() for window in {None if w is None or w >= keys else w for w in decoder.windows.values()}}
    first = next(iter(masks.values()))
    return decoder.by_kind({kind: masks.get(window, first) for kind, window in decoder.windows.items()})


def fake_split_mask(rows: int, queries: int, keys: int, noised: int, dtype: torch.dtype) -> SplitMask:
    """As large as can be: every query sees every clean key, and no piece of a row is plain causal."""
    clean, width = keys - noised, -(-noised // TILE) * TILE
    parts = [slice(start, min(queries, start + PIECE)) for start in range(0, queries, PIECE)]
    seen = [torch.zeros(rows, 1, part.stop - part.start, clean, dtype=dtype) for part in parts]
    pieces = [Piece(part, slice(0, clean), mask) for part, mask in zip(parts, seen, strict=True)]
    tiles = Tiles(
        slot=torch.zeros(rows * width, dtype=torch.int64),
        place=torch.zeros(rows * noised, dtype=torch.int64),
        present=torch.ones(rows, 1, noised, dtype=torch.bool),
        mask=torch.zeros(rows * width // TILE, 1, TILE, TILE, dtype=dtype),
    )
    return SplitMask(pieces, tiles, clean)


class SparseAttention(torch.autograd.Function):
    """What FlexAttention keeps and makes on a GPU: inputs, output and log-sum-exp; no scores."""

    tables: Tensor | None = None

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, H, Q, D] like the query."""
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the shapes of query, key and value."""
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _sparse_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    return SparseAttention.apply(query, key, value).transpose(1, 2).contiguous(), None  # type: ignore[union-attr]


class _FourBitProduct(torch.autograd.Function):
    """bitsandbytes' product with a 4-bit matrix: forward and backward, a whole copy of it lives meanwhile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: int) -> Tensor:
        """[..., in] -> [..., out]."""
        ctx.like, ctx.outputs = x.shape, outputs
        _copy = x.new_empty(outputs, x.shape[-1])
        return x.new_empty(*x.shape[:-1], outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        """[..., out] -> [..., in]."""
        _copy = upstream[0].new_empty(ctx.outputs, ctx.like[-1])
        return upstream[0].new_empty(ctx.like), None


class FourBitLinear(nn.Linear):
    """A frozen layer as bitsandbytes holds it in nf4: two values a byte, a float32 scale for each 64 values."""

    def __init__(self, of: nn.Module) -> None:
        weight, bias = cast(Tensor, of.weight), cast(Tensor | None, of.bias)
        sizes = weight.shape if isinstance(of, Conv1D) else weight.shape[::-1]
        with torch.device("meta"):
            super().__init__(*sizes, bias=False)
        self.compute = weight.dtype
        self.weight = nn.Parameter(torch.empty(-(-weight.numel() // 2), dtype=torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(-(-weight.numel() // 64)), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of the input."""
        out = cast(Tensor, _FourBitProduct.apply(input.to(self.compute), self.out_features)).to(input.dtype)
        return out if self.bias is None else out + self.bias


SPARSE = "nextblock_plan"
AttentionInterface.register(SPARSE, _sparse_attention)
