"""Functions that show the options they take: the fields of a model in their signature and docstring."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from pydantic import BaseModel
from pydantic.fields import FieldInfo

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A")
B = TypeVar("B")


def takes(
    options: Callable[P, BaseModel],
) -> Callable[[Callable[Concatenate[A, B, ...], R]], Callable[Concatenate[A, B, P], R]]:
    """Decorate a function `f(first, second, **options)` so that `help` and type checkers see a model's fields.

    Args:
        options: a model, whose fields stand in the signature and in the docstring in place of `**options`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        fields: dict[str, FieldInfo] = getattr(options, "model_fields")  # noqa: B009
        lines = [f"    {name}: {field.description}" for name, field in fields.items()]
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Keyword Args:", *lines])
        return spell_out(function, parameters_of(fields))

    return decorate


def parameters_of(fields: Mapping[str, FieldInfo]) -> list[inspect.Parameter]:
    """Fields of a model as keyword parameters."""
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(name, kind, default=field.default, annotation=field.annotation)
        for name, field in fields.items()
    ]


def spell_out(function: Callable[..., Any], parameters: Sequence[inspect.Parameter], kept: str = "") -> Any:
    """The function, with these parameters in its signature in place of `**options`.

    Args:
        kept: name of a `**` parameter that stays beside them, because it takes more than the options.
    """
    signature = inspect.signature(function, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    rest = [p for p in signature.parameters.values() if p.name == kept]
    setattr(function, "__signature__", signature.replace(parameters=[*own, *parameters, *rest]))  # noqa: B010
    return function
