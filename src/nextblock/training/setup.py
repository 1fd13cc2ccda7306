"""What a run needs before its first step: data, the parent and its adapters, the optimizer; each is checked."""

from __future__ import annotations

from collections.abc import Callable
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
from nextblock.data.mixture import NoDocument
from nextblock.data.rows import Rows, check_tokens
from nextblock.data.stream import RowStream
from nextblock.model.correction import Correction
from nextblock.model.decoder import Decoder
from nextblock.model.draft_adapter import new_adapter
from nextblock.model.loading import check_backward, weight_shapes
from nextblock.model.lora import LoraAdapter
from nextblock.model.mask_token import check_round_trip, check_vocabulary, choose_mask_token, fill_rows
from nextblock.model.parent import load_parent, parent_config, parent_tokenizer
from nextblock.model.positions import check_row_length
from nextblock.model.probe import probe, probe_adapter
from nextblock.model.training_mode import recompute_activations, run_in_parts, without_dropout
from nextblock.recipe.objective import TwoViewLoss
from nextblock.training.checkpoint import load_weights
from nextblock.training.devices import freed_at_once
from nextblock.training.launcher import check_batch, make_accelerator
from nextblock.training.ranks import errors_on_all_ranks, gather, is_main
from nextblock.training.run import Run
from nextblock.training.shards import BareParent, bare_parent, gathered


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


def check_stage(config: AdaptConfig, first: AdaptConfig) -> None:
    """UsageError for what is wrong with a later stage's data, row length, batch or model."""
    check_batch(config)
    RowStream(config.data, parent_tokenizer(config.model), seed=config.training.seed)
    check_row_length(config.data.row_length, parent_config(config.model))
    check_override(config.model, first.model)


def prepare(
    config: AdaptConfig, before: Path | None = None, checkpoint: Path | None = None, *, masks: bool | None = None
) -> Run:
    """Read data, load and check the parent, and hand both to accelerate. Writes nothing.

    Args:
        before: folder of the stage before, whose model this one goes on with; None: the parent.
        checkpoint: with the weights that the stage before ended with; None: those of its model, which may be rounded.
        masks: give the model a mask token, as this or a later stage needs it; None: as this one does.
    """
    accelerator = make_accelerator(config)
    model = config.model
    if before is not None:
        begin = {"path": str(before), "gguf_file": None, "revision": None, "tokenizer": None, "scratch": None}
        model = model.model_copy(update=begin)
    with errors_on_all_ranks():  # nothing in here communicates
        check_packages(config)
        torch.manual_seed(config.training.seed)  # for a parent that starts from random weights
        parent_config(model)  # what can be known without reading data or weights comes first
        if model.override and model.scratch is None:
            check_override(model, model.model_copy(update={"override": {}}))
    bare = bare_parent(model, config.correction, accelerator)
    with errors_on_all_ranks():
        tokenizer, feed, held_out = open_data(config, model, accelerator)
        decoder = bare.decoder if bare else load_parent(model, accelerator.device)
        check_parent(config, decoder, tokenizer, accelerator.device)
        if bare is None:
            if checkpoint is not None:
                load_weights(checkpoint, decoder.model)
            probe(decoder)
        vocabulary = decoder.vocabulary  # of the parent: rows that the mask token brings are untrained
        masks, fill = config.masks if masks is None else masks, bare.make_rows if bare else fill_rows
        decoder, mask_token_id = give_mask(config, decoder, tokenizer, masks, fill)
        # Look at the first batch, so that most bad data stops before anything is written.
        check_tokens(feed.peek(), vocabulary, mask_token_id)
        without_dropout(decoder.model)
        if not (bare or config.training.compile):  # which would not see through it
            run_in_parts(decoder)
        lora = None
        if config.lora is not None:
            lora = LoraAdapter(decoder.model, config.lora, mask_token_id, config.model.path)
    check_same_data(config, feed.digests)
    loss = bare and fill_shards(config, bare, accelerator, checkpoint)
    tell_dense_mask(config, decoder, accelerator)
    trained = lora.weights if lora is not None else decoder.adapter or decoder.correction or decoder.model
    trained.requires_grad_(True)
    if config.training.gradient_checkpointing:
        recompute_activations(decoder.model)
    if config.training.compile:
        decoder.model.base_model.compile()
    optimizer = make_optimizer(config.optimizer, trained)
    if loss is None:
        loss, optimizer = accelerator.prepare(TwoViewLoss(decoder), optimizer)
    else:
        optimizer = accelerator.prepare_optimizer(optimizer)
    output = Path(config.output)
    return Run(
        config, accelerator, tokenizer, decoder, loss, optimizer, feed, mask_token_id, output, lora, held_out=held_out
    )


def check_same_data(config: AdaptConfig, digests: list[str]) -> None:
    """UsageError if another rank reads other text. All ranks call it together.

    Args:
        digests: of this rank's sources.
    """
    ours, *others = gather(digests)
    for rank, theirs in enumerate(others, 1):
        for source, one, other in zip(config.data.sources, ours, theirs, strict=True):
            if one != other:
                raise UsageError(
                    f"data source {source.path} holds other text on rank {rank} than on rank 0; give all machines the "
                    "same files"
                )


def check_packages(config: AdaptConfig) -> None:
    """UsageError for a package that the configuration needs and that is not installed."""
    if config.lora is not None:
        require("peft", "lora", "lora")
    if config.optimizer.name == "adamw_8bit" and not is_bnb_available():
        raise UsageError("optimizer.name=adamw_8bit needs bitsandbytes; pip install bitsandbytes, or use adamw")


def open_data(config: AdaptConfig, model: ModelConfig, accelerator: Accelerator) -> tuple[Any, Feed, Rows | None]:
    """Tokenizer, this rank's feed of rows, and on rank 0 the held-out rows."""
    tokenizer = parent_tokenizer(model)
    feed = Feed(
        config.data,
        tokenizer,
        seed=config.training.seed,
        batch_rows=config.training.batch_rows,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
    )
    return tokenizer, feed, held_out_rows(config, tokenizer) if is_main() else None


def check_parent(config: AdaptConfig, decoder: Decoder, tokenizer: Any, device: torch.device) -> None:
    """UsageError for what is wrong with a parent, whatever its weights are."""
    check_backward(decoder.attention, device.type)
    check_vocabulary(tokenizer, decoder.vocabulary)
    check_row_length(config.data.row_length, decoder.model.config)


def fill_shards(config: AdaptConfig, bare: BareParent, accelerator: Accelerator, checkpoint: Path | None) -> Any:
    """The objective over a parent in shards, with the weights of `checkpoint`, if given, and tried out."""

    def try_out() -> None:
        probe(bare.decoder)
        if not config.training.compile:
            run_in_parts(bare.decoder)

    with freed_at_once():
        loss = bare.shard(accelerator)
        with errors_on_all_ranks():
            if checkpoint is not None:
                load_weights(checkpoint, bare.decoder.model)
        gathered(loss, try_out)
    return loss


def give_mask(
    config: AdaptConfig, decoder: Decoder, tokenizer: Any, masks: bool, fill: Callable[[Decoder, range], None]
) -> tuple[Decoder, int | None]:
    """The parent with its draft adapter, if it gets one, and the id of the mask token; None where none is needed.

    Args:
        fill: as of `choose_mask_token`.
    """
    if config.draft_adapter is not None:
        adapter = new_adapter(decoder.model, config.draft_adapter, config.correction)
        decoder = Decoder(decoder.model, adapter)
        probe_adapter(decoder)
        return decoder, adapter.mask_token_id
    if not masks:
        return decoder, None
    mask_token_id = choose_mask_token(decoder, tokenizer, config.model.mask_token, fill)
    if mask_token_id in span_ends(tokenizer):
        raise UsageError(
            f"mask token id {mask_token_id} ends the turns of the chat template; set model.mask_token to another"
        )
    check_round_trip(tokenizer, mask_token_id)
    if config.correction is not None:
        decoder.model.requires_grad_(False)
        decoder.model.correction = Correction(decoder.vocabulary, config.correction, decoder.device)
    return decoder, mask_token_id


def held_out_rows(config: AdaptConfig, tokenizer: Any) -> Rows | None:
    """The first held-out rows, or None where none are wanted or left (a single document, `data.held_out` = 0).

    Prints what is left out of the measurements on them.
    """
    if not (config.data.held_out and config.training.evaluate_rows):
        return None
    try:
        stream = RowStream(config.data, tokenizer, seed=config.training.seed, held_out=True)
        rows = stream.next(config.training.evaluate_rows)
    except NoDocument as error:
        every = f" (training.evaluate_every={config.training.evaluate_every})" * bool(config.training.evaluate_every)
        print(f"held-out text: none, so nothing is measured on it{every}: {error}")
        return None
    for path in stream.without:
        print(
            f"held-out text: no document of {path} is held out with data.held_out={config.data.held_out}, so what is "
            "measured on it is of the other sources"
        )
    return rows


def tell_dense_mask(config: AdaptConfig, decoder: Decoder, accelerator: Accelerator) -> None:
    """Print the most that the dense masks of one forward pass take, where there are any."""
    rows = config.training.batch_rows // accelerator.num_processes
    rows, length = min(config.training.micro_batch_rows or rows, rows), config.data.row_length
    noised = config.recipe.views * length if config.masks else 0
    both, size = noised + length, decoder.dense_mask_bytes
    drafting = decoder.adapter is not None
    if most := size(rows, length, length) + size(rows, noised, both) if drafting else size(rows, both, both):
        accelerator.print(
            f"attention: '{decoder.attention}' with a dense mask, up to {most / 2**20:,.0f} MiB for each forward pass "
            "of a process; shorter rows or a smaller training.micro_batch_rows make it less"
        )


def make_optimizer(options: OptimizerConfig, trained: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices alone, its states in 32 or in 8 bits."""
    decay = [p for p in trained.parameters() if p.ndim >= 2]
    plain = [p for p in trained.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": options.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    betas = (options.beta_1, options.beta_2)
    if options.name == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, betas=betas, fused=True)
    from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]  # see `check_packages`

    return AdamW8bit(groups, lr=options.lr, betas=betas)
