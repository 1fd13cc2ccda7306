"""What a task and the checkpoint ask of an answer, as the harness's `hf` model takes it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from nextblock.config.errors import UsageError
from nextblock.workflows.custom_generate import SETTINGS_OF_PROCESSORS

PROCESSORS = {
    "repetition_penalty": (RepetitionPenaltyLogitsProcessor, 1.0),
    "no_repeat_ngram_size": (NoRepeatNGramLogitsProcessor, 0),
}
"""Settings that are applied here: what applies them, and the value that does nothing."""
TOP_K = 50
"""What transformers samples from where neither caller nor checkpoint says more."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """How a group of requests is to be answered.

    until: stop strings; the text is cut before the first.
    limit: most new tokens.
    options: of `BlockDiffusionLM.generate`.
    processor: changes logits, as in `BlockDiffusionLM.run`; None: nothing does.
    seed: in place of torch's, if the task gives one.
    """

    until: list[str]
    limit: int
    options: dict[str, Any]
    processor: Any
    seed: int | None


def asked(
    given: Mapping[str, Any],
    decoding: Mapping[str, Any],
    config: GenerationConfig,
    mode: str,
    end_text: str | None,
    default_limit: int,
) -> Asked:
    """Read the generation arguments of a task.

    Args:
        given: of the task, with those of `--gen_kwargs`.
        decoding: decoding options among the model's arguments.
        config: of the checkpoint. Sampling values and penalties that `given` leaves out are its own, then
            transformers'.
        mode: ar, diffusion or speculative, unless `given` says otherwise.
        end_text: of the end token, which ends an answer as a stop string does.
        default_limit: new tokens where nothing is given.
    Raises:
        UsageError: a penalty in diffusion mode. Unknown arguments are for `generate` to refuse.
    """
    kwargs: dict[str, Any] = dict(normalize_gen_kwargs({**given, "until": given.get("until") or []}, default_limit))
    stop = kwargs.pop("stop", None) or []
    until = [*kwargs.pop("until"), *([stop] if isinstance(stop, str) else stop)]
    until = handle_stop_sequences(until, eos=end_text)
    limit, sampled, seed = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample"), kwargs.pop("seed", None)
    if kwargs.get("num_beams") == 1:
        del kwargs["num_beams"]
    values = {"temperature": 1.0, "top_k": TOP_K, "top_p": 1.0}
    for name in values:
        said = [one for one in (kwargs.pop(name, None), getattr(config, name, None)) if one is not None]
        values[name] = float([*said, values[name]][0])
    sampling = {**values, "top_k": int(values["top_k"]) or None}
    options = {**decoding, **kwargs, **(sampling if sampled else {"temperature": 0.0})}
    processor = _processor(options, config, options.get("mode", mode))
    stops = [one for one in until if one]
    return Asked(until, limit, {**options, "max_new_tokens": limit, "stop": stops}, processor, seed)


def _processor(options: dict[str, Any], config: GenerationConfig, mode: str) -> LogitsProcessorList | None:
    """What changes logits; its settings are taken out of `options`."""
    found = LogitsProcessorList()
    for name, (kind, neutral) in PROCESSORS.items():
        value, own = getattr(config, name, None), options.pop(name, None)
        if own is not None and own != neutral and mode == "diffusion":
            raise UsageError(f"{name}={own} acts in ar and speculative mode alone; leave it out")
        value = value if own is None else own
        if value is None or value == neutral:
            continue
        if mode == "diffusion":
            _warn_once(f"{name}={value} of generation_config.json does not act in diffusion mode")
        else:
            found.append(kind(value))
    done = {*PROCESSORS, "temperature", "top_k", "top_p"}
    for name, neutral in SETTINGS_OF_PROCESSORS.values():
        value = getattr(config, name, None)
        if name not in done and value is not None and value != neutral:
            _warn_once(f"{name}={value} of generation_config.json is left out here; the harness's hf model applies it")
    return found or None


_said: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.warning(text)


def seed_of(*parts: int | str | Sequence[int]) -> int:
    """A seed, 0 ... 2**62 - 1, that depends on all of the parts and on nothing else."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 2
