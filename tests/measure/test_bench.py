"""The decoding benchmark: equal terms for all contestants, honest counts, ratios within a round, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import nextblock as nb
from families import tiny_model
from nextblock.cli import measure as measure_commands
from nextblock.cli.main import app
from nextblock.config.errors import UsageError
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.decoding.compiled import StaticPasses
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.measure.bench import command, scores
from nextblock.measure.bench.command import run_bench, write_results
from nextblock.measure.bench.contest import (
    Contestant,
    Round,
    alternate,
    compared,
    left_padded,
    make_batches,
    our_mode,
    transformers_generate,
)
from nextblock.measure.bench.decoding import bench_decode, count_calls
from nextblock.measure.bench.figures import plot_bench
from nextblock.measure.bench.forwards import random_model, random_prompts, time_forwards
from nextblock.measure.bench.prompts import (
    Prompts,
    file_prompts,
    make_variants,
    parse_variant,
    task_prompts,
    variant_name,
)
from nextblock.model.parent import byte_tokenizer
from nextblock.model.shapes import SHAPES
from nextblock.tasks import get_task

VOCABULARY, MASK, END = 264, 263, 256
PROMPTS = [[72, 101, 108], [80, 33, 90, 91, 92, 40], [5], [17, 200, 3, 44]]


@pytest.fixture
def lm():
    """A random model over bytes that, like a trained one, never emits its mask token."""
    model = tiny_model("llama", vocab_size=VOCABULARY, eos_token_id=END, std=0.15)
    with torch.no_grad():
        model.lm_head.weight[MASK] = 0
    return BlockDiffusionLM(model, byte_tokenizer(), BlockDiffusionSettings(block_size=4, mask_token_id=MASK))


def passes(lm, contestant, prompts):
    """The call, and how often the model really ran."""
    count = 0

    def seen(*_):
        nonlocal count
        count += 1

    handle = lm.model.base_model.register_forward_hook(seen)
    call = contestant.run(prompts)
    handle.remove()
    return call, count


# ---------------------------------------------------------------------------------------- contestants


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_lossless_modes_give_the_tokens_of_transformers_generate(lm, mode, size):
    reference, own = transformers_generate(lm, 6, [END]), our_mode(lm, {"mode": mode}, 6, [END])
    for batch in make_batches(PROMPTS, size):
        assert own.run(batch).answers == reference.run(batch).answers


def test_a_static_cache_gives_the_same_tokens_and_serves_batch_after_batch(lm):
    dynamic, static = transformers_generate(lm, 6, [END]), transformers_generate(lm, 6, [END], static_length=12)
    for batch in make_batches(PROMPTS, 2):
        assert static.run(batch).answers == dynamic.run(batch).answers


@pytest.mark.parametrize("options", [None, {"mode": "ar"}, {"mode": "diffusion"}, {"mode": "speculative"}])
def test_every_forward_is_counted(lm, options):
    contestant = transformers_generate(lm, 9, []) if options is None else our_mode(lm, options, 9, [])
    for batch in ([PROMPTS[1]], PROMPTS):
        call, count = passes(lm, contestant, batch)
        assert call.forwards == count
        assert count <= call.row_forwards <= count * len(batch)  # rows may finish before the last one
        assert 0 < call.first_token_seconds[0] < call.seconds


def test_a_compiled_contestant_counts_its_forwards_without_a_hook(lm):
    plain, static = transformers_generate(lm, 9, []), transformers_generate(lm, 9, [], static_length=18)
    call, count = passes(lm, static, PROMPTS)
    assert call.forwards == count == plain.run(PROMPTS).forwards
    assert not lm.model.base_model._forward_pre_hooks  # else it would be compiled into every pass


def test_answers_end_with_their_first_end_token_for_all_contestants(lm):
    free = transformers_generate(lm, 8, []).run([PROMPTS[0]]).answers[0]
    ends = [free[3]]
    expected = free[: free.index(free[3]) + 1]
    both = [PROMPTS[0], PROMPTS[1]]
    assert transformers_generate(lm, 8, ends).run(both).answers[0] == expected
    assert our_mode(lm, {"mode": "ar"}, 8, ends).run(both).answers[0] == expected


def test_the_checkpoints_own_generation_config_changes_nothing_and_is_put_back(lm):
    plain = transformers_generate(lm, 8, [END]).run(PROMPTS).answers
    lm.model.generation_config.repetition_penalty = 5.0
    lm.model.generation_config.do_sample = True
    own = lm.model.generation_config
    assert transformers_generate(lm, 8, [END]).run(PROMPTS).answers == plain
    assert lm.model.generation_config is own


def test_left_padding_keeps_prompts_at_the_right():
    tokens, mask = left_padded([[7, 8, 9], [5]], torch.device("cpu"))
    assert tokens.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


# --------------------------------------------------------------------------------------------- rounds


def test_contestants_take_turns_at_every_batch():
    order = []

    def contestant(name):
        def run(prompts):
            order.append((name, prompts[0][0]))
            return Round([[1]], 1.0, [0.5], 1, 1)

        return Contestant(name, {}, run)

    alternate([contestant("a"), contestant("b")], [[[[1]], [[2]]], [[[3]]]])
    assert order == [(name, batch) for batch in (1, 2, 3) for name in "ab"]


def test_a_speedup_is_a_ratio_within_one_round():
    """The machine is ten times slower in the second round; the ratio does not see it."""
    fast = [Round([[1] * 8], seconds) for seconds in (1.0, 10.0)]
    slow = [Round([[1] * 4], seconds) for seconds in (1.0, 10.0)]
    found = compared(fast, slow)
    assert (found["speedup"], found["speedup_low"], found["speedup_high"]) == (2.0, 2.0, 2.0)


def test_only_whole_batches_are_used():
    assert make_batches([[1], [2], [3]], 2) == [[[1], [2]]]
    with pytest.raises(UsageError, match="batch=4 is more than the 3 prompts"):
        make_batches([[1], [2], [3]], 4)


def test_bench_decode_reports_transformers_first_and_every_variant_after_it(lm):
    calls = []
    variants = make_variants(lm.settings)
    speeds = bench_decode(
        lm, PROMPTS, variants, batch=2, ends=[END], rounds=2, max_new_tokens=6, on_call=lambda: calls.append(1)
    )
    assert [speed.name for speed in speeds] == ["transformers", "ar", "diffusion", "speculative"]
    assert len(calls) == count_calls(False, len(PROMPTS), len(variants), 2, 2)
    first, ar, _, speculative = speeds
    assert (first.speedup, first.equal_to_ar, ar.equal_to_ar, speculative.equal_to_ar) == (1, 1, 1, 1)
    for speed in speeds:
        assert speed.speedup_low <= speed.speedup <= speed.speedup_high
        assert speed.forward_ms > 0
        assert speed.peak_memory_gib is None or speed.peak_memory_gib > 0.01


def test_prompts_that_one_contestant_would_cut_short_are_refused(lm):
    with pytest.raises(UsageError, match=r"max_new_tokens=510 does not fit .* context of 512; use at most 506"):
        bench_decode(lm, PROMPTS, [{"mode": "ar"}], batch=1, ends=[], max_new_tokens=510)


# -------------------------------------------------------------------------------------------- forwards


def test_forward_times_name_their_positions_and_one_position_is_the_unit(lm):
    times = time_forwards(lm, cache_length=16, positions=(4, 8), batch=2, rounds=2)
    assert [time.positions for time in times] == [1, 4, 8]
    assert times[0].ratio == 1
    assert all(time.milliseconds > 0 for time in times)
    with pytest.raises(UsageError, match=r"use a cache_length of at most 504"):
        time_forwards(lm, cache_length=510, positions=(8,))


def test_what_is_compiled_is_what_is_timed_after_it_was_compiled(lm):
    sizes = []

    def compiler(function):
        def run(decoder, cache, tokens, *arguments):
            sizes.append((*tokens.shape, cache.capacity))
            return function(decoder, cache, tokens, *arguments)

        return run

    lm.passes = StaticPasses(compiler)
    time_forwards(lm, cache_length=16, positions=(1, 32), batch=2, rounds=2)
    assert set(sizes) == {(2, 1, 256), (2, 32, 256)}
    sizes.clear()
    known = []
    with torch.compiler.set_stance("force_eager"):  # transformers' compiled decoding takes part, but need not compile
        speeds = bench_decode(
            lm,
            [PROMPTS[0] * 90, PROMPTS[0]],  # of two capacities
            [{"mode": "ar"}],
            batch=1,
            ends=[],
            rounds=2,
            max_new_tokens=6,
            on_call=lambda: known.append(set(sizes)),
        )
    assert [speed.name for speed in speeds] == ["transformers", "transformers, static cache, compiled", "ar"]
    assert [speed.equal_to_ar for speed in speeds] == [1.0, 1.0, 1.0]
    assert known[1] == set()  # transformers' warm-up; then ours, over all prompts; then the rounds
    prompts = {(1, len(PROMPTS[0]), 256), (1, 90 * len(PROMPTS[0]), 512)}
    assert known[2] == known[-1] == {(1, 1, 256), (1, 1, 512), *prompts}


@pytest.mark.parametrize(
    ("shape", "billions", "without_embedding"),
    [
        ("qwen3-0.6b", 0.6, 0.44),
        ("qwen3-4b", 4.0, 3.6),
        ("qwen3-8b", 8.2, 6.95),
        ("llama-3.2-1b", 1.2, 0.97),
        ("openpangu-7b", 8.0, 6.7),
    ],
)
def test_shapes_have_the_parameters_that_their_models_state(shape, billions, without_embedding):
    """As the model cards have them; openPangu-Embedded: 7 B without embeddings."""
    lm = random_model(shape, device="meta")
    count = sum(parameter.numel() for parameter in lm.model.parameters())
    embedding = SHAPES[shape]["vocab_size"] * SHAPES[shape]["hidden_size"]
    layers = count - embedding * (1 if SHAPES[shape]["tie_word_embeddings"] else 2)
    assert round(count / 1e9, 1) == billions
    assert layers / 1e9 == pytest.approx(without_embedding, rel=0.02)


# ---------------------------------------------------------------------------- prompts and variants


def test_task_prompts_begin_where_they_are_asked_to():
    assert task_prompts("algebra", "test", 2, 7).items == task_prompts("algebra", "test", 9).items[7:]


def test_task_prompts_carry_their_problems():
    prompts = task_prompts("algebra", "train", 3)
    task = get_task("algebra")
    assert prompts.items == [task.example("train", index).prompt for index in range(3)]
    assert all(task.grade(case.completion, case) for case in prompts.cases)


def test_files_hold_a_prompt_a_line_or_json_with_texts_and_chats(lm, tmp_path):
    (tmp_path / "p.txt").write_text("one\\ntwo\n\nthree\nfour\n")
    assert file_prompts(tmp_path / "p.txt", 2).items == ["one\\ntwo", "three"]
    chat = [{"role": "user", "content": "hi"}]
    lines = [json.dumps({"prompt": "a\nb"}), json.dumps({"messages": chat})]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    prompts = file_prompts(tmp_path / "p.jsonl", 9)
    assert prompts.items == ["a\nb", chat]
    assert [lm.tokenizer.decode(ids) for ids in prompts.encode(lm)] == ["a\nb", "hi"]


def test_variants_are_every_mode_with_every_threshold_and_block_size(lm):
    variants = make_variants(lm.settings, thresholds=[0.9, None], block_sizes=[2, 4], extra=[{"mode": "ar"}])
    assert [variant_name(options) for options in variants] == [
        "ar",
        "diffusion, block_size=2, threshold=0.9",
        "diffusion, block_size=2, threshold=none",
        "diffusion, block_size=4, threshold=0.9",
        "diffusion, block_size=4, threshold=none",
        "speculative, block_size=2",
        "speculative, block_size=4",
    ]
    assert make_variants(None) == [{"mode": "ar"}]


def test_a_variant_is_a_mode_and_any_decoding_option():
    assert parse_variant("speculative,draft_length=8") == {"mode": "speculative", "draft_length": 8}
    assert parse_variant("speculative,draft_paths=3") == {"mode": "speculative", "draft_paths": 3}
    assert parse_variant("diffusion, threshold=none, sampler=margin") == {
        "mode": "diffusion",
        "threshold": None,
        "sampler": "margin",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("difusion", "did you mean 'diffusion'"),
        ("diffusion,treshold=1", "unknown option 'treshold'; did you mean 'threshold'"),
        ("ar,temperature=1", "sets temperature, which all contestants share"),
        ("diffusion,threshold", "write threshold=value"),
    ],
)
def test_a_wrong_variant_is_refused_in_one_line(text, message):
    with pytest.raises(UsageError, match=message):
        parse_variant(text)


def test_a_variant_that_generate_refuses_is_refused_before_timing(lm):
    with pytest.raises(UsageError, match="sub_blocks=3 does not divide"):
        make_variants(lm.settings, extra=[{"mode": "diffusion", "sub_blocks": 3}])
    with pytest.raises(UsageError, match="works in ar mode only"):
        make_variants(None, modes=["diffusion"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.txt", "\n\n", "holds no prompts"),
        ("bad.jsonl", '{"prompt": "a"}\n{', r"bad\.jsonl:2: broken JSON line"),
        ("bad.jsonl", '{"text": "a"}', r"bad\.jsonl:1: no prompt"),
    ],
)
def test_a_wrong_prompt_file_is_refused_in_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        file_prompts(tmp_path / name, 4)


# ------------------------------------------------------------------------------------- scores of a task


def test_what_is_timed_is_what_is_scored(monkeypatch):
    """The same problems, and answers that end at the same stop strings."""
    lm, timed = nb.load("tiny-bd"), []

    def noted(contestants, rounds, *rest):
        timed.extend(rounds[0])
        found.extend(contestants)
        return alternate(contestants, rounds, *rest)

    found: list[Contestant] = []
    monkeypatch.setattr(scores, "alternate", noted)
    task = replace(get_task("word_problems"), stop=("=",))
    scores.score_modes([("m", lm, {"mode": "ar"})], task, examples=2, first=500)
    prompts = [task.example("test", 500 + i).prompt for i in range(2)]
    assert timed == [[ids] for ids in Prompts("", prompts).encode(lm)]
    answers = lm.generate(prompts, mode="ar", stop=["="], max_new_tokens=task.max_new_tokens).answers
    assert [found[0].run(batch).answers[0] for batch in timed] == answers


def test_the_passes_of_an_assistant_count():
    lm, assistant = nb.load("tiny-bd"), nb.load("tiny-ar").model
    own = transformers_generate(lm, 8, [], assisted=("assistant", {"assistant_model": assistant}))
    call, parents = passes(lm, own, [PROMPTS[0]])
    calls: list[int] = []
    assistant.register_forward_hook(lambda *_: calls.append(1))
    assert own.run([PROMPTS[0]]).forwards == call.forwards == parents + len(calls)
    assert calls


def test_modes_on_a_task_take_turns_for_their_speeds(monkeypatch):
    lm, real = nb.load("tiny-bd"), scores.our_mode
    order: list[str] = []
    done: list[tuple[int, int]] = []

    def noted(lm, options, *rest):
        contestant = real(lm, options, *rest)

        def run(prompts):
            order.append(options["mode"])
            return contestant.run(prompts)

        return replace(contestant, run=run)

    monkeypatch.setattr(scores, "our_mode", noted)
    wanted = [(mode, lm, {"mode": mode}) for mode in ("speculative", "ar")]
    rows = scores.score_modes(
        wanted,
        get_task("word_problems"),
        examples=2,
        max_new_tokens=24,
        on_prompt=lambda now, all: done.append((now, all)),
    )
    assert order == ["speculative", "ar"] * (1 + scores.ROUNDS * 2)  # the first of each is the warm-up
    assert done[-1] == (2 * (2 + scores.ROUNDS * 2),) * 2
    assert [row["model"] for row in rows] == ["speculative", "ar"]
    assert (rows[1]["speedup"], rows[1]["speedup_low"], rows[1]["speedup_high"]) == (1.0, 1.0, 1.0)
    assert rows[0]["speedup_low"] <= rows[0]["speedup"] <= rows[0]["speedup_high"]


# --------------------------------------------------------------------------------------------- outputs


def test_results_are_json_with_a_plot_beside_it(lm, tmp_path):
    results = run_bench(
        lm,
        model="m",
        prompts=task_prompts("word_problems", "test", 2),
        variants=[{"mode": "diffusion", "threshold": None}],
        batches=[1, 2],
        rounds=1,
        max_new_tokens=4,
        forwards=False,
        cache_length=8,
    )
    output, plot = write_results(results, plot_bench(results), tmp_path / "new" / "b.json")
    stored = json.loads(output.read_text())
    assert [(e["batch"], e["name"]) for e in stored["decode"]] == [
        (size, name) for size in (1, 2) for name in ("transformers", "diffusion, threshold=none")
    ]
    assert stored["environment"]["device"].startswith("cpu")
    assert plot.read_bytes().startswith(b"\x89PNG")


ENTRY: dict[str, Any] = {"batch": 1, "tokens_per_second": 9.0, "speedup": 1.0, "speedup_low": 1.0, "options": {}}
ENTRY |= {"speedup_high": 1.0, "first_token_seconds": 0.1, "forward_ms": 1.0, "tokens_per_forward": 1.0}
ENTRY |= {"equal_to_ar": 1.0, "peak_memory_gib": None}


@pytest.mark.parametrize("name", ["assistant m[/x]", "assistant m[v2]"])
def test_a_contestant_is_shown_by_its_name_whatever_that_holds(name, capsys):
    measure_commands._tell_speeds(None, {"decode": [{**ENTRY, "name": name}], "forwards": []})
    assert name in capsys.readouterr().out


def test_figures_are_written_before_they_are_shown(tmp_path, monkeypatch):
    def broken() -> Any:
        raise OSError("no terminal")

    monkeypatch.setattr(measure_commands, "wide_console", broken)
    output: Path = tmp_path / "b.json"
    with pytest.raises(OSError, match="no terminal"):
        measure_commands._tell_speeds(output, {"decode": [{**ENTRY, "name": "a"}], "forwards": []})
    assert json.loads(output.read_text())["decode"][0]["name"] == "a"


def test_random_weights_are_timed_without_tokenizer_or_end_tokens():
    lm = BlockDiffusionLM(tiny_model("llama"), None, BlockDiffusionSettings(block_size=4, mask_token_id=96))
    results = run_bench(
        lm,
        model="random",
        prompts=None,
        variants=[{"mode": "ar"}],
        batches=[2],
        rounds=1,
        max_new_tokens=4,
        forwards=True,
        cache_length=8,
    )
    assert [entry["new_tokens"] for entry in results["decode"]] == [8, 8]
    assert results["forwards"][-1]["positions"] == 160
    assert random_prompts(97, 5, 2) == random_prompts(97, 5, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": [1, 32]}, "batch=32 is more than the 2 prompts"),
        ({"batches": [1, 0]}, "batch=0 must be at least 1"),
        ({"forwards": True, "cache_length": 5000}, "cache_length=5000 and 160 positions exceed"),
        ({"max_new_tokens": 5000}, "max_new_tokens=5000 does not fit"),
    ],
)
def test_all_that_is_refused_is_refused_before_anything_is_measured(lm, monkeypatch, changes, message):
    measured = []
    monkeypatch.setattr(command, "bench_decode", lambda *_, **__: measured.append("decode") or [])
    options: dict[str, Any] = {"batches": [1], "rounds": 1, "max_new_tokens": 4, "forwards": False, "cache_length": 8}
    prompts = task_prompts("word_problems", "test", 2)
    with pytest.raises(UsageError, match=message):
        run_bench(lm, model="m", prompts=prompts, variants=[{"mode": "ar"}], **{**options, **changes})
    assert not measured


def test_what_was_measured_is_told_where_a_later_part_fails(lm, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(command, "time_forwards", fails)
    told = []
    prompts = task_prompts("word_problems", "test", 1)
    sizes: dict[str, Any] = {"batches": [1], "rounds": 1, "max_new_tokens": 2, "cache_length": 8}
    with pytest.raises(RuntimeError, match="out of memory"):
        run_bench(lm, model="m", prompts=prompts, variants=[{"mode": "ar"}], forwards=True, tell=told.append, **sizes)
    ((results,),) = (told,)
    assert [entry["name"] for entry in results["decode"]] == ["transformers", "ar"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a MODEL or --shape"),
        (["m", "--shape", "qwen3-4b"], "give either a MODEL or --shape"),
        (["m", "--output", "results"], "is not the name of a .json file"),
        (["--shape", "qwen3-4"], "did you mean 'qwen3-4b'"),
        (["--shape", "qwen3-4b", "--task", "algebra"], "--task: --shape makes a model of random weights"),
        (["--shape", "qwen3-4b", "--prompts", "p.txt"], "--prompts: --shape makes a model of random weights"),
        (["--shape", "qwen3-4b", "--draft-adapter", "tiny-draft"], "--draft-adapter: --shape makes"),
        (["--shape", "qwen3-4b", "--settings", "nbdiff-7b"], "--settings: --shape makes"),
        (["m", "--mode", "ar", "--threshold", "0.3"], "--threshold: only diffusion mode reads it"),
        (["m", "--mode", "ar", "--block-size", "8"], "--block-size: ar mode has no blocks"),
        (["tiny-ar", "--block-size", "8"], "--block-size: ar mode has no blocks"),
        (["m", "--cache-length", "8"], "--cache-length: only --forwards and --shape read it"),
        (["m", "--task", "algebra", "--prompts", "p.txt"], "are both given"),
        (["m", "--output", "/proc/x.json"], "/proc/x.json cannot be written"),
        (["tiny-bd", "--batch", "2", "--prompt-lookup"], "--prompt-lookup: it is timed beside decoding at batch 1"),
        (["tiny-bd", "--forwards", "--cache-length", "0"], "cache_length=0 and all positions must be at least 1"),
    ],
)
def test_the_command_refuses_bad_input_before_it_loads(arguments, message):
    result = CliRunner().invoke(app, ["bench", "decode", *arguments])
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)
