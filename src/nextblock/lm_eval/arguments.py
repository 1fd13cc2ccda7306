"""What `--model_args` takes, stated once: which model, how it decodes, how it is scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from nextblock.config.errors import UsageError
from nextblock.config.sections import Section, validate
from nextblock.decoding.options import DecodingConfig

OF_A_TASK = {
    "max_new_tokens": "max_gen_toks={}",
    "max_gen_toks": "max_gen_toks={}",
    "temperature": "do_sample=true,temperature={}",
    "top_p": "do_sample=true,top_p={}",
    "top_k": "do_sample=true,top_k={}",
}
"""What tasks set for themselves, and how `--gen_kwargs` sets it for all of them."""


class ModelArguments(Section):
    """The arguments of the harness's model `nextblock`, beside those of `DecodingConfig`."""

    pretrained: str = Field(description="local folder, Hub id, tiny-ar or tiny-bd")
    draft_adapter: str | None = Field(default=None, description="folder of a draft adapter, or tiny-draft")
    settings: str | None = Field(default=None, description="block-diffusion settings in place of config.json's")
    revision: str | None = Field(default=None, description="Hub revision")
    trust_remote_code: bool = Field(default=False, description="run model code that comes with the checkpoint")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: float32 on CPU, else as saved"
    )
    device: str | None = Field(default=None, description="default: CUDA if there is one")
    compile: bool | None = Field(default=None, description="torch.compile and a static cache; default: on CUDA alone")
    likelihood: Literal["ar", "diffusion"] | None = Field(
        default=None,
        description="of likelihood tasks; ar: exact, from the causal path; diffusion: the bound; default: ar, but "
        "mode=diffusion asks for a choice",
    )
    mc_num: int = Field(default=128, ge=2, description="likelihood=diffusion: draws of the noise for each request")
    max_length: int | None = Field(default=None, ge=2, description="longest input, in tokens; default: the model's")
    add_bos_token: bool | None = Field(default=None, description="default: as the tokenizer does")
    prefix_token_id: int | None = Field(
        default=None, description="token in front of an empty context; default: the begin token, else the end token"
    )
    enable_thinking: bool | None = Field(default=None, description="handed to the chat template")
    think_end_token: int | str | None = Field(
        default=None, description="text, or id of a token, up to which an answer is thought and cut"
    )
    batch_size: int | str = Field(
        default=1, description="prompts decoded together; auto, or auto:N: as many as memory holds"
    )
    max_batch_size: int = Field(default=64, ge=1, description="of batch_size=auto")


def read_arguments(given: Mapping[str, Any]) -> tuple[ModelArguments, dict[str, Any]]:
    """The checked arguments, and the decoding options among them that were given.

    Raises:
        UsageError: an unknown argument, one that belongs elsewhere, or a value out of its limits.
    """
    for name, form in OF_A_TASK.items():
        if name in given:
            raise UsageError(
                f"{name}={given[name]} is not a model argument: tasks set it; replace it in all of them with "
                f"--gen_kwargs {form.format(given[name])}"
            )
    own = {name for name in DecodingConfig.model_fields if name not in OF_A_TASK}
    # A class made here, so that an unknown name is compared with all of them.
    both = type("Arguments", (DecodingConfig, ModelArguments), {})
    values = {name: None if value == "none" else value for name, value in given.items()}
    if values.get("draft_adapter") is not None:
        values.setdefault("mode", "speculative")  # what a draft adapter is for
    if (told := values.get("batch_size")) is not None:
        size, _, again = str(told).partition(":")  # auto:N looks anew N times, for which there is no need here
        if again and size == "auto" and again.isdecimal():
            values["batch_size"] = size
        elif again or (size != "auto" and not (size.isdecimal() and int(size))):
            raise UsageError(f"batch_size={told} is unknown; use a number of 1 or more, or auto")
    checked = validate(both, values)
    arguments = ModelArguments(**{name: getattr(checked, name) for name in ModelArguments.model_fields})
    return arguments, {name: getattr(checked, name) for name in checked.model_fields_set & own}
