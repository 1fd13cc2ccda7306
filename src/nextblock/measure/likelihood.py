"""Bits per byte of held-out text: exact for AR, an upper bound for diffusion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from nextblock.config.errors import UsageError
from nextblock.config.run import AdaptConfig
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.data.encode import span_ends
from nextblock.data.rows import Rows
from nextblock.measure import words
from nextblock.model.decoder import Decoder
from nextblock.recipe.likelihood import ar_nats, bound_nats


@dataclass(frozen=True)
class BitsPerByte:
    """Held-out compression. `value` is exact for the AR measure and an upper bound for diffusion.

    bytes, tokens: what is paid for; `perplexity` is per token.
    standard_error: of `value`, by the draws of the noise; 0 where nothing is drawn, None from a single draw.
    """

    measure: str
    block_size: int | None
    value: float
    bytes: int
    tokens: int
    perplexity: float
    standard_error: float | None = 0.0


def evaluation_rows(config: AdaptConfig) -> int:
    """Rows of one forward pass of the final evaluation: no more than a process takes while training."""
    return min(4, config.training.micro_batch_rows or 4)


@torch.no_grad()
def bits_per_byte(
    decoder: Decoder,
    tokenizer: Any,
    rows: Rows | Iterable[Rows],
    settings: BlockDiffusionSettings | None = None,
    *,
    block_sizes: Sequence[int] = (),
    fill_last_block: bool = True,
    draws: int = 8,
    batch_rows: int = 4,
    on_pass: Callable[[], None] = lambda: None,
) -> list[BitsPerByte]:
    """Bits per UTF-8 byte of the generated tokens in `rows`; the first token of a plain document is given.

    Only the bound of a model with aligned prediction, which can predict that token, pays for it and counts its bytes.

    AR: exact, from the clean half. Diffusion, where there are `settings`: `bound_nats`.

    Args:
        decoder, tokenizer: the model.
        rows: held-out rows, or batches of them, of which one is held at a time.
        settings: mask token, context and prediction of the diffusion bound.
        block_sizes: those of the bound; default: that of the settings.
        fill_last_block: as the model was trained; without, the bound knows where a text ends.
        draws: noise draws averaged over.
        batch_rows: rows in one forward pass.
        on_pass: called before each forward pass; what it raises ends the measuring.
    """
    if isinstance(rows, Rows):
        whole = rows
        rows = (whole.slice(start, start + batch_rows) for start in range(0, len(whole), batch_rows))
    sizes = block_sizes or ([settings.block_size] if settings else [])
    bounds = [settings.model_copy(update={"block_size": size}) for size in sizes] if settings else []
    ends = span_ends(tokenizer) if fill_last_block else ()
    nats, variances = [0.0] * (1 + len(bounds)), [0.0] * len(bounds)
    paid, paid_with_first = [0, 0], [0, 0]
    for batch in rows:
        clean = ar_nats(decoder, batch, on_pass)
        nats[0] += float(clean.sum())
        for i, own in enumerate(bounds):
            drawn = bound_nats(decoder, own, batch, draws, clean=clean, ends=ends, on_pass=on_pass)
            nats[1 + i] += float(drawn.mean(0).sum())
            variances[i] += float(drawn.var(0).sum()) / draws if draws > 1 else math.nan
        for total, first in ((paid, False), (paid_with_first, True)):
            size, tokens = _scored(batch, tokenizer, first)
            total[0], total[1] = total[0] + size, total[1] + tokens

    def result(measure: str, size: int | None, nats: float, paid: list[int], variance: float) -> BitsPerByte:
        if not paid[0]:
            raise UsageError("nothing to score: each text has at most one token, which is given; give longer ones")
        scale = math.log(2) * paid[0]
        error = None if math.isnan(variance) else math.sqrt(variance) / scale
        perplexity = math.exp(min(nats / paid[1], 700))
        return BitsPerByte(measure, size, nats / scale, paid[0], paid[1], perplexity, error)

    results = [result("AR (exact)", None, nats[0], paid, 0.0)]
    for own, total, variance in zip(bounds, nats[1:], variances, strict=True):
        own_paid = paid if own.prediction == "shifted" else paid_with_first
        results.append(result("diffusion (bound)", own.block_size, total, own_paid, variance))
    return results


def _scored(rows: Rows, tokenizer: Any, first: bool = False) -> tuple[int, int]:
    """UTF-8 bytes and number of all tokens that the AR loss scores, with `first` of all generated ones.

    An end token has no bytes.
    """
    size = count = 0
    for row in range(len(rows)):
        document, offset, tokens = rows.document[row], rows.offset[row], rows.tokens[row]
        for index in range(int(document.max()) + 1):
            scored = (document == index) & (offset >= 0)
            scored &= first | ~((offset == 0) & (rows.position[row] == 0))
            text = tokenizer.decode(
                tokens[scored].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            size, count = size + _bytes(text), count + int(scored.sum())
    return size, count


def _bytes(text: str) -> int:
    """UTF-8 bytes that stand behind a decoded text, whose first and last character may be cut.

    A byte that begins no character decodes to U+FFFD by itself; so do the bytes of an unfinished one, together: they
    count as one, which is at most two too few for each end of a row.
    """
    inner = text.strip("\ufffd")
    return len(inner.encode("utf-8")) + len(text) - len(inner)


def likelihood_table(found: Sequence[BitsPerByte]) -> Table:
    """Bits per byte and perplexity of each measure; ± is the standard error by the draws of the noise."""
    table = Table(box=SIMPLE_HEAD)
    for heading in ("measure", "b", "bits per byte", "perplexity", "tokens", "bytes"):
        table.add_column(heading, justify="left" if heading == "measure" else "right", no_wrap=True)
    for one in found:
        error = f" ± {one.standard_error:.4f}" if one.standard_error else ""
        perplexity = f"{one.perplexity:.3g}" if one.perplexity > 1e6 else words.number(one.perplexity)
        figures = (f"{one.value:.4f}{error}", perplexity, f"{one.tokens:,}", f"{one.bytes:,}")
        table.add_row(one.measure, str(one.block_size or words.DASH), *figures)
    return table
