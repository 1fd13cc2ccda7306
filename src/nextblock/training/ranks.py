"""The processes of one run (its ranks): what they tell each other, and errors that stop all or none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState

from nextblock.config.errors import UsageError

T = TypeVar("T")


def process_state() -> PartialState:
    """Of the processes that torchrun or `accelerate launch` started, which meet in the first call; or of this one."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":  # which would meet in its own way
        raise UsageError(
            "the launcher has set ACCELERATE_USE_DEEPSPEED=true, which a run of nextblock does not follow; start "
            "without DeepSpeed, and set training.fsdp=true: FSDP2 shares out weights, gradients and optimizer"
        )
    meet_after_restart()
    # accelerate takes CPU processes for unrelated ones unless it is told.
    return PartialState(cpu=int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available())


def meet_after_restart() -> None:
    """Where torchrun has started all processes of one machine again: let them meet under keys of their own.

    It keeps its store (torch 2.13), in which the addresses of ended processes would be taken for those of new ones.
    """
    said = os.environ
    start, count = said.get("TORCHELASTIC_RESTART_COUNT", "0"), said.get("WORLD_SIZE", "1")
    one_machine = said.get("LOCAL_WORLD_SIZE") == count != "1"  # on several, the starts are not counted alike
    if start == "0" or not one_machine or said.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    if torch.distributed.is_initialized() or (torch.accelerator.is_available() and not torch.cuda.is_available()):
        return
    distributed: Any = torch.distributed
    store = distributed.TCPStore(said["MASTER_ADDR"], int(said["MASTER_PORT"]), is_master=False)
    distributed.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=distributed.PrefixStore(f"start-{start}", store),
        rank=int(said["RANK"]),
        world_size=int(count),
    )


def is_main() -> bool:
    """Whether this is rank 0, which alone writes and prints."""
    return process_state().is_main_process


def gather(value: T, group: Any = None) -> list[T]:
    """Every rank's value (anything that pickles), in the order of ranks, on every rank.

    Args:
        group: a process group of all ranks for what goes on beside the training; None: the training's own.
    """
    count = process_state().num_processes
    if count == 1:
        return [value]
    found: list[Any] = [None] * count
    torch.distributed.all_gather_object(found, value, group=group)
    return found


def end_process_group() -> None:
    """End this process's part in the run, where it met others; the last thing that it does before it exits.

    Threads that still wait for other ranks would abort the process, and its exit status would be theirs.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def errors_on_all_ranks(group: Any = None) -> Iterator[None]:
    """Rank-synchronised errors: a UsageError that one rank raises in the block is raised on all at its end.

    What communicates inside must fail on every rank or on none. `group`: as of `gather`.
    """
    said = None
    try:
        yield
    except UsageError as error:
        said = str(error)
    first = next((line for line in gather(said, group) if line is not None), None)
    if first is not None:
        raise UsageError(first)
