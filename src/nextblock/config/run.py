"""A whole run's configuration, its stages, and how it is read from YAML and options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, model_validator

from nextblock.config.errors import UsageError
from nextblock.config.sections import (
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
