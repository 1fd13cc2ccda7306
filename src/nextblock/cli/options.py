"""Options that commands share, stated once: those of decoding are made from `DecodingConfig`.

Nothing here imports torch before a command runs, so that `--help` takes no seconds.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from nextblock.config.errors import UsageError
from nextblock.config.sections import validate
from nextblock.decoding.options import DecodingConfig, spell_out

C = TypeVar("C")

Model = Annotated[str, typer.Argument(help="local folder, Hub id, tiny-ar or tiny-bd")]
DraftAdapter = Annotated[str | None, typer.Option(help="folder of a draft adapter for this model, or tiny-draft")]
Settings = Annotated[
    str | None,
    typer.Option(help="block-diffusion settings in place of config.json's: nbdiff-7b, {mask_token_id: 7}, or a file"),
]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16; default: float32 on CPU, else as saved")]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="torch.compile and a static cache; default: on CUDA alone"),
]
Seed = Annotated[int | None, typer.Option(help="of the random draws")]
Stop = Annotated[list[str] | None, typer.Option(help="text that ends an answer; may be given again")]

TaskName = Annotated[str, typer.Option(help="built-in task: word_problems, algebra or functions")]
PromptFile = Annotated[
    Path | None, typer.Option(help="prompts of a file instead: one a line, or .jsonl with `prompt` or `messages`")
]
Modes = Annotated[
    list[str] | None, typer.Option(help="ar, diffusion or speculative; may be given again; default: all")
]
Thresholds = Annotated[
    list[str] | None, typer.Option(help="of diffusion mode; 'none': one a step; may be given again")
]
Variants = Annotated[
    list[str] | None, typer.Option(help="further settings: 'speculative,draft_length=8'; may be given again")
]
MaxNewTokens = Annotated[int, typer.Option(help="longest answer, in tokens")]
Results = Annotated[Path | None, typer.Option(help="write the figures to this .json file, and a plot beside it")]


def takes_decoding_options(command: C) -> C:
    """Decorate a command `f(..., **given)`: `given` holds an option for each field of `DecodingConfig`, as text."""
    parameters = []
    for name, field in DecodingConfig.model_fields.items():
        option = typer.Option(
            help=field.description,
            metavar=f"<{_in_words(field.annotation)}>",
            show_default=False if field.default is None else str(field.default),
            rich_help_panel="Decoding options (default: the checkpoint's, else as shown)",
        )
        annotation = Annotated[str | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return spell_out(command, parameters)


def _in_words(annotation: Any) -> str:
    """The type of an option: `int`, `ar|diffusion|speculative`, `int|auto`."""
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    parts = [part for part in get_args(annotation) or (annotation,) if part is not type(None)]
    return "|".join(part.__name__ if isinstance(part, type) else _in_words(part) for part in parts)


def decoding_options(given: Mapping[str, str | None]) -> dict[str, Any]:
    """The decoding options that were given, read from text; the others stay the checkpoint's, or `generate`'s own.

    Raises:
        UsageError: a value out of its limits.
    """
    texts = {name: given[name] for name in DecodingConfig.model_fields if given.get(name) is not None}
    config = validate(DecodingConfig, {name: None if text == "none" else text for name, text in texts.items()})
    return {name: getattr(config, name) for name in texts}


def thresholds_of(texts: list[str]) -> list[float | None]:
    """Thresholds from text; 'none' is None."""
    return [decoding_options({"threshold": text})["threshold"] for text in texts]


def at_least_one(**counts: int) -> None:
    """UsageError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name}={count} must be at least 1")


def torch_dtype(name: str | None) -> Any:
    """A torch dtype by name, None for none."""
    import torch

    if name not in (None, "float32", "bfloat16"):
        raise UsageError(f"dtype={name} is unknown; use float32 or bfloat16")
    return getattr(torch, name) if name else None


def load_lm(model: str, dtype: str | None = None, **options: Any) -> Any:
    """`nextblock.load` with a dtype by name, and without transformers' own progress bars.

    Raises:
        UsageError: what `load` refuses, or a model without a tokenizer.
    """
    from transformers.utils.logging import disable_progress_bar

    from nextblock.decoding.lm import load
    from nextblock.model.loading import no_tokenizer

    disable_progress_bar()
    lm = load(model, dtype=torch_dtype(dtype), **options)
    if lm.tokenizer is None:
        raise UsageError(f"{no_tokenizer(model)}; use it from Python with token ids")
    return lm
