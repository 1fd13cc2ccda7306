"""GGUF files as parents: found, and refused in one line where transformers cannot read them."""

from __future__ import annotations

import copy
import functools
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils.hub import cached_file

from nextblock.config.errors import UsageError, nearest, one_line, require
from nextblock.config.files import user_path
from nextblock.gguf.values import take_values

SUFFIX = ".gguf"
NOT_READ = {
    *("general", "tokenizer"),  # no architectures
    *("deci", "mistral"),  # listed by transformers, but their weights are not read
    *("t5", "umt5", "mamba", "lfm2", "qwen35", "qwen35moe"),  # no decoders, or with a recurrent state
    *("bloom", "gpt_oss"),  # without a mask of queries and keys; with positions that are always scaled
}
"""Names among those of transformers' architectures that are none that can be adapted."""


def find_gguf(path: str | Path, revision: str | None = None) -> Path | None:
    """The file that a path names: `FOLDER/NAME.gguf`, or `OWNER/NAME/FILE.gguf` of the Hub; None for other paths.

    Raises:
        UsageError: no such file, or one that transformers cannot read.
    """
    name = str(path)
    if not name.lower().endswith(SUFFIX):
        return None
    file = user_path(name, "model")
    if file.is_dir():  # of a model, with a name that ends so
        return None
    hub_id, inside = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    if not file.is_file() and inside and not name.startswith((".", "/", "~")) and not file.parent.is_dir():
        try:
            file = Path(str(cached_file(hub_id, inside, revision=revision)))
        except Exception as error:  # transformers raises many kinds here; each means the same to the user
            raise UsageError(f"cannot load model {name}: {one_line(error)}") from None
    if not file.is_file():
        there = sorted(found.name for found in file.parent.glob("*") if found.suffix.lower() == SUFFIX)
        cure = nearest(file.name, there) if there else "; give a .gguf file, or the folder of a Hugging Face model"
        raise UsageError(f"model file {name} does not exist{cure}")
    _check(file)
    return file


def _check(file: Path) -> None:
    """UsageError for a file that transformers cannot read whole."""
    try:
        with file.open("rb") as stream:
            begins = stream.read(4)
    except OSError as error:
        raise UsageError(
            f"model file {file} cannot be read: {error.strerror}; change its rights, or copy it"
        ) from None
    if begins != b"GGUF":
        raise UsageError(f"model file {file} is no GGUF file: it does not begin with GGUF; download it again")
    require("gguf", "gguf", f"model file {file}")
    found = header(file)
    count = int(found.value("split.count") or 1)
    if count > 1:
        raise UsageError(f"model file {file} is one of {count} parts{_parts(file, count)}")
    architecture, readable = str(found.value("general.architecture")), architectures()
    if re.sub("[-_]", "", architecture) not in (re.sub("_", "", name) for name in readable):
        raise UsageError(
            f"model file {file} holds architecture '{architecture}', which cannot be read from GGUF as a decoder with "
            f"softmax attention; these can: {', '.join(readable)}"
        )
    kinds = quantizations()
    if others := sorted({tensor.tensor_type.name for tensor in found.tensors} - set(kinds)):
        raise UsageError(
            f"model file {file} holds weights of kind {others[0]}, which the gguf package cannot unpack; it unpacks "
            f"{', '.join(kinds)}"
        )


def _parts(file: Path, count: int) -> str:
    """What to do about a file that is one of `count` parts: which are missing, or how to join them."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", file.stem)
    names = [f"{stem}-{n + 1:05}-of-{count:05}{SUFFIX}" for n in range(count)]
    if missing := [name for name in names if not (file.parent / name).is_file()]:
        return f", and {missing[0]} is missing ({len(missing)} of {count} are); download all, then join them: " + (
            f"llama-gguf-split --merge {names[0]} {stem}{SUFFIX}"
        )
    return f", but transformers reads one file; join them: llama-gguf-split --merge {names[0]} {stem}{SUFFIX}"


class Header:
    """What stands before the weights, and where each weight lies."""

    def __init__(self, file: Path) -> None:
        from gguf import GGUFReader

        try:
            self.reader: Any = GGUFReader(str(file))
        except Exception as error:  # of whatever kind the reader raises where a file ends too early
            said = one_line(error)
            raise UsageError(f"model file {file} is cut short or broken ({said}); download it again") from None
        self.tensors: list[Any] = self.reader.tensors

    def value(self, name: str) -> Any:
        """A value of the header; None where there is none of that name."""
        field = self.reader.get_field(name)
        return None if field is None else field.contents()


def header(file: Path) -> Header:
    """The header of a file, read once as long as the file stays the same."""
    stat = file.stat()
    return _header(file, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _header(file: Path, size: int, time: int) -> Header:
    return Header(file)


def gguf_config(file: Path) -> PreTrainedConfig:
    """The config of a file's header, by transformers and `take_values`; a second call copies the first's: it is slow.

    Raises:
        UsageError: a value that changes what the model computes, and that transformers does not compute.
    """
    stat = file.stat()
    return copy.deepcopy(_gguf_config(file, stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=2)
def _gguf_config(file: Path, size: int, time: int) -> PreTrainedConfig:
    config, found = AutoConfig.from_pretrained(file.parent, gguf_file=file.name), header(file)
    architecture = found.value("general.architecture")
    take_values(config, lambda key: found.value(f"{architecture}.{key}"), file)
    return config


def has_tokenizer(file: Path) -> bool:
    """Whether a file holds a vocabulary."""
    return header(file).value("tokenizer.ggml.model") not in (None, "none", "no_vocab")


def architectures() -> list[str]:
    """Names of the architectures that transformers reads from GGUF, of those that can be adapted."""
    from transformers import modeling_gguf_pytorch_utils as reading

    kinds = set(reading.GGUF_SUPPORTED_ARCHITECTURES)
    try:  # newer releases read some by another way
        from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    except ImportError:
        GGUF_CONFIG_ARCHS = ()
    return sorted(kinds.union(GGUF_CONFIG_ARCHS) - NOT_READ)


@functools.cache
def quantizations() -> list[str]:
    """Names of the kinds of weights that the gguf package unpacks."""
    import gguf

    kinds = []
    for kind, (_, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        kinds.append(kind.name)
    return kinds


def unpacking() -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model whose weights are all unpacked."""
    try:
        from transformers import GgufConfig
    except ImportError:  # older releases unpack them always
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def gguf_fingerprint(file: Path, sampled: int) -> str:
    """A digest of a GGUF file's weights: name, shape, kind and the first `sampled` bytes of each."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in sorted(header(file).tensors, key=lambda tensor: tensor.name):
        digest.update(f"{tensor.name} {tensor.shape.tolist()} {tensor.tensor_type.name}".encode())
        digest.update(tensor.data.reshape(-1).view(np.uint8)[:sampled].tobytes())
    return digest.hexdigest()


def unpacked(model: Any, file: Path) -> Any:
    """A model that transformers loaded from a GGUF file, as one of plain weights: it can be trained and saved.

    Raises:
        UsageError: the file holds weights that transformers has left out.
    """
    held = sum(int(tensor.n_elements) for tensor in header(file).tensors)
    taken = sum(parameter.numel() for parameter in model.parameters())
    if held > taken:
        raise UsageError(
            f"model file {file} holds {held:,} weights and transformers takes {taken:,} of them, so the model would "
            "compute something else; use its safetensors folder"
        )
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model
