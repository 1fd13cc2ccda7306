"""Print `docs/configuration.md` from the configuration classes themselves, so that the two cannot drift.

python docs/make_configuration.py > docs/configuration.md
"""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from nextblock.config.errors import UsageError
from nextblock.config.run import AdaptConfig, Stage, load_config
from nextblock.config.sections import BlockDiffusionSettings, Section
from nextblock.decoding.options import DecodingConfig

HEAD = """# Configuration

<!-- Made by `python docs/make_configuration.py > docs/configuration.md`; do not edit. -->

A run is one YAML file. Every key is also an option of `nextblock adapt`, with dots between the levels and its
value read as YAML; an integer indexes a list:

```sh
nextblock adapt demo --growth.b_max 8 --data.sources.0.path my_texts/ --training.steps 400 --output runs/mine
```

The first argument is a YAML file or the name of a file in `presets/`. The resolved configuration is saved as
`nextblock.yaml` in the output folder. In Python: `nb.adapt("demo.yaml", {"growth.b_max": 8})`, or a mapping, or
an `nb.AdaptConfig`. `nextblock adapt demo --keys` prints this list in the terminal.
"""

REFUSED_HEAD = """## What is refused

An unknown key, a value out of range, or keys that contradict each other stop the run before anything is loaded
or written: one line on standard error, exit status 2; in Python, `nb.UsageError`. The lines, as printed:

| given | answer |
|---|---|"""

SETTINGS_HEAD = """## In the checkpoint: `block_diffusion` in `config.json`

What `nb.load` reads back. `decoding` holds defaults for the options of the next section."""

DECODING_HEAD = """## Decoding options

Keyword arguments of `lm.generate`, `lm.stream` and `lm.stream_text`. Order of precedence: the call, then
`block_diffusion.decoding` of the checkpoint, then these defaults. So on the command line: an option that is given
(`--temperature 0`) goes before the stored one, and one that is left out leaves it. Prompts, seeds, stop strings and
end tokens are described in [decoding](decoding.md)."""

MEANINGS = {
    ("Source", "format"): "auto: by the path (see [data](data.md))",
    ("OptimizerConfig", "warmup_steps"): "steps over which the learning rate rises linearly to its peak",
    ("OptimizerConfig", "weight_decay"): "on matrices; vectors have none",
    ("OptimizerConfig", "beta_1"): "decay of the running mean of gradients",
    ("OptimizerConfig", "beta_2"): "decay of the running mean of squared gradients",
    ("TrainingConfig", "seed"): "of weights that start random, of the order of the data, and of the noise",
    ("BlockDiffusionSettings", "block_size"): "block size that the model was adapted to",
    ("BlockDiffusionSettings", "mask_token_id"): "id of the mask token; never generated",
    ("BlockDiffusionSettings", "context"): "clean half: causal, or whole own block",
    ("BlockDiffusionSettings", "prediction"): "position i-1 predicts token i, or i predicts i",
}
"""Meanings of keys that have no description in the code."""

CONTRADICTIONS: tuple[dict[str, Any], ...] = (
    {"growth.b_mx": 16},
    {"recipe.context": "causal"},
    {"growth.b_0": 64, "growth.b_max": 32},
    {"growth.b_max": 32, "data.row_length": 16},
    {"growth.b_max": 32, "data.row_length": 1000},
    {"growth.b_max": 32, "growth.delta": 50, "training.steps": 100},
    {"recipe.views": 3, "recipe.complementary": True},
    {"recipe.soft_weight": 1, "recipe.context": "block_causal"},
    {"lora.rank": 16, "draft_adapter.rank": 16, "growth.b_0": 32},
    {"model.quantization": "4bit"},
    {"recipe.annealed_mask_steps": 100},
    {"recipe.annealed_mask_steps": 100, "growth.b_0": 32, "recipe.context": "block_causal"},
)


def page() -> str:
    """The whole page as Markdown."""
    parts = [HEAD]
    for name, field in AdaptConfig.model_fields.items():
        # None or a section is one, too; that of `stages`, a list, comes below
        inner = _section(field.annotation, *([] if name == "stages" else get_args(field.annotation)))
        if inner is not None:
            parts += _table(inner, f"{name}.", f"## `{name}`\n\n{_summary(inner)}")
    top = "".join(_row("AdaptConfig", name, AdaptConfig.model_fields[name]) for name in ("decoding", "output"))
    parts.append("## Top level\n\n" + _row_head() + top)
    parts += _table(Stage, "stages.N.", f"## `stages`\n\n{_summary(Stage)} See [distributed](distributed.md#stages).")
    parts.append("\n".join([REFUSED_HEAD, *map(_refused, CONTRADICTIONS)]))
    parts += _table(BlockDiffusionSettings, "", SETTINGS_HEAD)
    parts += _table(DecodingConfig, "", DECODING_HEAD, none="None")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _table(section: type[Section], prefix: str, head: str, none: str = "null") -> list[str]:
    """A heading with the table of a section's keys, then those of the sections in lists below it."""
    rows, below = [], []
    for name, field in section.model_fields.items():
        rows.append(_row(section.__name__, prefix + name, field, none))
        inner = _section(*get_args(field.annotation))
        if inner is not None:
            below += _table(inner, f"{prefix}{name}.N.", f"### `{prefix}{name}`\n\n{_summary(inner)}", none)
    return [f"{head}\n\n{_row_head()}{''.join(rows)}", *below]


def _row_head() -> str:
    return "| key | type | default | meaning |\n|---|---|---|---|\n"


def _row(section: str, key: str, field: FieldInfo, none: str = "null") -> str:
    name = key.rpartition(".")[2]
    meaning = field.description or MEANINGS.get((section, name))
    if meaning is None:
        raise KeyError(f"{section}.{name} has no description in the code and none in MEANINGS")
    default = "required" if field.is_required() else _value(field.get_default(call_default_factory=True), none)
    meaning = meaning.replace("|", "\\|")
    return f"| `{key}` | {_type(field.annotation)}{_limits(field)} | {default} | {meaning} |\n"


def _value(value: Any, none: str) -> str:
    if value is None:
        return f"`{none}`"
    value = list(value) if isinstance(value, tuple) else value
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _type(annotation: Any) -> str:
    """A type in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in inner if part is not NoneType)
    if origin is tuple:
        return "list"
    return {"str": "text", "int": "integer", "float": "number", "bool": "`true` or `false`", "dict": "mapping"}[
        (origin or annotation).__name__
    ]


def _limits(field: FieldInfo) -> str:
    """`, ≥ 1, < 2` from the limits that pydantic checks."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    found += ["at least one" for limit in field.metadata if getattr(limit, "min_length", None) == 1]
    return "".join(f", {limit}" for limit in found)


def _section(*annotations: Any) -> type[Section] | None:
    """The first of the annotations that is a section."""
    return next((a for a in annotations if isinstance(a, type) and issubclass(a, Section)), None)


def _summary(section: type[Section]) -> str:
    """First line of a section's docstring; its `*` are no Markdown."""
    return " ".join((section.__doc__ or "").strip().splitlines()[0].split()).replace("*", "\\*")


def _refused(overrides: dict[str, Any]) -> str:
    """What the configuration says to a run with these keys, as a table row."""
    base = {"data": {"sources": [{"path": "my_texts/"}]}}
    given = " ".join(f"--{key} {_value(value, 'null').strip('`')}" for key, value in overrides.items())
    try:
        load_config(base, overrides)
    except UsageError as error:
        return f"| `{given}` | {error} |"
    raise AssertionError(f"{given} is accepted; take it out of CONTRADICTIONS")


if __name__ == "__main__":
    print(page(), end="")
