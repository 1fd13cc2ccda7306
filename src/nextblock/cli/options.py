"""Options that commands share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from nextblock.config.errors import UsageError

app = typer.Typer(
    name="nextblock",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn an autoregressive language model into a block-diffusion one, and run it (arXiv 2512.06776).\n\n"
    "A MODEL is a local Hugging Face folder, a Hub id, or a shipped model: tiny-ar (the AR parent) or tiny-bd "
    "(adapted).",
)

Model = Annotated[str, typer.Argument(help="local folder, Hub id, tiny-ar or tiny-bd")]
Mode = Annotated[
    str | None,
    typer.Option(help="ar: token by token. diffusion: a block at a time. speculative: a block at a time, AR's output"),
]
MaxNewTokens = Annotated[int, typer.Option(help="longest answer, in tokens")]
AnswerTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", help="longest answer, in tokens; default: the checkpoint's, else 256")
]
BlockSize = Annotated[int | None, typer.Option(help="tokens in a block; default: the checkpoint's")]
SubBlocks = Annotated[int | None, typer.Option(help="runs in which a block is denoised; divides the block size")]
Sampler = Annotated[str | None, typer.Option(help="confidence, entropy, margin or entropy_bound")]
Threshold = Annotated[str | None, typer.Option(help="diffusion: commit all above it, 0 to 1; 'none': one a step")]
Temperature = Annotated[float | None, typer.Option(help="0: greedy; default: the checkpoint's, else 0")]
TopP = Annotated[float | None, typer.Option(help="nucleus sampling")]
TopK = Annotated[int | None, typer.Option(help="sample from the k likeliest tokens")]
Seed = Annotated[int | None, typer.Option(help="of the random draws")]
Steps = Annotated[int | None, typer.Option(help="diffusion: denoising steps per block")]
DraftLength = Annotated[
    str | None, typer.Option(help="speculative: tokens per draft, or 'auto': by what was kept lately")
]
DraftAhead = Annotated[
    int | None, typer.Option(help="speculative: draft in the check's own pass, for so many points of acceptance")
]
DraftPaths = Annotated[int | None, typer.Option(help="speculative: paths of a draft, checked at once as a tree")]
DraftAdapterFolder = Annotated[
    str | None, typer.Option("--draft-adapter", help="folder of a draft adapter for this model, or tiny-draft")
]
Settings = Annotated[
    str | None,
    typer.Option(help="block-diffusion settings in place of config.json's: nbdiff-7b, {mask_token_id: 7}, or a file"),
]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16; default: float32 on CPU, else as saved")]
Compile = Annotated[
    bool | None,
    typer.Option("--compile/--no-compile", help="torch.compile and a static cache; default: on CUDA alone"),
]


def decoding_options(given: dict[str, Any]) -> dict[str, Any]:
    """The decoding options that were given; the others stay the checkpoint's, or `generate`'s own."""
    names = ("mode", "max_new_tokens", "block_size", "sub_blocks", "sampler", "steps", "temperature", "top_p", "top_k")
    names += ("draft_ahead", "draft_paths")
    options = {name: given[name] for name in names if given.get(name) is not None}
    if given.get("threshold") is not None:
        options["threshold"] = number(given["threshold"], "threshold")
    if (length := given["draft_length"]) is not None:
        if length != "auto" and not length.isdecimal():
            raise UsageError(f"draft_length={length} is not a number of tokens; use 1 or more, or auto")
        options["draft_length"] = length if length == "auto" else int(length)
    return options


def number(text: str, name: str) -> float | None:
    """A number, or None for 'none'."""
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise UsageError(f"{name}={text} is not a number; use 0 to 1, or none") from None


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


def load_lm(
    model: str,
    dtype: str | None = None,
    draft_adapter: str | None = None,
    compile: bool | None = None,
    settings: str | None = None,
) -> Any:
    """`nextblock.load` with a dtype by name, and without transformers' own progress bars."""
    from transformers.utils.logging import disable_progress_bar

    from nextblock.decoding.lm import load
    from nextblock.model.loading import no_tokenizer

    disable_progress_bar()
    lm = load(model, dtype=torch_dtype(dtype), draft_adapter=draft_adapter, compile=compile, settings=settings)
    if lm.tokenizer is None:
        raise UsageError(f"{no_tokenizer(model)}; use it from Python with token ids")
    return lm
