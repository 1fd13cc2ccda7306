"""nextblock: turn an autoregressive language model into a block-diffusion one, and run it.

For example::

    import nextblock as nb

    nb.adapt("presets/demo.yaml")
    lm = nb.load("tiny-bd")
    prompt = "Q: Leo has 8 bags with 7 coins in each. He loses 13. How many coins does Leo have?\\nA:"
    print(lm.generate(prompt).texts[0])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nextblock.config.errors import UsageError
    from nextblock.config.run import AdaptConfig
    from nextblock.config.sections import BlockDiffusionSettings
    from nextblock.decoding.lm import BlockDiffusionLM, Generation, load
    from nextblock.workflows.adapt import RunResult, adapt
    from nextblock.workflows.custom_generate import block_diffusion

__version__ = "0.1.0"

_HOME = {
    "AdaptConfig": "config.run",
    "BlockDiffusionSettings": "config.sections",
    "UsageError": "config.errors",
    "BlockDiffusionLM": "decoding.lm",
    "Generation": "decoding.lm",
    "load": "decoding.lm",
    "block_diffusion": "workflows.custom_generate",
    "RunResult": "workflows.adapt",
    "adapt": "workflows.adapt",
}

__all__ = [
    "AdaptConfig",
    "BlockDiffusionLM",
    "BlockDiffusionSettings",
    "Generation",
    "RunResult",
    "UsageError",
    "adapt",
    "block_diffusion",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import nextblock` and `--help` then take no seconds."""
    if name not in _HOME:
        raise AttributeError(f"module 'nextblock' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"nextblock.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
