"""The built-in tasks: exactly scored; our own are unlimited, train and test disjoint by construction.

Imports `config`. Start reading in `example.py`: what a task is.
"""

from __future__ import annotations

from nextblock.config.errors import UsageError, nearest
from nextblock.tasks import algebra, functions, human_eval, planted_fact, word_problems
from nextblock.tasks.example import Example, Task

TASKS: dict[str, Task] = {module.NAME: module.TASK for module in (word_problems, algebra, functions, human_eval)}
TASKS |= {name: planted_fact.task(name) for name in planted_fact.LENGTHS}


def get_task(name: str) -> Task:
    """The built-in task of that name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in TASKS:
        raise UsageError(f"task '{name}' does not exist{nearest(name, list(TASKS))}")
    return TASKS[name]


__all__ = ["TASKS", "Example", "Task", "get_task"]
