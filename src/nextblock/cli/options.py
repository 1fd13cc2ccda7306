"""Options that commands share, stated once: those of decoding are made from `DecodingConfig`.

Nothing here imports torch before a command runs, so that `--help` takes no seconds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from nextblock.config.errors import UsageError
from nextblock.config.files import user_path
from nextblock.config.sections import Section, validate
from nextblock.config.signatures import spell_out
from nextblock.decoding.options import DecodingConfig

C = TypeVar("C", bound=Callable[..., Any])

Model = Annotated[str, typer.Argument(help="local folder, Hub id, .gguf file, tiny-ar or tiny-bd")]
GgufFile = Annotated[str | None, typer.Option(help="name of a GGUF file in the folder or Hub id MODEL")]
Settings = Annotated[
    str | None,
    typer.Option(help="block-diffusion settings in place of config.json's: nbdiff-7b, {mask_token_id: 7}, or a file"),
]
LOADING: dict[str, Any] = {
    "draft_adapter": Annotated[
        str | None, typer.Option(help="folder of a draft adapter for this model, or tiny-draft")
    ],
    "settings": Settings,
    "gguf_file": GgufFile,
    "dtype": Annotated[str | None, typer.Option(help="float32 or bfloat16; default: float32 on CPU, else as saved")],
    "compile": Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="torch.compile and a static cache; default: on CUDA alone"),
    ],
}
"""Options of commands that load a model to decode with it."""
Seed = Annotated[int | None, typer.Option(help="of the random draws")]
Stop = Annotated[list[str] | None, typer.Option(help="text that ends an answer; may be given again")]

TaskName = Annotated[
    str | None,
    typer.Option(
        help="built-in task: word_problems, algebra, functions, human_eval or planted_fact; default: word_problems"
    ),
]
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


def takes_loading_options(command: C) -> C:
    """Decorate a command `f(..., **given)`: `given` holds those of `LOADING`, for `load_lm`."""
    return spell_out(command, [_parameter(name, annotation) for name, annotation in LOADING.items()])


def takes_decoding_options(command: C) -> C:
    """Decorate a command `f(..., **given)`: `given` holds each field of `DecodingConfig`, for `decoding_options`."""
    return takes_section(DecodingConfig, "Decoding options (default: the checkpoint's, else as shown)")(command)


def takes_section(section: type[Section], panel: str) -> Callable[[C], C]:
    """Decorate a command `f(..., **given)`: `given` holds each field of a section as text, for `given_of`."""
    parameters = []
    for name, field in section.model_fields.items():
        option = typer.Option(
            help=field.description,
            metavar=f"<{_in_words(field.annotation)}>",
            show_default=False if field.default is None else str(field.default),
            rich_help_panel=panel,
        )
        parameters.append(_parameter(name, Annotated[str | None, option]))
    return lambda command: spell_out(command, parameters)


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


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
    return given_of(DecodingConfig, given)


def given_of(section: type[Section], given: Mapping[str, str | None]) -> dict[str, Any]:
    """The fields of a section that were given, read from text. UsageError for a value out of its limits."""
    texts = {name: given[name] for name in section.model_fields if given.get(name) is not None}
    values = validate(section, {name: None if text == "none" else text for name, text in texts.items()})
    return {name: getattr(values, name) for name in texts}


def thresholds_of(texts: list[str]) -> list[float | None]:
    """Thresholds from text; 'none' is None."""
    return [decoding_options({"threshold": text})["threshold"] for text in texts]


def refuse_given(why: str, **options: Any) -> None:
    """UsageError for an option that is given and would do nothing."""
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"--{name.replace('_', '-')}: {why}; leave it out")


def at_least_one(**counts: int) -> None:
    """UsageError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name}={count} must be at least 1")


def check_output(output: Path | None) -> Path | None:
    """The output as a path, refused before anything is measured if it is no JSON file or cannot be written."""
    if output is None:
        return None
    output = user_path(output, "--output")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"--output {output}: the folder {output.parent} does not exist; make it, or name another")
    if output.suffix != ".json" or output.is_dir():
        raise UsageError(f"--output {output} is not the name of a .json file; end it in .json")
    there = output.exists()
    try:
        output.open("ab").close()
        if not there:
            output.unlink()
    except OSError as error:
        raise UsageError(f"--output {output} cannot be written: {error.strerror}; name another") from None
    return output


def wide_console() -> Any:
    """Standard output; where it is no terminal, wide enough for the tables."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=140)


def loading_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `nextblock.load`, with a torch dtype in place of its name."""
    import torch

    name = given.get("dtype")
    if name not in (None, "float32", "bfloat16"):
        raise UsageError(f"dtype={name} is unknown; use float32 or bfloat16")
    return {option: given.get(option) for option in LOADING} | {"dtype": getattr(torch, name) if name else None}


def load_lm(model: str, given: Mapping[str, Any]) -> Any:
    """`nextblock.load` with the loading options of a command, and without transformers' own progress bars.

    Raises:
        UsageError: what `load` refuses, or a model without a tokenizer.
    """
    from transformers.utils.logging import disable_progress_bar

    from nextblock.decoding.lm import load
    from nextblock.model.loading import no_tokenizer

    disable_progress_bar()
    lm = load(model, **loading_options(given))
    if lm.tokenizer is None:
        raise UsageError(
            f"{no_tokenizer(model)}; put the files of its tokenizer there, or use it from Python with token ids"
        )
    return lm
