"""`NextblockLM`: what the harness asks of a model, answered by this package's decoding and likelihoods.

Tokenisation, truncation, chat templates and stop strings are those of the harness's own `hf` model, whose class it
extends; what differs is how tokens are generated and scored. No score depends on the batch size: sampled answers draw
from a seed of their own, and the passes that score a request are chosen by the request.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from lm_eval import utils
from nextblock.config.errors import UsageError
from nextblock.data.rows import Document, collate
from nextblock.decoding.lm import load
from nextblock.decoding.options import resolve_config
from nextblock.lm_eval.arguments import read_arguments
from nextblock.model.loading import no_tokenizer
from nextblock.recipe.cross_entropy import chunk_rows, cross_entropy
from nextblock.recipe.likelihood import bound_nats

PASS_TOKENS = 2**14
"""Tokens of one pass that scores requests on a GPU. On CPU each goes alone, which is as fast and rounds alike."""
VIEW_TOKENS, MOST_VIEWS = 2**11, 16
"""Noised tokens of one pass of the diffusion bound, and draws in it."""

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
        with _quiet("lm_eval.models.huggingface"):
            super().__init__(
                pretrained=lm.model,
                tokenizer=None if arguments.add_bos_token is not None else lm.tokenizer,
                backend="causal",
                batch_size=arguments.batch_size,
                **{
                    name: getattr(arguments, name)
                    for name in (
                        "revision",
                        "trust_remote_code",
                        "max_length",
                        "add_bos_token",
                        "prefix_token_id",
                        "enable_thinking",
                        "think_end_token",
                        "max_batch_size",
                    )
                },
            )
        lm.tokenizer = self.tokenizer
        self.lm, self.arguments, self.decoding, self.config_of_mode = lm, arguments, decoding, config
        self.likelihood = arguments.likelihood
        self.spent: dict[str, list[int]] = {}
        self.bound_errors: list[float] = []
        if self.likelihood == "diffusion" and lm.settings is None:
            raise UsageError(
                "likelihood=diffusion: this checkpoint has no block_diffusion settings; use likelihood=ar, or adapt "
                "it with `nextblock adapt`"
            )

    # Answers --------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer (context, arguments) of each request, cut before its first stop string.

        Requests of one task with equal arguments are decoded together, longest contexts first. The tokens that a
        forward pass gained are kept for `get_model_info`.
        """
        groups: dict[tuple[str, str], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault((request.task_name or "", json.dumps(request.args[1], default=str)), []).append(i)
        texts, start = [""] * len(requests), torch.initial_seed() % 2**62
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests")
        for (task, _), members in groups.items():
            until, limit, options = self._options(requests[members[0]].args[1])
            room = self.max_length - limit
            if room < 1:
                raise UsageError(
                    f"max_gen_toks={limit} leaves no room for a prompt in the {self.max_length} tokens of the model; "
                    "use less (--gen_kwargs max_gen_toks=...)"
                )
            encoded = {i: self._context(requests[i].args[0], room) for i in members}
            members.sort(key=lambda i: -len(encoded[i]))

            def answer(
                batch: list[int],
                encoded: dict[int, list[int]] = encoded,
                options: dict[str, Any] = options,
                task: str = task,
            ) -> list[list[int]]:
                seeds = [start + i for i in batch]
                out = self.lm.generate({"input_ids": [encoded[i] for i in batch]}, seed=seeds, **options)  # pyright: ignore
                spent = self.spent.setdefault(task, [0, 0])
                spent[0] += out.stats.new_tokens
                spent[1] += sum(out.stats.row_forwards.values())
                return out.answers

            for i, ids in self._in_batches(members, answer):
                text = postprocess_generated_text(self.tok_decode(ids), until, self.arguments.think_end_token)
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
                bar.update(1)
        bar.close()
        for task, (tokens, forwards) in self.spent.items():
            log.info("%s: %.3f tokens per forward (%d / %d)", task, tokens / forwards, tokens, forwards)
        return texts

    def _options(self, given: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
        """Stop strings, the most new tokens, and the options of `generate`, from a task's generation arguments."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        until = handle_stop_sequences(kwargs.pop("until"), eos=self.tok_decode(self.eot_token_id, False))
        limit, sampled = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample")
        temperature = float(kwargs.pop("temperature", 1.0 if sampled else 0.0))
        if kwargs.get("num_beams") == 1:
            del kwargs["num_beams"]
        options = {**self.decoding, **kwargs, "temperature": temperature if sampled else 0.0, "max_new_tokens": limit}
        return until, limit, {**options, "stop": [one for one in until if one]}

    def _context(self, text: str, room: int) -> list[int]:
        """Token ids of a context, cut on the left."""
        ids = self.tok_batch_encode([text])[0][0].tolist() if text else []
        if len(ids) > room:
            log.warning("a context of %d tokens is cut on the left to the last %d", len(ids), room)
        return ids[-room:] or [self.prefix_token_id]

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

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, each token scored once, in windows of the longest input   (as `hf`)."""
        windows: list[Encoded] = []
        owners: list[int] = []
        longest = self.max_length - (self._measure() == "diffusion")
        for i, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=longest,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, pairs):
                windows.append((None, context, continuation))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
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
            if len(continuation) > self.max_length - diffusion:
                raise UsageError(
                    f"a continuation has {len(continuation)} tokens, more than the {self.max_length} of the model; "
                    "score it with a model of longer input"
                )
            seen = (*context, *continuation)[-(self.max_length + 1 - diffusion) :][:-1]
            sequences.setdefault(seen, []).append(i)  # one pass for continuations that differ in the last token
        order = sorted(sequences, key=lambda tokens: (-len(tokens), tokens))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for batch in _by_size(order, PASS_TOKENS if self.lm.decoder.device.type != "cpu" else 1):
            for row, hidden in zip(batch, self._states(batch), strict=True):
                for i in sequences[row]:
                    texts, _, continuation = requests[i]
                    value, greedy = self._score(hidden[-len(continuation) :], continuation, texts is None)
                    if diffusion:
                        value = self._bound([*row, continuation[-1]], len(continuation), i)
                    found[i] = (value, greedy)
                    if texts is not None:
                        self.cache_hook.add_partial("loglikelihood", texts, found[i])
                    bar.update(1)
        bar.close()
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

    def _bound(self, tokens: list[int], scored: int, number: int) -> float:
        """The mean of `mc_num` draws of the diffusion bound on log p of the last `scored` tokens."""
        if self.lm.refusal:
            raise UsageError(self.lm.refusal)
        settings = self.lm.settings
        assert settings is not None
        context = len(tokens) - scored
        offset = np.concatenate([np.full(context, -1), np.arange(scored)])
        rows = collate([[Document(np.array(tokens), offset)]], len(tokens), 0, 0, number)
        settings = settings.model_copy(update={"block_size": self.config_of_mode.block_size or settings.block_size})
        views = max(1, min(MOST_VIEWS, VIEW_TOKENS // scored))
        drawn = bound_nats(self.lm.decoder, settings, rows, self.arguments.mc_num, views=views)[:, 0]
        self.bound_errors.append(float(drawn.std()) / math.sqrt(len(drawn)))
        return -float(drawn.mean())

    # What stands with the results -----------------------------------------------------------------

    def get_model_info(self) -> dict[str, Any]:
        """Of the results' `config`: the mode, what a likelihood is, and the tokens that a forward pass gained."""
        decoding, likelihood = self.config_of_mode, self.likelihood or "ar"
        own = {
            "mode": decoding.mode,
            "block_size": None if decoding.mode == "ar" else decoding.block_size,
            "draft_adapter": self.arguments.draft_adapter,
            "tokens_per_forward": {task: tokens / passes for task, (tokens, passes) in self.spent.items()},
            "likelihood": "ar (exact)" if likelihood == "ar" else f"diffusion (bound, {self.arguments.mc_num} draws)",
            "likelihood_standard_error": float(np.mean(self.bound_errors)) if self.bound_errors else None,
        }
        model = self.lm.model
        return {"model_num_parameters": model.num_parameters(), "model_dtype": str(model.dtype), "nextblock": own}

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
