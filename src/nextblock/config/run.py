"""A whole run's configuration, its stages, and how it is read from YAML and options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from nextblock.config.errors import UsageError, one_line
from nextblock.config.files import expanded, read_yaml, user_path
from nextblock.config.sections import (
    CorrectionConfig,
    DataConfig,
    DraftAdapterConfig,
    GrowthConfig,
    LoraConfig,
    MachineConfig,
    ModelConfig,
    OptimizerConfig,
    RecipeConfig,
    Section,
    TrainingConfig,
    validate,
)


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
    correction: CorrectionConfig | None = Field(
        default=None,
        description="train a correction head: beside the draft adapter, or without one alone, the model left as it is",
    )
    decoding: dict[str, Any] = Field(
        default_factory=dict, description="default arguments of `generate`, which the checkpoint is to store"
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

    @field_validator("output")
    @classmethod
    def _expanded(cls, output: str) -> str:
        """With the home folder in place of `~`, wherever the folder is named from here on."""
        return str(expanded(output, "output")) if output.startswith("~") else output

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        if self.stages:  # each is checked as a run of its own
            stage_configs(self)
            return self
        for broken in chain(_lengths(self), _draft_adapter(self), _correction(self), _weights(self), _recipe(self)):
            raise ValueError(broken)  # the first
        return self


def _lengths(run: AdaptConfig) -> Iterator[str]:
    """Rules that are broken: blocks, rows and steps fit each other."""
    growth, training, row, b_max = run.growth, run.training, run.data.row_length, run.growth.b_max
    if growth.b_0 > b_max:
        yield f"growth.b_0={growth.b_0} is larger than growth.b_max={b_max}; start at or below it"
    if row < b_max:
        yield f"data.row_length={row} is smaller than the block growth.b_max={b_max}; use at least {b_max}"
    if row % b_max:
        yield f"data.row_length={row} is not a multiple of growth.b_max={b_max}; use {row // b_max * b_max}"
    growths, size = 0, growth.b_0
    while size < b_max:
        size, growths = size * growth.r, growths + 1
    needed = growth.s_0 + growths * growth.delta + 1 if growths else 1
    if training.steps < needed:
        yield (
            f"growth.b_max={b_max} is not reached in training.steps={training.steps}; "
            f"use at least training.steps={needed}, or a smaller growth.delta"
        )
    if training.evaluate_every and not (training.evaluate_rows and run.data.held_out):
        yield (
            f"training.evaluate_every={training.evaluate_every} needs held-out rows; set "
            "training.evaluate_rows and data.held_out above 0"
        )


def _draft_adapter(run: AdaptConfig) -> Iterator[str]:
    """Rules that are broken: what a draft adapter leaves as it is, and what it has no use for."""
    if run.draft_adapter is None:
        return
    if run.training.fsdp:
        yield "training.fsdp=true has no use for a draft adapter, which is small; set training.fsdp=false"
    if run.growth.b_0 == 1 and run.recipe.prediction == "shifted":
        yield "growth.b_0=1 gives a draft adapter nothing to learn; start at growth.b_0=2 or more"
    if run.recipe.context != "context_causal":
        yield (
            f"recipe.context={run.recipe.context} changes the clean half, which a draft adapter leaves to the "
            "parent; use context_causal"
        )
    if run.model.scratch is not None:
        yield "model.scratch has no weights that a draft adapter could leave as they are; set model.path instead"


def _correction(run: AdaptConfig) -> Iterator[str]:
    """Rules that are broken: what a correction head is trained beside."""
    if run.correction is None:
        return
    if run.recipe.prediction == "aligned":
        yield "correction needs recipe.prediction=shifted; set it, or leave the section out"
    if run.lora is not None:
        yield "correction is trained beside a draft adapter or a frozen model, not lora; leave one of the sections out"
    if run.draft_adapter is None and run.growth.b_0 < 3:
        yield (
            f"growth.b_0={run.growth.b_0} has no drafts that a correction head could learn from; set growth.b_0 and "
            "growth.b_max to the block size of model.path"
        )
    if run.training.fsdp:
        yield "training.fsdp=true has no use for a correction head, which is small; leave it out"


def _weights(run: AdaptConfig) -> Iterator[str]:
    """Rules that are broken: which weights are trained, in which form, and on how many devices."""
    model, fsdp, lora = run.model, run.training.fsdp, run.lora is not None
    trains_parent = not lora and run.draft_adapter is None and run.correction is None
    if fsdp and run.optimizer.name == "adamw_8bit":
        yield "optimizer.name=adamw_8bit cannot share out its states; use adamw or training.fsdp=false"
    if lora and run.draft_adapter is not None:
        yield "lora and draft_adapter exclude each other; leave one of the sections out"
    if lora and fsdp:
        yield "training.fsdp=true has no use for lora, whose trained weights are small; set training.fsdp=false"
    if lora and model.scratch is not None:
        yield "lora leaves random weights (model.scratch) as they are; set model.path, or leave the lora section out"
    if trains_parent and model.quantization is not None:
        yield (
            f"model.quantization={model.quantization} is for a frozen parent, but without draft_adapter or lora its "
            "weights are trained; set model.quantization=null, or give a draft_adapter or lora section"
        )
    if trains_parent and model.dtype == "bfloat16":
        # With 8 bits of mantissa most updates are lost: at lr 1e-5 a weight above 0.004 never moves.
        yield (
            "model.dtype=bfloat16 would round most updates of trained weights away; set model.dtype=float32 and "
            "training.mixed_precision=bf16"
        )


def _recipe(run: AdaptConfig) -> Iterator[str]:
    """Rules that are broken: which parts of the recipe go together."""
    recipe, b_max = run.recipe, run.growth.b_max
    random_starts = f"recipe.random_start_share={recipe.random_start_share}"
    annealing = f"recipe.annealed_mask_steps={recipe.annealed_mask_steps}"
    accept_weight = f"recipe.accept_weight={recipe.accept_weight:g}"
    if recipe.complementary and recipe.views % 2:
        yield f"recipe.views={recipe.views} is odd, but recipe.complementary needs pairs; use {recipe.views + 1}"
    if recipe.first_token == "noised":
        if recipe.prediction == "aligned":
            yield "recipe.first_token=noised is for shifted prediction: aligned positions predict first tokens anyway"
        if recipe.offset_decay is not None or recipe.taught or run.draft_adapter is not None:
            yield (
                "recipe.first_token=noised goes with none of recipe.offset_decay, soft_weight, accept_weight and "
                "draft_adapter, for a draft never has a first token; set recipe.first_token=clean"
            )
    if recipe.accept_weight and recipe.prediction == "aligned":  # then no draft is made behind a mask at offset 0
        yield f"{accept_weight} needs recipe.prediction=shifted; set that, or recipe.accept_weight=0"
    if recipe.context == "block_causal":
        needs = "needs recipe.context=context_causal; set that, or"
        if recipe.soft_weight:  # a clean token has seen the token that it would teach
            yield f"recipe.soft_weight={recipe.soft_weight:g} {needs} recipe.soft_weight=0"
        if recipe.accept_weight:
            yield f"{accept_weight} {needs} recipe.accept_weight=0"
        if recipe.random_start_share:  # blocks must start where decoding starts them, in both halves
            yield f"{random_starts} {needs} recipe.random_start_share=0"
        if recipe.annealed_mask_steps:  # a clean token has seen the rest of its block: the answer to the query
            yield f"{annealing} {needs} recipe.annealed_mask_steps=0"
    if recipe.annealed_mask_steps:
        if recipe.random_start_share:  # one coin decides over a pair of one block: both halves have the same blocks
            yield f"{random_starts} does not go with {annealing}; set one of them to 0"
        if run.growth.b_0 != b_max:
            yield f"{annealing} replaces block growth; set growth.b_0 to growth.b_max={b_max}"


def stage_configs(config: AdaptConfig) -> list[AdaptConfig]:
    """A run as one configuration for each of its stages; without stages, itself.

    A stage has what the run has but for what it sets itself. After the first, some things do not start again
    unless they are set: blocks stay at the size reached, mask annealing is over, values of the model's config stay
    replaced, and an optimizer that is carried over needs no warmup. `decoding` is the last one's.

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
        for adapter in ("draft_adapter", "lora", "correction"):
            if getattr(config, adapter) is not None:
                raise UsageError(f"{where}: {adapter} is trained in one stage; leave out stages, or {adapter}")
        values = {**whole, "output": str(Path(config.output) / f"stage-{number + 1}-{stage.name}")}
        if number + 1 < len(config.stages):
            values["decoding"] = {}  # it need not fit the blocks of a stage on the way
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


SET_FOR_THE_RUN = ("training.seed", "training.fsdp", "training.mixed_precision", "training.trackers", "optimizer.name")
"""Keys that a stage cannot change."""


def _overlaid(values: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings with those of `over` laid on top; lists are replaced whole."""
    mixed = dict(values)
    for key, value in over.items():
        below = mixed.get(key)
        mixed[key] = _overlaid(below, value) if isinstance(below, dict) and isinstance(value, Mapping) else value
    return mixed


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
        file = user_path(source, "configuration")
        try:
            values = read_yaml(file.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the configuration {source}: {one_line(error)}") from None
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
    if node is None and head == "0":
        return [_assign({} if rest else None, rest, value, key)]
    if node is not None and not isinstance(node, Mapping):
        raise UsageError(f"--{key}: '{head}' lies below a plain value")
    return {**(node or {}), head: _assign((node or {}).get(head), rest, value, key)}
