"""`NextblockLM`: what the harness asks of a model, answered by this package's decoding and likelihoods.

Tokenisation, truncation, chat templates and stop strings are those of the harness's own `hf` model, whose class it
extends; what differs is how tokens are generated and scored. No score depends on the batch size, or on what else is
asked: seeds of sampled answers and of noise are made of the request, and the passes that score it are chosen by it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import postprocess_generated_text
from tqdm import tqdm

from lm_eval import utils
from nextblock.config.errors import UsageError, one_line
from nextblock.data.rows import Document, collate
from nextblock.decoding.lm import BlockDiffusionLM, load
from nextblock.decoding.options import DecodingConfig, resolve_config
from nextblock.decoding.request import make_request
from nextblock.lm_eval.arguments import ModelArguments, read_arguments
from nextblock.lm_eval.generation import Asked, asked, seed_of
from nextblock.model.loading import no_tokenizer
from nextblock.recipe.cross_entropy import chunk_rows, cross_entropy
from nextblock.recipe.likelihood import bound_nats

PASS_TOKENS = 2**14
"""Tokens of one pass that scores requests on a GPU. On CPU each goes alone, which is as fast and rounds alike."""
VIEW_TOKENS, MOST_VIEWS = 2**11, 16
"""Noised tokens of one pass of the diffusion bound, and draws in it."""

NOTHING = (
    "a continuation has no token of its own: it is empty, or the tokenizer joins it with its context; let it begin "
    "where a token begins"
)

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")
Encoded = tuple[Any, list[int], list[int]]
"""The request's texts (None: part of a longer one), token ids of its context and of its continuation."""


Base: Any = HFLM  # its decorator hides its attributes from type checkers


class NextblockLM(Base):
    """`--model nextblock`. Its arguments are those of `arguments.ModelArguments` and of `DecodingConfig`."""

    def __init__(self, **given: Any) -> None:
        """Load the model.

        Raises:
            UsageError: a wrong argument, a model that cannot be loaded, or one without a tokenizer.
        """
        arguments, decoding = read_arguments(given)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError("the harness's model nextblock runs in one process; start it without accelerate launch")
        device = arguments.device
        if device and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness's own default, whatever the machine
        lm = load(
            arguments.pretrained,
            draft_adapter=arguments.draft_adapter,
            dtype=None if arguments.dtype == "auto" else getattr(torch, arguments.dtype),
            device=device,
            revision=arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
            compile=arguments.compile,
            settings=arguments.settings,
        )
        if lm.tokenizer is None:
            raise UsageError(f"{no_tokenizer(arguments.pretrained)}; the harness reads and writes text")
        if lm.settings is None:
            decoding.setdefault("mode", "ar")
        config = resolve_config(lm.settings, decoding)
        if arguments.likelihood == "diffusion" and lm.settings is None:
            raise UsageError(
                "likelihood=diffusion: this checkpoint has no block_diffusion settings; use likelihood=ar, or adapt "
                "it with `nextblock adapt`"
            )
        self._init_base(lm, arguments)
        lm.tokenizer = self.tokenizer
        self.lm, self.arguments, self.decoding, self.config_of_mode = lm, arguments, decoding, config
        self.likelihood = arguments.likelihood
        self.spent: dict[str, list[int]] = {}
        self.used: dict[str, DecodingConfig] = {}
        self.errors: dict[str, list[float]] = {}

    def _init_base(self, lm: BlockDiffusionLM, arguments: ModelArguments) -> None:
        """Let the harness's own model take its arguments; what it refuses is a UsageError."""
        longest, context = arguments.max_length, lm.decoder.max_positions
        if longest is not None and context is not None and longest > context:
            log.warning("max_length=%d is more than the model's context; %d is taken", longest, context)
            longest = context
        names = ("revision", "trust_remote_code", "add_bos_token", "prefix_token_id", "enable_thinking")
        names = (*names, "think_end_token", "max_batch_size", "batch_size")
        try:
            with _quiet("lm_eval.models.huggingface"):
                super().__init__(
                    pretrained=lm.model,
                    tokenizer=None if arguments.add_bos_token is not None else lm.tokenizer,
                    backend="causal",
                    max_length=longest,
                    **{name: getattr(arguments, name) for name in names},
                )
        except ValueError as error:
            raise UsageError(one_line(error)) from None
        prefix = arguments.prefix_token_id
        if prefix is not None and not 0 <= prefix < lm.decoder.vocabulary:
            raise UsageError(f"prefix_token_id={prefix} is outside the vocabulary of {lm.decoder.vocabulary}")

    # Answers --------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer (context, arguments) of each request, cut before its first stop string.

        Requests of one task with equal arguments are decoded together, longest contexts first. The tokens that a
        forward pass gained are kept for `get_model_info`.
        """
        self.spent, self.used = {}, {}
        groups: dict[tuple[str, str], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault((request.task_name or "", json.dumps(request.args[1], default=str)), []).append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for (task, said), members in groups.items():
                wish = self._asked(requests[members[0]].args[1])
                room = self.max_length - wish.limit
                if room < 1:
                    raise UsageError(
                        f"max_gen_toks={wish.limit} leaves no room for a prompt in the {self.max_length} tokens of "
                        "the model; use less (--gen_kwargs max_gen_toks=...)"
                    )
                prompts = {i: self._context(requests[i].args[0], room) for i in members}
                start = torch.initial_seed() if wish.seed is None else wish.seed
                seeds, met = {}, Counter[tuple[int, ...]]()
                for i in members:  # each repetition of a request has a seed of its own
                    seeds[i] = seed_of(start, said, prompts[i], met[tuple(prompts[i])])
                    met[tuple(prompts[i])] += 1
                members.sort(key=lambda i: -len(prompts[i]))
                for i, ids in self._in_batches(members, partial(self._answer, task, wish, prompts, seeds)):
                    texts[i] = self._text(ids, wish.until)
                    self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
                    bar.update(1)
        for task, (tokens, forwards) in self.spent.items():
            log.info("%s: %.3f tokens per forward (%d / %d)", task, tokens / forwards, tokens, forwards)
        return texts

    def _asked(self, given: dict[str, Any]) -> Asked:
        end = None if self.eot_token_id is None else self.tok_decode(self.eot_token_id, False)
        config, mode = self.lm.model.generation_config, self.config_of_mode.mode
        return asked(given, self.decoding, config, mode, end, self.max_gen_toks)

    def _answer(
        self, task: str, wish: Asked, prompts: dict[int, list[int]], seeds: dict[int, int], batch: list[int]
    ) -> list[list[int]]:
        """The token ids with which these requests are answered."""
        lm, options = self.lm, {**wish.options, "seed": [seeds[i] for i in batch]}
        given: Any = {"input_ids": [prompts[i] for i in batch]}
        request = make_request(lm.decoder, lm.tokenizer, lm.settings, given, options)
        stream = lm.run(request, time.perf_counter(), wish.processor)
        for _ in stream:
            pass
        self.used[task] = request.config
        spent = self.spent.setdefault(task, [0, 0])
        spent[0] += stream.stats.new_tokens
        spent[1] += sum(stream.stats.row_forwards.values())
        return [row.answer for row in stream.rows]

    def _text(self, ids: list[int], until: list[str]) -> str:
        """The text of an answer, without what was thought in front of it, and cut before the first stop string."""
        end = self.think_end_token
        if isinstance(end, int):
            last = max((n + 1 for n, token in enumerate(ids) if token == end), default=0)
            return postprocess_generated_text(self.tok_decode(ids[last:]).lstrip(), until, None)
        return postprocess_generated_text(self.tok_decode(ids), until, end)

    def _context(self, text: str, room: int) -> list[int]:
        """Token ids of a context, cut on the left."""
        ids = self.tok_batch_encode([text])[0][0].tolist() if text else []
        if len(ids) > room:
            log.warning("a context of %d tokens is cut on the left to the last %d", len(ids), room)
        return ids[-room:] or [self._prefix()]

    def _prefix(self) -> int:
        """The token in front of an empty context."""
        if self.prefix_token_id is None:
            raise UsageError("the tokenizer has neither a begin nor an end token: set prefix_token_id")
        return self.prefix_token_id

    def _in_batches(
        self, items: Sequence[Item], run: Callable[[list[Item]], Iterable[Result]]
    ) -> Iterator[tuple[Item, Result]]:
        """`run` over batches; with batch_size=auto these are halved whenever memory runs out."""
        size = self.max_batch_size if self.batch_size == "auto" else int(self.batch_size)
        first = 0
        while first < len(items):
            batch = list(items[first : first + size])
            try:
                results = list(run(batch))
            except torch.OutOfMemoryError:
                if self.batch_size != "auto" or size == 1:
                    raise
                size //= 2
                torch.cuda.empty_cache()
                continue
            yield from zip(batch, results, strict=True)
            first += size

    # Likelihoods ----------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is what greedy decoding gives) of each request   (as `hf`)."""
        self._owners = [(request.task_name or "", i) for i, request in enumerate(requests)]
        if any(not request.args[0] for request in requests):
            self._prefix()
        if any(not request.args[1] for request in requests):
            raise UsageError(NOTHING)
        try:
            return super().loglikelihood(requests, disable_tqdm)
        except ValueError as error:  # thinking, which no likelihood allows for
            raise UsageError(one_line(error)) from None

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, each token scored once, in windows of the longest input   (as `hf`)."""
        windows: list[Encoded] = []
        owners: list[tuple[str, int]] = []
        longest = self.max_length - (self._measure() == "diffusion")
        for i, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self._prefix(),
                max_seq_len=longest,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append((request.task_name or "", i))
        self._owners = owners
        totals = [0.0] * len(requests)
        for (_, i), (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _measure(self) -> str:
        """What a likelihood is here: "ar" or "diffusion"."""
        if self.likelihood is None and self.config_of_mode.mode == "diffusion":
            if "mode" in self.decoding:
                raise UsageError(
                    "mode=diffusion with a task that is scored by likelihood: say which one, likelihood=ar (exact, "
                    "from the causal path) or likelihood=diffusion (a bound, by mc_num draws)"
                )
            log.info("likelihoods are those of the causal path (ar), which are exact; likelihood=diffusion: the bound")
        return self.likelihood or "ar"

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether each of its tokens is the causal path's likeliest) of each request.

        With likelihood=diffusion the first is the mean of `mc_num` draws of the bound.
        """
        diffusion = self._measure() == "diffusion"
        sequences: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise UsageError(NOTHING)
            if len(continuation) > self.max_length - diffusion:
                raise UsageError(
                    f"a continuation has {len(continuation)} tokens, more than the {self.max_length} of the model; "
                    "score it with a model of longer input"
                )
            seen = (*context, *continuation)[-(self.max_length + 1 - diffusion) :][:-1]
            sequences.setdefault(seen, []).append(i)  # one pass for continuations that differ in the last token
        order = sorted(sequences, key=lambda tokens: (-len(tokens), tokens))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        squares: dict[tuple[str, int], float] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for batch in _by_size(order, PASS_TOKENS if self.lm.decoder.device.type != "cpu" else 1):
                for row, hidden in zip(batch, self._states(batch), strict=True):
                    for i in sequences[row]:
                        texts, _, continuation = requests[i]
                        value, greedy = self._score(hidden[-len(continuation) :], continuation, texts is None)
                        if diffusion:
                            value, error = self._bound([*row, continuation[-1]], len(continuation))
                            owner = self._owners[i]
                            squares[owner] = squares.get(owner, 0.0) + error**2
                        found[i] = (value, greedy)
                        if texts is not None:
                            self.cache_hook.add_partial("loglikelihood", texts, found[i])
                        bar.update(1)
        for task in {task for task, _ in squares}:
            self.errors[task] = [math.sqrt(square) for (of, _), square in squares.items() if of == task]
        return found

    @torch.inference_mode()
    def _states(self, batch: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        """Hidden states [T, D] of each sequence under causal attention; padded on the right, where nothing sees it."""
        longest, device = max(map(len, batch)), self.lm.decoder.device
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in batch], device=device)
        position = torch.arange(longest, device=device).expand_as(tokens)
        hidden = self.lm.decoder.hidden(tokens, position, None)
        return [states[: len(row)] for states, row in zip(hidden, batch, strict=True)]

    @torch.inference_mode()
    def _score(self, hidden: torch.Tensor, continuation: list[int], rolling: bool) -> tuple[float, bool]:
        """log p of the tokens that these states [S, D] predict, and, but for a rolling one, if each is likeliest."""
        decoder = self.lm.decoder
        target = torch.tensor(continuation, device=hidden.device)
        value = -float(cross_entropy(decoder, hidden, target, each=True).nats.sum())
        if rolling:
            return value, False
        likeliest = torch.cat([decoder.logits(part).argmax(-1) for part in hidden.split(chunk_rows(decoder))])
        return value, bool((likeliest == target).all())

    def _bound(self, tokens: list[int], scored: int) -> tuple[float, float]:
        """The diffusion bound on log p of the last `scored` tokens: mean of `mc_num` draws, and its standard error."""
        if self.lm.refusal:
            raise UsageError(self.lm.refusal)
        settings = self.lm.settings
        assert settings is not None
        context = len(tokens) - scored
        offset = np.concatenate([np.full(context, -1), np.arange(scored)])
        rows = collate([[Document(np.array(tokens), offset)]], len(tokens), 0, 0, seed_of(scored, tokens))
        settings = settings.model_copy(update={"block_size": self.config_of_mode.block_size or settings.block_size})
        views = max(1, min(MOST_VIEWS, VIEW_TOKENS // scored))
        drawn = bound_nats(self.lm.decoder, settings, rows, self.arguments.mc_num, views=views)[:, 0]
        return -float(drawn.mean()), float(drawn.std()) / math.sqrt(len(drawn))

    # What stands with the results -----------------------------------------------------------------

    def get_model_info(self) -> dict[str, Any]:
        """Of the results' `config`: how was decoded and scored, since this was asked last.

        `nextblock` holds for each task the tokens that a forward pass gained, and, for the diffusion bound, the mean
        standard error of a request.
        """
        default, likelihood = self.config_of_mode, self.likelihood or "ar"
        used = {(one.mode, one.block_size) for one in self.used.values()} or {(default.mode, default.block_size)}
        modes, sizes = zip(*sorted(used, key=str), strict=True)
        own = {
            "mode": ", ".join(dict.fromkeys(modes)),
            "block_size": None if set(modes) == {"ar"} else sizes[0] if len(used) == 1 else list(sizes),
            "draft_adapter": self.arguments.draft_adapter,
            "tokens_per_forward": {task: tokens / passes for task, (tokens, passes) in self.spent.items()},
            "likelihood": "ar (exact)" if likelihood == "ar" else f"diffusion (bound, {self.arguments.mc_num} draws)",
            "likelihood_standard_error": {task: float(np.mean(errors)) for task, errors in self.errors.items()},
        }
        self.spent, self.used, self.errors = {}, {}, {}
        model, revision = self.lm.model, self.arguments.revision
        sizes_of = {"model_num_parameters": model.num_parameters(), "model_dtype": str(model.dtype)}
        return {**sizes_of, "model_revision": revision, "nextblock": own}

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of requests."""
        return str(self.arguments.pretrained).replace("/", "__")


def _by_size(order: Sequence[tuple[int, ...]], tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Sequences, longest first, in batches of at most so many tokens with their padding, at least one each."""
    first = 0
    while first < len(order):
        count = max(1, tokens // max(1, len(order[first])))
        yield list(order[first : first + count])
        first += count


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without the warnings of a logger, here that a model was handed over and not a name."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
