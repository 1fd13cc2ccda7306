"""What the plug-in changes in vLLM: an engine is checked before it starts, a request before it is queued.

Each change passes on to what was there, unless the engine names our speculator.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

DRAFTER = "nextblock.vllm.Drafter"
"""`model` of a `speculative_config` that asks for this plug-in."""


def asked(config: Any) -> bool:
    """Whether an engine's VllmConfig names our speculator."""
    speculative = config.speculative_config
    return speculative is not None and speculative.method == "custom_class" and speculative.model == DRAFTER


def register() -> None:
    """Called by vLLM in each of its processes, maybe more than once."""
    arguments: Any = sys.modules.get("vllm.engine.arg_utils")  # where no engine is made there is nothing to check
    if arguments is not None:
        around(arguments.EngineArgs, "create_engine_config", _checked_engine)
    config: Any = sys.modules.get("vllm.config")
    lookahead = getattr(getattr(config, "VllmConfig", None), "num_lookahead_tokens", None)
    if isinstance(lookahead, property) and not hasattr(lookahead.fget, "__wrapped__"):
        assert lookahead.fget is not None
        config.VllmConfig.num_lookahead_tokens = property(functools.wraps(lookahead.fget)(_lookahead(lookahead.fget)))


def around(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """Put `make(old)` in place of a method, once."""
    old = getattr(owner, name)
    if not hasattr(old, "__wrapped__"):
        setattr(owner, name, functools.wraps(old)(make(old)))


def _lookahead(old: Any) -> Any:
    """Slots of the cache behind a row's last token, for the block that is drafted there."""

    def slots(config: Any) -> int:
        return config.num_speculative_tokens + 1 if asked(config) else old(config)

    return slots


def _checked_engine(old: Any) -> Any:
    def create(*args: Any, **options: Any) -> Any:
        config = old(*args, **options)
        if asked(config):
            from nextblock.config.errors import UsageError
            from nextblock.vllm.checks import check_engine

            try:
                check_engine(config)
            except UsageError as error:
                if not _is_command():
                    raise
                print(error, file=sys.stderr)
                raise SystemExit(2) from None
            from vllm.v1.engine.input_processor import InputProcessor  # pyright: ignore[reportMissingImports]

            around(InputProcessor, "_validate_params", _checked_request)
        return config

    return create


def _is_command() -> bool:
    """Whether this process is a command of vLLM (`vllm serve`, `python -m vllm.entrypoints...`), no user's program."""
    of_module = getattr(sys.modules.get("__main__"), "__package__", None) or ""
    return of_module.split(".")[0] == "vllm" or os.path.basename(sys.argv[0]) == "vllm"


def _checked_request(old: Any) -> Any:
    def validate(processor: Any, params: Any, *args: Any, **options: Any) -> Any:
        if asked(processor.vllm_config) and hasattr(params, "extra_args"):
            from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]

            from nextblock.config.errors import UsageError
            from nextblock.vllm.checks import check_request

            try:
                check_request(processor.vllm_config, params)
            except UsageError as error:  # vLLM makes status 400 of its own kind alone
                raise VLLMValidationError(str(error)) from None
        return old(processor, params, *args, **options)

    return validate
