"""A plug-in of vLLM: the model that vLLM serves drafts for itself, or denoises, a block at a time.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`); nothing changes for an engine that
does not name `nextblock.vllm.Drafter` as its speculator. The modules load without vLLM, which they import inside their
functions. May import workflows and below. Start reading in `drafter.py`: what vLLM calls between two steps. In
`passes.py` is the draft pass over vLLM's paged cache, in `blocks.py` the block that a request denoises, in
`adapter.py` a draft adapter at vLLM's layers, in `plugin.py` what is changed in vLLM, in `checks.py` what is refused.
"""

from typing import TYPE_CHECKING, Any

from nextblock.vllm.plugin import register

if TYPE_CHECKING:
    from nextblock.vllm.drafter import Drafter

__all__ = ["Drafter", "register"]


def __getattr__(name: str) -> Any:
    """`Drafter`, when vLLM asks for it: the plug-in itself loads in every process of vLLM, and without torch."""
    if name != "Drafter":
        raise AttributeError(f"module 'nextblock.vllm' has no attribute '{name}'")
    from nextblock.vllm.drafter import Drafter

    return Drafter
