"""The harness's model `nextblock`, against known answers and against the harness's own `hf` model."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager

import nextblock as nb
import nextblock.lm_eval
from lm_eval import simple_evaluate
from nextblock.lm_eval.__main__ import main
from nextblock.lm_eval.generation import TOP_K
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
    assert list(told["likelihood_standard_error"]) == ["choices"]
    assert 0 < told["likelihood_standard_error"]["choices"] < math.inf


def request(*args: Any, task: str = "t") -> Any:
    return SimpleNamespace(args=args, task_name=task)


def test_the_error_of_a_long_text_is_that_of_the_sum_of_its_windows():
    model = ours(likelihood="diffusion", block_size=16, mc_num=4, max_length=40)
    text = PROBLEMS[0].prompt + PROBLEMS[0].completion
    values = []
    for number in range(24):  # other texts of the same kind have other noise
        values.append(model.loglikelihood_rolling([request(text + " " * (number % 3) + "x" * number)])[0])
    one = model.loglikelihood_rolling([request(text, task="one"), request(text, task="two")])
    told = model.get_model_info()["nextblock"]["likelihood_standard_error"]
    assert one[0] == one[1]
    assert told["one"] == told["two"] > 0
    windows = len(model.tok_encode(text)) / 39
    assert windows > 2
    model.loglikelihood_rolling([request(text[:30], task="one")])
    assert told["one"] > model.get_model_info()["nextblock"]["likelihood_standard_error"]["one"]
    assert statistics.stdev(values) > 0


def test_no_score_and_no_sample_depends_on_what_else_is_asked(manager, tmp_path):
    bound = {"likelihood": "diffusion", "mc_num": 2}
    alone = evaluate(manager, ["sentences"], ours(**bound), limit=2)[1]
    beside = evaluate(manager, ["choices", "sentences"], ours(**bound), limit=2)[1]
    assert alone["sentences"] == beside["sentences"]
    cache = str(tmp_path / "cache")
    evaluate(manager, ["sentences"], ours(**bound), limit=1, use_cache=cache)
    assert evaluate(manager, ["sentences"], ours(**bound), limit=2, use_cache=cache)[1] == alone


def sampled(torch_seed: int, count: int, **more: Any) -> list[str]:
    torch.manual_seed(torch_seed)
    given = {"until": [], "do_sample": True, "temperature": 20.0, "max_gen_toks": 8, **more}
    return ours(mode="ar").generate_until([request(PROBLEMS[0].prompt, given)] * count)


def test_samples_of_neighbouring_seeds_are_not_the_same_ones():
    found = [sampled(seed, 4) for seed in (1, 2, 3)]
    assert len({text for texts in found for text in texts}) > 10
    assert sampled(1, 4) == found[0]
    assert sampled(5, 2, seed=7) == sampled(6, 2, seed=7)
    assert sampled(5, 2, seed=7) != sampled(5, 2, seed=8)


def test_figures_are_those_of_the_last_run_alone(manager):
    model = ours(mode="speculative")
    evaluate(manager, ["answers"], model, limit=2)
    again = evaluate(manager, ["answers"], model, limit=1, gen_kwargs="max_gen_toks=4,mode=ar")[0]
    told = again["config"]["nextblock"]
    assert told["tokens_per_forward"] == {"answers": 1.0}
    assert told["mode"] == "ar"
    assert model.get_model_info()["nextblock"]["tokens_per_forward"] == {}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-bd with values in its generation config that change answers."""
    folder = tmp_path_factory.mktemp("copied") / "model"
    shutil.copytree(ASSETS / "tiny-bd", folder)
    values = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 5, "top_k": 2, "temperature": 1.5}
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | values))
    return folder


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_penalties_of_the_generation_config_act_as_in_the_harness_s_own_model(manager, copied, mode):
    arguments = {"pretrained": str(copied), "dtype": "float32"}
    theirs = evaluate(manager, ["answers"], "hf", model_args=arguments, device="cpu")[1]
    model = ours(pretrained=str(copied), mode=mode, batch_size=2)
    assert evaluate(manager, ["answers"], model)[1] == theirs
    plain = evaluate(manager, ["answers"], model, gen_kwargs="repetition_penalty=1.0,no_repeat_ngram_size=0")[1]
    assert plain != theirs


def test_sampling_values_left_out_are_the_checkpoint_s_and_then_those_of_transformers(copied, caplog):
    def first(folder: Any, count: int, **more: Any) -> set[str]:
        torch.manual_seed(0)
        given = {"until": [], "do_sample": True, "max_gen_toks": 1, "repetition_penalty": 1.0, **more}
        return set(
            ours(pretrained=str(folder), mode="ar", batch_size=64).generate_until([request("a", given)] * count)
        )

    assert len(first(copied, 64)) == 2
    assert len(first(copied, 64, top_k=3, temperature=100.0)) == 3
    assert 30 < len(first(ASSETS / "tiny-bd", 400, temperature=100.0)) <= TOP_K
    assert len(first(ASSETS / "tiny-bd", 400, temperature=100.0, top_k=0)) > TOP_K
    model = ours(pretrained=str(copied), mode="diffusion")
    with caplog.at_level("WARNING"):
        model.generate_until([request("a", {"until": [], "max_gen_toks": 4})])
    assert "repetition_penalty=1.3 of generation_config.json does not act in diffusion mode" in caplog.text
    with pytest.raises(nb.UsageError, match=r"repetition_penalty=1\.1 acts in ar and speculative mode alone"):
        model.generate_until([request("a", {"until": [], "repetition_penalty": 1.1})])


def test_a_draft_adapter_drafts_and_thoughts_end_at_a_text_or_a_token():
    model = ours(pretrained="tiny-ar", draft_adapter="tiny-draft")
    assert model.config_of_mode.mode == "speculative"
    given = {"until": None, "stop": "\n", "max_gen_toks": 40}
    whole = model.generate_until([request(PROBLEMS[0].prompt, given)])[0]
    assert "=" in whole
    assert "\n" not in whole
    ids = model.tok_encode("=")
    for end in (ids[0], "="):
        thinking = ours(pretrained="tiny-ar", draft_adapter="tiny-draft", think_end_token=end)
        assert thinking.generate_until([request(PROBLEMS[0].prompt, given)])[0] == whole.split("=")[-1].lstrip()


@pytest.mark.parametrize("pair", [("a", ""), ("", ""), ("", "<eos>")])
def test_a_continuation_without_a_token_is_named(pair):
    model = ours(mode="ar")
    context, continuation = (part.replace("<eos>", model.tokenizer.eos_token) for part in pair)
    with pytest.raises(nb.UsageError, match="a continuation has no token of its own"):
        model.loglikelihood([request(context, continuation)])


def test_an_error_stands_on_a_line_of_its_own_behind_the_progress_bar(capfd):
    with pytest.raises(nb.UsageError):
        ours().generate_until([request("a", {"until": [], "unknown_key": 1})])
    assert capfd.readouterr().err.endswith("\n")


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
        ({"temperature": 1}, "--gen_kwargs do_sample=true,temperature=1"),
        ({"max_new_tokens": 9}, "--gen_kwargs max_gen_toks=9"),
        ({"max_gen_toks": 9}, "--gen_kwargs max_gen_toks=9"),
        ({"tokenizer": "x"}, "unknown key 'tokenizer'; choose from"),
        ({"device": "foo"}, "device=foo: "),
        ({"prefix_token_id": 9999}, "prefix_token_id=9999 is outside the vocabulary of 264"),
        ({"enable_thinking": True}, "think_end_token is required"),
        ({"pretrained": "tiny-ar", "mode": "speculative"}, "give a draft adapter"),
        ({"batch_size": "auto:x"}, "batch_size=auto:x is unknown"),
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


def test_an_input_longer_than_the_context_is_cut_to_it(caplog):
    with caplog.at_level("WARNING"):
        model = ours(mode="ar", max_length=4000, batch_size="auto:4")
    assert "max_length=4000 is more than the model's context; 2048 is taken" in caplog.text
    assert model.max_length == 2048
    assert model.batch_size == "auto"
    assert len(model.generate_until([request("a " * 1500, {"until": [], "max_gen_toks": 2})])) == 1


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
