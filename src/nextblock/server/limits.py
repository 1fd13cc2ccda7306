"""What a server takes, stated once: the options of `nextblock serve` are made from it. Loads without torch."""

from __future__ import annotations

from pydantic import Field

from nextblock.config.sections import Section


class Limits(Section):
    """What a server takes."""

    max_rows: int = Field(default=32, ge=1, description="answers that are decoded at the same time")
    max_waiting: int = Field(default=256, ge=0, description="answers that may wait for a place; more get status 429")
    pass_tokens: int = Field(
        default=512,
        ge=1,
        description="tokens of prompts read between two passes of the answers in flight; widest pass of an answer",
    )
    max_tokens: int = Field(default=4096, ge=1, description="longest answer that a client may ask for, in tokens")
    max_prompt: int | None = Field(default=None, ge=1, description="longest prompt, in tokens; default: the context")
    max_body: int = Field(default=1 << 20, ge=1, description="largest body of a request, in bytes; else status 413")
    send_seconds: float = Field(default=30, gt=0, description="a client that takes nothing for so long is given up")
    stop_seconds: float = Field(default=30, gt=0, description="how long answers may go on after the signal to stop")
