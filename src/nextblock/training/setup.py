"""What a run needs before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_bnb_available

from nextblock.config.errors import UsageError, require
from nextblock.config.run import AdaptConfig
from nextblock.config.sections import ModelConfig, OptimizerConfig
from nextblock.data.encode import span_ends
from nextblock.data.feed import Feed
from nextblock.data.rows import Rows, check_tokens
from nextblock.data.stream import NoDocument, RowStream
from nextblock.model.decoder import Decoder
from nextblock.model.draft_adapter import DraftAdapter
from nextblock.model.loading import weight_shapes
from nextblock.model.lora import LoraAdapter
from nextblock.model.mask_token import check_round_trip, choose_mask_token
from nextblock.model.parent import load_parent, parent_config, parent_tokenizer
from nextblock.model.positions import check_row_length
from nextblock.model.probe import probe, probe_adapter, recompute_activations, run_in_parts, without_dropout
from nextblock.recipe.objective import DraftLoss, TwoViewLoss
from nextblock.training.checkpoint import load_weights
from nextblock.training.launcher import make_accelerator
from nextblock.training.ranks import is_main, together
from nextblock.training.run import Run


def check_override(model: ModelConfig, before: ModelConfig) -> None:
    """UsageError where the values that `model.override` replaces make other weights than there were before."""
    wanted, there = (weight_shapes(parent_config(m), m.trust_remote_code) for m in (model, before))
    for name in sorted(wanted.keys() | there.keys()):
        if wanted.get(name) != there.get(name):
            sizes = (" x ".join(map(str, shapes.get(name, ()))) or "none" for shapes in (wanted, there))
            raise UsageError(
                f"model.override={dict(model.override)}: {name} would be {next(sizes)} and is {next(sizes)}; replace "
                "only values that leave the weights as they are"
            )


def prepare(
    config: AdaptConfig, before: Path | None = None, checkpoint: Path | None = None, *, masks: bool | None = None
) -> Run:
    """Read data, load and check the parent (or what the stage in the folder `before` has made of it), and hand
    both to accelerate. Writes nothing.

    Args:
        checkpoint: with the weights that the stage before ended with; None: those of its model, which may be rounded.
        masks: give the model a mask token, as this or a later stage needs it; None: as this one does.
    """
    accelerator = make_accelerator(config)
    with together():
        loaded = load(config, accelerator, before, checkpoint, masks=config.masks if masks is None else masks)
    tokenizer, feed, decoder, mask_token_id, lora, held_out = loaded
    trained = lora.weights if lora is not None else decoder.adapter or decoder.model
    trained.requires_grad_(True)
    if config.training.gradient_checkpointing:
        recompute_activations(decoder.model)
    if config.training.compile:
        decoder.model.base_model.compile()
    optimizer = make_optimizer(config.optimizer, trained)
    objective = TwoViewLoss(decoder) if decoder.adapter is None else DraftLoss(decoder)
    loss, optimizer = accelerator.prepare(objective, optimizer)
    output = Path(config.output)
    return Run(
        config, accelerator, tokenizer, decoder, loss, optimizer, feed, mask_token_id, output, lora, held_out=held_out
    )


def load(
    config: AdaptConfig, accelerator: Accelerator, before: Path | None, checkpoint: Path | None, *, masks: bool
) -> tuple[Any, Feed, Decoder, int | None, LoraAdapter | None, Rows | None]:
    """Tokenizer, data, parent (with its draft adapter), mask token id, LoRA and held-out rows, all checked.

    No communication.
    """
    if config.lora is not None:
        require("peft", "lora", "lora")
    if config.optimizer.name == "adamw_8bit" and not is_bnb_available():
        raise UsageError("optimizer.name=adamw_8bit needs bitsandbytes; pip install bitsandbytes, or use adamw")
    torch.manual_seed(config.training.seed)  # for a parent that starts from random weights
    model = config.model
    if before is not None:
        begin = {"path": str(before), "revision": None, "tokenizer": None, "scratch": None}
        model = model.model_copy(update=begin)
    parent_config(model)  # what can be known without reading data or weights comes first
    if model.override and model.scratch is None:
        check_override(model, model.model_copy(update={"override": {}}))
    tokenizer = parent_tokenizer(model)
    feed = Feed(
        config.data,
        tokenizer,
        seed=config.training.seed,
        batch_rows=config.training.batch_rows,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )
    held_out = held_out_rows(config, tokenizer) if is_main() else None
    decoder = load_parent(model, accelerator.device)
    if checkpoint is not None:
        load_weights(checkpoint, decoder.model)
    if decoder.attention == "flex_attention" and decoder.device.type == "cpu":
        raise UsageError("model.attention=flex_attention has no backward pass on CPU; use sdpa, or auto")
    if len(tokenizer) > decoder.vocabulary:  # else a new mask token would make rows for the missing ones, untrained
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {decoder.vocabulary}; "
            "use the tokenizer that belongs to the model"
        )
    check_row_length(config.data.row_length, decoder.model.config)
    probe(decoder)
    if config.draft_adapter is not None:
        adapter = DraftAdapter(decoder.model, config.draft_adapter)
        decoder, mask_token_id = Decoder(decoder.model, adapter), adapter.mask_token_id
        probe_adapter(decoder)
    elif masks:
        mask_token_id = choose_mask_token(decoder, tokenizer, model.mask_token)
        if mask_token_id in span_ends(tokenizer):
            raise UsageError(
                f"mask token id {mask_token_id} ends the turns of the chat template; set model.mask_token to another"
            )
        check_round_trip(tokenizer, mask_token_id)
    else:
        mask_token_id = None
    # Look at the first batch, so that most bad data stops before anything is written.
    check_tokens(feed.peek(), decoder.vocabulary, mask_token_id)
    without_dropout(decoder.model)
    if not config.training.compile:  # which would not see through it
        run_in_parts(decoder)
    if size := dense_mask_bytes(config, decoder, accelerator.num_processes):
        accelerator.print(
            f"attention: '{decoder.attention}' with a dense mask, up to {size / 2**20:,.0f} MiB for each forward pass "
            "of a process; shorter rows or a smaller training.micro_batch_rows make it less"
        )
    lora = None
    if config.lora is not None:
        lora = LoraAdapter(decoder.model, config.lora, mask_token_id, config.model.path)
    return tokenizer, feed, decoder, mask_token_id, lora, held_out


def held_out_rows(config: AdaptConfig, tokenizer: Any) -> Rows | None:
    """The first held-out rows, or None where none are wanted or left (a single document, `data.held_out` = 0)."""
    if not (config.data.held_out and config.training.evaluate_rows):
        return None
    try:
        stream = RowStream(config.data, tokenizer, seed=config.training.seed, held_out=True)
        return stream.next(config.training.evaluate_rows)
    except NoDocument:
        return None


def dense_mask_bytes(config: AdaptConfig, decoder: Decoder, processes: int) -> int:
    """The most that the dense masks of one forward pass take, where there are any."""
    rows = config.training.batch_rows // processes
    rows, length = min(config.training.micro_batch_rows or rows, rows), config.data.row_length
    noised = config.recipe.views * length if config.masks else 0
    if decoder.adapter is None:
        return decoder.dense_mask_bytes(rows, noised + length, noised + length)
    return decoder.dense_mask_bytes(rows, length, length) + decoder.dense_mask_bytes(rows, noised, noised + length)


def make_optimizer(options: OptimizerConfig, trained: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices alone, its states in 32 or in 8 bits."""
    decay = [p for p in trained.parameters() if p.ndim >= 2]
    plain = [p for p in trained.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    betas = (options.beta_1, options.beta_2)
    if options.name == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, betas=betas, fused=True)
    from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]  # checked by `load`

    return AdamW8bit(groups, lr=options.lr, betas=betas)
