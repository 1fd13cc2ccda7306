"""Block-diffusion decoding inside transformers' own `generate`.

For example::

    model.generate(**inputs, custom_generate=nextblock.block_diffusion, mode="speculative")
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import logits_process
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from nextblock.config.errors import UsageError
from nextblock.config.signatures import parameters_of, spell_out
from nextblock.decoding.events import Finish
from nextblock.decoding.lm import BlockDiffusionLM, Stream
from nextblock.decoding.options import DecodingConfig, resolve_config
from nextblock.decoding.request import make_request
from nextblock.decoding.rows import Row
from nextblock.model.adapter_files import take_correction
from nextblock.model.draft_adapter import attached_adapter
from nextblock.model.loading import read_settings
from nextblock.model.probe import why_no_blocks

_OWN_WARPERS = {
    logits_process.TemperatureLogitsWarper: "temperature",
    logits_process.TopKLogitsWarper: "top_k",
    logits_process.TopPLogitsWarper: "top_p",
}
SETTINGS_OF_PROCESSORS = {  # transformers' processors: the setting that each is made of, and the value that makes none
    "EncoderNoRepeatNGramLogitsProcessor": ("encoder_no_repeat_ngram_size", 0),
    "EncoderRepetitionPenaltyLogitsProcessor": ("encoder_repetition_penalty", 1.0),
    "EpsilonLogitsWarper": ("epsilon_cutoff", 0.0),
    "EtaLogitsWarper": ("eta_cutoff", 0.0),
    "ExponentialDecayLengthPenalty": ("exponential_decay_length_penalty", None),
    "ForcedBOSTokenLogitsProcessor": ("forced_bos_token_id", None),
    "ForcedEOSTokenLogitsProcessor": ("forced_eos_token_id", None),
    "InfNanRemoveLogitsProcessor": ("remove_invalid_values", False),
    "LogitNormalization": ("renormalize_logits", False),
    "MinLengthLogitsProcessor": ("min_length", 0),
    "MinNewTokensLengthLogitsProcessor": ("min_new_tokens", 0),
    "MinPLogitsWarper": ("min_p", None),
    "NoBadWordsLogitsProcessor": ("bad_words_ids", None),
    "NoRepeatNGramLogitsProcessor": ("no_repeat_ngram_size", 0),
    "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", 1.0),
    "SequenceBiasLogitsProcessor": ("sequence_bias", None),
    "SuppressTokensAtBeginLogitsProcessor": ("begin_suppress_tokens", None),
    "SuppressTokensLogitsProcessor": ("suppress_tokens", None),
    "TemperatureLogitsWarper": ("temperature", 1.0),
    "TopHLogitsWarper": ("top_h", None),
    "TopKLogitsWarper": ("top_k", 0),
    "TopPLogitsWarper": ("top_p", 1.0),
    "TypicalLogitsWarper": ("typical_p", 1.0),
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": ("guidance_scale", 1),
    "WatermarkLogitsProcessor": ("watermarking_config", None),
}
"""All but guidance, which has a cache of its own, are functions of prefix and scores alone."""
_REFUSED = {  # what plain `generate` would heed: what to do
    "inputs_embeds": "give input_ids, and leave it out",
    "position_ids": "positions follow from attention_mask; leave it out",
    "past_key_values": "the prompt is read anew; leave it out",
    "assistant_model": "block_diffusion drafts by itself; leave it out",
    "prompt_lookup_num_tokens": "block_diffusion drafts by itself; leave it out",
    "dola_layers": "block_diffusion contrasts no layers; leave it out",
    "penalty_alpha": "block_diffusion has no contrastive search; leave it out",
    "cache_implementation": "block_diffusion has a cache of its own; leave it out",
}
_OWN_CRITERIA = (MaxLengthCriteria, EosTokenCriteria)
_OPTIONS = {
    name: field
    for name, field in DecodingConfig.model_fields.items()
    if name not in ("max_new_tokens", "temperature", "top_p", "top_k")  # which the generation config says
}


def block_diffusion(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any = None,
    stopping_criteria: Any = None,
    generation_config: Any = None,
    streamer: Any = None,
    seed: int | list[int] | None = None,
    **model_kwargs: Any,
) -> Any:
    """A decoding method for `model.generate(custom_generate=...)`; called by it, not by users.

    Args:
        model: with the draft adapter that `nextblock.load` put on it, if there is one.
        input_ids, logits_processor, stopping_criteria, generation_config: what `generate` prepared.
            Temperature, top-p, top-k, lengths and end tokens are those of the generation config.
        streamer: gets the answer's tokens in order, once they cannot change (batch of one).
        seed: as in `BlockDiffusionLM.generate`.
        model_kwargs: the options of `DecodingConfig`, as in `BlockDiffusionLM.generate`, and what transformers
            prepared for the model, of which `attention_mask` is read (padding on either side).
    Returns:
        int64 [B, T] as `generate` returns it, or its dict form where the config asks for that.
    Raises:
        UsageError: an argument or a processor that could not act as in plain `generate`, or what `BlockDiffusionLM`
            refuses.
    """
    call = _call()
    streamer = streamer if streamer is not None else call.get("streamer")
    _check_generation_config(generation_config, {**call, **call.get("kwargs", model_kwargs)})
    options = {name: model_kwargs.pop(name) for name in _OPTIONS if name in model_kwargs}
    adapter = attached_adapter(model)
    settings = read_settings(model.config) if adapter is None else adapter.settings
    if adapter is None and settings is not None and model.name_or_path:
        take_correction(model, Path(model.name_or_path), settings)
    lm = BlockDiffusionLM(model, None, settings, adapter, refusal=why_no_blocks(model))
    foreign = _foreign(list(logits_processor or ()), lm, generation_config)
    _check_processors(foreign, resolve_config(lm.settings, options).mode, generation_config)
    options |= _sampling_options(generation_config, own_warpers=not foreign)
    criteria = list[Any](stopping_criteria or ())
    lengths = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    ends = {int(i) for c in criteria if isinstance(c, EosTokenCriteria) for i in c.eos_token_id.tolist()}
    options |= {
        "attention_mask": model_kwargs.get("attention_mask"),
        "seed": seed,
        "eos_token_id": sorted(ends),
        "max_new_tokens": min([generation_config.max_length, *lengths]) - input_ids.shape[1],
    }
    request = make_request(lm.decoder, None, lm.settings, input_ids, options)
    for row, ids in zip(request.rows, input_ids.tolist(), strict=True):  # processors see equal lengths, as the input's
        row.padding = row.padding or ids[len(row.prompt) :]
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


spell_out(
    block_diffusion, parameters_of(_OPTIONS), kept="model_kwargs"
)  # transformers hands on what the signature names


def _sampling_options(config: Any, own_warpers: bool) -> dict[str, Any]:
    """Temperature, top-k and top-p: nothing is the checkpoint's, the generation config says it all.

    Args:
        own_warpers: apply them here; else they act in their place among the caller's processors.
    """
    if not config.do_sample:
        return {"temperature": 0.0, "top_k": None, "top_p": None}
    if not own_warpers:
        return {"temperature": 1.0, "top_k": None, "top_p": None}
    return {"temperature": float(config.temperature or 1.0), "top_k": config.top_k or None, "top_p": config.top_p}


def _check_generation_config(config: Any, call: Mapping[str, Any]) -> None:
    """UsageError for what `generate` would do by itself, or with an argument of the call, and this method does not."""
    for name, cure in _REFUSED.items():
        value = call.get(name)
        value = getattr(config, name, None) if value is None else value
        if value is not None and not (name == "cache_implementation" and value == "dynamic"):
            raise UsageError(f"{name}: {cure}")
    if (config.num_beams or 1) > 1:
        raise UsageError(f"num_beams={config.num_beams}: block_diffusion has no beam search; leave it out")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise UsageError(f"{name}=True: block_diffusion returns sequences alone; leave it out")


def _foreign(processors: list[Any], lm: BlockDiffusionLM, config: Any) -> list[Any]:
    """The processors that do what decoding does not do by itself.

    By itself it leaves out the mask token and applies the config's temperature, top-k and top-p. A warper of the
    caller's own, beside the config's or with another value, is a processor like any other.
    """
    kinds = [type(processor) for processor in processors]
    foreign = []
    for kind, processor in zip(kinds, processors, strict=True):
        if kind is logits_process.SuppressTokensLogitsProcessor and lm.settings is not None:
            own = set(processor.suppress_tokens.tolist()) <= {lm.settings.mask_token_id}
        else:
            name = _OWN_WARPERS.get(kind, "")
            own = name and config.do_sample and kinds.count(kind) == 1
            own = own and getattr(processor, name) == getattr(config, name)
        if not own:
            foreign.append(processor)
    return foreign


def _check_processors(processors: list[Any], mode: str, config: Any) -> None:
    """UsageError for a processor that could not act in this mode as it does in plain `generate`."""
    for kind in map(type, processors):
        known = kind.__name__ if kind.__module__ == logits_process.__name__ else ""
        setting, neutral = SETTINGS_OF_PROCESSORS.get(known, ("", None))
        stateless = bool(setting) and setting != "guidance_scale"
        if mode == "diffusion":
            source, cure = "", "leave it out"
            if setting and (value := getattr(config, setting, None)) not in (None, neutral):
                source = f", made of {setting}={value} in the generation config,"
                where = (
                    "model.generation_config." if neutral is None else ""
                )  # a call's None stands for the model's own
                cure = f"set {where}{setting}={neutral}"
            raise UsageError(
                f"logits processor {kind.__name__}{source} has no meaning in diffusion mode, where tokens are not "
                f"decided from left to right; {cure}, or use mode='ar'{' or speculative' * stateless}"
            )
        if mode == "speculative" and not stateless:
            raise UsageError(
                f"logits processor {kind.__name__} may depend on what it was called with before, and speculative mode "
                "also calls it for drafts that are not kept; use mode='ar'"
            )


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


def _call() -> Mapping[str, Any]:
    """The arguments of the `generate` call that runs us, others under `kwargs`; empty where there is none.

    transformers (5.23) feeds `streamer` the prompt, but does not pass it on to a custom decoding method. And what it
    passes on has positions and a cache of its own making, which cannot be told from the caller's.
    """
    code, frame = inspect.unwrap(cast(Any, GenerationMixin).generate).__code__, inspect.currentframe()
    while frame is not None and frame.f_code is not code:  # the call, and not a name that resembles it
        frame = frame.f_back
    return {} if frame is None else dict(frame.f_locals)
