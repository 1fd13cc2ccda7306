"""What text costs under a model: exact bits per byte and perplexity as AR, and the diffusion bound of block sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nextblock.config.errors import UsageError
from nextblock.config.progress import Update
from nextblock.config.sections import Source
from nextblock.data.cursors import HubStream
from nextblock.data.encode import encode_batch
from nextblock.data.records import Record
from nextblock.data.rows import Rows, check_tokens, collate, pack
from nextblock.data.sources import read_source
from nextblock.data.stream import BATCH_BYTES, BATCH_DOCUMENTS
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.measure.likelihood import BitsPerByte, bits_per_byte
from nextblock.model.loading import no_tokenizer


def text_likelihood(
    lm: BlockDiffusionLM,
    source: Source,
    *,
    block_sizes: Sequence[int] = (),
    draws: int = 8,
    row_length: int = 1024,
    batch_rows: int = 4,
    on_documents: Update = lambda done, total: None,
) -> list[BitsPerByte]:
    """Score the generated tokens of a source: the whole of texts, completions, assistants' turns.

    Args:
        source: where the text is; `source.examples` keeps the first documents.
        block_sizes: of the bound; default: the checkpoint's. A model without settings is scored as AR alone.
        draws: of the noise, for each row and block size.
        row_length: longest context; longer texts are cut into parts of it, whose first tokens are given.
        batch_rows: rows in one forward pass.
        on_documents: called with the documents scored, and their number or, where that is unknown, the same again.
    Raises:
        UsageError: a source that cannot be read, or options that do not fit the model.
    """
    settings, longest = lm.settings, lm.decoder.max_positions
    if lm.tokenizer is None:
        raise UsageError(f"{no_tokenizer(lm.model.name_or_path or '')}; bits per byte need its text")
    if block_sizes and settings is None:
        raise UsageError(
            f"block_sizes={','.join(map(str, block_sizes))}: this checkpoint has no block_diffusion settings, so it "
            "is scored as AR only; leave them out, or adapt it with `nextblock adapt`"
        )
    if block_sizes and min(block_sizes) < 1:
        raise UsageError(f"block_sizes={','.join(map(str, block_sizes))}: each must be at least 1")
    if lm.refusal and settings is not None:
        raise UsageError(lm.refusal)
    if longest is not None:
        row_length = min(row_length, longest)
    room = max(block_sizes or [settings.block_size if settings else 1])
    batches = _batches(lm, source, row_length, batch_rows, room, on_documents)
    return bits_per_byte(lm.decoder, lm.tokenizer, batches, settings, block_sizes=block_sizes, draws=draws)


def _batches(
    lm: BlockDiffusionLM, source: Source, row_length: int, batch_rows: int, room: int, on_documents: Update
) -> Iterator[Rows]:
    """The source once, in packed rows; UsageError if nothing in it is generated. `room`: the largest block."""
    number = done = 0
    total, records = _records(source)
    while group := _group(records):
        packed = pack(encode_batch(group, lm.tokenizer), row_length)
        # One length for the whole group, with room to fill last blocks, so that no figure depends on the batch.
        length = min(row_length, room + max((sum(len(piece.tokens) for piece in row) for row in packed), default=0))
        for first in range(0, len(packed), batch_rows):
            batch = packed[first : first + batch_rows]
            rows = collate(batch, length, 0, 0, number)
            check_tokens(rows, lm.decoder.vocabulary, lm.settings.mask_token_id if lm.settings else None)
            number += len(batch)
            yield rows
            read = done + len(group) * (first + len(batch)) // len(packed)
            on_documents(read, total or read)
        done += len(group)
    if not number:
        raise UsageError(f"{source.path} has nothing to score; give at least one document with text")


def _group(records: Iterator[Record]) -> list[Record]:
    """The next documents, as many as one call of the tokenizer takes; none at the end."""
    group: list[Record] = []
    size = 0
    while len(group) < BATCH_DOCUMENTS and size < BATCH_BYTES and (record := next(records, None)):
        group.append(record)
        size += len(str(record.value))
    return group


def _records(source: Source) -> tuple[int | None, Iterator[Record]]:
    """The documents of a source, each once, and their number where it is known."""
    opened = read_source(source)
    if isinstance(opened, HubStream):

        def stream() -> Iterator[Record]:
            while (record := opened.take()) and not opened.epoch:
                yield record

        return source.examples, stream()
    if opened.count is None:
        raise UsageError(f"{source.path} has no end; set the number of problems with --examples")
    return opened.count, map(opened.read, range(opened.count))
