"""A tiny llama as a GGUF file, written with the `gguf` package as llama.cpp's converter writes one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*ALPHABET, "th", "the", "<|end|>", "<|start|>"]
MERGES = ["t h", "th e"]
END = TOKENS.index("<|end|>")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def source_model(tied: bool = False) -> LlamaForCausalLM:
    """Random weights; each head sees the rotary positions, so a wrong order of rows changes the logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        eos_token_id=END,
        bos_token_id=END + 1,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.1) if weight.ndim > 1 else weight.uniform_(0.5, 1.5)
    return model


def rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of llama.cpp: the two halves of each head interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_header(
    folder: Path, architecture: str, values: Mapping[str, Any], model: LlamaForCausalLM | None = None
) -> Path:
    """A file of an architecture with such values in its header, without its name in front, and llama's weights."""
    named = {f"{architecture}.{name}": value for name, value in values.items()}
    return write_gguf(folder / "header.gguf", model or source_model(), architecture=architecture, values=named)


def write_gguf(
    file: Path,
    model: LlamaForCausalLM,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    values: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model`, matrices in `kind`; of a quantized kind the model takes the rounded weights too.

    values: further values of the header, or others in place of the model's. more: further tensors.
    """
    config: Any = model.config
    writer: Any = gguf.GGUFWriter(str(file), architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * (len(TOKENS) - 2) + [3, 3])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(END + 1)
    writer.add_eos_token_id(END)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    for name, value in (values or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, list: writer.add_array}
        add.get(type(value), writer.add_uint32)(name, value)
    for name, tensor in named_tensors(model):
        weight = tensor.detach().numpy()
        heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            weight = rotary_order(weight, heads)
        if weight.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, weight)
            continue
        packed = gguf.quantize(weight, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
        rounded = gguf.dequantize(packed, kind)
        if name.endswith(("attn_q.weight", "attn_k.weight")):  # back to the order of the model
            rounded = rounded.reshape(heads, -1, 2, rounded.shape[1]).swapaxes(1, 2).reshape(rounded.shape)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(rounded))
    for name, array in (more or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def named_tensors(model: LlamaForCausalLM) -> list[tuple[str, torch.Tensor]]:
    """The model's weights by their names in a GGUF file."""
    found = [("token_embd.weight", model.model.embed_tokens.weight), ("output_norm.weight", model.model.norm.weight)]
    if not model.config.tie_word_embeddings:
        found.append(("output.weight", model.lm_head.weight))
    for number, layer in enumerate(model.model.layers):
        parts = {ours: layer.get_submodule(theirs).weight for theirs, ours in NAMES.items()}
        found += [(f"blk.{number}.{name}.weight", weight) for name, weight in parts.items()]
    return found
