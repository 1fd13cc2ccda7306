"""Typed configuration of a run: YAML and overrides in, one resolved and checked object out.

Everything that can be known to be wrong before weights are read is refused here, in one line
that names the value, the rule and the cure.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator


class UsageError(ValueError):
    """Bad input from the user: one line with the value, the rule and the cure. The CLI exits 2."""


class TrainingStopped(UsageError):
    """A run that cannot go on, after steps that were well: what it has written is worth a look."""


def nearest(word: str, choices: Sequence[str]) -> str:
    """`; did you mean 'x'?` for the choice most like `word`, or the list of all choices."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; choose from {', '.join(choices)}"


def require(package: str, extra: str, key: str) -> None:
    """Stop in one line where `key` of the configuration needs an optional package that is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{key} needs {package}, which is not installed; run `pip install nextblock[{extra}]`")


class Section(BaseModel):
    """A frozen group of options; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Section)
Context = Literal["context_causal", "block_causal"]
Prediction = Literal["shifted", "aligned"]


class ModelConfig(Section):
    """The AR parent."""

    path: str = Field(default="tiny-ar", description="local Hugging Face folder, Hub id, or a shipped model")
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
        description="mask token id or text; default: the tokenizer's, else an unused row, else a new one",
    )
    trust_remote_code: bool = Field(default=False, description="run model code that comes with the checkpoint")
    override: dict[str, Any] = Field(
        default_factory=dict,
        description="values of the Hugging Face config to replace: max_position_embeddings, rope_parameters, ...",
    )


class Source(Section):
    """One source of documents."""

    path: str = Field(description="file, folder, glob, `datasets` id, `task:NAME`, or `python-stdlib`")
    format: Literal["auto", "text", "jsonl", "parquet", "hub", "task"] = "auto"
    text_field: str = Field(default="text", description="field of JSONL, Parquet and Hub rows that holds the document")
    split: str = Field(default="train", description="split of a Hub data set or of a built-in task")
    weight: float = Field(default=1.0, gt=0, description="share of the text that comes from this source")
    examples: int | None = Field(default=None, gt=0, description="read at most this many documents")


class DataConfig(Section):
    """Documents and how they become rows."""

    sources: tuple[Source, ...] = Field(min_length=1, description="where documents come from")
    row_length: int = Field(default=512, ge=2, description="tokens in a packed row (L)")
    held_out: float = Field(
        default=0.02,
        ge=0,
        lt=1,
        description="share of documents kept for evaluation, chosen by hash of their text",
    )
    shards: int = Field(
        default=1,
        ge=1,
        description="parts that are read and tokenised apart, and fixed for a run; a multiple of the processes lets "
        "each read its own only",
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
    ar_weight: float = Field(default=0.5, ge=0, description="lambda, weight of the AR loss (Eq. 2)")
    ar_weight_final: float | None = Field(
        default=None, ge=0, description="anneal lambda to this value while blocks grow; default: constant"
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
    fill_last_block: bool = Field(
        default=True, description="fill the last block of an ended span with end tokens, as decoding meets it"
    )
    annealed_mask_steps: int = Field(
        default=0,
        ge=0,
        description="baseline: over this many steps go at random from the b = 1 to the b_max mask",
    )


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
    checkpoint_every: int = Field(default=200, ge=1, description="steps between resumable checkpoints")
    keep_last: int = Field(default=2, ge=1, description="checkpoints kept")
    keep_every: int | None = Field(default=None, ge=1, description="of so many checkpoints, one is kept for good")
    checkpoint: Literal["full", "sharded"] = Field(
        default="full", description="full: gathered and written by one process; sharded: each writes its part"
    )
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


class LoraConfig(DraftAdapterConfig):
    """LoRA: the full recipe through low-rank updates (peft), and the mask token's row; the rest stays frozen."""


class MachineConfig(Section):
    """What the run is meant for, as `nextblock plan` takes it; the run itself takes what it is started on."""

    gpu: str = Field(default="h100", description="h200, h100, a100-80g, rtx4090, ... ; cpu: none")
    gpus: int = Field(default=1, ge=1, description="how many of them, on all machines")


class Stage(Section):
    """One stage of a run: what differs from the run's own sections."""

    name: str = Field(pattern=r"^[\w-]+$", description="the stage's folder is stage-NUMBER-NAME")
    model: dict[str, Any] = Field(default_factory=dict, description="`override` alone, as for a longer row")
    data: dict[str, Any] = Field(default_factory=dict, description="default: as the run, read on from there")
    recipe: dict[str, Any] = Field(default_factory=dict, description="default: as the run")
    growth: dict[str, Any] = Field(default_factory=dict, description="default after the first stage: no growth")
    optimizer: dict[str, Any] = Field(
        default_factory=dict, description="default: as the run, but no warmup where the optimizer is carried over"
    )
    training: dict[str, Any] = Field(default_factory=dict, description="`steps` count from 0 in each stage")
    fresh_optimizer: bool = Field(
        default=False, description="forget the moments of the stage before instead of carrying them over"
    )


class AdaptConfig(Section):
    """All of one `nextblock adapt` run."""

    model: ModelConfig = Field(default_factory=lambda: ModelConfig())
    data: DataConfig
    recipe: RecipeConfig = Field(default_factory=lambda: RecipeConfig())
    growth: GrowthConfig = Field(default_factory=lambda: GrowthConfig())
    optimizer: OptimizerConfig = Field(default_factory=lambda: OptimizerConfig())
    training: TrainingConfig = Field(default_factory=lambda: TrainingConfig())
    draft_adapter: DraftAdapterConfig | None = Field(
        default=None, description="train a draft adapter for the frozen parent instead of the parent itself"
    )
    lora: LoraConfig | None = Field(
        default=None, description="train low-rank updates of the parent; the result is saved both apart and merged"
    )
    machine: MachineConfig = Field(default_factory=lambda: MachineConfig())
    stages: tuple[Stage, ...] = Field(
        default=(), description="parts of the run, one after another, each from the weights of the one before"
    )
    output: str = Field(default="runs/adapted", description="folder for the checkpoint, the log and the report")

    @property
    def masks(self) -> bool:
        """Whether tokens are ever masked; if not, this is plain AR training (b = 1 to the end)."""
        return self.growth.b_max > 1 or self.recipe.prediction == "aligned"

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        if self.stages:  # each is checked as a run of its own
            stage_configs(self)
            return self
        growth, steps = self.growth, self.training.steps
        row, b_max = self.data.row_length, growth.b_max
        if growth.b_0 > b_max:
            raise ValueError(f"growth.b_0={growth.b_0} is larger than growth.b_max={b_max}; start at or below it")
        if row < b_max:
            raise ValueError(
                f"data.row_length={row} is smaller than the block growth.b_max={b_max}; use at least {b_max}"
            )
        if row % b_max:
            raise ValueError(
                f"data.row_length={row} is not a multiple of growth.b_max={b_max}; use {row // b_max * b_max}"
            )
        growths, size = 0, growth.b_0
        while size < b_max:
            size, growths = size * growth.r, growths + 1
        needed = growth.s_0 + growths * growth.delta + 1 if growths else 1
        if steps < needed:
            raise ValueError(
                f"growth.b_max={b_max} is not reached in training.steps={steps}; "
                f"use at least {needed} steps or a smaller growth.delta"
            )
        if self.training.evaluate_every and not (self.training.evaluate_rows and self.data.held_out):
            raise ValueError(
                f"training.evaluate_every={self.training.evaluate_every} needs held-out rows; set "
                "training.evaluate_rows and data.held_out above 0"
            )
        if self.draft_adapter is not None:
            self._check_draft_adapter()
        if self.training.fsdp and self.optimizer.name == "adamw_8bit":
            raise ValueError("optimizer.name=adamw_8bit cannot share out its states; use adamw or training.fsdp=false")
        if self.lora is not None and self.draft_adapter is not None:
            raise ValueError("lora and draft_adapter exclude each other; leave one of the sections out")
        if self.lora is not None and self.training.fsdp:
            raise ValueError("training.fsdp=true has no use for lora, whose trained weights are small; leave it out")
        if self.lora is not None and self.model.scratch is not None:
            raise ValueError(
                "lora leaves random weights (model.scratch) as they are; set model.path, or train them all"
            )
        if self.model.quantization is not None and self.lora is None and self.draft_adapter is None:
            raise ValueError(
                f"model.quantization={self.model.quantization} is for a frozen parent, but without draft_adapter or "
                "lora its weights are trained; leave one out or set the other"
            )
        if self.model.dtype == "bfloat16" and self.lora is None and self.draft_adapter is None:
            # With 8 bits of mantissa most updates are lost: at lr 1e-5 a weight above 0.004 never moves.
            raise ValueError(
                "model.dtype=bfloat16 would round most updates of trained weights away; set model.dtype=float32 and "
                "training.mixed_precision=bf16"
            )
        if self.recipe.complementary and self.recipe.views % 2:
            raise ValueError(
                f"recipe.views={self.recipe.views} is odd, but recipe.complementary needs pairs; "
                f"use {self.recipe.views + 1}"
            )
        if self.recipe.soft_weight and self.recipe.context == "block_causal":
            raise ValueError(  # a block-causal clean token has seen the token that it would teach
                f"recipe.soft_weight={self.recipe.soft_weight:g} needs recipe.context=context_causal; set it, or "
                "leave soft targets out"
            )
        if self.recipe.random_start_share and self.recipe.context == "block_causal":
            # There blocks must start where decoding starts them, in the clean half as in the noised one.
            raise ValueError(
                f"recipe.random_start_share={self.recipe.random_start_share} needs recipe.context=context_causal; "
                "set it, or leave the random starts out"
            )
        if self.recipe.random_start_share and self.recipe.annealed_mask_steps:
            # One coin decides over a pair of one block, in both halves: their blocks must be the same.
            raise ValueError(
                f"recipe.random_start_share={self.recipe.random_start_share} does not go with "
                "recipe.annealed_mask_steps; leave one of them out"
            )
        if self.recipe.annealed_mask_steps and growth.b_0 != b_max:
            raise ValueError(
                f"recipe.annealed_mask_steps={self.recipe.annealed_mask_steps} replaces block growth; "
                f"set growth.b_0 to growth.b_max={b_max}"
            )
        if self.recipe.annealed_mask_steps and self.recipe.context == "block_causal":
            # A block-causal clean token has seen the rest of its block: it would tell the query its answer.
            raise ValueError(
                f"recipe.annealed_mask_steps={self.recipe.annealed_mask_steps} needs "
                "recipe.context=context_causal; set it, or leave the annealing out"
            )
        return self

    def _check_draft_adapter(self) -> None:
        if self.training.fsdp:
            raise ValueError("training.fsdp=true has no use for a draft adapter, which is small; leave it out")
        if self.growth.b_0 == 1 and self.recipe.prediction == "shifted":
            raise ValueError("growth.b_0=1 gives a draft adapter nothing to learn; start at growth.b_0=2 or more")
        if self.recipe.context != "context_causal":
            raise ValueError(
                f"recipe.context={self.recipe.context} changes the clean half, which a draft adapter leaves to the "
                "parent; use context_causal"
            )
        if self.model.scratch is not None:
            raise ValueError(
                "model.scratch has no weights that a draft adapter could leave as they are; set model.path"
            )


def stage_configs(config: AdaptConfig) -> list[AdaptConfig]:
    """A run as one configuration for each of its stages; without stages, itself.

    A stage has what the run has but for what it sets itself. After the first, some things do not start again
    unless they are set: blocks stay at the size reached, mask annealing is over, values of the model's config stay
    replaced, and an optimizer that is carried over needs no warmup.

    Raises:
        UsageError: naming the stage.
    """
    found: list[AdaptConfig] = []
    whole = config.model_dump(exclude={"stages"})
    for number, stage in enumerate(config.stages):
        where, given = f"stages.{number} ({stage.name})", stage.model_dump(exclude={"name", "fresh_optimizer"})
        for key in (f"{section}.{name}" for section, values in given.items() for name in values):
            if key in SET_FOR_THE_RUN or (key.startswith("model.") and key != "model.override"):
                raise UsageError(f"{where}: {key} holds for the whole run; set it outside the stages")
        for adapter in ("draft_adapter", "lora"):
            if getattr(config, adapter) is not None:
                raise UsageError(f"{where}: {adapter} is trained in one stage; leave out stages, or {adapter}")
        values = {**whole, "output": str(Path(config.output) / f"stage-{number + 1}-{stage.name}")}
        if found:
            reached = found[-1].growth.b_max
            values = _overlaid(values, {"growth": {"b_0": reached, "b_max": reached}})
            values = _overlaid(values, {"recipe": {"annealed_mask_steps": 0}})
            values = _overlaid(values, {"model": {"override": found[-1].model.override}})
            values = _overlaid(values, {} if stage.fresh_optimizer else {"optimizer": {"warmup_steps": 0}})
        try:
            found.append(validate(AdaptConfig, _overlaid(values, given)))
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
    return found or [config]


SET_FOR_THE_RUN = (
    "training.seed",
    "training.fsdp",
    "training.mixed_precision",
    "training.trackers",
    "optimizer.name",
)
"""Keys that a stage cannot change."""


def _overlaid(values: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings with those of `over` laid on top; lists are replaced whole."""
    mixed = dict(values)
    for key, value in over.items():
        below = mixed.get(key)
        mixed[key] = _overlaid(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return mixed


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


def load_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> AdaptConfig:
    """Read a YAML file (or mapping), apply dotted overrides, check, and return the frozen result.

    Args:
        source: path of a YAML file, or an already parsed mapping.
        overrides: dotted key -> YAML value, e.g. ``{"growth.b_max": 16}``; an integer part of a key
            indexes a list (``data.sources.0.path``).
    Raises:
        UsageError: unreadable file, unknown key, value out of range, or keys that contradict each other.
    """
    if isinstance(source, Mapping):
        values: Any = dict(source)
    else:
        try:
            values = yaml.safe_load(Path(source).read_text(encoding="utf-8")) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"cannot read the configuration {source}: {reason}") from None
    if not isinstance(values, dict):
        raise UsageError(f"configuration {source}: expected a mapping of sections at the top level")
    for key, value in (overrides or {}).items():
        values = _assign(values, key.split("."), value, key)
    return validate(AdaptConfig, values)


def _assign(node: Any, parts: list[str], value: Any, key: str) -> Any:
    """A copy of `node` with the value at the dotted path `parts` replaced."""
    if not parts:
        return value
    head, rest = parts[0], parts[1:]
    if isinstance(node, list | tuple):
        if not head.isdigit() or int(head) > len(node):
            raise UsageError(f"--{key}: '{head}' is not an index into a list of {len(node)}")
        items = [*node, {}] if int(head) == len(node) else list(node)
        items[int(head)] = _assign(items[int(head)], rest, value, key)
        return items
    if node is not None and not isinstance(node, Mapping):
        raise UsageError(f"--{key}: '{head}' lies below a plain value")
    return {**(node or {}), head: _assign((node or {}).get(head), rest, value, key)}


def validate(section: type[S], values: Any) -> S:
    """Build a section from plain values, turning pydantic's findings into one line."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _known_keys(section, first["loc"][:-1])
            raise UsageError(f"unknown key '{where}'{nearest(str(first['loc'][-1]), known)}") from None
        if first["type"] == "missing":
            raise UsageError(f"{where} is missing; it must be set") from None
        message = first["msg"].removeprefix("Value error, ")
        message = message if not where else f"{where}={first['input']!r}: {message}"
        raise UsageError(message) from None


def _known_keys(section: type[Section], location: Sequence[int | str]) -> list[str]:
    """Keys that are valid at a location such as ('data', 'sources', 0)."""
    for part in location:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            candidates = [annotation, *get_args(annotation)]
            section = next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))
    return list(section.model_fields)
