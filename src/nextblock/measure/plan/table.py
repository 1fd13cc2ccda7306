"""A plan as a table of the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from nextblock.measure.plan import USABLE, Plan, StagedPlan
from nextblock.measure.words import count, memory, number
from nextblock.training.devices import DEVICES

HOST = {"loading": "host, while loading", "training": "host, with a checkpoint", "end": "host, at the end"}
RECEIVED = {"weights": "weights received", "gradients": "gradients received", "copies": "gradients between copies"}
YES = {True: "yes", False: "no", None: ""}
FLOPS = {"clean": "clean half", "noised": "noised half", "head": "head", "recomputed": "computed twice"}


def plan_table(found: Plan | StagedPlan) -> Table:
    """What `nextblock plan` prints: one column with notes, or a column for each stage and one for all of them."""
    staged = isinstance(found, StagedPlan)
    plans = [stage.plan for stage in found.stages] if isinstance(found, StagedPlan) else [found]
    first, room = plans[0], DEVICES[plans[0].device].memory_gib
    table = Table(box=SIMPLE_HEAD, show_header=staged)
    table.add_column("", no_wrap=True)
    for name in (stage.name for stage in found.stages) if isinstance(found, StagedPlan) else ("",):
        table.add_column(escape(name), justify="right", no_wrap=True)
    table.add_column("all" if staged else "", justify="right" if staged else "left", style="" if staged else "dim")

    def row(label: str, cell: Callable[[Plan], str], note: str = "", total: str = "", **style: Any) -> None:
        table.add_row(label, *map(cell, plans), escape(total if staged else note), **style)

    share = f"{100 * first.trained_share:.2f} % of the parent" if first.trained != "full" else ""
    row("parameters", lambda one: count(one.parameters, 2), first.model)
    row("trained", lambda one: count(one.trained_parameters, 2), f"{first.trained} {share}".strip(), end_section=True)
    row("steps", lambda one: f"{one.steps:,}", total=f"{found.steps:,}")
    row("rows a step", lambda one: str(one.batch_rows))
    row("rows a pass on one device", lambda one: str(one.micro_batch_rows))
    row("tokens a row", lambda one: str(one.row_length))
    row("noised tokens a row", lambda one: str(one.noised_tokens))
    row("block size", lambda one: str(one.block_size), end_section=True)

    most = {kind: max(one.memory.get(kind, 0) for one in plans) for one in plans for kind in one.memory}
    for kind in sorted(most, key=lambda kind: -most[kind]):
        row(kind, lambda one, kind=kind: memory(one.memory[kind]) if one.memory.get(kind) else "")
    row("memory at a step's peak", lambda one: memory(sum(one.memory.values())))
    if any(one.evaluation_bytes for one in plans):
        row("at the final evaluation", lambda one: memory(one.evaluation_bytes), "the first device")
    row("memory at the peak", lambda one: memory(one.peak_bytes), total=memory(found.peak_bytes), style="bold")
    if room is not None:
        row(f"fits {USABLE:.0%} of {room:.0f} GiB", lambda one: YES[one.fits], total=YES[found.fits])
        row("longest row that fits", lambda one: str(one.largest_row or "none"), "tokens")
    table.add_section()
    for kind, label in HOST.items():
        row(label, lambda one, kind=kind: memory(one.host_memory[kind]), "of a process, beside Python and libraries")
    for kind, label in RECEIVED.items():
        if first.communication.get(kind):
            row(label, lambda one, kind=kind: memory(one.communication[kind]), "a device, each step")
    table.add_section()

    for part, label in FLOPS.items():
        if any(getattr(one.flops, part) for one in plans):
            row(f"FLOPs a step, {label}", lambda one, part=part: f"{getattr(one.flops, part):.3g}")
    row("useful FLOPs a step", lambda one: f"{one.flops.useful:.3g}", "clean half, noised half and head")
    row("useful FLOPs", lambda one: f"{one.run_flops:.3g}", "all steps", f"{found.run_flops:.3g}", style="bold")
    row("a checkpoint", lambda one: memory(one.checkpoint_bytes), f"{first.checkpoint_seconds:.1f} s to the storage")
    row("tokens of all steps, stored", lambda one: memory(one.store_bytes), "nextblock prepare")
    if found.seconds is None or found.device_hours is None:
        return table
    table.add_section()
    where = f"{first.devices} x {first.device}" + (f", {first.parallel}" if first.parallel else "")
    table.caption = escape(f"{first.model} on {where} at {first.mfu:.0%} MFU, assumed")
    row("tokens per second", lambda one: number(one.tokens_per_second, 0))
    row("of which each process is fed", lambda one: number(one.feed_tokens_per_second, 0))
    row("seconds a step", lambda one: number(one.step_seconds))
    row("days", lambda one: number((one.seconds or 0) / 86400), "with block growth", number(found.seconds / 86400))
    row("GPU-hours", lambda one: number(one.device_hours, 1), total=number(found.device_hours, 1), style="bold")
    return table
