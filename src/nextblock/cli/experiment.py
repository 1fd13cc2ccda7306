"""`nextblock experiment`: the arms of one question, with error bars."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nextblock.cli.options import at_least_one
from nextblock.config.errors import UsageError
from nextblock.config.files import user_path


def experiment(
    name: Annotated[str, typer.Argument(help="YAML file, or the name of one in experiments/: table1, table2, ...")],
    jobs: Annotated[int, typer.Option(help="runs side by side, of one thread each")] = 1,
    runs: Annotated[Path, typer.Option(help="folder of checkpoints and logs")] = Path("runs/experiments"),
    table: Annotated[bool, typer.Option("--table", help="run nothing; print what is there")] = False,
    arm: Annotated[str | None, typer.Option(help="this arm alone, in this process, without --jobs")] = None,
    seed: Annotated[int | None, typer.Option(help="with this seed; goes with --arm")] = None,
    parent: Annotated[str | None, typer.Option(help="train this parent of the experiment alone")] = None,
) -> None:
    """Run every arm of an experiment with every seed, and print a table with 95 % intervals over the seeds.

    Finished runs are skipped, stopped ones go on. Figures go into `results/NAME/ARM-SEED.json` beside the YAML file.
    """
    from nextblock.workflows.experiment import find_experiment, load_experiment

    at_least_one(jobs=jobs)
    source = find_experiment(name)
    checked = load_experiment(source)
    if (arm is None) != (seed is None):
        raise UsageError("--arm and --seed go together; give both or none")
    if sum((table, arm is not None, parent is not None)) > 1:
        raise UsageError("--table, --arm and --parent each ask for something else; give one")
    if seed is not None and seed not in checked.seeds:
        raise UsageError(f"seed={seed} is none of the experiment's seeds {list(checked.seeds)}; add it there")

    from rich.markdown import Markdown
    from transformers.utils.logging import disable_progress_bar

    from nextblock.cli.options import wide_console
    from nextblock.config.progress import progress
    from nextblock.workflows.evidence import markdown_table, plot
    from nextblock.workflows.experiments import place_of, read_results, run_experiment, run_one, run_parent

    disable_progress_bar()
    place = place_of(source, user_path(runs, "--runs"))
    if parent is not None:
        run_parent(checked, place, parent)
    elif arm is not None and seed is not None:
        run_one(checked, place, arm, seed)
    else:
        if not table:
            with progress(f"{source.stem}: steps") as update:
                run_experiment(checked, place, jobs, update)
        if not (results := read_results(checked, place)):
            raise UsageError(f"{place.results} holds no figures yet; run without --table")
        console = wide_console()
        console.print(checked.question, soft_wrap=True, highlight=False, markup=False)
        console.print(Markdown(markdown_table(checked, results)))
        place.runs.mkdir(parents=True, exist_ok=True)
        plot(checked, results).savefig(place.runs / "plot.png")
        console.print(f"plot        {place.runs / 'plot.png'}", soft_wrap=True, highlight=False, markup=False)
