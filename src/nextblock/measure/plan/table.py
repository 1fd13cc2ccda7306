"""A plan as a table of the terminal."""

from __future__ import annotations

from typing import cast

from rich.box import SIMPLE_HEAD
from rich.table import Table

from nextblock.measure.plan import USABLE, Plan, StagedPlan
from nextblock.measure.plan.memory import GIB
from nextblock.training.devices import DEVICES


def plan_table(found: Plan) -> Table:
    """What `nextblock plan` prints."""
    table = Table(box=SIMPLE_HEAD, show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", style="dim")
    share = f"{100 * found.trained_share:.2f} % of the parent" if found.trained != "full" else ""
    table.add_row("parameters", _count(found.parameters), found.model)
    table.add_row("trained", _count(found.trained_parameters), f"{found.trained} {share}".strip(), end_section=True)
    for kind, size in sorted(found.memory.items(), key=lambda item: -item[1]):
        table.add_row(kind, _gib(size), "")
    room = DEVICES[found.device].memory_gib
    verdict = "" if room is None else f"{'fits' if found.fits else 'does not fit'} {USABLE:.0%} of {room:.0f} GiB"
    table.add_row("memory at a step's peak", _gib(sum(found.memory.values())), "")
    if found.evaluation_bytes:
        table.add_row("at the final evaluation", _gib(found.evaluation_bytes), "the first device")
    table.add_row("memory at the peak", _gib(found.peak_bytes), verdict, style="bold")
    rows = f"{found.micro_batch_rows} x ({found.row_length} tokens + {found.noised_tokens} noised)"
    table.add_row("a pass on one device", "", f"{rows}, b = {found.block_size}")
    if room is not None:
        longest = "none" if found.largest_row is None else str(found.largest_row)
        table.add_row("longest row that fits", longest, "tokens")
    table.add_section()
    for name in ("clean", "noised", "head", "recomputed"):
        value = getattr(found.flops, name)
        if value:
            label = {"clean": "clean half", "noised": "noised half", "recomputed": "computed twice"}.get(name, name)
            table.add_row(f"FLOPs a step, {label}", f"{value:.3g}", "")
    table.add_row("useful FLOPs a step", f"{found.flops.useful:.3g}", "clean half, noised half and head", style="bold")
    if found.seconds is None or found.step_seconds is None:
        return table
    table.add_section()
    where = f"{found.devices} x {found.device}" + (f", {found.parallel}" if found.parallel else "")
    table.add_row("tokens per second", f"{found.tokens_per_second:,.0f}", f"{where} at {found.mfu:.0%} MFU, assumed")
    table.add_row("a step", f"{found.step_seconds:,.2f} s", f"{found.batch_rows} rows")
    table.add_row("the run", f"{found.seconds / 86400:,.2f} days", "with block growth")
    table.add_row("", f"{found.device_hours:,.1f} h", "GPU-hours")
    return table


def stages_table(found: StagedPlan) -> Table:
    """What `nextblock plan` prints of a run in stages: a column for each, and one for the whole."""
    plans = [stage.plan for stage in found.stages]
    first, room = plans[0], DEVICES[plans[0].device].memory_gib
    where = f"{first.devices} x {first.device}" + (f", {first.parallel}" if first.parallel else "")
    table = Table(box=SIMPLE_HEAD, caption=f"{first.model}, {_count(first.parameters)} parameters; {where}")
    table.add_column("", no_wrap=True)
    for name in (*(stage.name for stage in found.stages), "all"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("steps", *(f"{stage.steps:,}" for stage in found.stages), f"{found.steps:,}")
    table.add_row("tokens a row", *(str(one.row_length) for one in plans))
    table.add_row("rows a step", *(str(one.batch_rows) for one in plans))
    table.add_row("rows a pass on one device", *(str(one.micro_batch_rows) for one in plans))
    table.add_row("block size", *(str(one.block_size) for one in plans), end_section=True)
    kinds = sorted(
        {kind for one in plans for kind in one.memory}, key=lambda k: -max(p.memory.get(k, 0) for p in plans)
    )
    for kind in kinds:
        table.add_row(kind, *(_gib(one.memory[kind]) if one.memory.get(kind) else "" for one in plans))
    if first.evaluation_bytes:
        table.add_row("at the final evaluation", *(_gib(one.evaluation_bytes) for one in plans))
    table.add_row("memory at the peak", *(_gib(one.peak_bytes) for one in plans), _gib(found.peak_bytes), style="bold")
    if room is not None:
        verdicts = ("yes" if fits else "no" for fits in (*(one.fits for one in plans), found.fits))
        table.add_row(f"fits {USABLE:.0%} of {room:.0f} GiB", *verdicts)
        longest = ("none" if one.largest_row is None else str(one.largest_row) for one in plans)
        table.add_row("longest row that fits", *longest)
    table.add_section()
    table.add_row("useful FLOPs a step", *(f"{one.flops.useful:.3g}" for one in plans))
    flops = [stage.run_flops for stage in found.stages]
    table.add_row("useful FLOPs", *(f"{n:.3g}" for n in (*flops, found.run_flops)), style="bold")
    if found.seconds is None:
        return table
    table.add_section()
    table.add_row(
        f"tokens per second at {first.mfu:.0%} MFU, assumed", *(f"{one.tokens_per_second:,.0f}" for one in plans)
    )
    table.add_row("seconds a step", *(f"{one.step_seconds:,.2f}" for one in plans))
    table.add_row("days", *(f"{cast(float, of.seconds) / 86400:,.2f}" for of in (*plans, found)))
    table.add_row("GPU-hours", *(f"{of.device_hours:,.1f}" for of in (*plans, found)), style="bold")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"
