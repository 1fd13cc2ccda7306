"""What outlives a step: the run with all that its steps need, and what each of them reports."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from nextblock.config.run import AdaptConfig
from nextblock.config.sections import BlockDiffusionSettings, RecipeConfig
from nextblock.data.encode import span_ends
from nextblock.data.feed import Feed
from nextblock.data.rows import Rows
from nextblock.model.decoder import Decoder
from nextblock.model.lora import LoraAdapter
from nextblock.recipe.corruption import TwoView, corrupt
from nextblock.training.checkpoint import CheckpointWriter
from nextblock.training.flops import Products, kind_of_training, peak_flops, updates
from nextblock.training.log import LossProfile

LOG = "log.jsonl"
RESOLVED_CONFIG = "nextblock.yaml"
"""Files in a run's folder."""


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step did. Losses in nats per scored token; NaN where nothing was scored."""

    step: int
    block_size: int
    diffusion_loss: float
    ar_loss: float
    loss: float
    ar_weight: float
    learning_rate: float
    grad_norm: float
    tokens: int
    step_seconds: float
    soft_loss: float = math.nan
    """Distillation: mean KL from the clean half's predictions over the masked tokens; NaN where `soft_weight` is 0."""
    lost_drafts: float = math.nan
    """Share of the masked tokens that the AR head is expected to reject in blocks masked whole, or to lose behind one
    that it rejects; NaN where `accept_weight` is 0."""
    device_tokens_per_second: float = math.nan
    peak_memory_gib: float = math.nan
    """Of the main process since it began: allocated on CUDA, resident elsewhere."""
    mfu: float | None = None
    """Useful floating-point operations per second over the device's bfloat16 peak, where that is known."""
    stage: str | None = None
    stage_number: int | None = None
    """From 1; None in a run without stages."""

    @property
    def tokens_per_second(self) -> float:
        """Clean tokens with offset >= 0 that the step trained on, per second."""
        return self.tokens / self.step_seconds


@dataclass
class Run:
    """Everything that a step needs and that outlives it."""

    config: AdaptConfig
    accelerator: Accelerator
    tokenizer: Any
    decoder: Decoder
    loss: torch.nn.Module
    optimizer: torch.optim.Optimizer
    feed: Feed
    mask_token_id: int | None
    output: Path
    lora: LoraAdapter | None = None
    step: int = 0
    profile: LossProfile | None = None
    held_out: Rows | None = None  # of rank 0: the first held-out rows, where the data leave any
    first_step: int = 0  # steps of the stages before this one
    stage: str | None = None
    stage_number: int | None = None
    checkpoint: Path | None = None  # the last one that was begun, or gone on from
    seconds: float = 0.0  # of training until now, with checkpoints, evaluations and what was done before a resume
    changes: list[str] = field(default_factory=list)  # of the configuration, since the checkpoint gone on from
    finished: bool = False
    writer: CheckpointWriter = field(default_factory=CheckpointWriter)

    @cached_property
    def span_ends(self) -> list[int]:
        """Tokens that end a generated span: the end token and what ends a turn of chat."""
        return span_ends(self.tokenizer)

    def noised(self, rows: Rows, block_size: int, step: int, recipe: RecipeConfig | None = None) -> TwoView:
        """`corrupt` with what this run sets; `recipe` in place of the run's, if given."""
        return corrupt(
            rows,
            block_size,
            mask_token_id=self.mask_token_id or 0,  # None: at b = 1 nothing is masked
            end_token_id=self.span_ends,
            recipe=recipe or self.config.recipe,
            seed=self.config.training.seed,
            step=step,
        )

    @property
    def trained(self) -> torch.nn.Module:
        """What has been learned, so what a checkpoint holds: LoRA's, the draft adapter's or the correction head's
        weights, or all."""
        if self.lora is not None:
            return self.lora.weights
        return self.decoder.adapter or self.decoder.correction or self.decoder.model

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether one belongs at this step, wherever the run is stopped."""
        options = self.config.training
        return self.step % options.checkpoint_every == 0 or self.step == options.steps

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the model only (FSDP2)."""
        return self.accelerator.distributed_type == DistributedType.FSDP

    @property
    def peak_flops(self) -> float | None:
        """The bfloat16 peak that MFU is measured against; None where it is not known or another dtype computes."""
        low = self.config.training.mixed_precision == "bf16" or self.config.model.dtype == "bfloat16"
        return peak_flops(self.accelerator.device) if low else None

    def flops(self, view: TwoView, score_ar: bool) -> float:
        """Useful floating-point operations of a micro-batch; 0 where nothing is measured against them."""
        if self.peak_flops is None:
            return 0.0
        model, trained, kind = self.decoder.model, self.trained, kind_of_training(self.config)
        products = Products.of(model, () if kind == "full" else updates(trained))
        return products.of_view(kind, view, score_ar, self.config.recipe.taught).useful

    @property
    def settings(self) -> BlockDiffusionSettings | None:
        """What the checkpoint tells a sampler; None after plain AR training (b = 1 to the end)."""
        if self.mask_token_id is None or not self.config.masks:
            return None
        return BlockDiffusionSettings(
            block_size=self.config.growth.b_max,
            mask_token_id=self.mask_token_id,
            context=self.config.recipe.context,
            prediction=self.config.recipe.prediction,
            decoding=self.config.decoding,
        )
