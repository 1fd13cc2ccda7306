"""Typed configuration of a run: YAML and overrides in, one resolved and checked object out.

Everything that can be known to be wrong before weights are read is refused here, in one line
that names the value, the rule and the cure.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from nextblock.config.errors import UsageError, nearest


class Section(BaseModel):
    """A frozen group of options; unknown keys are errors, and numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is meant (Python takes them for 1 and 0); YAML's `no` may be a name."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if value is False and "no" in get_args(kind):
            return "no"
        if isinstance(value, bool) and "number" in type_in_words(kind):
            raise PydanticCustomError("number_type", "not a number")
        return value


S = TypeVar("S", bound=Section)
Context = Literal["context_causal", "block_causal"]
Prediction = Literal["shifted", "aligned"]


def with_gguf(path: str, gguf_file: str | None) -> str:
    """A folder or Hub id and the name of a GGUF file there -> the path of that file."""
    return path if gguf_file is None else f"{path.rstrip('/')}/{gguf_file}"


class ModelConfig(Section):
    """The AR parent."""

    path: str = Field(default="tiny-ar", description="local folder, Hub id, .gguf file, or a shipped model")
    gguf_file: str | None = Field(default=None, description="name of a GGUF file in the folder or Hub id `path`")
    revision: str | None = Field(default=None, description="Hub revision")
    scratch: dict[str, Any] | None = Field(
        default=None, description="start from random weights of this Hugging Face config instead of `path`"
    )
    tokenizer: str | None = Field(
        default=None, description="folder or Hub id of the tokenizer, or `bytes`; default: the model's own"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="dtype of the weights in memory; bfloat16 only for the frozen parent of an adapter or lora",
    )
    export_dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None, description="dtype of the exported weights; default: as trained"
    )
    quantization: Literal["4bit"] | None = Field(
        default=None, description="4bit: the frozen parent of an adapter or lora in 4 bits (bitsandbytes, CUDA)"
    )
    attention: Literal["auto", "sdpa", "flex_attention"] = Field(
        default="auto", description="auto: FlexAttention on CUDA, elsewhere SDPA, in parts while training"
    )
    mask_token: int | str | None = Field(
        default=None,
        description="mask token id or text; default: that of the checkpoint's settings, else the tokenizer's, else "
        "an unused row, else a new one",
    )
    trust_remote_code: bool = Field(default=False, description="run model code that comes with the checkpoint")
    override: dict[str, Any] = Field(
        default_factory=dict,
        description="values of the Hugging Face config to replace: max_position_embeddings, rope_parameters, ...",
    )

    @property
    def source(self) -> str:
        """What the functions that load a model take."""
        return with_gguf(self.path, self.gguf_file)


class Source(Section):
    """One source of documents."""

    path: str = Field(description="file, folder, glob, `datasets` id, `task:NAME`, or `python-stdlib`")
    format: Literal["auto", "text", "jsonl", "parquet", "hub", "task"] = "auto"
    text_field: str = Field(default="text", description="field of JSONL, Parquet and Hub rows that holds the document")
    split: str | None = Field(
        default="train",
        description="split of a Hub data set, of a built-in task, or of a folder whose files are named by split",
    )
    weight: float = Field(default=1.0, gt=0, description="share of the text that comes from this source")
    examples: int | None = Field(default=None, gt=0, description="read at most this many documents")


class DataConfig(Section):
    """Documents and how they become rows."""

    sources: tuple[Source, ...] = Field(min_length=1, description="where documents come from")
    row_length: int = Field(default=512, ge=2, description="tokens in a packed row (L)")
    held_out: float = Field(
        default=0.02, ge=0, lt=1, description="share of documents kept for evaluation, chosen by hash of their text"
    )
    skip_unusable: bool = Field(
        default=False,
        description="leave out records that cannot be used (a broken line, a chat that the template refuses), and "
        "count them, instead of stopping",
    )
    shards: int | None = Field(
        default=None,
        ge=1,
        description="parts that are read and tokenised apart, fixed for a run; a multiple of the processes lets each "
        "read its own only; default: the largest divisor of training.batch_rows up to 8, with a Hub data set 1",
    )


class GrowthConfig(Section):
    """Block growth b(s) = min(b_max, b_0 * r ** floor(max(0, s - s_0) / delta))   (paper, Eq. 3)."""

    b_0: int = Field(default=1, ge=1, description="first block size")
    r: int = Field(default=2, ge=2, description="factor of each growth")
    delta: int = Field(default=50, ge=1, description="steps between growths")
    s_0: int = Field(default=0, ge=0, description="steps before the first interval starts")
    b_max: int = Field(default=32, ge=1, description="target block size; the row length gives full-sequence diffusion")


class RecipeConfig(Section):
    """What is learned: mask, noise and losses (paper, section 4; baselines are settings of it)."""

    context: Context = Field(default="context_causal", description="clean half: causal, or whole own block")
    prediction: Prediction = Field(default="shifted", description="position i-1 predicts token i, or i predicts i")
    first_token: Literal["clean", "noised"] = Field(
        default="clean",
        description="a block's first token is learned from the AR loss alone, or also from the noised block before it",
    )
    ar_weight: float = Field(default=0.5, ge=0, description="lambda, weight of the AR loss (Eq. 2)")
    ar_weight_final: float | None = Field(
        default=None,
        ge=0,
        description="lambda at the end of block growth, annealed to; without growth: throughout; default: constant",
    )
    noise_per: Literal["block", "row"] = Field(default="block", description="one noise level t per block, or per row")
    full_mask_share: float = Field(default=0.0, ge=0, le=1, description="share of blocks masked whole, whatever t is")
    random_start_share: float = Field(
        default=0.0, ge=0, le=1, description="share of spans whose blocks start late at random, as drafts do"
    )
    views: int = Field(default=1, ge=1, description="noised views of one clean pass (k)")
    complementary: bool = Field(default=False, description="views in pairs: the second masks what the first left")
    offset_decay: float | None = Field(
        default=None,
        gt=0,
        description="weight masked tokens by exp(-offset in their block / this), mean 1: early drafts count most",
    )
    soft_weight: float = Field(
        default=0.0,
        ge=0,
        description="w_soft, weight of the KL from the clean half's predictions of the masked tokens",
    )
    accept_weight: float = Field(
        default=0.0,
        ge=0,
        description="w_accept, weight of the drafts that the AR head is expected to reject in blocks masked whole",
    )
    fill_last_block: bool = Field(
        default=True, description="fill the last block of an ended span with end tokens, as decoding meets it"
    )
    annealed_mask_steps: int = Field(
        default=0, ge=0, description="baseline: over this many steps go at random from the b = 1 to the b_max mask"
    )

    @property
    def taught(self) -> bool:
        """Whether masked tokens are compared with the clean half's own predictions."""
        return self.soft_weight > 0 or self.accept_weight > 0


class OptimizerConfig(Section):
    """AdamW and its learning rate."""

    lr: float = Field(default=1e-3, gt=0, description="peak learning rate")
    schedule: Literal["constant", "cosine", "wsd"] = Field(default="wsd", description="wsd: warmup, stable, decay")
    warmup_steps: int = Field(default=20, ge=0)
    decay_share: float = Field(default=0.3, ge=0, le=1, description="wsd: last share of the steps that decays")
    min_lr_ratio: float = Field(default=0.05, ge=0, le=1, description="final over peak learning rate")
    weight_decay: float = Field(default=0.01, ge=0)
    beta_1: float = Field(default=0.9, ge=0, lt=1)
    beta_2: float = Field(default=0.95, ge=0, lt=1)
    grad_clip: float = Field(default=1.0, gt=0, description="global gradient norm")
    name: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw", description="adamw_8bit: states in 8 bits, by bitsandbytes"
    )


class TrainingConfig(Section):
    """Length, batch and bookkeeping of the run."""

    steps: int = Field(default=300, ge=1, description="optimizer steps")
    batch_rows: int = Field(default=8, ge=1, description="rows in the global batch, over all ranks and micro-batches")
    micro_batch_rows: int | None = Field(
        default=None, ge=1, description="rows in one forward pass; default: all of a rank's"
    )
    seed: int = Field(default=0, ge=0, lt=2**63)
    skip_rows: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(),
        description="numbers of rows to leave out, as a run that stops at a loss that is not finite names them",
    )
    checkpoint_every: int = Field(default=200, ge=1, description="steps between resumable checkpoints")
    keep_last: int = Field(default=2, ge=1, description="checkpoints kept")
    keep_every: int | None = Field(default=None, ge=1, description="of so many checkpoints, one is kept for good")
    fsdp: bool = Field(
        default=False, description="several processes: share out weights, gradients and optimizer (FSDP2)"
    )
    evaluate_rows: int = Field(
        default=16, ge=0, description="held-out rows for evaluation while training and at the end"
    )
    evaluate_every: int | None = Field(
        default=None,
        ge=1,
        description="steps between held-out losses with a sample decoding, at the current block size",
    )
    profile_every: int = Field(
        default=50, ge=1, description="steps between log records of the loss by noise level and by offset in the block"
    )
    trackers: Annotated[
        tuple[Literal["tensorboard", "trackio", "wandb"], ...],
        BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
    ] = Field(default=(), description="send the log to these too, through accelerate")
    gradient_checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    compile: bool = Field(default=False, description="torch.compile the model")
    mixed_precision: Literal["no", "bf16"] = Field(default="no", description="autocast of the forward pass")


class DraftAdapterConfig(Section):
    """A draft adapter instead of full adaptation: the parent stays frozen, low-rank updates act on noised tokens."""

    rank: int = Field(default=32, ge=1, description="rank of the updates")
    alpha: float = Field(default=32.0, gt=0, description="updates are scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout in front of the updates")
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear", description="all-linear, a regular expression, or endings of module names"
    )


class CorrectionConfig(Section):
    """A correction head: a draft's logits, corrected by what the token before it tells."""

    rank: int = Field(default=32, ge=1, description="rank of the correction")
    candidates: int = Field(default=32, ge=1, description="likeliest tokens of a place whose logits are corrected")


class LoraConfig(DraftAdapterConfig):
    """LoRA: the full recipe through low-rank updates (peft), and the mask token's row; the rest stays frozen."""


class MachineConfig(Section):
    """What the run is meant for, as `nextblock plan` takes it (`gpu`, `gpus`), and how FSDP2 uses it."""

    gpu: str = Field(default="h100", description="h200, h100, a100-80g, rtx4090, ...; cpu: no GPU")
    gpus: int = Field(default=1, ge=1, description="how many of them, on all machines")
    shard_over: int | None = Field(
        default=None,
        ge=2,
        description="FSDP2: neighbouring processes over which one copy of the model is shared out, such as those of a "
        "machine (hybrid sharding); default: all",
    )
    hold_gradients: bool = Field(
        default=False,
        description="FSDP2: hold the gradient whole on each process, and share it out once a step instead of after "
        "every micro-batch",
    )


class BlockDiffusionSettings(Section):
    """The `block_diffusion` section of a checkpoint's `config.json`."""

    block_size: int = Field(default=32, ge=1)
    mask_token_id: int = Field(ge=0)
    context: Context = "context_causal"
    prediction: Prediction = "shifted"
    decoding: dict[str, Any] = Field(default_factory=dict, description="default arguments of `generate`")

    @field_validator("decoding")
    @classmethod
    def _forget(cls, decoding: dict[str, Any]) -> dict[str, Any]:
        """Without `draft_steps`, which older versions stored: it changed how fast an answer came, not the answer."""
        return {name: value for name, value in decoding.items() if name != "draft_steps"}


LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
"""Names of a field's limits, and how they are said."""
OUT_OF_LIMITS = ("greater_than_equal", "greater_than", "less_than_equal", "less_than")
"""What pydantic calls values beyond them."""
KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    tuple: "a list",
}
"""Types of options, and how they are said."""


def validate(section: type[S], values: Any) -> S:
    """Build a section from plain values, turning pydantic's findings into one line.

    A validator that raises UsageError has said the whole line; another ValueError says what is wrong with a value.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UsageError(_in_words(section, error.errors()[0])) from None


def _in_words(section: type[Section], found: Any) -> str:
    """One of pydantic's findings as a line with the key, its value and what is wrong."""
    kind, value, message = found["type"], f"{found['input']!s:.200}", found["msg"].removeprefix("Value error, ")
    location, holder = _place(section, found["loc"])
    where = ".".join(map(str, location))
    name = next((part for part in reversed(location) if isinstance(part, str)), "")
    if kind == "extra_forbidden" and where.endswith("training.checkpoint"):
        return f"{where} is no option any more: each process writes its part of a checkpoint; leave it out"
    if kind == "extra_forbidden":
        return f"unknown key '{where}'{nearest(name, list(holder.model_fields))}"
    if kind == "missing":
        return f"{where} is missing; it must be set"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", found["ctx"]["expected"])
        return f"{where}={found['input']!r:.200}: unknown {name}{nearest(value, choices, 0.7)}"
    if kind.endswith(("_type", "_parsing", "_from_float")) and name in holder.model_fields:
        of = {"list_type": "a list", "dict_type": "a mapping"}
        return f"{where}={value} is not {of.get(kind) or type_in_words(holder.model_fields[name].annotation)}"
    if kind == "finite_number":
        return f"{where}={value} is not a finite number"
    if kind in OUT_OF_LIMITS:
        return f"{where}={value} {limits_in_words(holder.model_fields[name])}"
    if not where or isinstance(found.get("ctx", {}).get("error"), UsageError):
        return message
    return f"{where}={found['input']!r:.200}: {message}"


def type_in_words(annotation: Any) -> str:
    """The type of an option: "a whole number or a text"."""
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, get_args(annotation)))
    kind = get_origin(annotation) or annotation
    if kind in (*KINDS, dict) or not get_args(annotation):
        return KINDS.get(kind, "a mapping")
    parts = [type_in_words(part) for part in get_args(annotation) if part is not type(None)]
    return " or ".join(dict.fromkeys(parts))


def said_type(section: type[Section], key: str) -> str:
    """The type of the option at a dotted key, in words; "" where there is none, or where a mapping takes any key."""
    key = re.sub(r"^stages\.\d+\.(?=\w+\.)", "", key)  # a stage has the keys of the run
    location = [int(part) if part.isdigit() else part for part in key.split(".")]
    keys, holder = _place(section, location)
    field = holder.model_fields.get(str(location[-1]))
    return type_in_words(field.annotation) if field and len(keys) == len(location) else ""


def limits_in_words(field: FieldInfo) -> str:
    """The limits of a number: "must be at least 1", "must lie in (0, 1]"."""
    limits = {name: getattr(rule, name) for rule in field.metadata for name in LIMITS if hasattr(rule, name)}
    if len(limits) == 2:
        low, high = limits.values()
        return f"must lie in {'[' if 'ge' in limits else '('}{low}, {high}{']' if 'le' in limits else ')'}"
    name, limit = limits.popitem()
    return "must be 0 or more" if (name, limit) == ("ge", 0) else f"must be {LIMITS[name]} {limit}"


def _place(section: type[Section], location: Sequence[int | str]) -> tuple[list[int | str], type[Section]]:
    """The keys of a location such as ('data', 'sources', 0, 'path'), and the section that has the last of them.

    Behind the last key pydantic names the type that it tried.
    """
    keys: list[int | str] = []
    inner: type[Section] | None = section
    for part in location:
        if isinstance(part, str):
            if inner is None:
                break
            section, field = inner, inner.model_fields.get(part)
            candidates = [field.annotation, *get_args(field.annotation)] if field else []
            inner = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
        keys.append(part)
    return keys, section
