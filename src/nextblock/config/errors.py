"""What a user did wrong, in one line; and near misses of names."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Sequence


class UsageError(ValueError):
    """Bad input from the user: one line with the value, the rule and the cure. The CLI exits 2."""


class TrainingStopped(UsageError):
    """A run that cannot go on, after steps that were well: what it has written is worth a look."""


def nearest(word: str, choices: Sequence[str], likeness: float = 0.6) -> str:
    """`; did you mean 'x'?` for the choice most like `word`, or the list of all choices."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=likeness)
    return f"; did you mean '{close[0]}'?" if close else f"; choose from {', '.join(choices)}"


def require(package: str, extra: str, key: str) -> None:
    """Stop in one line where `key` of the configuration needs an optional package that is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # None: a folder of that name, which is no package
        raise UsageError(f"{key} needs {package}, which is not installed; run `pip install 'nextblock[{extra}]'`")


def one_line(error: BaseException) -> str:
    """What an exception of another library says, on one line of at most 300 characters."""
    said = " ".join(str(error).split())
    if isinstance(error, KeyError) or not said:  # a key alone says nothing
        said = f"{type(error).__name__} {said}".strip()
    return said[:300]
