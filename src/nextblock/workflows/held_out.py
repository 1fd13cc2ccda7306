"""Measurements on held-out text, during a run and at its end."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from nextblock.attention.rule import block_diffusion_rule
from nextblock.data.rows import Rows
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.measure.likelihood import bits_per_byte, evaluation_rows
from nextblock.model.decoder import Decoder
from nextblock.model.loading import load_model
from nextblock.model.parent import load_parent
from nextblock.recipe import schedules
from nextblock.training.run import Run

STEPS_PER_BLOCK, SAMPLE_TOKENS, PROMPT_TOKENS = 4, 64, 32
"""Of the sample decoded while training."""


class SigtermReceived(Exception):
    """A measurement was left, as its process is to end."""


@torch.no_grad()
def evaluate_midway(run: Run, rows: Rows) -> dict[str, Any]:
    """Held-out losses in nats per scored token, and one sample decoding, at the block size of the step just done.

    The noise is the same each time. Each block of the sample gets STEPS_PER_BLOCK denoising steps, so that the
    number T of steps of the whole answer is proportional to 1 / b. The run goes on as if nothing had happened.
    """
    config = run.config
    # Every token counts alike, whatever is trained.
    recipe = config.recipe.model_copy(update={"offset_decay": None})
    block_size = schedules.block_size(run.step - 1, config.growth)
    objective = run.accelerator.unwrap_model(run.loss)
    modes = {module: module.training for module in objective.modules()}
    objective.eval()
    parts, size = [], config.training.micro_batch_rows or len(rows)
    for start in range(0, len(rows), size):
        view = run.noised(rows.slice(start, min(start + size, len(rows))), block_size, 0, recipe)
        losses = objective(view.to(run.accelerator.device), block_diffusion_rule(recipe.context))
        parts.append([float(losses.diffusion), losses.diffusion_tokens, float(losses.ar), losses.ar_tokens])
    diffusion, diffusion_tokens, ar, ar_tokens = map(sum, zip(*parts, strict=True))

    settings = run.settings and run.settings.model_copy(update={"block_size": block_size})
    lm = BlockDiffusionLM(run.decoder.model, run.tokenizer, settings, run.decoder.adapter, compile=False)
    prompt = first_prompt(rows)
    options: dict[str, Any] = {"max_new_tokens": max(1, min(SAMPLE_TOKENS, config.data.row_length - len(prompt)))}
    if block_size == 1:
        options["mode"] = "ar"
    else:
        options |= {"mode": "diffusion", "threshold": None, "steps": STEPS_PER_BLOCK}
    sharded: Any = objective if run.is_sharded else None
    if sharded is not None:  # embedding and head, which layers do not gather as they do their own
        sharded.unshard()
    out = lm.generate(prompt[None], **options)
    if sharded is not None:
        sharded.reshard()
    for module, mode in modes.items():
        module.training = mode
    return {
        "block_size": block_size,
        "diffusion_loss": diffusion / diffusion_tokens if diffusion_tokens else math.nan,
        "ar_loss": ar / ar_tokens if ar_tokens else math.nan,
        "prompt": run.tokenizer.decode(prompt.tolist()),
        "sample": out.texts[0],
        "tokens_per_forward": out.stats.tokens_per_forward,
    }


def first_prompt(rows: Rows) -> Tensor:
    """The first document's context, int64 [T]; of plain text, which has none, its beginning."""
    own = rows.document[0] == 0
    tokens, context = rows.tokens[0][own], int((rows.offset[0][own] < 0).long().cumprod(0).sum())
    return tokens[: context or max(1, min(PROMPT_TOKENS, len(tokens) // 2))]


def held_out_bits(run: Run, received: list[int]) -> list[dict[str, Any]]:
    """Bits per byte of the parent (AR) and of the adapted model (AR and the diffusion bound).

    Each is alone on the device: what the run holds goes before, so that it is of no more use, and the adapted model
    before the parent is loaded, as it was for training (in 4 bits, if the run held it so).

    Raises:
        SigtermReceived: a signal came, before or meanwhile (`received`, of `stop_on_sigterm`).
    """

    def leave_on_signal() -> None:
        if received:
            raise SigtermReceived

    config, rows, tokenizer, accelerator = run.config, run.held_out, run.tokenizer, run.accelerator
    if rows is None:
        accelerator.print(
            "no document is held out, so bits per byte are not measured; raise data.held_out, or give more"
        )
        return []
    measure = functools.partial(bits_per_byte, batch_rows=evaluation_rows(config), on_pass=leave_on_signal)
    fill = config.recipe.fill_last_block
    decoder, settings, sharded, output = run.decoder, run.settings, run.is_sharded, run.output
    device, dtype = decoder.device, decoder.model.dtype
    run.loss.eval()
    vars(run).clear()
    if sharded:  # only this rank measures, and it holds a part of the weights
        del decoder
        accelerator.free_memory()
        code = config.model.trust_remote_code
        decoder = Decoder(load_model(output, dtype=dtype, device=device, trust_remote_code=code))
    accelerator.free_memory()
    found = [("adapted", one) for one in measure(decoder, tokenizer, rows, settings, fill_last_block=fill)]
    if config.model.scratch is None:
        del decoder
        accelerator.free_memory()
        found = [("parent", one) for one in measure(load_parent(config.model, device), tokenizer, rows)] + found
    return [{"model": model, **asdict(one)} for model, one in found]
