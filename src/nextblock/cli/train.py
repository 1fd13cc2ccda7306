"""Commands that train or plan a training."""

from __future__ import annotations

import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from nextblock.cli.options import at_least_one
from nextblock.config.errors import UsageError
from nextblock.config.files import read_yaml, user_path
from nextblock.config.run import AdaptConfig
from nextblock.config.sections import Section, said_type


def _explain_config(section: type[Section] = AdaptConfig, prefix: str = "") -> list[str]:
    """One line of help for each key of a run's configuration."""
    lines = []
    for name, field in section.model_fields.items():
        inner: Any = next((t for t in (field.annotation, *get_args(field.annotation)) if is_section(t)), None)
        if inner is not None:
            many = ".0" if field.annotation is not inner and name.endswith("s") else ""
            lines += _explain_config(inner, f"{prefix}{name}{many}.")
        else:
            default = "" if field.is_required() else f" [{field.get_default(call_default_factory=True)}]"
            lines.append(f"--{prefix}{name}{default}: {field.description or ''}".rstrip(": "))
    return lines


def is_section(kind: Any) -> bool:
    """Whether an annotation is a group of options."""
    return isinstance(kind, type) and issubclass(kind, Section)


def adapt(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a preset: demo, tiny_ar, ...")],
    output: Annotated[str | None, typer.Option(help="folder for checkpoint, log and report")] = None,
    resume: Annotated[
        str | None, typer.Option(help="auto: go on from the newest whole checkpoint in the output folder, else start")
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="list every key of the configuration and stop")] = False,
) -> None:
    """Adapt an AR model into a block-diffusion model, with any key of the configuration as an option."""
    if keys:
        print("\n".join(_explain_config()))
        return
    from nextblock.config.presets import find_config

    overrides = parse_overrides(context.args)
    if output is not None:
        overrides["output"] = output
    if resume not in (None, "auto"):
        raise UsageError(f"--resume {resume}: the one value is auto; --output names the folder")

    from transformers.utils.logging import disable_progress_bar

    from nextblock.cli.live import TrainingBar
    from nextblock.config.run import load_config, stage_configs
    from nextblock.training.ranks import errors_on_all_ranks, is_main
    from nextblock.workflows.adapt import adapt as run

    disable_progress_bar()
    with errors_on_all_ranks():  # a file may be missing on one machine
        checked = load_config(find_config(config), overrides)
    steps = sum(stage.training.steps for stage in stage_configs(checked))
    with TrainingBar(steps) if is_main() else nullcontext() as bar:
        options = {"on_step": bar.update, "on_evaluation": bar.evaluated} if bar else {}
        result = run(checked, resume=resume == "auto", **options)
    if not is_main():
        return
    if not result.finished:
        print(f"stopped at step {result.steps}; go on with --resume auto", file=sys.stderr)
        return
    for measure in result.results.get("bits_per_byte", []):
        print(f"{measure['model']:8s} {measure['measure']:18s} {measure['value']:.3f} bits per byte")
    lost = result.results["training"]
    if lost["truncated"] or lost["skipped"]:
        bad = f", of these {lost['unusable']} that cannot be used" if lost.get("unusable") else ""
        print(
            f"data        {lost['truncated']} documents were cut at data.row_length, {lost['skipped']} left out{bad}"
        )
    if lost["spelled"]:
        print(f"data        {lost['spelled']} special tokens in contents read as text, first in {lost['spelled_at']}")
    print(f"checkpoint  {result.output}\nreport      {result.output / 'report.html'}")


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`--a.b value` and `--a.b=value` -> {"a.b": value}, values read as YAML."""
    overrides: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--"):
            raise UsageError(f"unexpected argument '{key}'; options are written --key.sub value")
        key, equals, value = key[2:].partition("=")
        if not equals:
            if not rest:
                raise UsageError(f"option --{key} needs a value")
            value = rest.pop(0)
        overrides[key] = read_value(key, value)
    return overrides


def read_value(key: str, text: str) -> Any:
    """An option's value, read as YAML; where a text is wanted, or it is no YAML, it is taken as it stands."""
    try:
        value = read_yaml(text)
    except UsageError:
        return text
    kind = said_type(AdaptConfig, key)
    other = (isinstance(value, int) and "number" in kind) or (isinstance(value, list) and "list" in kind)
    if value is None or other or "a text" not in kind or text[:1] in ("'", '"'):
        return value
    return text


def plan(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a preset: qwen3-0.6b, qwen3-8b, ...")],
    gpu: Annotated[
        str | None,
        typer.Option(
            help="h200, h100, h100-pcie, a100-80g, a100-40g, l40s, l4, rtx5090, rtx4090, rtx3090, b200; cpu: memory "
            "alone; default: machine.gpu of the configuration"
        ),
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="how many of them; default: machine.gpus")] = None,
    parallel: Annotated[
        str | None,
        typer.Option(help="ddp: copies; fsdp2: sharded weights, gradients and optimizer; default: as training.fsdp"),
    ] = None,
    mfu: Annotated[float, typer.Option(help="share of the GPU's peak that useful FLOPs reach, for the time")] = 0.4,
    bandwidth: Annotated[float, typer.Option(help="GB/s of the storage that checkpoints go to")] = 1.0,
    json_: Annotated[bool, typer.Option("--json", help="print JSON instead of the table")] = False,
) -> None:
    """Say what a run takes before it starts: parameters, memory by kind, the longest row, FLOPs, days, GPU-hours.

    Without options: what `nextblock adapt` of the same configuration will do. Exit status 1 if it does not fit.
    """
    from nextblock.cli.options import wide_console
    from nextblock.config.presets import find_config
    from nextblock.config.run import load_config
    from nextblock.measure.plan import plan_run, shortfall
    from nextblock.measure.plan.table import plan_table

    checked = load_config(find_config(config), parse_overrides(context.args))
    found = plan_run(checked, device=gpu, devices=gpus, parallel=parallel, mfu=mfu, bandwidth=bandwidth)
    if json_:
        print(json.dumps(found.as_dict(), indent=1))
    else:
        wide_console().print(plan_table(found))
    if line := shortfall(found, checked):
        print(line, file=sys.stderr)
        raise typer.Exit(1)


def prepare(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="YAML file, or the name of a preset")],
    output: Annotated[Path, typer.Option(help="folder that gets a token store for each source")],
    processes: Annotated[int | None, typer.Option(min=1, help="default: one for each core")] = None,
    part: Annotated[
        str | None, typer.Option(metavar="I/N", help="write part I (from 1) of N alone, as one job of an array of N")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="make stores of the parts that such jobs wrote")] = False,
    append: Annotated[bool, typer.Option("--append", help="add the sources to the stores that are there")] = False,
) -> None:
    """Tokenise the sources of a configuration once, into stores that `adapt` takes in their place.

    Killed and started again, it goes on. OUTPUT/nextblock.yaml is the configuration with its stores.
    """
    if part is not None and (merge or processes):
        other = "--merge" if merge else "--processes"
        raise UsageError(f"--part {part} is written by one process, and merged when all are; leave out {other}")
    numbers = re.fullmatch(r"(\d+)/(\d+)", part or "1/1")
    if numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise UsageError(f"--part {part} must be I/N with 1 <= I <= N, as in 3/8")
    from nextblock.config.presets import find_config
    from nextblock.config.run import load_config
    from nextblock.workflows.prepare import CONFIG
    from nextblock.workflows.prepare import prepare as run

    output = user_path(output, "--output")
    found = run(
        load_config(find_config(config), parse_overrides(context.args)),
        output,
        processes=processes,
        part=(int(numbers[1]) - 1, int(numbers[2])) if part else None,
        merge_parts=merge,
        append=append,
    )
    for one in found:
        if one.manifest is None:
            print(f"{one.store}: part {part} is written; when all are, run nextblock prepare with --merge")
            continue
        made, size = one.manifest, sum(file.stat().st_size for file in one.store.glob("*/*.bin"))
        print(
            f"{one.store}: {made['documents']:,} documents, {made['tokens']:,} tokens "
            f"({made['generated']:,} generated), {size / 2**20:,.1f} MiB"
        )
    if part is None:
        print(f"{output / CONFIG}: the configuration that reads them")


def demo(
    output: Annotated[Path | None, typer.Option(help="folder for everything; default: a new one under runs/")] = None,
    examples: Annotated[int, typer.Option(help="held-out problems scored in each mode")] = 200,
) -> None:
    """Adapt the shipped AR model in front of your eyes, then decode with it in every mode (about 7 minutes)."""
    at_least_one(examples=examples)
    from nextblock.cli.demo import demo as run

    run(output, examples=examples)
