"""Block-diffusion decoding inside transformers' own `generate`.

model.generate(**inputs, custom_generate=nextblock.block_diffusion, mode="speculative")
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.logits_process import (
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from nextblock.adapter import attached_adapter
from nextblock.batch import Row
from nextblock.config import UsageError
from nextblock.events import Finish
from nextblock.generate import BlockDiffusionLM, Stream, look_at
from nextblock.model import read_settings
from nextblock.request import make_request, resolve_config

_OWN_WARPERS = {TemperatureLogitsWarper: "temperature", TopKLogitsWarper: "top_k", TopPLogitsWarper: "top_p"}
_OWN_CRITERIA = (MaxLengthCriteria, EosTokenCriteria)
_UNSET: Any = object()


def block_diffusion(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    streamer: Any = None,
    mode: str = _UNSET,
    block_size: int | None = _UNSET,
    sub_blocks: int = _UNSET,
    sampler: str = _UNSET,
    threshold: float | None = _UNSET,
    steps: int | None = _UNSET,
    draft_length: Any = _UNSET,
    draft_ahead: int = _UNSET,
    draft_paths: int = _UNSET,
    seed: int | list[int] | None = None,
    **model_kwargs: Any,
) -> Any:
    """A decoding method for `model.generate(custom_generate=...)`; called by it, not by users.

    Args:
        model: with the draft adapter that `nextblock.load` put on it, if there is one.
        input_ids, logits_processor, stopping_criteria, generation_config: what `generate` prepared.
            Temperature, top-p, top-k, lengths and end tokens are those of the generation config.
        streamer: gets the answer's tokens in order, once they cannot change (batch of one).
        mode ... draft_paths, seed: as in `BlockDiffusionLM.generate`.
        model_kwargs: `attention_mask` is read (padding on either side).
    Returns:
        int64 [B, T] as `generate` returns it, or its dict form where the config asks for that.
    Raises:
        UsageError: beam search, a logits processor in diffusion mode, or what `BlockDiffusionLM` refuses.
    """
    streamer = streamer if streamer is not None else _streamer_of_caller()
    given = {
        "mode": mode,
        "block_size": block_size,
        "sub_blocks": sub_blocks,
        "sampler": sampler,
        "threshold": threshold,
        "steps": steps,
        "draft_length": draft_length,
        "draft_ahead": draft_ahead,
        "draft_paths": draft_paths,
    }
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not _UNSET}
    adapter = attached_adapter(model)
    settings = read_settings(model.config) if adapter is None else adapter.settings
    look_at(model)
    lm = BlockDiffusionLM(model, None, settings, adapter)
    _check_generation_config(generation_config)
    diffusion = resolve_config(lm.settings, options).mode == "diffusion"
    foreign = [p for p in logits_processor or () if not _is_own(p, lm, generation_config)]
    if diffusion and foreign:
        raise UsageError(
            f"logits processor {type(foreign[0]).__name__} has no meaning in diffusion mode, where tokens are not "
            "decided from left to right; use mode='ar' or 'speculative'"
        )
    # Of sampling nothing is the checkpoint's: the generation config says it all.
    options |= {"temperature": 1.0 if generation_config.do_sample else 0.0, "top_k": None, "top_p": None}
    if generation_config.do_sample and not foreign:  # else they act in their place among the processors
        options["temperature"] = float(generation_config.temperature or 1.0)
        options |= {"top_k": generation_config.top_k or None, "top_p": generation_config.top_p}
    criteria: list[Any] = list(stopping_criteria or ())
    lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    ends = {int(i) for c in criteria if isinstance(c, EosTokenCriteria) for i in c.eos_token_id.tolist()}
    options |= {
        "attention_mask": model_kwargs.get("attention_mask"),
        "seed": seed,
        "eos_token_id": sorted(ends),
        "max_new_tokens": min([generation_config.max_length, *lengths]) - input_ids.shape[1],
    }
    request = make_request(lm.decoder, None, lm.settings, input_ids, options)
    others = [c for c in criteria if not isinstance(c, _OWN_CRITERIA)]
    if others:
        for row in request.rows:
            row.stop = _stop_by(others, row, model.device)
    _drain(lm.run(request, time.perf_counter(), logits_processor if foreign else None), streamer)
    padding = generation_config.pad_token_id
    result = _whole(input_ids, request.rows, padding if padding is not None else min(ends, default=0))
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=result)  # type: ignore[arg-type]
    return result


def _check_generation_config(config: Any) -> None:
    """UsageError for what `generate` would do by itself and this method does not."""
    if (config.num_beams or 1) > 1:
        raise UsageError(f"num_beams={config.num_beams}: block_diffusion has no beam search; leave it out")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise UsageError(f"{name}=True: block_diffusion returns sequences alone; leave it out")
    if getattr(config, "prompt_lookup_num_tokens", None):
        raise UsageError("prompt_lookup_num_tokens: block_diffusion drafts by itself; leave it out")


def _is_own(processor: Any, lm: BlockDiffusionLM, config: Any) -> bool:
    """Whether decoding does by itself what the processor does: the config's temperature, top-k, top-p; no mask token.

    A warper of the caller's own, whose value is not the config's, is a processor like any other.
    """
    if isinstance(processor, SuppressTokensLogitsProcessor) and lm.settings is not None:
        return set(processor.suppress_tokens.tolist()) <= {lm.settings.mask_token_id}
    for kind, name in _OWN_WARPERS.items():
        if isinstance(processor, kind):
            return config.do_sample and getattr(processor, name) == getattr(config, name)
    return False


def _whole(input_ids: Tensor, rows: list[Row], padding: int) -> Tensor:
    """int64 [B, T]: the input as it was given, wherever its padding stands, then the answers, then `padding`."""
    longest = max(len(row.answer) for row in rows)
    answers = [row.answer + [padding] * (longest - len(row.answer)) for row in rows]
    return torch.cat([input_ids, torch.tensor(answers, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def _drain(stream: Stream, streamer: Any) -> None:
    """Run to the end; the streamer gets each token of the answer once it and all before it are decided."""
    if streamer is None:
        for _ in stream:
            pass
        return
    if len(stream.rows) > 1:
        raise UsageError(f"streamer: streaming {len(stream.rows)} rows at once is not possible; give one prompt")
    shown, answer = 0, stream.rows[0].answer
    for _ in stream:
        if len(answer) > shown:
            streamer.put(torch.tensor(answer[shown:]))
            shown = len(answer)
    streamer.end()


def _stop_by(criteria: list[Any], row: Row, device: torch.device) -> Callable[[list[int]], Finish | None]:
    """Transformers' stopping criteria as a check of one row's answer."""

    def check(answer: list[int]) -> Finish | None:
        ids = torch.tensor([row.padding + row.prompt + answer], device=device)
        return "criteria" if any(bool(torch.as_tensor(c(ids, None)).all()) for c in criteria) else None

    return check


def _streamer_of_caller() -> Any:
    """The `streamer` argument of the `generate` call that runs us.

    transformers (5.23) feeds it the prompt, but does not pass it on to a custom decoding method.
    """
    code, frame = inspect.unwrap(GenerationMixin.generate).__code__, inspect.currentframe()
    while frame is not None and frame.f_code is not code:  # the call, and not a name that resembles it
        frame = frame.f_back
    return None if frame is None else frame.f_locals["streamer"]
