"""Open any Hugging Face decoder: load it, find or make its mask token, check that it obeys a caller's
mask and positions, and run hidden states and logits apart.

No family is known by name. What a model cannot do is found by running it (`probe`) and ends in one line.
"""

from __future__ import annotations

import functools
import inspect
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

from nextblock.attention.masks import additive, to_block_mask, to_dense
from nextblock.attention.rule import Places, Rule, block_diffusion_rule, within_window
from nextblock.attention.split import SPLIT, split_mask
from nextblock.config.errors import UsageError, nearest
from nextblock.config.sections import BlockDiffusionSettings, ModelConfig, validate
from nextblock.model.draft_adapter import DraftAdapter, Gate, attached_adapter, recomputation
from nextblock.model.shapes import shape_values

SHIPPED = ("tiny-ar", "tiny-bd")
SHIPPED_ADAPTERS = ("tiny-draft",)
MASK_TOKEN = "<|mask|>"
KNOWN_SETTINGS = {
    "nbdiff-7b": BlockDiffusionSettings(
        block_size=32, mask_token_id=45830, context="context_causal", prediction="shifted"
    )
}
"""Settings of released models whose config.json has no `block_diffusion` section."""
AttentionMask = Tensor | BlockMask | dict[str, Tensor | BlockMask]
GivenSettings = BlockDiffusionSettings | Mapping[str, Any] | str
"""What `read_settings` reads: whole settings, some keys, a name of `KNOWN_SETTINGS`, or a YAML (or JSON) mapping or
file."""


@dataclass(frozen=True)
class Decoder:
    """A causal LM with hidden states and logits apart, and masks in the form that its layers read.

    Legend of shapes: B rows, T tokens, D hidden size, V vocabulary.
    """

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
    def attention(self) -> str:
        """Name of the attention implementation that transformers runs."""
        return cast(str, self.model.config._attn_implementation)

    @property
    def windows(self) -> dict[str, int | None]:
        """Kind of layer -> its sliding window in positions, None for full attention."""
        return layer_windows(self.model.config)

    def hidden(
        self, tokens: Tensor, position: Tensor, mask: AttentionMask | None, cache: Any = None, noised: Gate = False
    ) -> Tensor:
        """Final hidden states, after the last norm.

        Args:
            tokens, position: int64 [B, T].
            mask: from `masks` or `decode_masks`; None: plain causal.
            cache: a transformers cache to read and write; None: none.
            noised: which positions are noised (bool [B, T], or all, or none): there a draft adapter acts.
        Returns:
            [B, T, D] in the model's dtype.
        """
        common = {
            "position_ids": position,
            "attention_mask": mask,
            "past_key_values": cache,
            "use_cache": cache is not None,
        }
        if self.adapter is None or noised is False:
            return self.model.base_model(input_ids=tokens, **common).last_hidden_state
        with self.adapter.open(noised), self.adapter.masked(tokens) as readable:
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
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        if (cap := self.logit_cap) is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits

    def masks(self, rule: Rule, query: Places, key: Places | None = None) -> AttentionMask:
        """The rule in the form this model's layers read: dense or BlockMask, one for each kind of layer."""
        build = to_block_mask if self.attention == "flex_attention" else to_dense
        longest = int((query if key is None else key).position.max()) + 1
        return self._of_each_kind(rule, longest, lambda rule: self.prepare_dense(build(rule, query, key)))

    def two_view_masks(self, rule: Rule, noised: Places, clean: Places, cached: bool = False) -> AttentionMask:
        """The rule over [noised ; clean]; in parts where the model runs `split_attention`.

        Args:
            noised: [B, N], clean: [B, L].
            cached: only noised queries pass, and the clean keys, which lie in front of theirs, are cached.
        """
        if self.attention == SPLIT and noised.view.shape[1]:
            longest = max(int(places.position.max()) for places in (noised, clean)) + 1
            dtype = self.model.dtype
            return self._of_each_kind(rule, longest, lambda rule: split_mask(rule, noised, clean, dtype, cached))
        if cached:
            return self.masks(rule, noised, clean.followed_by(noised))
        return self.masks(rule, noised.followed_by(clean))

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


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a config that describes the text model: a nested one where images or sound come with it."""
    return config.get_text_config(decoder=True)


def steady_positions(config: PreTrainedConfig) -> int | None:
    """Longest sequence whose positions mean the same in every pass, if the config says.

    Of `longrope` factors, transformers takes the short or the long ones by the largest position of the pass. So
    beyond the original length a token would depend on what else is in its row, batch or cache.
    `dynamic` factors change beyond `max_position_embeddings`, which nothing here exceeds.
    """
    config = text_config(config)
    ropes = getattr(config, "rope_parameters", None) or {}
    longest = [getattr(config, "max_position_embeddings", None)]
    for rope in (ropes, *ropes.values()):  # one, or one for each kind of layer
        changing = isinstance(rope, Mapping) and rope.get("rope_type") == "longrope"
        if changing and rope["short_factor"] != rope["long_factor"]:
            longest.append(rope["original_max_position_embeddings"])
    return min((n for n in longest if n is not None), default=None)


def check_row_length(length: int, config: PreTrainedConfig) -> None:
    """UsageError for training rows of `length` tokens where the model's positions end earlier."""
    positions = steady_positions(config)
    if positions is None or length <= positions:
        return
    text = text_config(config)
    cure = f"data.row_length={length} is over the model's {positions} positions; use at most {positions}"
    if positions < text.max_position_embeddings:
        cure += ", beyond which its longrope factors change, or give model.override.rope_parameters.short_factor the "
        cure += "values of long_factor"
    elif getattr(text, "rope_parameters", None):  # learned positions cannot be made more
        cure += ", or raise model.override.max_position_embeddings"
    raise UsageError(cure)


def layer_windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """Kind of layer -> sliding window, read from the config.

    A window that the config's class does not declare is stray: transformers keeps it, the architecture ignores it.

    Raises:
        UsageError: a kind of layer other than full or sliding attention.
    """
    config = text_config(config)
    window = getattr(config, "sliding_window", None)
    declared = "sliding_window" in _parameters(type(config))
    if not declared or getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UsageError(
                f"architecture '{config.model_type}' has layers of kind '{kind}', which cannot take a block "
                "mask; use a decoder with full or sliding-window attention"
            )
    if not kinds:
        return {"sliding_attention" if window else "full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


@functools.cache
def _parameters(kind: type) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(kind).parameters


def resolve(path: str | Path) -> str:
    """A shipped model's name, a local folder or a Hub id -> what `from_pretrained` takes.

    Raises:
        UsageError: nothing of that name, or a folder that holds no model or no safetensors weights.
    """
    name = str(path)
    if name in SHIPPED:
        name = str(resources.files("nextblock") / "assets" / name)
    folder = Path(name).expanduser()
    if folder.is_file():
        raise UsageError(f"model {name} is a file; give the folder that holds config.json")
    if not folder.exists():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UsageError(
                f"model folder {name} does not exist; give a local folder, a Hub id, or one of {', '.join(SHIPPED)}"
            )
        return name
    if not (folder / "config.json").is_file():
        raise UsageError(f"model folder {name} has no config.json; give the folder of a Hugging Face model")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {folder / 'config.json'}: {error}") from None
    if not any(folder.glob("*.safetensors")):
        raise UsageError(f"model folder {name} has no weights (*.safetensors); weights are read from safetensors only")
    return str(folder)


def resolve_adapter(path: str | Path) -> Path:
    """A shipped draft adapter's name or a local folder -> the folder."""
    if str(path) in SHIPPED_ADAPTERS:
        return Path(str(resources.files("nextblock") / "assets" / str(path)))
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"draft adapter {path} is not a folder; give one made by `nextblock adapt`, or {SHIPPED_ADAPTERS[0]}"
        )
    return folder


def weights_folder(path: str | Path, revision: str | None = None) -> Path:
    """The local folder that holds a model's weight files; for a Hub id its place in the cache."""
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
    source = resolve(path)
    try:
        config = config_as_stored(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds here; each means the same to the user
        raise UsageError(f"cannot load model {path}: {_first_line(error)}{_suggest(str(path))}") from None
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
        values = f"{type(error).__name__}: {_first_line(error)}"
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
        setattr(config, name, {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value)


def check_architecture(config: PreTrainedConfig) -> None:
    """Refuse what is known, before any weight is read, not to work: encoders, state-space, linear attention."""
    kind = config.model_type
    mapping: Any = AutoModelForCausalLM._model_mapping
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder or (type(config) not in mapping and not remote):
        raise UsageError(f"architecture '{kind}' is not a causal decoder; use a model of AutoModelForCausalLM")
    layers = set(getattr(text_config(config), "layer_types", None) or ["any"])
    softmax = layers <= {"full_attention", "sliding_attention"}  # all that a model of a hybrid family may hold
    if not remote and not softmax and getattr(mapping[type(config)], "_is_stateful", False):
        raise UsageError(
            f"architecture '{kind}' carries a recurrent state, which a block mask cannot reach; "
            "use a decoder with softmax attention in every layer"
        )
    layer_windows(config)


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
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    wanted: Any = dtype or (torch.float32 if target.type == "cpu" else "auto")
    options: dict[str, Any] = {}
    if quantization:  # where bitsandbytes is missing, transformers says so in one line
        if target.type != "cuda":  # there bitsandbytes packs the weights for a kernel that has no backward pass
            raise UsageError(f"model.quantization={quantization} needs a CUDA device; leave it out on {target.type}")
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        options = {"quantization_config": nf4, "device_map": {"": target}}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve(path),
            config=config,
            dtype=wanted,
            attn_implementation=choose_attention(config, attention, target),
            use_safetensors=True,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        reason = _first_line(error)
        if "does not support an attention implementation" in reason:  # transformers' advice is no option here
            reason = f"architecture '{config.model_type}' has no attention with a block mask; it is not supported"
        raise UsageError(f"cannot load model {path}: {reason}") from None
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers would make them up
        raise UsageError(
            f"cannot load model {path}: its files lack {len(missing)} of the weights that architecture "
            f"'{config.model_type}' needs, the first {missing[0]}; restore them, or repair config.json"
        )
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is not model.get_input_embeddings().weight:
        # The files hold a head of their own, whatever config.json says: nothing may tie the two later.
        for part in (model.config, model.config.get_text_config()):
            if getattr(part, "tie_word_embeddings", False):
                part.tie_word_embeddings = False
    return model.eval() if quantization else cast(Any, model).to(target).eval()


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


def load_tokenizer(
    path: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None where none can be had (`no_tokenizer` says why): token ids still work."""
    source = resolve(path)
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        if not trust_remote_code and _tokenizer_code(source, revision):
            return None
        raise UsageError(f"cannot load the tokenizer of {path}: {_first_line(error)}") from None


def _tokenizer_code(source: str, revision: str | None = None) -> bool:
    """Whether a tokenizer comes with code of its own."""
    return bool(get_tokenizer_config(source, revision=revision).get("auto_map"))


def no_tokenizer(path: str | Path, revision: str | None = None) -> str:
    """Why `load_tokenizer` gives none, as the first half of a message; an empty path: a model that has none."""
    if not str(path):
        return "this model has no tokenizer"
    if _tokenizer_code(str(Path(path).expanduser()), revision):
        return f"the tokenizer of {path} is code in its folder, which runs only with trust_remote_code"
    return f"model {path} has no tokenizer"


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token for each byte of UTF-8 text, id 256 the end token; a turn of chat is its bare text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    return tokenizer


def parent_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of a run: the parent's, or the one that `config.tokenizer` names."""
    if config.tokenizer == "bytes":
        return byte_tokenizer()
    source = config.tokenizer or config.path
    tokenizer = load_tokenizer(source, config.revision, config.trust_remote_code)
    if tokenizer is None:
        raise UsageError(f"{no_tokenizer(source, config.revision)}; adapting reads text: set model.tokenizer")
    return tokenizer


def scratch_config(scratch: Mapping[str, Any]) -> PreTrainedConfig:
    """The Hugging Face config that plain values describe; `model_type` is llama if they name none.

    Raises:
        UsageError: an unknown `model_type`, or one that cannot be adapted.
    """
    values = dict(scratch)
    kind = str(values.pop("model_type", "llama"))
    try:
        shape = AutoConfig.for_model(kind, **values)
    except ValueError as error:
        raise UsageError(f"model.scratch.model_type={kind!r}: {_first_line(error)}") from None
    check_architecture(shape)
    return shape


def parent_config(model: ModelConfig) -> PreTrainedConfig:
    """The config of the parent that a run begins with, its values replaced."""
    if model.scratch is None:
        return read_config(model.path, model.revision, model.trust_remote_code, model.override)
    config = scratch_config(model.scratch)
    replace_values(config, model.override)
    return config


def load_parent(config: ModelConfig, device: torch.device | str | None = None) -> Decoder:
    """The parent of a run: loaded, or random weights of `config.scratch`'s shape."""
    dtype = getattr(torch, config.dtype)
    if config.scratch is None:
        model = load_model(
            config.path,
            dtype=dtype,
            attention=config.attention,
            device=device,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            override=config.override,
            quantization=config.quantization,
        )
        return Decoder(model)
    shape = parent_config(config)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    attention = choose_attention(shape, config.attention, target)
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=attention)
    return Decoder(cast(Any, model).to(target).eval())


def read_settings(config: PreTrainedConfig, given: GivenSettings | None = None) -> BlockDiffusionSettings | None:
    """The `block_diffusion` section of a checkpoint, with what is given in its place; None for a plain AR model.

    Raises:
        UsageError: settings that cannot be read, an unknown key, or a value out of range.
    """
    section = getattr(config, "block_diffusion", None)
    if isinstance(given, str):
        given = KNOWN_SETTINGS.get(given) or _mapping(given)
    if isinstance(given, BlockDiffusionSettings):
        return given
    if section is None and given is None:
        return None
    return validate(BlockDiffusionSettings, {**(section or {}), **(given or {})})


def _mapping(text: str) -> Mapping[str, Any]:
    """The mapping that a YAML text, or a file of that name, holds."""
    try:
        values = yaml.safe_load(Path(text).read_text(encoding="utf-8") if Path(text).is_file() else text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"settings {text}: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise UsageError(
            f"settings={text!r} is no mapping, no file and no name{nearest(text, list(KNOWN_SETTINGS))}; "
            "write {block_size: 32, mask_token_id: 7}"
        )
    return values


def choose_mask_token(decoder: Decoder, tokenizer: Any, wanted: int | str | None) -> int:
    """The mask token's id; makes one where the model has none, with embedding and head rows at the mean.

    In this order: `wanted`; the id in the checkpoint's settings; the tokenizer's own mask token; an unused
    row of a padded vocabulary; a new row.

    Raises:
        UsageError: an id outside the vocabulary, a token that is not in it, or an end token.
    """
    settings = read_settings(decoder.model.config)
    if wanted is not None:
        mask_id = _wanted_mask(decoder, tokenizer, wanted)
    elif settings is not None:
        mask_id = settings.mask_token_id
        check_mask_token(mask_id, decoder.vocabulary, "block_diffusion.mask_token_id of the checkpoint")
    elif tokenizer is not None and tokenizer.mask_token_id is not None:
        mask_id = int(tokenizer.mask_token_id)
        check_mask_token(mask_id, decoder.vocabulary, "the tokenizer's mask token")
    else:
        return _add_mask_token(decoder, tokenizer)
    model = decoder.model
    for source in (model.generation_config, model.config, tokenizer):
        ends = getattr(source, "eos_token_id", None)
        if mask_id in (ends if isinstance(ends, list) else [ends]):
            raise UsageError(f"mask token id {mask_id} is an end token; set model.mask_token to another")
    if tokenizer is not None and tokenizer.mask_token_id not in (None, mask_id):  # what is exported tells one story
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(mask_id)
    return mask_id


def check_round_trip(tokenizer: Any, mask_id: int) -> None:
    """Save and read a tokenizer, as an export and its user will.

    Raises:
        UsageError: it cannot be saved, some tokens then have other ids (added ones do where the vocabulary has holes),
            or the mask token shares its id with another.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
            after = type(tokenizer).from_pretrained(folder).get_vocab()
        except Exception as error:  # tokenizers raise anything
            raise UsageError(f"the tokenizer cannot be saved and loaded again: {_first_line(error)}") from None
    for token, number in tokenizer.get_vocab().items():
        if after.get(token) != number:
            raise UsageError(
                f"the tokenizer reads {token!r} as id {number}, but once saved and loaded as {after.get(token)}: its "
                "ids have holes, which an added token upsets; set model.mask_token to an unused id or token of its own"
            )
    if len(tokens := [token for token, number in after.items() if number == mask_id]) > 1:
        raise UsageError(f"the tokenizer reads {tokens} as one id, {mask_id}; set model.mask_token to an unused one")


def _wanted_mask(decoder: Decoder, tokenizer: Any, wanted: int | str) -> int:
    if isinstance(wanted, str):
        if tokenizer is None or wanted not in tokenizer.get_vocab():
            raise UsageError(
                f"model.mask_token={wanted!r} is not in the tokenizer's vocabulary; give an id, or leave it out "
                "to have one added"
            )
        wanted = int(tokenizer.convert_tokens_to_ids(wanted))
    check_mask_token(wanted, decoder.vocabulary, "model.mask_token")
    return wanted


def check_mask_token(mask_id: int, vocabulary: int, name: str) -> None:
    """UsageError for a mask token id, called `name`, that is no row of the embedding."""
    if not 0 <= mask_id < vocabulary:
        raise UsageError(f"{name}={mask_id} is outside the vocabulary; ids run from 0 to {vocabulary - 1}")


def _add_mask_token(decoder: Decoder, tokenizer: Any) -> int:
    """A new special token: on the first unused row of a padded vocabulary if there is one, else a new row."""
    rows = decoder.vocabulary
    if tokenizer is None:
        mask_id = rows
    else:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
        mask_id = int(tokenizer.mask_token_id)
    if mask_id >= rows:
        decoder.model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    layers = {id(m): m for m in (decoder.model.get_input_embeddings(), decoder.model.get_output_embeddings())}
    with torch.no_grad():
        for layer in layers.values():
            for name in ("weight", "bias"):
                values = getattr(layer, name, None)
                if values is not None:
                    values[mask_id] = values[: min(mask_id, rows)].float().mean(dim=0).to(values.dtype)
    return mask_id


def recompute_activations(model: PreTrainedModel, **options: Any) -> None:
    """Compute the layers' activations again in the backward pass, in train mode; `options` of torch's checkpoint."""
    model.train()
    options["use_reentrant"] = False
    if attached_adapter(model) is None:
        # Its old name, which transformers 5.23 deprecates, is all that 5.22 and older have.
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options)
        return
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:  # of a model's own code
        raise UsageError(
            f"training.gradient_checkpointing=true: architecture '{model.config.model_type}' has no layers that can "
            "be computed again under a draft adapter; lower training.micro_batch_rows instead"
        )
    for layer in layers:
        # Not by transformers, which takes the cache away: that of `DraftLoss` is only read when layers run again.
        again = functools.partial(checkpoint, layer.forward, context_fn=recomputation, **options)
        plain = layer.forward
        layer.forward = lambda *x, a=again, p=plain, **y: (a if torch.is_grad_enabled() else p)(*x, **y)


def without_dropout(model: nn.Module) -> None:
    """Set every dropout to zero: clean-half logits must be the causal model's own (identity 1)."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


class NotFiniteError(UsageError):
    """Logits are NaN or infinite: the model is of no use in any mode."""


@torch.no_grad()
def probe(decoder: Decoder) -> None:
    """Run the model on a few tokens and stop if it does not do what the method needs.

    Checked: two documents whose tokens lie mixed in one row, with their own positions and mask, give what
    each gives alone, also where one stands at the end of the context; a later token reaches an earlier one
    where the mask lets it; hidden states and head, run apart, give the model's own logits; a window that the
    config declares is applied. Mixed, because rotary positions are relative: a model that ignores them would
    pass with documents side by side.

    Raises:
        UsageError: naming what the model ignores.
    """
    model, device = decoder.model, decoder.device
    name = f"architecture '{model.config.model_type}'"
    generator = torch.Generator().manual_seed(0)
    alone = [torch.randint(0, decoder.vocabulary, (1, n), generator=generator).to(device) for n in (5, 4)]
    steps = [torch.arange(part.shape[1], device=device)[None] for part in alone]
    try:
        own = [model(input_ids=part).logits for part in alone]
    except Exception as error:
        raise UsageError(f"{name} cannot run on token ids alone; it is not supported ({_raised(error)})") from None
    _check_finite(model, own)
    try:
        mixed, far, seen_both_ways = _mixed_documents(decoder, alone, steps)
        apart = [decoder.logits(decoder.hidden(*pair, None)) for pair in zip(alone, steps, strict=True)]
    except Exception as error:
        raise UsageError(
            f"{name} takes no mask of query and key (attention: {decoder.attention}), which blocks need; "
            f"use a decoder that takes one ({_raised(error)})"
        ) from None
    if any(_differs(a, b) for a, b in zip(apart, own, strict=True)):
        raise UsageError(f"{name}: hidden states and head apart do not give the model's logits; it is not supported")
    how = f"(attention: {decoder.attention}); it is not supported"
    if _differs(mixed, torch.cat(own, dim=1)):
        raise UsageError(f"{name} ignores the attention mask or the position ids it is given {how}")
    if _differs(far[:, : own[0].shape[1]], own[0]):
        raise UsageError(
            f"{name}: a document changes when another in its row stands at position {decoder.max_positions}; give the "
            "model rotary factors that do not depend on the length (model.override.rope_parameters)"
        )
    if not _differs(seen_both_ways[:, 0], mixed[:, 0]):
        raise UsageError(f"{name} stays causal whatever mask it is given {how}")
    _check_window(decoder, alone[0], steps[0])


def _mixed_documents(decoder: Decoder, alone: list[Tensor], steps: list[Tensor]) -> list[Tensor]:
    """Logits [1, T, V] of two documents mixed in one row, put back in order.

    Returns:
        causal; causal with the second document at the end of the context; each document seeing all of itself.
    """
    device = decoder.device
    order = torch.tensor([6, 1, 4, 7, 0, 8, 3, 2, 5], device=device)  # slot -> token of [first ; second]
    tokens, position = torch.cat(alone, dim=1)[:, order], torch.cat(steps, dim=1)[:, order]
    document = torch.cat([torch.full_like(part, i) for i, part in enumerate(alone)], dim=1)[:, order]
    end = max((decoder.max_positions or 0) - alone[1].shape[1], 0)

    def causal(query: Places, key: Places) -> Tensor:
        return (query.document == key.document) & (key.position <= query.position)

    def both_ways(query: Places, key: Places) -> Tensor:
        return query.document == key.document

    found = []
    for rule, shift in ((causal, 0), (causal, end), (both_ways, 0)):
        at = position + shift * document
        places = Places(
            view=torch.zeros_like(tokens),
            document=document,
            position=at,
            block_start=at,
            seed=torch.zeros(1, 1, dtype=torch.int64, device=device),
        )
        logits = decoder.logits(decoder.hidden(tokens, at, decoder.masks(rule, places)))
        found.append(logits[:, order.argsort()])
    return found


def _check_finite(model: PreTrainedModel, logits: list[Tensor]) -> None:
    """NotFiniteError for logits with NaN or infinite values, naming the first weight that holds such."""
    if all(bool(part.isfinite().all()) for part in logits):
        return
    weights = ((n, p) for n, p in model.named_parameters() if p.is_floating_point())
    bad = next((name for name, weight in weights if not weight.isfinite().all()), None)
    if bad:
        raise NotFiniteError(f"weight {bad} holds NaN or infinite values; restore the weights")
    raise NotFiniteError(f"logits are not finite in {str(model.dtype).removeprefix('torch.')}; use a wider dtype")


def _check_window(decoder: Decoder, tokens: Tensor, position: Tensor) -> None:
    """Refuse a sliding window that the config declares and the plain forward pass does not apply.

    A window of 2 for a moment shows it on a few tokens. Where it changes nothing, the model may have read its
    window when it was made: then a row past the window tells.
    """
    config = decoder.config
    window = next((window for window in decoder.windows.values() if window is not None), None)
    if window is None or window + 1 >= (decoder.max_positions or 2**31):
        return
    plain = decoder.hidden(tokens, position, None)
    config.sliding_window = 2
    try:
        narrow = decoder.hidden(tokens, position, None)
    finally:
        config.sliding_window = window
    if _differs(narrow, plain):
        return
    position = torch.arange(min(window + 8, decoder.max_positions or 2**31), device=decoder.device)[None]
    tokens, zero = position % decoder.vocabulary, torch.zeros_like(position)
    mask = decoder.masks(lambda q, k: k.position <= q.position, Places(zero, zero, position, position, zero[:, :1]))
    if _differs(decoder.hidden(tokens, position, mask), decoder.hidden(tokens, position, None)):
        raise UsageError(
            f"architecture '{decoder.model.config.model_type}' declares a sliding window of {window} that its own "
            f"forward pass does not apply; set max_position_embeddings (model.override, or config.json) to {window}"
        )


@torch.no_grad()
def probe_adapter(decoder: Decoder) -> None:
    """Run a draft adapter on a few tokens, one of them noised.

    Raises:
        UsageError: the model cannot run with it.
    """
    assert decoder.adapter is not None
    tokens = torch.tensor([[0, 1, decoder.adapter.mask_token_id]], device=decoder.device)
    try:
        decoder.hidden(tokens, torch.arange(3, device=decoder.device)[None], None, noised=tokens > 1)
    except Exception as error:  # of whatever kind a model raises at what it does not know
        raise UsageError(
            f"architecture '{decoder.model.config.model_type}' cannot run with a draft adapter on these layers "
            f"({_first_line(error)}); name others in draft_adapter.target_modules"
        ) from None


@torch.no_grad()
def run_in_parts(decoder: Decoder) -> None:
    """On CPU, let two-view passes run `split_attention` instead of SDPA with one dense mask, where a trial agrees.

    Layers with an attention of their own, sinks or soft caps stay as they are.
    """
    model = decoder.model
    if decoder.attention != "sdpa" or decoder.device.type != "cpu" or not model._can_set_attn_implementation():
        return
    position = torch.arange(4)[None]
    noised, clean = (
        Places(
            view=torch.full_like(position, view),
            document=torch.zeros_like(position),
            position=position,
            block_start=position // 2 * 2,
            seed=torch.zeros(1, 1, dtype=torch.int64),
        )
        for view in (1, 0)
    )
    tokens = torch.arange(8)[None] % decoder.vocabulary

    def hidden() -> Tensor:
        mask = decoder.two_view_masks(block_diffusion_rule(), noised, clean)
        return decoder.hidden(tokens, torch.cat([position, position], dim=1), mask)

    dense = hidden()
    try:
        model.set_attn_implementation(SPLIT)
        agrees = not _differs(hidden(), dense)
    except Exception:  # of whatever kind a model raises at what it does not know
        agrees = False
    if not agrees:
        model.set_attn_implementation("sdpa")


def _differs(a: Tensor, b: Tensor) -> bool:
    scale = float(b.float().abs().max()) + 1e-6
    return float((a.float() - b.float()).abs().max()) > scale * (1e-3 if a.dtype == torch.float32 else 5e-2)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _raised(error: BaseException) -> str:
    return f"it raised {type(error).__name__}" + (f": {_first_line(error)}" if str(error).strip() else "")


def _suggest(name: str) -> str:
    return nearest(name, SHIPPED) if "/" not in name else ""
