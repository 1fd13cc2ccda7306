"""What text costs under a model: exact bits per byte and perplexity as AR, and the diffusion bound of block sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from nextblock.config.errors import UsageError
from nextblock.config.progress import Update
from nextblock.config.sections import Source
from nextblock.data.cursors import HubStream
from nextblock.data.encode import encode_batch
from nextblock.data.records import Record
from nextblock.data.rows import Document, Rows, check_tokens, collate, cut, pack
from nextblock.data.sources import place_of, read_source
from nextblock.data.stream import BATCH_BYTES, BATCH_DOCUMENTS
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.measure.likelihood import BitsPerByte, bits_per_byte
from nextblock.model.loading import no_tokenizer
from nextblock.tasks import get_task


class TextScore(NamedTuple):
    """What text costs, and what of it was not scored.

    row_length: the longest context; no more than the model has positions for.
    documents: how many were read.
    truncated: of these, prompts and chats that were cut at the end of a row.
    skipped: of these, those with nothing to generate within a row.
    """

    measures: list[BitsPerByte]
    row_length: int
    documents: int
    truncated: int
    skipped: int


def text_likelihood(
    lm: BlockDiffusionLM,
    source: Source,
    *,
    block_sizes: Sequence[int] = (),
    draws: int = 8,
    row_length: int = 1024,
    batch_rows: int = 4,
    on_documents: Update = lambda done, total: None,
) -> TextScore:
    """Score the generated tokens of a source: the whole of texts, completions, assistants' turns.

    Args:
        source: where the text is; `source.examples` keeps the first documents, and a `source.split` of None is "test".
        block_sizes: of the bound; default: the checkpoint's. A model without settings is scored as AR alone.
        draws: of the noise, for each row and block size.
        row_length: longest context; longer texts are cut into parts of it, whose first tokens are given; of longer
            prompts and chats only the first part is scored.
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
    if block_sizes and not 1 <= min(block_sizes) <= max(block_sizes) <= row_length:
        raise UsageError(
            f"block_sizes={','.join(map(str, block_sizes))}: each must lie in [1, row_length={row_length}]"
        )
    if lm.refusal and settings is not None:
        raise UsageError(lm.refusal)
    if longest is not None:
        row_length = min(row_length, longest)
    room = max(block_sizes or [settings.block_size if settings else 1])
    texts = _Texts(lm, source, row_length)
    batches = _batches(texts, batch_rows, room, on_documents)
    measures = bits_per_byte(lm.decoder, lm.tokenizer, batches, settings, block_sizes=block_sizes, draws=draws)
    return TextScore(measures, row_length, texts.read, texts.truncated, texts.skipped)


class _Texts:
    """The documents of a source, each once and tokenised, with a count of what is not scored of them."""

    def __init__(self, lm: BlockDiffusionLM, source: Source, row_length: int) -> None:
        self.lm, self.row_length, self.path = lm, row_length, source.path
        self.read = self.truncated = self.skipped = 0
        self.total, self._records = _records(source, lm.tokenizer)

    def group(self) -> list[Document]:
        """The next documents, as many as one call of the tokenizer takes; none at the end."""
        documents = encode_batch(_group(self._records), self.lm.tokenizer)
        for document in documents:
            kept = sum(len(piece.tokens) for piece in cut(document, self.row_length))
            self.skipped += not kept
            self.truncated += 0 < kept < len(document.tokens)
        self.read += len(documents)
        return documents


def _batches(texts: _Texts, batch_rows: int, room: int, on_documents: Update) -> Iterator[Rows]:
    """The source once, in packed rows; UsageError if nothing in it is generated. `room`: the largest block."""
    lm, row_length = texts.lm, texts.row_length
    number = done = 0
    while group := texts.group():
        packed = pack(group, row_length)
        # One length for the whole group, with room to fill last blocks, so that no figure depends on the batch.
        length = min(row_length, room + max((sum(len(piece.tokens) for piece in row) for row in packed), default=0))
        for first in range(0, len(packed), batch_rows):
            batch = packed[first : first + batch_rows]
            rows = collate(batch, length, 0, 0, number)
            check_tokens(rows, lm.decoder.vocabulary, lm.settings.mask_token_id if lm.settings else None)
            number += len(batch)
            yield rows
            read = done + len(group) * (first + len(batch)) // len(packed)
            on_documents(read, texts.total or read)
        done += len(group)
    if not number and texts.skipped:
        raise UsageError(
            f"{texts.path}: none of its {texts.skipped} documents has anything to score within "
            f"row_length={row_length}; give longer rows, or documents with text"
        )
    if not number:
        raise UsageError(f"{texts.path} has nothing to score; give at least one document with text")


def _group(records: Iterator[Record]) -> list[Record]:
    """The next documents, as many as one call of the tokenizer takes; none at the end."""
    group: list[Record] = []
    size = 0
    while len(group) < BATCH_DOCUMENTS and size < BATCH_BYTES and (record := next(records, None)):
        group.append(record)
        size += len(str(record.value))
    return group


def _records(source: Source, tokenizer: Any) -> tuple[int | None, Iterator[Record]]:
    """The documents of a source, each once, and their number where it is known."""
    if place_of(source) == "task" and source.examples is None:
        count = get_task(source.path.removeprefix("task:")).count
        source = source.model_copy(update={"examples": count})
    opened = read_source(source, usual_split="test")
    if isinstance(opened, HubStream):

        def stream() -> Iterator[Record]:
            while (record := opened.take()) and not opened.epoch:
                yield record

        return source.examples, stream()
    opened.check(tokenizer)
    if opened.count is None:
        raise UsageError(f"{source.path} has no end; set the number of problems with --examples")
    return opened.count, map(opened.read, range(opened.count))
