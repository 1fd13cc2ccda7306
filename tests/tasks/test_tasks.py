"""The built-in tasks: split, determinism, references and graders."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nextblock.config.sections
from nextblock.config.errors import UsageError
from nextblock.tasks import TASKS, Example, get_task
from nextblock.tasks.example import split_of

NAMES = ("word_problems", "algebra", "functions")
SAMPLE = 3000
PROMPT_BYTES = {"word_problems": (70, 160), "algebra": (20, 60), "functions": (45, 130)}
COMPLETION_BYTES = {"word_problems": (35, 80), "algebra": (40, 115), "functions": (15, 140)}


@functools.cache
def _drawn(name: str, split: str) -> list[Example]:
    task = get_task(name)
    return [task.example(split, index) for index in range(SAMPLE)]


def test_the_tasks_are_there_under_their_names() -> None:
    assert tuple(TASKS) == (*NAMES, "human_eval", "planted_fact", *(f"planted_fact_{times}x" for times in (1, 2, 4)))
    assert all(get_task(name).name == name for name in TASKS)


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'word_problem' does not exist; did you mean 'word_problems'\?"):
        get_task("word_problem")


@pytest.mark.parametrize("name", NAMES)
def test_bad_split_or_index_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="split 'tset' does not exist; did you mean 'test'"):
        get_task(name).example("tset", 0)
    with pytest.raises(UsageError, match="index -1"):
        get_task(name).example("train", -1)


@pytest.mark.parametrize("name", NAMES)
def test_no_key_and_no_prompt_is_on_both_sides(name: str) -> None:
    train, test = _drawn(name, "train"), _drawn(name, "test")
    assert not {e.key for e in train} & {e.key for e in test}
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    assert all(split_of(name, e.key) == "train" for e in train)
    assert all(split_of(name, e.key) == "test" for e in test)


def test_no_problem_with_the_same_numbers_and_steps_is_on_both_sides() -> None:
    # Read off the text alone, not off the keys: given numbers and written operations of word problems.
    def content(problem: Example) -> tuple[tuple[str, ...], tuple[str, ...]]:
        numbers = re.findall(r"\d+", problem.prompt)
        return tuple(sorted(numbers)), tuple(sorted(re.findall(r" ([-+*/]) ", problem.completion)))

    train = {content(problem) for problem in _drawn("word_problems", "train")}
    assert not train & {content(problem) for problem in _drawn("word_problems", "test")}


def test_no_function_body_is_on_both_sides() -> None:
    def content(problem: Example) -> str:
        parameter = problem.prompt.partition("(")[2].partition(")")[0]
        return re.sub(rf"\b{parameter}\b", "v", problem.completion)

    train = {content(problem) for problem in _drawn("functions", "train")}
    assert not train & {content(problem) for problem in _drawn("functions", "test")}


@pytest.mark.parametrize("name", NAMES)
def test_text_is_ascii_and_short(name: str) -> None:
    train, test = _drawn(name, "train"), _drawn(name, "test")
    for problem in train + test:
        assert (problem.prompt + problem.completion + problem.answer).isascii()
        assert PROMPT_BYTES[name][0] <= len(problem.prompt) <= PROMPT_BYTES[name][1], problem.prompt
        assert COMPLETION_BYTES[name][0] <= len(problem.completion) <= COMPLETION_BYTES[name][1], problem


@pytest.mark.parametrize("name", NAMES)
def test_problems_are_many(name: str) -> None:
    train, test = _drawn(name, "train"), _drawn(name, "test")
    assert len({e.prompt for e in train}) > 0.6 * SAMPLE
    assert len({e.key for e in train}) > 0.6 * SAMPLE
    assert len({e.key for e in test}) > 0.3 * SAMPLE


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_the_same_in_every_process_and_order(name: str) -> None:
    program = (
        "import sys; from nextblock.tasks import get_task; t = get_task(sys.argv[1]);"
        "print([repr(t.example(s, i)) for s in ('train', 'test') for i in (10**12, 7, 0)])"
    )
    path = str(Path(nextblock.config.sections.__file__).parents[2])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program, name],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    task = get_task(name)
    here = [task.example(split, index) for split in ("test", "train") for index in (0, 7, 10**12)]
    assert outputs == {f"{[repr(e) for e in here[3:][::-1] + here[:3][::-1]]}\n"}


# --- references --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["word_problems", "algebra"])
def test_every_reference_is_graded_right(name: str) -> None:
    task = get_task(name)
    for split in ("train", "test"):
        for index in range(500):
            problem = task.example(split, index)
            assert task.grade(problem.completion, problem), problem


def test_every_reference_function_is_graded_right() -> None:
    task = get_task("functions")
    for index in range(80):
        problem = task.example("test", index)
        assert task.grade(problem.completion, problem), problem


def test_every_written_step_of_a_word_problem_is_true_and_small() -> None:
    for problem in _drawn("word_problems", "train"):
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", problem.completion)
        assert 2 <= len(steps) <= 3
        known = set(re.findall(r"\d+", problem.prompt))
        for left, operation, right, result in steps:
            a, b = int(left), int(right)
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operation]
            assert value == int(result), problem
            assert 2 <= value < 200, problem
            # Each operand stands in the question or was worked out just before.
            assert {left, right} <= known, problem
            known.add(result)
            if operation == "*":
                assert max(a, b) < 10
        assert steps[-1][3] == problem.answer


def _python(text: str) -> str:
    """Algebra as Python: 3x -> 3*x, 2(x -> 2*(x, )( -> )*(, ^ -> **."""
    text = re.sub(r"(\d)([xy(])", r"\1*\2", text).replace(")(", ")*(")
    return text.replace("^", "**")


def test_every_algebra_answer_holds_when_put_in() -> None:
    for problem in _drawn("algebra", "train"):
        kind, question = problem.prompt.removesuffix("\nSteps:").split(": ")
        if kind == "Solve":
            left, right = question.split(" = ")
            at = {"x": int(problem.answer)}
            assert eval(_python(left), {}, at) == eval(_python(right), {}, at), problem
            assert eval(_python(left), {}, {"x": at["x"] + 1}) != eval(_python(right), {}, {"x": at["x"] + 1})
        elif kind == "Expand":
            for x in range(-3, 4):
                assert eval(_python(question), {}, {"x": x}) == eval(_python(problem.answer), {}, {"x": x}), problem
            assert "(" not in problem.answer
        else:
            assert kind == "Evaluate"
            expression, _, values = question.partition(" at ")
            at = {name: int(value) for name, value in re.findall(r"(\w) = (\d+)", values)}
            assert eval(_python(expression), {}, at) == int(problem.answer), problem


def test_every_written_step_of_algebra_is_true_and_small() -> None:
    for problem in _drawn("algebra", "train"):
        *steps, _ = problem.completion.strip().split(". ")
        assert 3 <= len(steps) <= 5
        assert all(int(number) < 200 for number in re.findall(r"\d+", problem.prompt + problem.completion))
        for step in steps:
            left, right = _python(step).split(" = ")
            # A step of an equation holds at the solution; every other step holds for all x.
            points = [int(problem.answer)] if problem.prompt.startswith("Solve") else [-2, 1, 3]
            assert all(eval(left, {}, {"x": x}) == eval(right, {}, {"x": x}) for x in points), problem


# --- right, nearly right, wrong ----------------------------------------------------------------------


def _ending(answer: str) -> str:
    return f" The answer is {answer}."


@pytest.mark.parametrize("name", ["word_problems", "algebra"])
def test_only_the_one_right_final_statement_counts(name: str) -> None:
    task = get_task(name)
    problem = dataclasses.replace(task.example("test", 0), answer="14")
    right = (" 12 + 5 = 17. 17 - 3 = 14. The answer is 14.", " The answer is 14.", "The answer is 14.\n")
    nearly_right = (
        "",
        " 12 + 5 = 17. 17 - 3 = 14.",
        " 14",
        " 14.",
        " The answer is 14",
        " The answer is 14.5.",
        " The answer is 14.0.",
        " The answer is 140.",
        " The answer is 114.",
        " The answer is -14.",
        " The answer is 014.",
        " The answer is 1 4.",
        " The answer is  14.",
        " The answer is 14 .",
        " The answer is 14..",
        " The answer is 14 apples.",
        " The answer is x = 14.",
        " The answer is 13.",
        " the answer is 14.",
        " The answer is: 14.",
        " The answer is 14. 14 + 1 = 15.",
        " The answer is 14.\nQ: And now?",
        " The answer is 15. The answer is 14.",
        " The answer is 14. The answer is 15.",
        " The answer is 14. The answer is 14.",
        " The answer is 14.\0",
        " The answer is \u0661\u0664.",
    )
    assert all(task.grade(text, problem) for text in right)
    assert [text for text in nearly_right if task.grade(text, problem)] == []


def test_a_polynomial_must_be_complete_and_in_order() -> None:
    task = get_task("algebra")
    problem = dataclasses.replace(task.example("test", 0), answer="x^2 - 2x - 15")
    assert task.grade(_ending("x^2 - 2x - 15"), problem)
    for wrong in ("x^2 - 2x + 15", "x^2 + 2x - 15", "x^2 - 2x", "-2x - 15", "x^2 - 2x - 15 = 0", "x^2-2x-15"):
        assert not task.grade(_ending(wrong), problem)


def _passes_in_process(problem: Example, completion: str) -> bool:
    """The hidden assertions without the sandbox, for harmless changes of the reference only."""
    namespace: dict[str, object] = {}
    try:
        exec(problem.prompt + completion + "\n" + problem.answer, namespace)
    except Exception:
        return False
    return True


# `n < 7` and `n <= 7` clamp alike, so a changed comparison there is no error.
EQUIVALENT = "clamp"


def test_hidden_assertions_catch_every_changed_constant() -> None:
    missed, tried = [], 0
    problems = [p for p in _drawn("functions", "train")[:1500] if not p.key.startswith(EQUIVALENT)]
    for problem in problems:
        for match in re.finditer(r"(?<![\w'])\d+(?![\w'])", problem.completion):
            # Changing a start value or a loop bound by one need not change anything.
            if match.group() in ("0", "1"):
                continue
            tried += 1
            changed = str(int(match.group()) + 1)
            text = problem.completion[: match.start()] + changed + problem.completion[match.end() :]
            if _passes_in_process(problem, text):
                missed.append((problem.prompt, text))
    assert tried > 1500
    assert len(missed) <= 0.002 * tried, missed


def test_hidden_assertions_catch_every_changed_operator() -> None:
    changes = [
        *((" > ", " >= "), (" < ", " <= "), (" <= ", " < "), (" == ", " != "), (" != ", " == ")),
        *((" and ", " or "), (" or ", " and "), ("max(", "min("), ("any(", "all("), ("all(", "any(")),
        *((" + ", " - "), (" - ", " + "), ("+=", "-="), ("ljust", "rjust"), ("[::-1]", "")),
    ]
    missed, tried = [], 0
    problems = [p for p in _drawn("functions", "train")[:1500] if not p.key.startswith(EQUIVALENT)]
    for problem in problems:
        for old, new in changes:
            if old in problem.completion:
                tried += 1
                text = problem.completion.replace(old, new, 1)
                if _passes_in_process(problem, text):
                    missed.append((problem.prompt, text))
    assert tried > 1000
    assert len(missed) <= 0.002 * tried, missed


PROBLEM = Example(
    prompt='def f(nums):\n    """Return a list of x plus 2 for each x in nums."""\n',
    completion="    return [x + 2 for x in nums]",
    answer="assert f([]) == []\nassert f([1, -5]) == [3, -3]\nassert f([4]) == [6]",
    key="",
)


@pytest.mark.parametrize(
    "completion",
    [
        "    return [x + 2 for x in nums]",
        "    return [x + 2 for x in nums]\n\n",
        "    out = []\n    for x in nums:\n        out.append(2 + x)\n    return out",
        "    import math\n    return [x + int(math.sqrt(4)) for x in nums]",
        "    print('hello')\n    return list(map(lambda x: x + 2, nums))",
    ],
)
def test_any_right_function_is_graded_right(completion: str) -> None:
    assert get_task("functions").grade(completion, PROBLEM)


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "    pass",
        "    return [x + 3 for x in nums]",
        "    return [x + 2.0 for x in nums]",
        "    return (x + 2 for x in nums)",
        "    return tuple(x + 2 for x in nums)",
        "    return str([x + 2 for x in nums])",
        "    return [x + 2 for x in nums",
        "return [x + 2 for x in nums]",
        "    return [x + 2 for x in nums] if nums != [4] else []",
        "    raise SystemExit",
        "    return [x + 2 for x in nums]\nraise SystemExit",
        "    return [x + 2 for x in nums]\nimport os\nos._exit(0)",
        "    while True:\n        pass",
        # Answers that compare equal to everything, look like text, or replace what a grader may use.
        "    class Same(list):\n        __eq__ = lambda a, b: True\n    return Same()",
        "    class Same(str):\n        __eq__ = lambda a, b: True\n    class R:\n"
        "        __repr__ = lambda s: Same()\n    return R()",
        "    return 1\nimport builtins\nbuiltins.repr = lambda x: '[]'",
        "    return 1\nimport __main__\n__main__.main = print",
        # Text tricks that would swallow assertions written after the answer.
        "    return 1\n'''",
        "    return 1\nif False: \\",
        "    return 1\nclass AssertionError(Exception): pass\ntry: 1\nexcept: 1",
    ],
)
def test_wrong_or_cheating_function_is_graded_wrong(completion: str) -> None:
    assert not get_task("functions").grade(completion, PROBLEM)
