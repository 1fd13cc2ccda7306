"""The command line: bad input ends in one line on standard error, exit status 2, and nothing left behind."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import nextblock as nb
from families import tiny_model
from nextblock.cli import main as cli
from nextblock.cli import train
from nextblock.config.sections import BlockDiffusionSettings, DraftAdapterConfig
from nextblock.model.adapter_files import save_adapter
from nextblock.model.draft_adapter import DraftAdapter
from nextblock.model.parent import byte_tokenizer
from nextblock.tasks import get_task
from nextblock.training.export import export


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command line in this process -> (exit status, standard output, standard error)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nextblock", *map(str, arguments)])
        monkeypatch.setattr("warnings.showwarning", lambda *_, **__: None)
        capsys.readouterr()  # what fixtures wrote is not the command's
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return call


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("generate tiny-bd abc --foo", "No such option: --foo; see nextblock generate --help"),
        ("generate tiny-bd abc --seed x", "Invalid value for '--seed'"),
        ("generate", "Missing argument 'model'; see nextblock generate --help"),
        ("nosuch", "No such command 'nosuch'; see nextblock --help"),
        ("bench nosuch", "No such command 'nosuch'; see nextblock bench --help"),
        ("--foo", "No such option: --foo; see nextblock --help"),
    ],
)
def test_a_command_line_that_cannot_be_read_gives_one_line(run, line, words):
    status, out, err = run(*line.split())
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_the_version_is_told_and_no_command_gives_help(run):
    assert run("--version") == (0, f"nextblock {nb.__version__}\n", "")
    for line, word in (((), "COMMAND"), (("bench",), "decode"), (("generate", "--help"), "--threshold")):
        status, out, _ = run(*line)
        assert status == (2 if "--help" not in line else 0)
        assert word in out


@pytest.fixture
def parent(tmp_path):
    """A tiny random parent's folder."""
    folder = tmp_path / "parent"
    export(folder, tiny_model("llama", vocab_size=264), byte_tokenizer(), None)
    return folder


@pytest.fixture
def adapted(tmp_path):
    """A tiny random model with block-diffusion settings."""
    folder = tmp_path / "adapted"
    settings = BlockDiffusionSettings(block_size=4, mask_token_id=263)
    export(folder, tiny_model("llama", vocab_size=264), byte_tokenizer(), settings)
    return folder


@pytest.fixture
def texts(tmp_path):
    """A folder of plain text."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"text {number}: " + "words and more words. " * 20, encoding="utf-8")
    return folder


def small(parent, data, output):
    """Options of a run that takes a second."""
    return [
        "demo",
        "--model.path",
        parent,
        "--data.sources.0.path",
        data,
        "--data.row_length",
        "64",
        "--data.held_out",
        "0.3",
        "--growth.b_max",
        "4",
        "--growth.delta",
        "1",
        "--training.steps",
        "4",
        "--training.batch_rows",
        "2",
        "--training.evaluate_rows",
        "2",
        "--output",
        output,
    ]


def test_the_entry_point_knows_every_command():
    """In a process of its own: here other tests have imported the modules that add commands."""
    names = "from nextblock.cli.main import app; print(*(c.callback.__name__ for c in app.registered_commands))"
    found = subprocess.run([sys.executable, "-c", names], capture_output=True, text=True, check=True).stdout.split()
    assert {"adapt", "plan", "generate", "chat", "evaluate", "tune", "verify", "report", "demo"} <= set(found)


def test_adapt_leaves_a_checkpoint_figures_and_a_report(run, parent, texts, tmp_path):
    status, out, _ = run("adapt", *small(parent, texts, tmp_path / "out"))
    assert status == 0
    assert "bits per byte" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    measured = [(m["model"], m["measure"]) for m in results["bits_per_byte"]]
    assert measured == [
        ("parent", "AR (exact)"),
        ("adapted", "AR (exact)"),
        ("adapted", "diffusion (bound)"),
    ]
    assert "</html>" in (tmp_path / "out" / "report.html").read_text()
    for mode in ("ar", "diffusion", "speculative"):
        status, out, _ = run("generate", tmp_path / "out", "words", "--mode", mode, "--max-new-tokens", "6")
        assert (status, out[:5]) == (0, "words")


def test_a_finished_run_is_not_written_over_but_can_be_resumed(run, parent, texts, tmp_path):
    assert run("adapt", *small(parent, texts, tmp_path / "out"))[0] == 0
    status, _, err = run("adapt", *small(parent, texts, tmp_path / "out"))
    assert (status, err.count("\n")) == (2, 1)
    assert "is not empty" in err
    assert run("adapt", *small(parent, texts, tmp_path / "out"), "--resume", "auto")[0] == 0


@pytest.mark.parametrize(
    "where",
    [
        "nextblock.recipe.likelihood._nats",
        "nextblock.training.loop.export_run",
        "nextblock.workflows.held_out.load_parent",
    ],
)
def test_sigterm_after_the_last_step_leaves_the_model_and_a_resume_measures_it(
    run, parent, texts, tmp_path, monkeypatch, where
):
    module, name = where.rsplit(".", 1)
    owner = importlib.import_module(module)
    real, calls = getattr(owner, name), []

    def interrupted(*arguments, **options):
        calls.append(name)
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    output = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        status, _, err = run("adapt", *small(parent, texts, output))
    assert (status, calls) == (0, [name])
    assert "stopped at step 4; go on with --resume auto" in err
    trained = (output / "model.safetensors").read_bytes()
    assert not (output / "results.json").exists()
    status, out, _ = run("adapt", *small(parent, texts, output), "--resume", "auto")
    assert status == 0
    assert out.count("bits per byte") == 3
    assert (output / "model.safetensors").read_bytes() == trained
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def broken_data(folder, name):
    """A data source of each bad kind -> (path, words of the message)."""
    path = folder / name
    if name == "missing.txt":
        return path, "does not exist"
    if name == "empty.txt":
        path.write_text("")
        return path, "anything to generate|is empty"
    if name == "latin.txt":
        path.write_bytes(b"caf\xe9 " * 40)
        return path, r"latin\.txt is not UTF-8: byte 3"
    path.write_text('{"text": "fine"}\n{"text": \n')
    return path, r"broken\.jsonl:2: broken JSON line"


@pytest.mark.parametrize("name", ["missing.txt", "empty.txt", "latin.txt", "broken.jsonl"])
def test_bad_data_gives_one_line_and_no_output(run, parent, tmp_path, name):
    path, words = broken_data(tmp_path, name)
    refused(run, ["adapt", *small(parent, path, tmp_path / "out")], words, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.path", "no/such/model/here"], "does not exist"),
        (["--model.path", "{weightless}"], "has no weights"),
        (["--model.path", "{unreadable}"], "cannot read"),
        (["--model.path", "{mamba}"], "recurrent state"),
        (["--model.mask_token", "9999"], "outside the vocabulary; ids run from 0 to 263"),
        (["--model.mask_token", "{letter}"], "is used in the data"),
        (["--data.row_length", "2"], "smaller than the block"),
        (["--training.steps", "2"], "is not reached in training.steps=2"),
        (["--growth.bmax", "4"], "did you mean 'b_max'"),
        (["--recipe.context", "causal"], "context_causal"),
        (["--stepz", "4"], "unknown key 'stepz'"),
        (["--growth.b_max"], "needs a value"),
        (["--resume", "now"], "the one value is auto"),
        (["--growth.b_max", "["], "growth.b_max"),
        (["--output", "/proc/none/out"], "cannot be made"),
        (["--training.seed", str(2**70)], "training.seed"),
        (["--recipe.random_start_share", "0.5", "--recipe.annealed_mask_steps", "2"], "set one of them to 0"),
        (["--training.trackers", "wandbb"], "training.trackers"),
    ],
)
def test_bad_options_give_one_line_and_no_output(run, parent, texts, tmp_path, options, words):
    weightless, unreadable, mamba = (tmp_path / name for name in ("weightless", "unreadable", "mamba"))
    for folder in (weightless, unreadable, mamba):
        folder.mkdir()
    (weightless / "config.json").write_text((parent / "config.json").read_text())
    (unreadable / "config.json").write_text("{broken")
    (mamba / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    (mamba / "model.safetensors").write_bytes(b"")
    places = {"weightless": weightless, "unreadable": unreadable, "mamba": mamba}
    places["letter"] = byte_tokenizer().convert_tokens_to_ids("w")
    options = [option.format(**places) if option.startswith("{") else option for option in options]
    made = tmp_path / "new"
    refused(run, ["adapt", *small(parent, texts, made / "runs" / "out"), *options], words, made)


def refused(run, arguments, words, output):
    """Assert exit status 2, one line that says `words`, and no output folder."""
    import re

    status, _, err = run(*arguments)
    assert status == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert re.search(words, err), err
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--mode", "difusion"], "did you mean 'diffusion'"),
        (["--mode", "diffusion"], "adapt it with"),
        (["--threshold", "x"], "not a number"),
        (["--max-new-tokens", "0"], "must be at least 1"),
        (["--steps", "0"], "steps=0 must be at least 1"),
        (["--draft-length", "long"], "draft_length=long is not a number of tokens; use 1 or more, or auto"),
        (["--draft-length", "0"], "draft_length=0 must be at least 1"),
        (["--draft-paths", "2", "--draft-ahead", "1"], "draft_paths=2 does not go with draft_ahead"),
        (["--dtype", "int8"], "float32 or bfloat16"),
        (["--temperature", "1", "--seed", str(2**70)], f"seed={2**70} must be a whole number"),
        (["second", "--live"], "--live shows one answer"),
        (["--live", "--stats"], "--live shows one answer"),
        (["--live", "--stop", "5"], "--live shows one answer"),
        (["--batch-size", "0"], "--batch-size and --ray go with --input alone"),
        (["--examples", "3"], "--batch-size and --ray go with --input alone"),
        (["--ray", "0"], "--batch-size and --ray go with --input alone"),
        (["caf\udce9"], "prompt 1: half of a surrogate pair, or a byte that is not UTF-8"),
    ],
)
def test_generate_refuses_bad_options_in_one_line(run, parent, tmp_path, arguments, words):
    refused(run, ["generate", parent, "words", *arguments], words, tmp_path / "out")


@pytest.mark.parametrize(
    "options",
    [
        ["--draft-length", "auto"],
        ["--draft-length", "3", "--draft-paths", "3"],
        ["--draft-ahead", "2"],
    ],
    ids=" ".join,
)
def test_drafting_options_change_no_word_of_what_is_said(run, adapted, options, monkeypatch):
    expected = run("generate", adapted, "words", "--mode", "ar", "--max-new-tokens", "12")[:2]
    said = run("generate", adapted, "words", "--mode", "speculative", "--max-new-tokens", "12", *options)[:2]
    assert said == expected
    talks = []
    for mode in (["--mode", "ar"], ["--mode", "speculative", *options]):
        answers = iter(["words", ""])
        monkeypatch.setattr("builtins.input", lambda prompt, answers=answers: next(answers))
        talks.append(run("chat", adapted, "--max-new-tokens", "12", *mode)[:2])
    assert talks[0] == talks[1]
    assert talks[0][0] == 0


def test_a_prompt_is_taken_as_it_is_typed(run, adapted, monkeypatch):
    prompt = r"Compute \nabla f and \neq"
    options = ["--mode", "ar", "--max-new-tokens", "4"]
    lm = nb.load(adapted)
    assert run("generate", adapted, prompt, *options)[1].startswith(prompt)
    for encoding in ("utf-8", "utf-8-sig"):  # the latter with a byte order mark, as PowerShell's pipes have it
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt.encode(encoding)), encoding="utf-8"))
        assert run("generate", adapted, *options)[1].startswith(prompt)
    answers = iter([prompt, ""])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    said = lm.generate([{"role": "user", "content": prompt}], mode="ar", max_new_tokens=4).texts[0]
    assert run("chat", adapted, *options)[1] == f"model: {said}\n"


def test_bytes_that_are_no_text_are_refused_from_standard_input_and_in_a_chat(run, adapted, tmp_path, monkeypatch):
    words = "prompt 0: half of a surrogate pair, or a byte that is not UTF-8"
    for encoding in ("utf-8", "ascii"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding=encoding))
        refused(run, ["generate", adapted, "--mode", "ar"], words, tmp_path / "out")
    typed = iter(["caf\udce9", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert words in str(run("chat", adapted, "--mode", "ar"))


def test_a_terminal_that_lacks_a_character_shows_its_escape(run, adapted, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("2π".encode()), encoding="ascii"))
    assert run("generate", adapted, "--mode", "ar", "--max-new-tokens", "1")[0] == 0
    screen.flush()
    assert screen.buffer.getvalue().startswith(rb"2\u03c0")  # pyright: ignore[reportAttributeAccessIssue]


def test_a_number_of_steps_limits_the_passes_of_a_block(run, adapted):
    line = ["generate", adapted, "words", "--mode", "diffusion", "--threshold", "none", "--max-new-tokens", "8"]
    forwards = [run(*line, "--stats", *steps)[2].split(", ")[1] for steps in ([], ["--steps", "1"])]
    assert int(forwards[0].split()[0]) > int(forwards[1].split()[0])


def test_a_document_shorter_than_one_block_is_kept(run, parent, tmp_path):
    path = tmp_path / "short.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"a{n}"}) for n in range(40)))
    assert run("adapt", *small(parent, path, tmp_path / "out"))[0] == 0


def test_every_key_of_the_configuration_is_listed(run):
    status, out, _ = run("adapt", "demo", "--keys")
    assert status == 0
    for key in ("--model.path", "--data.sources.0.path", "--growth.b_max", "--draft_adapter.rank", "--output"):
        assert key in out


def test_report_makes_the_page_again(run, parent, texts, tmp_path):
    assert run("adapt", *small(parent, texts, tmp_path / "out"))[0] == 0
    page = tmp_path / "out" / "report.html"
    before = page.read_text()
    page.unlink()
    assert run("report", tmp_path / "out")[0] == 0
    assert page.read_text() == before
    page.unlink()
    page.mkdir()
    status, _, err = run("report", tmp_path / "out")
    assert (status, err.count("\n")) == (2, 1)
    assert f"{page} cannot be written: Is a directory" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "Once upon a time " * 20, "words"], "model 'Once upon .*too long"),
        (["generate", "~no-such-user/x", "words"], "unknown user"),
        (["generate", "tiny-ar", "words", "--draft-adapter", "~no-such-user/x"], "draft adapter ~.* unknown user"),
        (["evaluate", "tiny-ar", "--output", "x" * 300 + ".json"], "--output 'xxx.*too long"),
        (["plan", "x" * 300], "configuration 'xxx.*too long"),
        (["report", "x" * 300], "run 'xxx.*too long"),
    ],
)
def test_a_name_that_can_be_no_path_gives_one_line(run, tmp_path, arguments, words):
    refused(run, arguments, words, tmp_path / "out")


def test_what_is_given_on_the_command_line_goes_before_the_checkpoint_and_only_that(run, tmp_path):
    stored = {"mode": "ar", "temperature": 1.0, "max_new_tokens": 5}
    settings = BlockDiffusionSettings(block_size=4, mask_token_id=263, decoding=stored)
    export(tmp_path / "adapted", tiny_model("llama", vocab_size=264, eos_token_id=None), byte_tokenizer(), settings)
    lm = nb.load(tmp_path / "adapted")
    cases: list[tuple[list[str], dict[str, Any]]] = [
        ([], {}),
        (["--temperature", "0"], {"temperature": 0.0}),
        (["--max-new-tokens", "256"], {"max_new_tokens": 256}),
    ]
    for given, options in cases:
        expected = lm.generate("ab", seed=1, **options)
        status, out, err = run("generate", tmp_path / "adapted", "ab", "--seed", 1, "--stats", *given)
        assert (status, out) == (0, f"ab{expected.texts[0]}\n")
        assert f"{expected.stats.new_tokens} tokens" in err


def test_generate_answers_a_file_as_training_data(run, parent, tmp_path):
    output = tmp_path / "data.jsonl"
    call = ["generate", parent, "--input", "task:algebra", "--examples", "3", "--max-new-tokens", "4"]
    assert run(*call, "--output", output)[:2] == (0, f"wrote 3 answers to {output}\n")
    assert len(output.read_text(encoding="utf-8").splitlines()) == 3
    assert run(*call, "--output", output)[:2] == (0, f"{output} is finished; nothing was left to do\n")
    for options, words in (
        (["--output", output, "--temperature", "1"], "belongs to other settings: seed was None"),
        (["--output", tmp_path / "no" / "data.jsonl"], "does not exist"),
        ([], "go together"),
        (["--output", output, "--live"], "does not go with"),
    ):
        refused(run, [*call, *options], words, tmp_path / "no")


@pytest.mark.parametrize(
    ("targets", "words"), [("nothing", "match nothing"), ("[q_proj, key]", "'key'"), ("(q", "no regular expression")]
)
def test_target_modules_that_match_nothing_leave_nothing_behind(run, parent, texts, tmp_path, targets, words):
    options = ["--draft_adapter.target_modules", targets, "--growth.b_0", "4"]
    refused(run, ["adapt", *small(parent, texts, tmp_path / "out"), *options], words, tmp_path / "out")


def test_a_draft_adapter_out_of_place_gives_one_line(run, parent, tmp_path):
    model = tiny_model("llama", vocab_size=264)
    adapter = DraftAdapter(model, DraftAdapterConfig(rank=2))
    section = BlockDiffusionSettings(block_size=4, mask_token_id=adapter.mask_token_id)
    save_adapter(tmp_path / "draft", adapter, section, "my-parent", parent)
    export(tmp_path / "other", tiny_model("llama", vocab_size=264, seed=5), byte_tokenizer(), None)
    for model, folder, options, words in (
        (tmp_path / "other", "draft", [], "belongs to my-parent"),
        (parent, "nowhere", [], "is not a folder"),
        (parent, "other", [], "holds no draft adapter"),
        (parent, "draft", ["--block-size", "8"], "block_size=8 is larger than the 4"),
    ):
        call = ["generate", model, "a", "--mode", "speculative", "--draft-adapter", tmp_path / folder, *options]
        refused(run, call, words, tmp_path / "out")


def test_values_that_are_text_by_their_key_or_no_yaml_are_taken_as_they_stand():
    given = ["--data.sources.0.path", "*.jsonl", "--model.mask_token", "[MASK]", "--model.tokenizer=task:"]
    given += ["--data.sources.0.text_field", "a: b: c", "--growth.b_max", "["]
    assert train.parse_overrides(given) == {
        "data.sources.0.path": "*.jsonl",
        "model.mask_token": "[MASK]",
        "model.tokenizer": "task:",
        "data.sources.0.text_field": "a: b: c",
        "growth.b_max": "[",
    }
    given = [
        "--model.mask_token",
        "7",
        "--model.override.rope_theta",
        "1e6",
        "--output",
        "2024",
        "--model.tokenizer",
        "null",
    ]
    assert train.parse_overrides(given) == {
        "model.mask_token": 7,
        "model.override.rope_theta": 1e6,
        "output": "2024",
        "model.tokenizer": None,
    }


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("data.sources.0.split", "2024", "2024"),
        ("data.sources.0.path", "x #y", "x #y"),
        ("data.sources.0.path", "'a b'", "a b"),
        ("model.gguf_file", "1:2", "1:2"),
        ("machine.gpu", "4090", "4090"),
        ("model.mask_token", "010", "010"),
        ("lora.target_modules", "no", "no"),
        ("lora.target_modules", "[a, b]", ["a", "b"]),
        ("model.scratch.tie_word_embeddings", "no", False),
        ("optimizer.lr", "1:30", "1:30"),
        ("stages.0.data.sources.0.path", "2024", "2024"),
        ("stages.0.name", "no", "no"),
        ("stages.0.training.steps", "7", 7),
    ],
)
def test_the_type_of_a_key_says_how_its_value_is_read(key, text, value):
    assert train.read_value(key, text) == value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threshold", "x"], "threshold=x is not a number"),
        (["--examples", "0"], "examples=0 must be at least 1"),
        (["--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["--output", "no/such/folder/x.json"], "does not exist"),
        (["--mode", "foo"], "unknown mode"),
        (["--block-sizes", "4"], "--block-sizes is an option of --likelihood; for a task give --block-size"),
        (["--row-length", "9"], "--row-length is an option of --likelihood; leave it out"),
        (["--likelihood", "a.txt", "--block-size", "4"], "--block-size is an option of a task; give --block-sizes"),
        (["--likelihood", "a.txt", "--mode", "ar"], "--mode is an option of a task; leave it out"),
        (["--likelihood", "/no/such.txt"], "data source /no/such.txt does not exist"),
        (["--mode", "ar", "--threshold", "0.5"], "--threshold: only diffusion mode reads it; leave it out"),
        (["--mode", "ar", "--block-size", "4"], "--block-size: ar mode has no blocks; leave it out"),
        (["--top-p", "0.5"], "--top-p cuts what is sampled, and answers are greedy; give --temperature as well"),
        (["--first", "-1"], "first=-1 must be at least 0"),
    ],
)
def test_evaluate_refuses_bad_options_in_one_line(run, tmp_path, arguments, words):
    refused(run, ["evaluate", "tiny-bd", *arguments], words, tmp_path / "out")


def test_evaluate_takes_what_is_left_of_a_task_behind_the_first(run, monkeypatch, tmp_path):
    task = replace(get_task("algebra"), count=32)
    monkeypatch.setattr("nextblock.tasks.get_task", lambda name: task)
    status, _, _ = run("evaluate", "tiny-bd", "--mode", "ar", "--first", "30", "--output", tmp_path / "scores.json")
    assert status == 0
    (row,) = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert row["examples"] == 2


def test_the_demo_refuses_a_number_of_examples_before_it_trains(run, tmp_path):
    refused(run, ["demo", "--examples", "0", "--output", tmp_path / "out"], "examples=0", tmp_path / "out")


def without_a_weight(folder, target, rename=False):
    """A copy of a model folder that lacks a weight, or whose weights all have other names."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    kept = {f"x.{k}" if rename else k: v for k, v in weights.items() if rename or k != name}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("rename", [False, True])
def test_weights_that_are_missing_are_not_made_up(run, parent, texts, tmp_path, rename):
    broken = without_a_weight(parent, tmp_path / "broken", rename)
    refused(run, ["adapt", *small(broken, texts, tmp_path / "out")], "lack .* of the weights", tmp_path / "out")
    refused(run, ["generate", broken, "words", "--mode", "ar"], "lack .* of the weights", tmp_path / "out")


def test_a_saved_mask_id_outside_the_vocabulary_is_refused(run, adapted, texts, tmp_path):
    wild = tmp_path / "wild"
    shutil.copytree(adapted, wild)
    config = json.loads((wild / "config.json").read_text())
    config["block_diffusion"]["mask_token_id"] = 9999
    (wild / "config.json").write_text(json.dumps(config))
    words = "mask_token_id of the checkpoint=9999 is outside the vocabulary"
    refused(run, ["generate", wild, "words"], words, tmp_path / "out")
    refused(run, ["verify", wild], words, tmp_path / "out")
    refused(run, ["adapt", *small(wild, texts, tmp_path / "out")], words, tmp_path / "out")


def test_a_mask_id_that_is_met_late_in_the_data_ends_in_one_line_and_keeps_the_steps_before(run, parent, tmp_path):
    path = tmp_path / "late.jsonl"
    path.write_text('{"text": "abc abc abc"}\n' * 200 + '{"text": "abc w abc"}\n')
    options = ["--model.mask_token", byte_tokenizer().convert_tokens_to_ids("w"), "--training.steps", "200"]
    options += ["--training.checkpoint_every", "500", "--data.held_out", "0"]
    status, _, err = run("adapt", *small(parent, path, tmp_path / "out"), *options)
    assert status == 2
    assert "is used in the data" in err.splitlines()[-1]
    (kept,) = (tmp_path / "out" / "checkpoints").iterdir()
    assert kept.name in err.splitlines()[-1]


def test_a_chat_shows_and_remembers_what_generate_answers(run, tmp_path, monkeypatch):
    """Also in diffusion mode, where tokens behind an end token may be decided before it."""
    folder = tmp_path / "wild"
    model = tiny_model("llama", vocab_size=264)
    settings = BlockDiffusionSettings(block_size=8, mask_token_id=263)
    lm = nb.BlockDiffusionLM(model, byte_tokenizer(), settings)
    tokens = lm.generate([{"role": "user", "content": "hi"}], threshold=0.01, max_new_tokens=8).answers[0]
    model.generation_config.eos_token_id = tokens[3]
    export(folder, model, byte_tokenizer(), settings.model_copy(update={"decoding": {"threshold": 0.01}}))
    wanted = nb.load(folder).generate([{"role": "user", "content": "hi"}], max_new_tokens=8).texts[0]
    answers = iter(["hi", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    assert run("chat", folder, "--max-new-tokens", "8")[1] == f"model: {wanted}\n"


def test_settings_can_be_given_to_a_folder_that_has_none(run, parent, pangu, tmp_path):
    given = "{mask_token_id: 263, block_size: 4}"
    options = ["generate", parent, "a", "--max-new-tokens", "4", "--mode", "speculative"]
    assert "works in ar mode only" in run(*options)[2]
    wanted = run(*options[:-1], "ar")[1]
    assert run(*options, "--settings", given)[:2] == (0, wanted)
    status, out, _ = run("verify", pangu[0], "--settings", given)
    assert (status, "failed" in out) == (0, False)
    refused(run, ["generate", pangu[0], "a", "--settings", given], "is code in its folder", tmp_path / "out")
    refused(run, ["tune", parent, "--write", "--settings", given], "put the block_diffusion section", tmp_path / "out")


def test_documents_that_were_cut_at_the_end_of_a_row_are_told(run, parent, tmp_path):
    rows = [{"prompt": "words " * 3, "completion": "more " * size} for size in (1, 100)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 40))
    options = ["--data.row_length", "64", "--training.steps", "80", "--data.held_out", "0"]
    status, out, _ = run("adapt", *small(parent, tmp_path / "long.jsonl", tmp_path / "out"), *options)
    assert status == 0
    told = next(line for line in out.splitlines() if line.startswith("data "))
    assert int(told.split()[1]) > 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["training"]["truncated"] == int(told.split()[1])


def test_a_turn_that_is_refused_leaves_the_talk_to_be_saved(run, adapted, tmp_path, monkeypatch):
    file = tmp_path / "talk.jsonl"
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = iter(["hi", "long " * 200, "/save ~/talk.jsonl", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    status, out, _ = run("chat", adapted, "--mode", "ar", "--max-new-tokens", "6")
    assert status == 0
    assert "but the model's context is 512" in out.splitlines()[-2]
    assert out.splitlines()[-1] == f"wrote 2 messages to {file}"
    assert file.is_file()


def test_a_chat_asks_for_a_template_before_anything_is_typed(run, tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    export(tmp_path / "bare", tiny_model("llama", vocab_size=264), tokenizer, None)
    refused(
        run,
        ["chat", tmp_path / "bare"],
        "has no chat template, so it cannot chat; put a chat_template",
        tmp_path / "x",
    )


def test_a_chat_obeys_commands_and_an_interrupt_ends_an_answer_alone(run, adapted, tmp_path, monkeypatch):
    lm, file = nb.load(adapted), tmp_path / "talk.jsonl"
    said = lm.generate([{"role": "user", "content": "hi"}], mode="ar", max_new_tokens=6).texts[0]
    lines = iter(["/mode ar", "hi", f"/save {file}", "/mode dream", "/nothing", f"/save {tmp_path}/no/talk", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    status, out, _ = run("chat", adapted, "--max-new-tokens", "6")
    assert status == 0
    shown = out.splitlines()
    assert shown[0] == "mode: ar"
    assert out.startswith(f"mode: ar\nmodel: {said}\nwrote 2 messages to {file}\n")
    assert "unknown mode" in shown[-3]
    assert "/nothing" in shown[-2]
    assert "cannot be written" in shown[-1]
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": said}]
    assert json.loads(file.read_text(encoding="utf-8")) == {"messages": talk}

    def pieces(self, messages, **options):
        asked.append([dict(message) for message in messages])
        yield 0, "so far"
        raise KeyboardInterrupt

    asked: list[list[dict[str, str]]] = []
    monkeypatch.setattr(nb.BlockDiffusionLM, "stream_text", pieces)
    lines = iter(["one", "two", ""])
    status, out, _ = run("chat", adapted)
    assert (status, out) == (0, "model: so far [stopped]\n" * 2)
    assert asked[1] == [*asked[0], {"role": "assistant", "content": "so far"}, {"role": "user", "content": "two"}]


@pytest.mark.parametrize(("count", "lines"), [(None, 1), ("1", 1), ("2", 0)])
def test_a_rank_is_silent_only_beside_others(run, monkeypatch, count, lines):
    monkeypatch.setenv("RANK", "1")
    if count is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", count)
    status, _, err = run("adapt", "nosuch")
    assert (status, err.count("\n")) == (2, lines)
