"""A model's own answers as training data: the same file however often it was killed, and `adapt` reads it back."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from typing import Any

import numpy as np
import pytest

import nextblock as nb
from families import longrope_model, tiny_model
from nextblock.config.errors import UsageError
from nextblock.config.run import load_config
from nextblock.config.sections import BlockDiffusionSettings, DraftAdapterConfig, Source
from nextblock.data.encode import encode
from nextblock.data.prompts import read_prompts
from nextblock.data.records import Records
from nextblock.data.sources import read_source
from nextblock.data.stream import RowStream
from nextblock.model.adapter_files import save_adapter
from nextblock.model.draft_adapter import DraftAdapter
from nextblock.model.parent import byte_tokenizer
from nextblock.training.export import export
from nextblock.workflows.answers import write_answers

END = 256
PROMPTS = [f"{'long ' * (n % 4)}prompt {n}:" for n in range(11)]
SAMPLED = {"max_new_tokens": 12, "temperature": 1.0, "seed": 7}
MODES: list[dict[str, Any]] = [{"mode": "ar"}, {"mode": "speculative"}, {"mode": "diffusion", "threshold": 0.5}]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with a tiny parent that often ends its answers, a draft adapter of it, and prompts."""
    folder = tmp_path_factory.mktemp("answers")
    model = tiny_model("llama", vocab_size=264, std=0.1)
    model.generation_config.eos_token_id = [END, *range(13)]
    export(folder / "parent", model, byte_tokenizer(), None)
    lm = nb.load(folder / "parent")
    adapter = DraftAdapter(lm.model, DraftAdapterConfig(rank=2))
    settings = BlockDiffusionSettings(block_size=4, mask_token_id=adapter.mask_token_id)
    save_adapter(folder / "adapter", adapter, settings, "parent", folder / "parent")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return folder


def answer(places, output, source="prompts.jsonl", **options):
    adapter = None if options.get("mode") == "ar" else places / "adapter"
    return write_answers(
        places / "parent", str(places / source), output, draft_adapter=adapter, **{**SAMPLED, **options}
    )


def rows_in(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_rows_are_what_generate_answers_and_do_not_depend_on_the_batch(places, tmp_path, mode):
    files = []
    for size in (1, 4, 100):
        answer(places, tmp_path / f"{size}.jsonl", batch_size=size, **mode)
        files.append((tmp_path / f"{size}.jsonl").read_bytes())
    assert files[0] == files[1] == files[2]
    adapter = None if mode["mode"] == "ar" else places / "adapter"
    out = nb.load(places / "parent", draft_adapter=adapter).generate(PROMPTS, **SAMPLED, **mode)
    rows = rows_in(tmp_path / "1.jsonl")
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["completion"].rstrip("\ufffd") for row in rows] == [text.rstrip("\ufffd") for text in out.texts]
    assert [row.get("ended", True) for row in rows] == [finish == "end_token" for finish in out.finish]
    assert {"end_token", "length"} == set(out.finish)


def test_a_run_killed_at_any_moment_goes_on_to_the_same_file(places, tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    answer(places, whole, mode="ar", batch_size=2)
    draw, kills = random.Random(3), 0
    for _ in range(6):
        if (child := os.fork()) == 0:
            try:
                answer(places, killed, mode="ar", batch_size=2, on_batch=lambda *_: time.sleep(0.02))
            finally:
                os._exit(0)
        deadline, start = time.monotonic() + 120, killed.stat().st_size if killed.exists() else 0
        wanted = start + draw.randrange(100)
        while time.monotonic() < deadline and (not killed.exists() or killed.stat().st_size <= wanted):
            if os.waitpid(child, os.WNOHANG)[0]:
                break
            time.sleep(0.001)
        else:
            time.sleep(draw.random() * 0.04)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills += 1
    assert kills >= 2
    answer(places, killed, mode="ar", batch_size=2)
    assert killed.read_bytes() == whole.read_bytes()


def test_any_part_of_the_file_is_completed_to_the_same_file(places, tmp_path):
    """Also where the last line is half written, or even half a character."""
    output = tmp_path / "data.jsonl"
    answer(places, output, mode="speculative", batch_size=4)
    whole = output.read_bytes()
    for size in [0, 1, len(whole) - 1, *random.Random(0).sample(range(len(whole)), 4)]:
        output.write_bytes(whole[:size])
        done = whole[:size].count(b"\n")
        assert answer(places, output, mode="speculative", batch_size=3) == len(PROMPTS) - done
        assert output.read_bytes() == whole


def test_prompts_on_both_sides_of_a_change_of_factors_are_answered_as_alone(tmp_path):
    model = longrope_model(64, vocab_size=264, max_position_embeddings=256)
    export(tmp_path / "phi", model, byte_tokenizer(), None)
    prompts = ["short", "longer than 64 " * 7, "six ty", "and seven"]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    given: Any = {"batch_size": 2, "max_new_tokens": 4, "temperature": 1.0}
    assert write_answers(tmp_path / "phi", str(tmp_path / "p.txt"), tmp_path / "out.jsonl", **given, seed=5) == 4
    lm, rows = nb.load(tmp_path / "phi"), rows_in(tmp_path / "out.jsonl")
    del given["batch_size"]
    alone = [lm.generate(prompt, mode="ar", seed=5 + n, **given).texts[0] for n, prompt in enumerate(prompts)]
    assert [row["completion"] for row in rows] == [text.rstrip("\ufffd") for text in alone]


def test_a_file_belongs_to_one_process_and_holds_no_more_rows_than_prompts(places, tmp_path):
    output, seen = tmp_path / "data.jsonl", []

    def second(done, total):
        if not seen:
            with pytest.raises(UsageError, match=r"output .*data\.jsonl is in use by process") as error:
                answer(places, output, mode="ar")
            seen.append(str(error.value))

    answer(places, output, mode="ar", on_batch=second)
    assert seen
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "data.jsonl.settings"}
    whole = output.read_bytes()
    output.write_bytes(whole + whole.splitlines(keepends=True)[0])
    with pytest.raises(UsageError, match="has 12 rows for 11 prompts"):
        answer(places, output, mode="ar")


def test_an_empty_answer_to_a_chat_is_read_back(places, tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    lm = nb.load(places / "parent")
    first = lm.generate([{"role": "user", "content": "hi"}], mode="ar", max_new_tokens=1).texts[0]
    answer(places, tmp_path / "out.jsonl", source=tmp_path / "chat.jsonl", mode="ar", temperature=0.0, stop=[first])
    assert rows_in(tmp_path / "out.jsonl")[0]["messages"][-1] == {"role": "assistant", "content": ""}
    records = read_source(Source(path=str(tmp_path / "out.jsonl")))
    assert isinstance(records, Records)
    document = encode(records.read(0), byte_tokenizer())
    assert document.tokens[document.offset >= 0].tolist() == [END] * records.read(0).ended


def test_a_finished_file_is_left_alone(places, tmp_path):
    output = tmp_path / "data.jsonl"
    assert answer(places, output) == len(PROMPTS)
    before = output.stat().st_mtime_ns
    assert answer(places, output) == 0
    assert output.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.5}, r"temperature was 1\.0, is 0\.5"),
        ({"seed": 8}, "seed was 7, is 8"),
        ({"mode": "speculative"}, "mode was 'diffusion', is 'speculative'"),
        ({"stop": [":"]}, r"stop was \[\], is \[':'\]"),
        ({"examples": 3}, "prompts was"),
    ],
)
def test_a_file_of_other_settings_is_refused_and_left_alone(places, tmp_path, change, words):
    output = tmp_path / "data.jsonl"
    answer(places, output)
    before = output.read_bytes()
    with pytest.raises(UsageError, match=words) as error:
        answer(places, output, **change)
    assert "\n" not in str(error.value)
    assert output.read_bytes() == before


def test_a_file_of_another_model_is_refused(places, tmp_path):
    answer(places, tmp_path / "data.jsonl", mode="ar")
    export(tmp_path / "other", tiny_model("llama", vocab_size=264, seed=5), byte_tokenizer(), None)
    with pytest.raises(UsageError, match="model was"):
        write_answers(tmp_path / "other", str(places / "prompts.jsonl"), tmp_path / "data.jsonl", mode="ar", **SAMPLED)


def test_adapt_reads_prompt_answer_and_end_token_back(places, tmp_path):
    """The span is the answer's tokens; the end token only where the model ended."""
    tokenizer, output = byte_tokenizer(), tmp_path / "data.jsonl"
    answer(places, output, mode="ar")
    records = read_source(Source(path=str(output)))
    assert isinstance(records, Records)
    ended = []
    for number, row in enumerate(rows_in(output)):
        document = encode(records.read(number), tokenizer)
        generated = document.tokens[document.offset >= 0].tolist()
        ended.append(row.get("ended", True))
        assert tokenizer.decode(document.tokens[document.offset < 0]) == row["prompt"]
        assert generated == tokenizer(row["completion"])["input_ids"] + [END] * ended[-1]
    assert set(ended) == {True, False}
    values = {"sources": [{"path": str(output)}], "row_length": 64, "held_out": 0.0}
    rows = RowStream(load_config({"data": values}, {"growth.b_max": 4, "growth.delta": 1}).data, tokenizer, seed=0)
    assert int((rows.next(4).offset >= 0).sum()) > 0


def test_a_chat_gets_the_assistants_turn_and_its_end_of_turn_token_where_it_ended(places, tmp_path):
    talk = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    more = [*talk, {"role": "user", "content": "three"}]
    given = tmp_path / "chat.jsonl"
    given.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (talk, more, more[2:], more * 2)))
    answer(places, tmp_path / "data.jsonl", source=given, mode="ar")
    rows = rows_in(tmp_path / "data.jsonl")
    before = [talk[:1], more, more[2:], more * 2]  # the first one's answer is made anew
    assert [row["messages"][:-1] for row in rows] == before
    out = nb.load(places / "parent").generate(before, mode="ar", **SAMPLED)
    records = read_source(Source(path=str(tmp_path / "data.jsonl")))
    assert isinstance(records, Records)
    for number, (row, text) in enumerate(zip(rows, out.texts, strict=True)):
        document = encode(records.read(number), byte_tokenizer())
        last = int(np.flatnonzero(document.offset == 0)[-1])
        ended = out.finish[number] == "end_token"
        assert row.get("ended", True) == ended
        assert row["messages"][-1] == {"role": "assistant", "content": text if ended else text.rstrip("\ufffd")}
        expected = byte_tokenizer()(row["messages"][-1]["content"])["input_ids"] + [END] * ended
        assert document.tokens[last:].tolist() == expected
    assert {"end_token", "length"} == set(out.finish)


def test_prompts_come_from_lines_of_text_and_from_tasks(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n \nthree\r\n", encoding="utf-8")
    records = read_prompts(str(tmp_path / "a.txt"))
    assert [r.value["prompt"] for r in records] == ["one", "three"]
    assert [r.where.rpartition(":")[2] for r in records] == ["1", "4"]
    task = read_source(Source(path="task:algebra"))
    assert isinstance(task, Records)
    expected = [task.read(i).value["prompt"] for i in range(3)]
    assert [r.value for r in read_prompts("task:algebra", 3)] == [{"prompt": p} for p in expected]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not a file; give a .jsonl file"),
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n{"prompt": \n', r"in\.jsonl:2: broken JSON line"),
        ('{"prompt": "a"}\n{"text": "b"}\n', r"in\.jsonl:2: no prompt"),
        ('{"prompt": "a"}\n[]\n', r"in\.jsonl:2: no prompt"),
        ('{"prompt": ""}\n', r"in\.jsonl:1: prompt is ''"),
        ('{"prompt": 3}\n', r"in\.jsonl:1: prompt is 3"),
        ('{"messages": []}\n', r"in\.jsonl:1: messages hold nothing to answer"),
        ('{"messages": "a"}\n', r"in\.jsonl:1: messages must be"),
        ('{"messages": [{"role": "user"}]}\n', r"in\.jsonl:1: message 1 has no content"),
        ('{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}\n', r"in\.jsonl:1: tools"),
        ('{"prompt": "a"}\n' + json.dumps({"prompt": "a" * 600}) + "\n", r"in\.jsonl:2: the prompt has 600 tokens"),
    ],
)
def test_bad_prompts_are_refused_in_one_line_and_nothing_is_written(places, tmp_path, content, words):
    if content is not None:
        (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(UsageError, match=words) as error:
        answer(places, tmp_path / "out.jsonl", source=tmp_path / "in.jsonl")
    assert "\n" not in str(error.value)
    assert {p.name for p in tmp_path.iterdir()} <= {"in.jsonl"}


@pytest.mark.parametrize(
    ("output", "options", "words"),
    [
        ("data.txt", {}, "must end in .jsonl"),
        ("no/data.jsonl", {}, "output folder .*no does not exist"),
        ("folder.jsonl", {}, "is a folder"),
        ("prompts.jsonl", {}, "is the input itself"),
        ("other.jsonl", {}, "was not begun by this command"),
        ("data.jsonl", {"batch_size": 0}, "batch_size=0 must be at least 1"),
        ("data.jsonl", {"examples": 0}, "examples=0 must be at least 1"),
        ("data.jsonl", {"treshold": 0.5}, "did you mean 'threshold'"),
        ("data.jsonl", {"max_new_tokens": 0}, "must be at least 1"),
    ],
)
def test_bad_outputs_and_options_are_refused_and_nothing_is_written(places, tmp_path, output, options, words):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "other.jsonl").write_text("{}\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(UsageError, match=words) as error:
        answer(places, tmp_path / output, source=tmp_path / "prompts.jsonl", **options)
    assert "\n" not in str(error.value)
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_a_task_without_a_number_of_problems_is_refused():
    with pytest.raises(UsageError, match=re.escape("task:algebra has no end; set the number of problems")):
        read_prompts("task:algebra")
