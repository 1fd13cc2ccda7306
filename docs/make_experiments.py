"""Write `docs/experiments.md` and its plots from the figures in `experiments/results`, so that none is typed by hand.

python docs/make_experiments.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib import rc_context

from nextblock.workflows.evidence import Results, filled, markdown_table, plot
from nextblock.workflows.experiment import Experiment, load_experiment
from nextblock.workflows.experiments import place_of, read_results, wanted_runs

ROOT = Path(__file__).parents[1]
ORDER = (
    "table1", "table2", "figure3", "table5", "growth", "ar_weight", "first_token", "noise", "budget", "length",
)  # fmt: skip
HEAD = """# Experiments

<!-- Made by `python docs/make_experiments.py` from experiments/; do not edit. -->

The claims of the method, in miniature: models of 2 million parameters and less, and 0.6 million tokens of rows in most
runs, prompts and padding included.
Each experiment is one file in `experiments/`, and one command runs what is missing of it:

```sh
nextblock experiment table1 --jobs 2
```

Arms share parent, data, their order and the budget in tokens, unless an arm's name says otherwise; the keys of each
arm stand in the YAML file. A figure is the mean over seeds with its 95 % interval (Student's t); below the arms stand
the differences from the first arm, paired by seed. Intervals are over seeds of the adaptation: each parent was trained
once, and all runs answer the same problems. Processors round differently, so the same run comes out a little
different elsewhere: in diffusion mode the full recipe of 300 steps has {table1} in table1, {growth} in growth and
{budget} in budget.
Each run's figures are in `experiments/results/NAME/ARM-SEED.json`. A small model on one task says little about a large
one on many: read these as a check of the direction, not of the size, of an effect.
"""
NOTHING = "No runs yet.\n"
SAME_RUN = {
    "table1": "{diffusion: accuracy|context-causal}",
    "growth": "{diffusion, blocks of 16: accuracy|by 2 every 30 steps}",
    "budget": "{diffusion: accuracy|0.6}",
}
"""Where the full recipe of 300 steps was run, by experiment."""
FINDINGS = "## Findings\n\nMeans with 95 % intervals; the sections below have the rest.\n"


def page() -> str:
    """The whole page as Markdown."""
    found = {name: read(name) for name in ORDER}
    head = HEAD.format(**{name: filled(text, *found[name]) for name, text in SAME_RUN.items()})
    return "\n".join([head, findings(found), *(section(name, *one) for name, one in found.items())])


def findings(found: dict[str, tuple[Experiment, Results]]) -> str:
    """What a busy reader needs: a sentence with its numbers for each experiment that has run."""
    said = {
        name: filled(experiment.headline, experiment, results)
        for name, (experiment, results) in found.items()
        if results and experiment.headline
    }
    return "\n".join([FINDINGS, *(f"- [{name}](#{name}): {text}" for name, text in said.items())]) + "\n"


def read(name: str) -> tuple[Experiment, Results]:
    """An experiment and its figures."""
    source = ROOT / "experiments" / f"{name}.yaml"
    experiment = load_experiment(source)
    return experiment, read_results(experiment, place_of(source, Path("runs")))


def section(name: str, experiment: Experiment, results: Results) -> str:
    """What one experiment asks, how to run it, and what came out."""
    parts = [f"## {name}\n", f"{experiment.question}\n"]
    if experiment.paper:
        parts.append(f"The paper: {experiment.paper}\n")
    parts.append(f"```sh\nnextblock experiment {name} --jobs 2\n```\n")
    if not results:
        return "\n".join([*parts, NOTHING])
    if len(results) < (wanted := len(wanted_runs(experiment))):
        parts.append(f"{len(results)} of {wanted} runs are made; they are too few to tell.\n")
    parts.append(effort(results))
    parts += [markdown_table(experiment, results) + "\n", f"![{name}](experiments/{name}.svg)\n"]
    if experiment.finding:
        parts.append(f"{filled(experiment.finding, experiment, results)}\n")
    return "\n".join(parts)


def effort(results: Results) -> str:
    """What the runs took, for whoever wants to run them again."""
    seconds = [one["training"]["seconds"] for one in results.values()]
    return (
        f"The {len(seconds)} runs trained for {sum(seconds) / 3600:.1f} hours in all, the longest for "
        f"{max(seconds) / 60:.0f} minutes, on one thread each of a CPU that did other work besides.\n"
    )


def main() -> None:
    """Write the page and the plots."""
    folder = ROOT / "docs" / "experiments"
    folder.mkdir(exist_ok=True)
    for name in ORDER:
        experiment, results = read(name)
        if results:
            with rc_context({"svg.hashsalt": name}):  # else the same plot has other ids each time
                plot(experiment, results).savefig(folder / f"{name}.svg", metadata={"Date": None})
    (ROOT / "docs" / "experiments.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
