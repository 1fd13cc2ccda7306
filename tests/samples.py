"""Tokenizers, documents and streams that tests of the data share."""

from __future__ import annotations

import json
import string
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from nextblock.config.errors import UsageError
from nextblock.config.sections import DataConfig
from nextblock.data.rows import Document, Rows
from nextblock.data.stream import RowStream
from nextblock.model.parent import byte_tokenizer

SPECIAL = ["<|end|>", "<|begin|>", "<|turn|>"]


CHAT = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def marked_bytes(begin: bool = False, template: str | None = CHAT) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, *SPECIAL])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if begin:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 257)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        bos_token="<|begin|>" if begin else None,
        additional_special_tokens=["<|turn|>"],
        chat_template=template,
    )


TOKENIZER = marked_bytes()


def byte_level():
    """Every byte is a token: any character beyond ASCII takes several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(count: int, seed: int = 0, longest: int = 300) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    return [{"text": f"{i} " + "ab cd\n" * int(rng.integers(1, longest // 6))} for i in range(count)]


def stream(
    *sources: dict | str,
    row_length: int = 64,
    share: float = 0.0,
    seed: int = 0,
    held_out: bool = False,
    tokenizer: PreTrainedTokenizerFast = TOKENIZER,
) -> RowStream:
    listed = [{"path": source} if isinstance(source, str) else source for source in sources]
    config = DataConfig.model_validate({"sources": listed, "row_length": row_length, "held_out": share})
    return RowStream(config, tokenizer, seed=seed, held_out=held_out)


def same(a: Rows, b: Rows) -> bool:
    return all(torch.equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(Rows))


def documents_of(rows: Rows) -> list[str]:
    """The documents of rows as text, end tokens kept."""
    found = []
    for tokens, document in zip(rows.tokens, rows.document, strict=True):
        found += [str(TOKENIZER.decode(tokens[document == d])) for d in range(int(document.max()) + 1)]
    return found


def span_texts(document: Document) -> list[str]:
    """The generated spans of a document as text."""
    found: list[list[int]] = []
    for token, offset in zip(document.tokens.tolist(), document.offset.tolist(), strict=True):
        if offset == 0:
            found.append([])
        if offset >= 0:
            assert len(found[-1]) == offset
            found[-1].append(token)
    return [str(TOKENIZER.decode(span)) for span in found]


def refusal(*sources: dict | str, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        stream(*sources, **kwargs).next(1)
    message = str(caught.value)
    assert "\n" not in message
    return message


ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TALK = [user("What is the capital of France?"), assistant("Paris"), user("A?"), assistant("5")]


def sentencepiece(kind: str, template: str = "<s> $A") -> PreTrainedTokenizerFast:
    """Bytes and a few words; a space is put in front of each part, as Llama-2 does, or in front of a text alone."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [f"<0x{byte:02X}>" for byte in range(256)] + [
        "▁",
        *string.ascii_letters,
        *string.digits,
        *"?:.<>/|_[]",
    ]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges: list[tuple[str, str]] = []
    for word in ("▁Paris", "▁5", "▁The", "▁What", "Paris"):
        for end in range(1, len(word)):
            pair = (word[:end], word[end])
            merges += [] if pair in merges else [pair]
            vocabulary.setdefault(word[: end + 1], len(vocabulary))
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if kind == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=ZEPHYR
    )


def words(template: str = CHATML) -> PreTrainedTokenizerFast:
    """Bytes and a few words; the places of its tokens leave out the space before a word, as those of Llama 3 do."""
    alphabet = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("Ċ", "Ċ"), ("Ġ", "P"), ("ĠP", "a"), ("1", "2")]
    core = Tokenizer(models.BPE(alphabet | {a + b: 256 + n for n, (a, b) in enumerate(merges)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
    )


TOKENIZERS = {
    "prepend": lambda: sentencepiece("prepend"),
    "first": lambda: sentencepiece("first"),
    "words": words,
    "bytes": byte_tokenizer,
    "slow": lambda: ByT5Tokenizer(extra_ids=0, chat_template=ZEPHYR),
}


def spans(document: Document, tokenizer: Any) -> list[list[str]]:
    """The tokens of each generated span."""
    found = []
    for start in np.flatnonzero(document.offset == 0):
        stop = start + 1
        while stop < len(document.offset) and document.offset[stop] == stop - start:
            stop += 1
        found.append(tokenizer.convert_ids_to_tokens(document.tokens[start:stop].tolist()))
    return found


def json_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def call(**arguments: Any) -> dict[str, Any]:
    """A conversation in which the assistant calls a tool, with the tool's schema."""
    function = {"name": "f", "arguments": arguments}
    kinds = {name: {"type": "string"} for name in arguments}
    return {
        "messages": [
            {"role": "user", "content": "go"},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": kinds}}}],
    }
