"""`load` a checkpoint and `generate`: prompts in; texts, token ids and honest counts out.

Letters: B prompts, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nextblock.config.errors import UsageError, nearest
from nextblock.config.sections import BlockDiffusionSettings, with_gguf
from nextblock.config.signatures import takes
from nextblock.data.text import TextStream, decode
from nextblock.decoding.batch import Batch
from nextblock.decoding.compiled import StaticPasses
from nextblock.decoding.engine import run
from nextblock.decoding.events import Event, Finish, RowFinished, Stats
from nextblock.decoding.head import Processor
from nextblock.decoding.pace import costs_of
from nextblock.decoding.request import CallOptions, Prompts, Request, make_request
from nextblock.decoding.rows import Row
from nextblock.model.adapter_files import load_adapter, take_correction
from nextblock.model.decoder import Decoder
from nextblock.model.draft_adapter import DraftAdapter
from nextblock.model.loading import (
    GivenSettings,
    choose_attention,
    load_model,
    load_tokenizer,
    read_config,
    read_settings,
    resolve_adapter,
    weights_folder,
)
from nextblock.model.mask_token import check_given_mask
from nextblock.model.probe import why_no_blocks

PASSES = "_nextblock_passes"
"""Attribute of a model that was decoded: its compiled passes."""


@dataclass
class Generation:
    """What `generate` returns.

    texts: answers, without special tokens and cut before a stop string; empty without a tokenizer.
    sequences: int64 [B, T], prompt and answer, padded on the right.
    answers: token ids of each answer, end token included.
    finish: why each answer ended.
    stats: what it cost.
    """

    texts: list[str]
    sequences: Tensor
    answers: list[list[int]]
    finish: list[Finish]
    stats: Stats


class Stream(Iterator[Event], AbstractContextManager["Stream"]):
    """The events of one call, as they happen; `rows` and `stats` grow with them.

    One that is not read to its end keeps the memory of its cache until it is closed, as `with` does, or dropped.
    """

    def __init__(self, request: Request, stats: Stats, events: Generator[Event]) -> None:
        self.rows: list[Row] = request.rows
        self.stop, self.opening = request.stop, request.opening
        self.stats = stats
        self._events = events

    def __iter__(self) -> Generator[Event]:
        return self._events

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """Give up what is left."""
        self._events.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass
class BlockDiffusionLM:
    """A model, its tokenizer (None: token ids only) and its block-diffusion settings (None: ar mode only).

    adapter: a draft adapter that acts on noised positions; the settings are then its own.
    compile: decode with `torch.compile` and a static cache; None: on CUDA alone.
    refusal: from `why_no_blocks`; then one prompt in ar mode is all that is decoded.
    """

    model: PreTrainedModel
    tokenizer: Any
    settings: BlockDiffusionSettings | None = None
    adapter: DraftAdapter | None = None
    compile: bool | None = None
    refusal: str | None = None
    decoder: Decoder = field(init=False, repr=False)
    passes: StaticPasses | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        self.decoder = Decoder(self.model, self.adapter)
        if self.decoder.device.type == "cuda" if self.compile is None else self.compile:
            self.passes = compiled_passes(self.model)

    @takes(CallOptions)
    def generate(self, prompts: Prompts, **options: Any) -> Generation:
        """Answer every prompt.

        Args:
            prompts: one text, a list of texts, one chat (a list of {"role", "content"}), a list of chats, or
                token ids int64 [B, T].
            options: those of `CallOptions`; what is left out is taken from the checkpoint's `decoding` settings,
                then from the defaults.
        Raises:
            UsageError: bad input, in one line.
        """
        began = time.perf_counter()
        request = make_request(self.decoder, self.tokenizer, self.settings, prompts, options)
        stream = self.run(request, began)
        for _ in stream:
            pass
        rows, told = stream.rows, zip(stream.rows, stream.stop, stream.opening, strict=True)
        return Generation(
            texts=[] if self.tokenizer is None else [self._text(*row) for row in told],
            sequences=sequences(rows, self._padding_id(rows)).to(self.decoder.device),
            answers=[row.answer for row in rows],
            finish=[row.finish for row in rows if row.finish is not None],
            stats=stream.stats,
        )

    @takes(CallOptions)
    def stream(self, prompts: Prompts, **options: Any) -> Stream:
        """The same as `generate`, as an iterator of events. Bad input is refused here, not at the first event."""
        request = make_request(self.decoder, self.tokenizer, self.settings, prompts, options)
        return self.run(request, time.perf_counter(), confidence=True)

    @takes(CallOptions)
    def stream_text(self, prompts: Prompts, **options: Any) -> Iterator[tuple[int, str]]:
        """The same as `generate`, as pieces (row, text); no piece splits a character or is ever taken back."""
        if self.tokenizer is None:
            raise UsageError("stream_text: this model has no tokenizer; use `stream`, which gives token ids")
        request = make_request(self.decoder, self.tokenizer, self.settings, prompts, options)
        return self._pieces(self.run(request, time.perf_counter()))

    def _pieces(self, stream: Stream) -> Iterator[tuple[int, str]]:
        texts = [TextStream(self.tokenizer, *row) for row in zip(stream.stop, stream.opening, strict=True)]
        with stream:
            for event in stream:
                row, text = stream.rows[event.row], texts[event.row]
                # In diffusion mode a block is decided in any order: `answer` is what is decided without a gap.
                for token in row.answer[len(text.tokens) :]:
                    if piece := text.put(token):
                        yield event.row, piece
                if isinstance(event, RowFinished) and (piece := text.end()):
                    yield event.row, piece

    def run(
        self, request: Request, began: float, processor: Processor | None = None, *, confidence: bool = False
    ) -> Stream:
        """Decode a checked request.

        Args:
            began: `time.perf_counter()` when the clock started.
            processor: logits processors, for ar and speculative mode.
            confidence: whether anybody reads that of `Committed`; else it is nan outside diffusion mode.
        Raises:
            UsageError: a model that ignores the mask or the positions which blocks and batches need.
        """
        if self.refusal and (request.config.mode != "ar" or len(request.rows) > 1):
            raise UsageError(self.refusal)
        stats = Stats(rows=len(request.rows))
        parts = self.decoder, self.settings, request.config, request.rows, stats, processor, self.passes, confidence

        def make() -> Batch:  # costs are measured before the batch has the memory of compiled passes
            if not any(row.paced for row in request.rows):
                return Batch(*parts)
            costs = costs_of(*parts[:3], len(request.rows), self.passes)
            # A draw depends on the length of its draft: torch's own seed repeats it, whatever was decoded before.
            return Batch(*parts, costs.unlearned() if request.config.temperature else costs)

        return Stream(request, stats, run(make, stats, began))

    def _text(self, row: Row, stop: tuple[str, ...], opening: str) -> str:
        if not stop:
            return decode(self.tokenizer, row.answer).removeprefix(opening)
        # Whatever ended the row: what only its last bytes made whole may hold a stop string, too.
        text = TextStream(self.tokenizer, stop, opening)
        return "".join([*map(text.put, row.answer), text.end()])

    def _padding_id(self, rows: list[Row]) -> int:
        for source in (self.tokenizer, self.model.config):
            if (found := getattr(source, "pad_token_id", None)) is not None and found >= 0:  # -1 in old configs
                return int(found)
        return min(rows[0].end_tokens, default=0)


def compiled_passes(model: PreTrainedModel) -> StaticPasses:
    """The compiled passes of a model, one set for all who decode it."""
    if not hasattr(model, PASSES):
        setattr(model, PASSES, StaticPasses())
    return getattr(model, PASSES)


def sequences(rows: list[Row], padding: int) -> Tensor:
    """int64 [B, T]: what stood in front of the prompt, prompt, answer, padding."""
    lines = [row.padding + row.prompt + row.answer for row in rows]
    longest = max(map(len, lines))
    return torch.tensor([line + [padding] * (longest - len(line)) for line in lines])


def load(
    path: str | Path,
    *,
    draft_adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    attention: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    compile: bool | None = None,
    settings: GivenSettings | None = None,
    gguf_file: str | None = None,
) -> BlockDiffusionLM:
    """Load a checkpoint with its tokenizer and settings; a plain AR model loads too, for ar mode.

    Args:
        path: shipped name, local folder, Hub id, or a GGUF file (of the Hub: OWNER/NAME/FILE.gguf).
        draft_adapter: folder of a draft adapter that was trained for this model, or the shipped tiny-draft.
        dtype: None: float32 on CPU, the checkpoint's own elsewhere.
        device: None: CUDA if there is one.
        attention: "auto" (SDPA, or eager where scores are soft-capped), "sdpa" or "eager".
        compile: decode with `torch.compile` and a static cache; None: on CUDA alone. The first calls compile.
        settings: in place of those in config.json; see `model.GivenSettings`.
        gguf_file: name of a GGUF file in the folder or Hub id `path`.
    Raises:
        UsageError: what cannot be loaded.
    """
    choices = ("auto", "sdpa", "eager")
    if attention not in choices:
        raise UsageError(f"attention={attention!r} cannot decode with dense masks{nearest(attention, choices)}")
    if settings is not None and draft_adapter is not None:
        raise UsageError("settings and a draft adapter do not go together: an adapter brings its own; leave one out")
    path = with_gguf(str(path), gguf_file)
    config = read_config(path, revision, trust_remote_code)
    given, settings = settings, read_settings(config, settings)
    adapter_folder = None if draft_adapter is None else resolve_adapter(draft_adapter)
    if attention == "auto":
        attention = choose_attention(config, "auto", torch.device("cpu"))
    code = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = load_model(path, dtype=dtype, attention=attention, device=device, **code)
    refusal = why_no_blocks(model)
    tokenizer, adapter = load_tokenizer(path, revision, trust_remote_code), None
    if settings is not None:
        check_given_mask(path, Decoder(model).vocabulary, tokenizer, settings, given=given is not None)
        if given is not None:
            model.config.block_diffusion = settings.model_dump()  # where `model.generate` and `save_pretrained` look
    folder = weights_folder(path, revision)
    if adapter_folder is not None:
        adapter, settings = load_adapter(adapter_folder, model, folder)
    elif settings is not None:
        take_correction(model, folder, settings)
    return BlockDiffusionLM(model, tokenizer, settings, adapter, compile, refusal)
