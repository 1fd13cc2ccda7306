"""The planted fact: lengths as promised, the story anywhere in the text, and the same problems as without the text."""

from __future__ import annotations

import pytest

from nextblock.tasks import get_task
from nextblock.tasks.planted_fact import LENGTHS, NAME


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_problem_stands_whole_in_a_text_of_the_stated_length(name, split):
    task, problems, places = get_task(name), get_task("word_problems"), []
    least, most = LENGTHS[name]
    for index in range(200):
        example, problem = task.example(split, index), problems.example(split, index)
        at = problem.prompt.rindex("How many")
        story, question = problem.prompt[3:at], problem.prompt[at:]
        assert least - 40 < len(example.prompt) <= most
        assert example.prompt.startswith("Q: ")
        assert example.prompt.endswith(question)
        assert example.prompt.count(story) == 1
        assert (example.completion, example.answer, example.key) == (problem.completion, problem.answer, problem.key)
        assert task.grade(example.completion, example)
        places.append(example.prompt.index(story) / (len(example.prompt) - len(story) - len(question)))
    assert min(places) < 0.1
    assert max(places) > 0.9


def test_with_their_answers_they_fit_one_two_and_four_times_a_length():
    for times in (1, 2, 4):
        examples = [get_task(f"{NAME}_{times}x").example("test", index) for index in range(300)]
        assert max(len(one.prompt + one.completion) for one in examples) < 490 * times


def test_the_task_itself_has_all_lengths_up_to_that_of_training():
    lengths = sorted(len(get_task(NAME).example("train", index).prompt) for index in range(300))
    assert lengths[0] < 180
    assert lengths[150] == pytest.approx(290, abs=30)
    assert lengths[-1] > 400
