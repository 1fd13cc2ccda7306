"""The planted fact: lengths as promised, one fact asked, and the same split at every length."""

from __future__ import annotations

import re

import pytest

from nextblock.tasks import get_task
from nextblock.tasks.planted_fact import LENGTHS, NAME


@pytest.mark.parametrize(("name", "times"), [(f"{NAME}_{times}x", times) for times in (1, 2, 4)])
def test_prompt_and_answer_fill_their_rows_and_the_asked_fact_stands_once_in_the_text(name, times):
    task, places = get_task(name), []
    for index in range(100):
        example = task.example("test", index)
        assert 440 * times < len(example.prompt + example.completion) <= 490 * times
        text, question = example.prompt.split("\nQ: ")
        facts = dict(re.findall(r"The code of (\w+) is (\d{6})\.", text))
        (asked,) = re.findall(r"code of (\w+)\?", question)
        assert 1 <= len(facts) <= 5
        assert text.count(f" is {example.answer}.") == 1
        assert facts[asked] == example.answer
        assert task.grade(example.completion, example)
        others = set(facts.values()) - {example.answer}
        assert not any(task.grade(f" The answer is {code}.", example) for code in others)
        places.append(text.index(example.answer) / len(text))
    assert min(places) < 0.1
    assert max(places) > 0.9


def test_the_task_itself_has_all_lengths_up_to_that_of_training():
    lengths = sorted(len(get_task(NAME).example("train", index).prompt) for index in range(300))
    assert lengths[0] < 180
    assert lengths[-1] > 420
    assert lengths[-1] <= 440


def test_a_code_is_on_one_side_whatever_the_length():
    sides = {
        split: {get_task(name).example(split, index).key for name in LENGTHS for index in range(200)}
        for split in ("train", "test")
    }
    assert not sides["train"] & sides["test"]
    assert get_task(NAME).example("test", 3).key != get_task(NAME).example("train", 3).key
