"""The identities that define "correct", measured on a user's own model; `verify_model` lists them.

Random tokens in short rows: the laws hold for any weights, so nothing has to be trained or meaningful.
Letters: B rows, T tokens, V vocabulary, b block size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich import box
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask
from torch.nn.utils.rnn import pad_sequence

from nextblock.attention.masks import to_block_mask, to_dense
from nextblock.attention.rule import Places, Rule, block_diffusion_rule, within_window
from nextblock.config.errors import UsageError
from nextblock.config.sections import BlockDiffusionSettings, RecipeConfig
from nextblock.data.rows import Rows
from nextblock.decoding.batch import Batch
from nextblock.decoding.events import Stats
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.decoding.options import MODES, DecodingConfig, Mode
from nextblock.decoding.rows import Row
from nextblock.model.decoder import Decoder
from nextblock.model.loading import GivenSettings, load_model, load_tokenizer, read_settings
from nextblock.model.mask_token import check_mask_token, choose_mask_token
from nextblock.model.probe import probe
from nextblock.recipe.corruption import TwoView, corrupt
from nextblock.recipe.objective import TwoViewLoss

TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference that rounding explains, as a share of the largest value. float64 allows for the parts of
some models that are float32 in any dtype."""
ALWAYS_TRIED = 1024  # positions up to this are tried on any model
SCORES = 5e7  # attention scores of a pass, over heads and layers: beyond these a longer row costs too much
AR_WEIGHT = 0.5

Unit = Literal["relative", "tokens", "entries"]
Status = Literal["passed", "failed", "skipped"]
OnCheck = Callable[[int, int, str], None]
Identity = tuple[str, Callable[["_Subject"], float | None], float | None, Unit, int]
"""Name, how it is measured, and of the `Check`: tolerance, unit and positions."""


@dataclass(frozen=True)
class Check:
    """What came out of one identity.

    name: the law, in words, with its number.
    difference: the largest found: of logits or gradients over the largest of them, or a count of tokens or
        mask entries (`unit`). None where nothing was measured.
    tolerance: largest difference that passes, None likewise.
    reason: why it was skipped or could not be measured; else empty.
    positions: of the longest document, prompt or mask that it ran on.
    """

    name: str
    status: Status
    difference: float | None
    tolerance: float | None
    unit: Unit
    reason: str
    seconds: float
    positions: int


class _Skip(Exception):
    """An identity that does not apply to this model; the message says why."""


def verify(
    path: str | Path,
    *,
    mask_token: int | str | None = None,
    attention: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    settings: GivenSettings | None = None,
    on_check: OnCheck = lambda done, total, name: None,
) -> list[Check]:
    """Run the identities that apply on a checkpoint; nothing on disk is changed.

    Args:
        path: shipped name, local folder or Hub id; adapted or not, with or without a tokenizer.
        mask_token: id or text; default: the checkpoint's, else the tokenizer's, else the last id.
        attention: "auto", "sdpa", "flex_attention" or "eager".
        dtype: of the computation; float32 shows errors that bfloat16 hides.
        device: None: CUDA if there is one.
        settings: as of `load`.
        on_check: called before each check: checks done, checks in all, and its name.
    Raises:
        UsageError: the model cannot be loaded, ignores the mask or the positions that it is given or has too few of
            these, or the mask token is not in its vocabulary.
    """
    model = load_model(path, dtype=dtype, attention=attention, device=device)
    decoder, tokenizer, given = Decoder(model), load_tokenizer(path), read_settings(model.config, settings)
    if given is not None:
        model.config.block_diffusion = given.model_dump()
        if mask_token is None and settings is not None:
            check_mask_token(given.mask_token_id, decoder.vocabulary, "settings.mask_token_id")
    probe(decoder)
    mask_id = decoder.vocabulary - 1
    if mask_token is not None or given is not None or getattr(tokenizer, "mask_token_id", None) is not None:
        mask_id = choose_mask_token(decoder, tokenizer, mask_token, name="mask_token")
    given = (given or BlockDiffusionSettings(mask_token_id=mask_id)).model_copy(update={"mask_token_id": mask_id})
    return verify_model(BlockDiffusionLM(model, None, given), on_check)


def verify_model(lm: BlockDiffusionLM, on_check: OnCheck = lambda done, total, name: None) -> list[Check]:
    """Run the identities on a model in memory, which must have settings (block size, mask token, recipe)."""
    assert lm.settings is not None
    own, room = lm.settings.block_size, Decoder(lm.model).max_positions or 2**31
    # The longest of the shortest documents takes 2b + 8 positions, a prompt of one token with its answer 3b + 1.
    fitting = [b for b in range(2, 1 + (own if 1 < own < 8 else 8)) if max(2 * b + 8, 3 * b + 1) <= room]
    if not fitting:
        raise UsageError(f"the model has {room} positions and the identities need 12; verify one with more")
    settings = lm.settings.model_copy(update={"block_size": fitting[-1], "decoding": {}})
    subject = _Subject(BlockDiffusionLM(lm.model, None, settings), settings)
    relative = TOLERANCE.get(lm.model.dtype, 5e-2)
    row, prompt = subject.longest(subject.rows), max(len(p) for prompts in subject.prompts for p in prompts)
    context, short = subject.decoder.max_positions or 5, subject.longest(subject.short_rows)
    checks: list[Identity] = [
        ("the model obeys the mask and positions it is given", lambda s: probe(s.decoder), None, "relative", context),
        ("1  clean half = plain causal forward", _clean_half, relative, "relative", row),
        ("2  noised block = cached decoding step", _decoding_step, relative, "relative", row),
        ("3  at b = 1 loss and gradient = lambda x AR's", _ar_objective, relative, "relative", row),
        ("4  dense mask = FlexAttention mask = Eq. 4", _masks, 0, "entries", short),
        ("5  document in a packed row = document alone", _packing, relative, "relative", row),
        *((f"6  prompt in a batch = prompt alone, {m}", partial(_batching, m), 0, "tokens", prompt) for m in MODES),
        ("7  speculative greedy = ar greedy", _speculative, 0, "tokens", prompt),
    ]
    done: list[Check] = []
    for check in checks:
        on_check(len(done), len(checks), check[0])
        done.append(_measure(subject, check))
    skipped = ("skipped", None, None, "relative", "such a row is too long to try", 0.0, row)
    return done + [Check(f"   {limit} are exceeded", *skipped) for limit in subject.untried]


def table(checks: Iterable[Check]) -> Table:
    """The checks as a table for the terminal."""
    out = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for name in ("identity", "positions", "largest difference", "tolerance", "seconds", "result"):
        out.add_column(name, overflow="fold")
    colour = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
    for check in checks:
        unit = "" if check.unit == "relative" else f" {check.unit}"
        numbers = (check.difference, check.tolerance)
        difference, tolerance = ("" if value is None else f"{value:.2g}{unit}" for value in numbers)
        result = f"[{colour[check.status]}]{check.status}[/]" + (f": {escape(check.reason)}" if check.reason else "")
        out.add_row(check.name, str(check.positions), difference, tolerance, f"{check.seconds:.2f}", result)
    return out


def _measure(subject: _Subject, identity: Identity) -> Check:
    name, check, tolerance, unit, positions = identity
    start, difference, reason = time.perf_counter(), None, ""
    status: Status
    try:
        difference = check(subject)
        within = difference is None or tolerance is None or difference <= tolerance  # NaN is not
        status = "passed" if within else "failed"
    except _Skip as skip:
        status, reason = "skipped", str(skip)
    except Exception as error:  # a model that cannot do it at all is what this command is there to show
        line = (str(error).strip().splitlines() or [""])[0]
        status, reason = "failed", line if isinstance(error, UsageError) else f"{type(error).__name__}: {line}"
    return Check(name, status, difference, tolerance, unit, reason, time.perf_counter() - start, positions)


# ------------------------------------------------------------------------------- what is measured on


class _Subject:
    """The model under test, and one row of three random documents: plain text, prompted, chat."""

    def __init__(self, lm: BlockDiffusionLM, settings: BlockDiffusionSettings) -> None:
        self.lm, self.model, self.settings = lm, lm.model, settings
        self.decoder = Decoder(lm.model)
        self.rule = block_diffusion_rule(settings.context)
        self.generator = torch.Generator().manual_seed(0)
        b, context = settings.block_size, self.decoder.max_positions or 2**31
        windows = {w for w in self.decoder.windows.values() if w is not None and w + 2 * b <= context}
        tried = [w for w in windows if self.affordable(w + 2 * b)]
        self.untried = [f"{w} positions, a sliding window," for w in sorted(windows.difference(tried))]
        longest = min(max([3 * b, *(w + 2 * b for w in tried)]), context - b)
        prompted = [-max(5, longest - (2 * b + 3)), 2 * b + 3]
        chat = [-4, b + 1, -3, b - 2]
        self.rows = self.row([prompted, [3 * b - 1], chat])
        self.short_rows = self.row([[b + 3], [-5, 2 * b + 3], chat])  # for what is counted pair by pair
        room = max(1, context - 3 * b)
        self.prompts = [[self.tokens(min(length, room)) for length in (3, longest, 6)]]
        if self.decoder.context(context + 1) != self.decoder.max_positions:
            # longrope: all prompts beyond the length where its factors change
            if self.affordable(context + 5 * b):
                self.prompts.append([self.tokens(context + length) for length in (1, b, 3)])
            else:
                self.untried.append(f"{context} positions, where longrope factors change,")

    def affordable(self, positions: int) -> bool:
        """Whether a row of so many positions may be tried: on any model, or on one that is small."""
        config = self.decoder.config
        scores = config.num_hidden_layers * config.num_attention_heads * positions**2
        return positions <= ALWAYS_TRIED + 64 or scores <= SCORES

    @staticmethod
    def longest(rows: Rows) -> int:
        """Positions of the longest document."""
        return int(rows.position.max()) + 1

    def tokens(self, count: int) -> Tensor:
        """Random ids int64 [count], never the mask token."""
        ids = torch.randint(0, self.decoder.vocabulary - 1, (count,), generator=self.generator)
        return ids + (ids >= self.settings.mask_token_id)

    def row(self, documents: list[list[int]]) -> Rows:
        """One packed row; a document is a list of span lengths, negative ones context."""
        document, position, offset = [], [], []
        for number, spans in enumerate(documents):
            length = sum(abs(n) for n in spans)
            document += [number] * length
            position += range(length)
            offset += [k if n > 0 else -1 for n in spans for k in range(abs(n))]
        zero = torch.zeros(1, dtype=torch.int64)
        columns = (torch.tensor([values]) for values in (document, position, offset))
        return Rows(self.tokens(len(document))[None], *columns, epoch=zero, number=zero)

    def two_views(self, block_size: int, rows: Rows | None = None) -> TwoView:
        """The row (default: the long one) and its noised half, on the model's device."""
        values = {"context": self.settings.context, "prediction": self.settings.prediction}
        # Half of the blocks whole: so that every document has noised ones, in both kinds.
        recipe = RecipeConfig.model_validate({**values, "full_mask_share": 0.5, "fill_last_block": False})
        noise: Any = {"mask_token_id": self.settings.mask_token_id, "end_token_id": None, "seed": 0, "step": 0}
        return corrupt(rows or self.rows, block_size, recipe=recipe, **noise).to(self.decoder.device)

    @torch.no_grad()
    def logits(self, tokens: Tensor, places: Places) -> Tensor:
        """[1, T, V] of the parallel pass."""
        masks = self.decoder.masks(self.rule, places)
        return self.decoder.logits(self.decoder.hidden(tokens, places.position, masks))

    def documents(self) -> Iterator[Tensor]:
        """Columns of each document of the row."""
        for number in range(int(self.rows.document.max()) + 1):
            yield torch.nonzero(self.rows.document[0] == number).flatten()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    scale = theirs.float().abs().max()
    return float((ours.float() - theirs.float()).abs().max() / scale.clamp_min(1e-30))


# ------------------------------------------------------------------------------- the identities


@torch.no_grad()
def _clean_half(subject: _Subject) -> float:
    if subject.settings.context == "block_causal":
        raise _Skip("the clean half is block-causal by choice")
    view = subject.two_views(subject.settings.block_size)
    clean = subject.logits(view.tokens, view.places)[0, view.noised_length :]
    differences = []
    for columns in subject.documents():
        tokens = subject.rows.tokens[:, columns].to(subject.decoder.device)
        plain = subject.model(input_ids=tokens, use_cache=False).logits[0]
        differences.append(_difference(clean[columns.to(clean.device)], plain))
    return max(differences)


@torch.no_grad()
def _decoding_step(subject: _Subject) -> float:
    """The first document decoded block by block, each behind the cache that the committed ones left."""
    view, b = subject.two_views(subject.settings.block_size), subject.settings.block_size
    parallel = subject.logits(view.tokens, view.places)[0]
    columns = next(subject.documents())
    clean, offset = subject.rows.tokens[0, columns].tolist(), subject.rows.offset[0, columns]
    context = int((offset < 0).sum())
    config = DecodingConfig.model_validate({"mode": "diffusion", "block_size": b})
    row = Row(0, clean[:context], limit=len(clean) - context)
    differences = []
    batch = Batch(subject.decoder, subject.settings, config, [row], Stats(rows=1))
    batch.prefill()
    for start in range(context, len(clean), b):
        place = view.places
        own = (place.view[0] > 0) & (place.document[0] == 0) & (place.block_start[0] == start)
        if own.any():
            step = batch.forward(view.tokens[:, own], [start], [False])
            differences.append(_difference(parallel[own], subject.decoder.logits(step)[0]))
        block = torch.tensor([clean[start : start + b]], device=subject.decoder.device)
        batch.forward(block, [start], [subject.settings.context == "context_causal"])
    return max(differences)


def _ar_objective(subject: _Subject) -> float:
    """Gradients with respect to the embeddings: they pass through every layer, and cost little memory."""
    if subject.settings.prediction == "aligned":
        raise _Skip("with aligned prediction b = 1 has a noised half too")
    if subject.decoder.attention == "flex_attention" and subject.decoder.device.type == "cpu":
        raise _Skip("FlexAttention has no backward pass on CPU")
    model, device = subject.model, subject.decoder.device
    embedding = cast(nn.Embedding, model.get_input_embeddings()).weight
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    embedding.requires_grad_(True)
    try:
        with torch.enable_grad():
            sums = TwoViewLoss(subject.decoder)(subject.two_views(1), subject.rule)
            objective = sums.total(AR_WEIGHT)
            (gradient,) = torch.autograd.grad(objective, embedding)
            plain = objective.new_zeros(())
            for columns in subject.documents():
                tokens = subject.rows.tokens[0, columns].to(device)
                scored = subject.rows.offset[0, columns][1:].to(device) >= 0
                logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
                log_p = logits.to(objective.dtype).log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
                plain = plain - AR_WEIGHT * log_p[scored].sum()
            (plain_gradient,) = torch.autograd.grad(plain, embedding)
    finally:
        embedding.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
    return max(_difference(objective.detach(), plain.detach()), _difference(gradient, plain_gradient))


@torch.no_grad()
def _masks(subject: _Subject) -> float:
    view = subject.two_views(subject.settings.block_size, subject.short_rows)
    wanted = _equation_4(subject, view)
    distance = (view.places.position[0, :, None] - view.places.position[0]).cpu()
    wrong = 0
    for window in set(subject.decoder.windows.values()):
        rule: Rule = within_window(subject.rule, window)
        near = wanted if window is None else wanted & (distance < window)
        dense = to_dense(rule, view.places)[0, 0]
        block_mask = to_block_mask(rule, view.places)
        flex = create_mask(block_mask.mask_mod, 1, 1, *dense.shape, device=dense.device)[0, 0]
        wrong += int((dense.cpu() != near).sum()) + int((flex.cpu() != near).sum())
    return wrong


def _equation_4(subject: _Subject, view: TwoView) -> Tensor:
    """Bool [T, T], read from Eq. 4 pair by pair, with blocks counted out from the row rather than computed."""
    block_of: dict[tuple[int, int], int] = {}  # (document, position) -> number of the block
    first: list[int] = []  # block -> position of its first token
    size = 0
    rows = subject.short_rows
    columns = (column[0].tolist() for column in (rows.document, rows.position, rows.offset))
    for document, position, offset in zip(*columns, strict=True):
        if offset < 0:
            continue
        if offset == 0 or size == subject.settings.block_size:
            first.append(position)
            size = 0
        size += 1
        block_of[document, position] = len(first) - 1
    places = [getattr(view.places, name)[0].tolist() for name in ("view", "document", "position")]
    slots = list(zip(*places, strict=True))
    own = [block_of.get(slot[1:], -1 - k) for k, slot in enumerate(slots)]
    whole_block = subject.settings.context == "block_causal"
    allowed = torch.zeros(len(slots), len(slots), dtype=torch.bool)
    for i, (query_view, query_document, query) in enumerate(slots):
        for j, (key_view, key_document, key) in enumerate(slots):
            if query_document != key_document:
                continue
            if query_view and key_view:
                allowed[i, j] = query_view == key_view and own[i] == own[j]
            elif query_view:
                allowed[i, j] = key < first[own[i]]
            elif not key_view:
                allowed[i, j] = key <= query or (whole_block and own[i] == own[j])
    return allowed


@torch.no_grad()
def _packing(subject: _Subject) -> float:
    view = subject.two_views(subject.settings.block_size)
    packed = subject.logits(view.tokens, view.places)[0]
    differences = []
    for number, _ in enumerate(subject.documents()):
        own = view.places.document[0] == number
        columns = {f.name: getattr(view.places, f.name) for f in fields(Places)}
        places = Places(**{name: v if name == "seed" else v[:, own] for name, v in columns.items()})
        differences.append(_difference(packed[own], subject.logits(view.tokens[:, own], places)[0]))
    return max(differences)


def _greedy(subject: _Subject, mode: Mode, prompts: list[Tensor]) -> list[list[int]]:
    """Greedy answers of two blocks and a bit to a batch of prompts, end tokens ignored."""
    if subject.model.dtype not in (torch.float32, torch.float64):
        raise _Skip(f"in {str(subject.model.dtype).removeprefix('torch.')} rounding decides near ties; use float32")
    tokens, real = (pad_sequence(rows, batch_first=True) for rows in (prompts, [torch.ones_like(p) for p in prompts]))
    new = 2 * subject.settings.block_size + 2
    how = {"attention_mask": real, "draft_length": None, "eos_token_id": ()}  # drafts whether they pay or not
    out = subject.lm.generate(tokens, mode=mode, max_new_tokens=new, **how)
    return out.answers


def _different_tokens(ours: list[list[int]], theirs: list[list[int]]) -> int:
    pairs = ((a, b) for own, other in zip(ours, theirs, strict=True) for a, b in zip_longest(own, other))
    return sum(a != b for a, b in pairs)


def _batching(mode: Any, subject: _Subject) -> float:
    different = 0
    for prompts in subject.prompts:
        alone = [answer for prompt in prompts for answer in _greedy(subject, mode, [prompt])]
        different += _different_tokens(_greedy(subject, mode, prompts), alone)
    return different


def _speculative(subject: _Subject) -> float:
    both = ([_greedy(subject, mode, prompts) for mode in ("speculative", "ar")] for prompts in subject.prompts)
    return sum(_different_tokens(ours, theirs) for ours, theirs in both)
