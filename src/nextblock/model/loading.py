"""Find a model's files, check what can be known before its weights, load it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

from nextblock.config.errors import UsageError, nearest, one_line
from nextblock.config.files import read_yaml, user_path
from nextblock.config.sections import BlockDiffusionSettings, validate
from nextblock.gguf.files import find_gguf, gguf_config, has_tokenizer, unpacked, unpacking
from nextblock.model.positions import layer_windows, text_config
from nextblock.model.shapes import shape_values

SHIPPED = ("tiny-ar", "tiny-bd")
SHIPPED_ADAPTERS = ("tiny-draft",)

KNOWN_SETTINGS = {
    "nbdiff-7b": BlockDiffusionSettings(
        block_size=32, mask_token_id=45830, context="context_causal", prediction="shifted"
    )
}
"""Settings of released models whose config.json has no `block_diffusion` section."""

GivenSettings = BlockDiffusionSettings | Mapping[str, Any] | str
"""What `read_settings` reads: whole settings, some keys, a name of `KNOWN_SETTINGS`, or a YAML (or JSON) mapping or
file."""


def resolve(path: str | Path) -> str:
    """A shipped model's name, a local folder or a Hub id -> what `from_pretrained` takes.

    Raises:
        UsageError: nothing of that name, or a folder that holds no model or no safetensors weights.
    """
    name = str(path)
    if name in SHIPPED:
        name = str(resources.files("nextblock") / "assets" / name)
    folder = user_path(name, "model")
    if folder.is_file():
        raise UsageError(f"model {name} is a file; give the folder that holds config.json, or a .gguf file")
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UsageError(
                f"model folder {name} does not exist; give a local folder, a Hub id, or one of {', '.join(SHIPPED)}"
            )
        return name
    if not (folder / "config.json").is_file():
        raise UsageError(f"model folder {name} has no config.json; {_cure(folder)}")
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {folder / 'config.json'}: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{folder / 'config.json'} holds no mapping; give the folder of a Hugging Face model")
    if not any(folder.glob("*.safetensors")):
        raise UsageError(f"model folder {name} has no weights (*.safetensors); weights are read from safetensors only")
    return str(folder)


def _cure(folder: Path) -> str:
    """What to give in place of a folder that holds no model."""
    files = sorted(folder.glob("*.gguf"))
    return f"name its file: {files[0]}" if files else "give the folder of a Hugging Face model"


def located(path: str | Path, revision: str | None = None) -> tuple[str, dict[str, Any]]:
    """Where a model is, as the first argument and the further ones that `from_pretrained` takes.

    Raises:
        UsageError: as of `resolve`, or a GGUF file that is not there or cannot be read.
    """
    file = find_gguf(path, revision)
    return (resolve(path), {"revision": revision}) if file is None else (str(file.parent), {"gguf_file": file.name})


def resolve_adapter(path: str | Path) -> Path:
    """A shipped draft adapter's name or a local folder -> the folder."""
    if str(path) in SHIPPED_ADAPTERS:
        return Path(str(resources.files("nextblock") / "assets" / str(path)))
    folder = user_path(path, "draft adapter")
    if not folder.is_dir():
        raise UsageError(
            f"draft adapter {path} is not a folder; give one made by `nextblock adapt`, or {SHIPPED_ADAPTERS[0]}"
        )
    return folder


def weights_folder(path: str | Path, revision: str | None = None) -> Path:
    """The local folder that holds a model's weight files, or its GGUF file; for a Hub id its place in the cache."""
    if (file := find_gguf(path, revision)) is not None:
        return file
    source = resolve(path)
    if Path(source).is_dir():
        return Path(source)
    found = cached_file(source, "config.json", revision=revision)
    if found is None:
        raise UsageError(f"model {path} is not in the cache of downloaded models; load it once")
    return Path(found).parent


def read_config(
    path: str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    override: Mapping[str, Any] | None = None,
) -> PreTrainedConfig:
    """The model's config with some values replaced, refused in one line where the architecture cannot be adapted."""
    source, where = located(path, revision)
    try:
        if "gguf_file" in where:
            config = gguf_config(Path(source) / where["gguf_file"])
        else:
            config = config_as_stored(source, trust_remote_code=trust_remote_code, **where)
    except UsageError:
        raise
    except Exception as error:  # transformers raises many kinds here; each means the same to the user
        suggestion = nearest(str(path), SHIPPED) if "/" not in str(path) else ""
        here = user_path(path, "model").exists() or str(path) in SHIPPED
        there = "" if here else "no such folder here, and on the Hub: "
        raise UsageError(f"cannot load model {path}: {there}{one_line(error).rstrip('.')}{suggestion}") from None
    check_architecture(config)
    replace_values(config, override or {})
    return config


def config_as_stored(source: str, trust_remote_code: bool = False, **options: Any) -> PreTrainedConfig:
    """The config of a folder or Hub id, not yet checked; `options` of `from_pretrained`, whose errors these are."""
    values, _ = PreTrainedConfig.get_config_dict(source, **options)
    if values.get("model_type") == "PanguEmbedded":
        return _pangu_as_llama(values)
    return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **options)


def _pangu_as_llama(values: Mapping[str, Any]) -> PreTrainedConfig:
    """openPangu-Embedded's config as Llama's: it computes the same from weights of the same names, without its code.

    Its one flag `bias` gives biases to the projections of attention (q, k, v, o) and to nothing else.
    """
    values = {**shape_values("openpangu-7b"), "attention_bias": values.get("bias", True), **values}
    values |= {"model_type": "llama", "mlp_bias": False}
    return LlamaConfig.from_dict({name: value for name, value in values.items() if name not in ("auto_map", "bias")})


def weight_shapes(config: PreTrainedConfig, trust_remote_code: bool = False) -> dict[str, torch.Size]:
    """Name -> shape of every weight of the config's architecture; no memory is taken.

    Raises:
        UsageError: the config makes no model.
    """
    try:
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # of whatever kind an architecture raises at values that it cannot take
        values = f"{type(error).__name__}: {one_line(error)}"
        raise UsageError(f"the config makes no model of architecture '{config.model_type}': {values}") from None
    return {name: value.shape for name, value in model.state_dict().items()}


def replace_values(config: PreTrainedConfig, override: Mapping[str, Any]) -> None:
    """Set values of a config; of a value that is a mapping (rope_parameters), the keys that are given."""
    top, text = config, text_config(config)
    known = sorted(name for name in {**text.to_dict(), **top.to_dict()} if not name.startswith("_"))
    for name, value in override.items():
        config = text if hasattr(text, name) else top
        if name not in known:
            raise UsageError(
                f"model.override.{name}: the config of architecture '{config.model_type}' has no such value"
                f"{nearest(name, known)}"
            )
        old = getattr(config, name)
        new = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value
        try:
            setattr(config, name, new)
        except Exception as error:  # of whatever kind a config raises at values that it cannot take
            raise UsageError(f"model.override.{name}={value!r}: {one_line(error)}") from None


def check_architecture(config: PreTrainedConfig) -> None:
    """Refuse what is known, before any weight is read, not to work: encoders, state-space, linear attention."""
    kind = config.model_type
    mapping: Any = AutoModelForCausalLM._model_mapping
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder or (type(config) not in mapping and not remote):
        raise UsageError(f"architecture '{kind}' is not a causal decoder; use a model of AutoModelForCausalLM")
    if getattr(text_config(config), "num_hidden_layers", None) == 0:
        raise UsageError("num_hidden_layers=0 leaves no attention that a block mask could reach; use 1 or more")
    layers = set(getattr(text_config(config), "layer_types", None) or ["any"])
    softmax = layers <= {"full_attention", "sliding_attention"}  # all that a model of a hybrid family may hold
    if not remote and not softmax and getattr(mapping[type(config)], "_is_stateful", False):
        raise UsageError(
            f"architecture '{kind}' carries a recurrent state, which a block mask cannot reach; "
            "use a decoder with softmax attention in every layer"
        )
    layer_windows(config)


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device that is named; None: CUDA if there is one. UsageError for one that is not there."""
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device={device}: {one_line(error)}; use cpu, or a device that this machine has") from None
    return target


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    attention: str = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    override: Mapping[str, Any] | None = None,
    quantization: Literal["4bit"] | None = None,
) -> PreTrainedModel:
    """Load a causal LM from safetensors and put it in eval mode.

    Args:
        path: shipped name, local folder or Hub id.
        dtype: None: float32 on CPU, the checkpoint's own elsewhere.
        attention: "auto", "sdpa", "flex_attention" or "eager".
        device: None: CUDA if there is one.
        override: values of the model's config to replace.
        quantization: "4bit": linear layers in bitsandbytes' nf4, on CUDA.
    Raises:
        UsageError: what cannot be loaded or adapted.
    """
    config = read_config(path, revision, trust_remote_code, override)
    target = usable_device(device)
    wanted: Any = dtype or (torch.float32 if target.type == "cpu" else "auto")
    source, options = located(path, revision)
    file = Path(source) / options["gguf_file"] if "gguf_file" in options else None
    if file is not None:
        if quantization:
            raise UsageError(f"quantization={quantization} does not go with {path}, a GGUF file; leave it out")
        options |= unpacking()
    if quantization:  # where bitsandbytes is missing, transformers says so in one line
        check_quantization(quantization, target.type)
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        options |= {"quantization_config": nf4, "device_map": {"": target}}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=wanted,
            attn_implementation=choose_attention(config, attention, target),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_complete` names them
            **options,
        )
    except Exception as error:
        reason = one_line(error)
        if "does not support an attention implementation" in reason:  # transformers' advice is no option here
            reason = f"architecture '{config.model_type}' has no attention with a block mask; it is not supported"
        raise UsageError(f"cannot load model {path}: {reason}") from None
    model, found = loaded
    _check_complete(found, f"cannot load model {path}: its files", config.model_type, gguf=file is not None)
    model = model if file is None else unpacked(model, file)
    _keep_own_head(model)
    _warn_of_correction(found["unexpected_keys"], path)
    return model.eval() if quantization else cast(Any, model).to(target).eval()


def _warn_of_correction(unexpected: Iterable[str], path: str | Path) -> None:
    """Say that a correction head which was saved among a model's weights is not read."""
    if any(name.startswith("correction.") for name in unexpected):
        warnings.warn(
            f"the weights of {path} hold a correction head that cannot be read from there, so drafts go without it; "
            "save the model again, from the folder that it was loaded from",
            stacklevel=3,
        )


def _keep_own_head(model: PreTrainedModel) -> None:
    """Where the files hold a head of their own, nothing ties it to the embedding later, whatever config.json says."""
    if getattr(model.get_output_embeddings(), "weight", None) is not model.get_input_embeddings().weight:
        for part in (model.config, model.config.get_text_config()):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False


def _check_complete(found: Mapping[str, Any], files: str, kind: str, gguf: bool = False) -> None:
    """UsageError, which begins with `files`, for weights that transformers would make up."""
    cure = "use the model's safetensors folder" if gguf else "restore them, or repair config.json"
    if missing := sorted(found["missing_keys"]):
        needed = f"{len(missing)} of the weights that architecture '{kind}' needs, the first {missing[0]}"
        raise UsageError(f"{files} lack {needed}; {cure}")
    if other := sorted(found["mismatched_keys"]):
        name, stored, wanted = other[0]
        says = "what transformers makes of the header" if gguf else "config.json"
        raise UsageError(f"{files} hold {name} of shape {tuple(stored)}, {says} says {tuple(wanted)}; {cure}")


def choose_attention(config: PreTrainedConfig, wanted: str, device: torch.device) -> str:
    """`auto`: FlexAttention on CUDA, SDPA elsewhere, eager where scores are soft-capped (SDPA cannot).

    And the next best where the architecture says that it has no such implementation.
    """
    if wanted != "auto":
        return wanted
    mapping: Any = AutoModelForCausalLM._model_mapping
    kind = mapping.get(type(config), None)  # None: a class of the model's own code
    if device.type == "cuda" and getattr(kind, "_supports_flex_attn", True):
        return "flex_attention"
    sdpa = getattr(kind, "_supports_sdpa", True) and not getattr(text_config(config), "attn_logit_softcapping", None)
    return "sdpa" if sdpa else "eager"


def check_backward(attention: str, device: str) -> None:
    """UsageError where an attention implementation cannot be trained on a kind of device."""
    if attention == "flex_attention" and device == "cpu":
        raise UsageError("model.attention=flex_attention has no backward pass on CPU; use sdpa, or auto")


def check_quantization(quantization: str | None, device: str) -> None:
    """UsageError where a kind of device has no quantized weights that can be trained through."""
    if quantization and device != "cuda":  # on a CPU bitsandbytes packs them for a kernel without a backward pass
        raise UsageError(f"model.quantization={quantization} needs a CUDA device; leave it out on {device}")


def load_tokenizer(
    path: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None where none can be had (`no_tokenizer` says why): token ids still work."""
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    own = user_path(path, "model")  # which may hold a tokenizer alone
    found = str(path) not in SHIPPED and any((own / name).is_file() for name in names)
    source, where = (str(own), {"revision": revision}) if found else located(path, revision)
    bare = Path(source).is_dir() and not any((Path(source) / name).is_file() for name in names)
    gguf: Any = where.get("gguf_file")
    if bare if gguf is None else not has_tokenizer(Path(source) / gguf):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code, **where)
    except Exception as error:
        if not trust_remote_code and _tokenizer_code(source, revision):
            return None
        raise UsageError(f"cannot load the tokenizer of {path}: {one_line(error)}") from None


def _tokenizer_code(source: str, revision: str | None = None) -> bool:
    """Whether a tokenizer comes with code of its own."""
    config = get_tokenizer_config(source, revision=revision)
    return isinstance(config, Mapping) and bool(config.get("auto_map"))


def no_tokenizer(path: str | Path, revision: str | None = None) -> str:
    """Why `load_tokenizer` gives none, as the first half of a message; an empty path: a model that has none."""
    if not str(path):
        return "this model has no tokenizer"
    if _tokenizer_code(str(user_path(path, "model")), revision):
        return f"the tokenizer of {path} is code in its folder, which runs only with trust_remote_code"
    return f"model {path} has no tokenizer"


def read_settings(config: PreTrainedConfig, given: GivenSettings | None = None) -> BlockDiffusionSettings | None:
    """The `block_diffusion` section of a checkpoint, with what is given in its place; None for a plain AR model.

    Raises:
        UsageError: settings that cannot be read, an unknown key, or a value out of range.
    """
    section = getattr(config, "block_diffusion", None)
    for name, value, text in (("block_diffusion of config.json", section, False), ("settings", given, True)):
        if not isinstance(value, Mapping | BlockDiffusionSettings | None) and not (text and isinstance(value, str)):
            raise UsageError(f"{name} is {value!r}; it must be a mapping such as {{block_size: 32, mask_token_id: 7}}")
    if isinstance(given, str):
        given = KNOWN_SETTINGS.get(given.lower()) or _mapping(given)
    if isinstance(given, BlockDiffusionSettings):
        return given
    if section is None and given is None:
        return None
    return validate(BlockDiffusionSettings, {**(section or {}), **(given or {})})


def _mapping(text: str) -> Mapping[str, Any]:
    """The mapping that a YAML text, or a file of that name, holds."""
    is_text = "{" in text or "\n" in text  # which may be too long for the name of a file
    file = None if is_text else user_path(text, "settings")
    try:
        values = read_yaml(text if file is None or not file.is_file() else file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"settings {text}: {one_line(error)}") from None
    if not isinstance(values, Mapping):
        raise UsageError(
            f"settings={text!r} is no mapping, no file and no name{nearest(text, list(KNOWN_SETTINGS))}; "
            "write {block_size: 32, mask_token_id: 7}"
        )
    return values
