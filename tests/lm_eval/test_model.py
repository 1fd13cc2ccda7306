"""The harness's model `nextblock`, against known answers and against the harness's own `hf` model."""

from __future__ import annotations

import json
import math
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager

import nextblock as nb
import nextblock.lm_eval
from lm_eval import simple_evaluate
from nextblock.lm_eval.__main__ import main
from nextblock.lm_eval.model import NextblockLM
from nextblock.tasks import get_task

ASSETS = Path(str(resources.files("nextblock"))) / "assets"
PROBLEMS = [get_task("word_problems").example("test", i) for i in range(5)]
LIKELIHOODS = ["choices", "sentences", "texts"]


def write_tasks(folder: Path) -> None:
    """One local task of each output type over the same problems, of unequal lengths."""
    documents = [
        {
            "prompt": "so " * (7 * i) + p.prompt,
            "answer": p.completion,
            "choices": [f" The answer is {p.answer}.", " The answer is 999.", " no"],
            "text": p.prompt + p.completion,
            "beginning": p.completion.split(" answer is")[0],
        }
        for i, p in enumerate(PROBLEMS)
    ]
    data = folder / "documents.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks = {
        "answers": {
            "output_type": "generate_until",
            "doc_to_target": "{{beginning}}",
            "generation_kwargs": {"until": ["\n\n", " answer is"], "do_sample": False, "max_gen_toks": 48},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc", **mean}],
        },
        "sentences": {"output_type": "loglikelihood", "metric_list": [{"metric": "acc", **mean}]},
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }
    for name, own in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **own}))


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(manager: TaskManager, tasks: list[str], model: Any, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The harness's results, and every answer to every request, by task and document."""
    names: Any = tasks
    found: Any = simple_evaluate(model, tasks=names, task_manager=manager, bootstrap_iters=0, **more)
    answers = {
        task: [sample["resps"] for sample in sorted(samples, key=lambda one: one["doc_id"])]
        for task, samples in found["samples"].items()
    }
    return found, answers


def ours(**arguments: Any) -> NextblockLM:
    return NextblockLM(**{"pretrained": "tiny-bd", "device": "cpu", **arguments})


@pytest.fixture(scope="module")
def hf(manager: TaskManager) -> tuple[dict[str, Any], dict[str, Any]]:
    """The harness's own model on the same folder."""
    arguments = {"pretrained": str(ASSETS / "tiny-bd"), "dtype": "float32"}
    return evaluate(manager, ["answers", *LIKELIHOODS], "hf", model_args=arguments, device="cpu")


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_ar_and_speculative_mode_give_the_answers_and_scores_of_the_harness_s_own_model(manager, hf, mode):
    arguments = {"pretrained": "tiny-bd", "mode": mode}
    results, answers = evaluate(manager, ["answers", *LIKELIHOODS], "nextblock", model_args=arguments, batch_size=3)
    assert answers["answers"] == hf[1]["answers"]
    for task in LIKELIHOODS:
        assert_close(answers[task], hf[1][task])
    for task, figures in hf[0]["results"].items():
        for name, value in figures.items():
            if isinstance(value, float):
                assert results["results"][task][name] == pytest.approx(value, rel=1e-5), (task, name)
    wanted = [p.completion.split(" answer is")[0] for p in PROBLEMS]
    right = sum(found[0][0] == text for found, text in zip(answers["answers"], wanted, strict=True))
    assert results["results"]["answers"]["exact_match,none"] == right / len(wanted) > 0
    told = results["config"]["nextblock"]
    assert told["mode"] == mode
    assert (told["tokens_per_forward"]["answers"] > 1) == (mode == "speculative")


def assert_close(found: Any, wanted: Any) -> None:
    if isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_close(one, other)
    else:
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-4)  # float32


@pytest.mark.parametrize(
    ("arguments", "tasks", "gen_kwargs"),
    [
        ({"mode": "ar"}, LIKELIHOODS, None),
        ({"likelihood": "diffusion", "mc_num": 3}, ["choices"], None),
        ({"mode": "ar"}, ["answers"], None),
        ({"mode": "speculative"}, ["answers"], "temperature=1,top_p=0.9,do_sample=True"),
        ({"mode": "diffusion"}, ["answers"], None),
        ({"pretrained": "tiny-ar", "draft_adapter": "tiny-draft", "mode": "speculative"}, ["answers"], None),
    ],
    ids=str,
)
def test_no_answer_and_no_score_depends_on_the_batch_size_by_a_single_bit(manager, arguments, tasks, gen_kwargs):
    found = [
        evaluate(manager, tasks, ours(batch_size=size, **arguments), gen_kwargs=gen_kwargs, limit=3)[1]
        for size in (1, 2, 64)
    ]
    assert found[0] == found[1] == found[2]


def log_p(lm: nb.BlockDiffusionLM, tokens: list[int]) -> list[float]:
    """log p of each token but the first, from one plain pass."""
    with torch.no_grad():
        logits = lm.model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return [float(logits[i, token]) for i, token in enumerate(tokens[1:])]


def test_likelihoods_are_plain_sums_of_log_probabilities_in_windows_that_score_each_token_once(manager):
    lm = nb.load("tiny-bd", device="cpu")
    model = ours(mode="ar", max_length=100)
    _, answers = evaluate(manager, ["sentences", "texts"], model, limit=2)
    for problem, answer in zip(PROBLEMS[:2], answers["texts"], strict=True):
        tokens = [lm.tokenizer.eos_token_id, *lm.tokenizer.encode(problem.prompt + problem.completion)]
        total, done = 0.0, 1
        while done < len(tokens):  # 100 more tokens, or the last of all behind as much context as fits
            stop = min(done + 100, len(tokens))
            total += sum(log_p(lm, tokens[max(0, stop - 101) : stop])[-(stop - done) :])
            done = stop
        assert answer[0][0] == pytest.approx(total, rel=1e-5)
    context, continuation = (lm.tokenizer.encode(text) for text in (PROBLEMS[0].prompt, PROBLEMS[0].completion))
    tokens = (context + continuation)[-101:]
    assert answers["sentences"][0][0][0][0] == pytest.approx(sum(log_p(lm, tokens)[-len(continuation) :]), rel=1e-5)


def test_in_blocks_of_one_the_bound_is_the_exact_likelihood_and_in_larger_ones_it_states_its_error(manager):
    exact = evaluate(manager, LIKELIHOODS, ours(mode="ar"), limit=2)[1]
    one = evaluate(manager, LIKELIHOODS, ours(likelihood="diffusion", block_size=1, mc_num=2), limit=2)[1]
    assert_close([one[task] for task in LIKELIHOODS], [exact[task] for task in LIKELIHOODS])
    results, _ = evaluate(manager, ["choices"], ours(likelihood="diffusion", block_size=8, mc_num=4), limit=2)
    told = results["config"]["nextblock"]
    assert told["likelihood"] == "diffusion (bound, 4 draws)"
    assert 0 < told["likelihood_standard_error"] < math.inf


def test_few_shot_chat_templates_limit_and_cache_work_and_cached_answers_cost_no_pass(manager, tmp_path):
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    found = []
    for _ in range(2):
        model = ours(mode="speculative", batch_size="auto")
        model.tokenizer.chat_template = template
        more = {"num_fewshot": 1, "limit": 2, "apply_chat_template": True, "use_cache": str(tmp_path / "cache")}
        found.append(evaluate(manager, ["answers", "choices"], model, **more))
    assert found[0][1] == found[1][1]
    assert len(found[0][1]["answers"]) == 2
    spent = [results["config"]["nextblock"]["tokens_per_forward"] for results, _ in found]
    assert list(spent[0]) == ["answers"]
    assert spent[1] == {}
    prompt = found[0][0]["samples"]["answers"][0]["arguments"][0][0]
    assert prompt.startswith("<user>")
    assert "<assistant>" in prompt


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mod": "ar"}, "unknown key 'mod'; did you mean 'mode'?"),
        ({"draft_adaptor": "x"}, "did you mean 'draft_adapter'?"),
        ({"mode": "fast"}, "mode='fast': unknown mode"),
        ({"temperature": 1}, "--gen_kwargs temperature=1"),
        ({"mc_num": 1}, "mc_num=1 must be at least 2"),
        ({"batch_size": "many"}, "batch_size=many is unknown"),
        ({"pretrained": "tiny-ar", "mode": "diffusion"}, "has no block_diffusion settings"),
        ({"pretrained": "tiny-ar", "likelihood": "diffusion"}, "has no block_diffusion settings"),
    ],
)
def test_wrong_arguments_end_in_one_line(arguments, words):
    with pytest.raises(nb.UsageError) as caught:
        ours(**arguments)
    assert words in str(caught.value)


def test_diffusion_mode_asks_which_likelihood_is_meant(manager):
    with pytest.raises(nb.UsageError, match=r"likelihood=ar .* or likelihood=diffusion"):
        evaluate(manager, ["choices"], ours(mode="diffusion"))


def test_unknown_generation_arguments_and_a_prompt_without_room_end_in_one_line(manager):
    with pytest.raises(nb.UsageError, match="did you mean 'threshold'"):
        evaluate(manager, ["answers"], ours(), gen_kwargs="treshold=0.5")
    with pytest.raises(nb.UsageError, match="max_gen_toks=48 leaves no room"):
        evaluate(manager, ["answers"], ours(max_length=40))


def test_a_checkpoint_without_a_tokenizer_is_named(tmp_path):
    for file in (ASSETS / "tiny-bd").iterdir():
        if "token" not in file.name and file.is_file():
            shutil.copy(file, tmp_path)
    with pytest.raises(nb.UsageError, match="has no tokenizer"):
        ours(pretrained=str(tmp_path))


def test_the_command_names_a_task_that_is_missing_and_the_extra_that_is(monkeypatch, capsys):
    def refuse(*_: Any) -> None:  # as the harness does, which reads thousands of tasks for it
        raise ValueError("Tasks not found: gsm8kk")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refuse)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "error: Tasks not found: gsm8kk; `lm_eval ls tasks` lists" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main()
    assert "pip install 'nextblock[eval]'" in capsys.readouterr().err
