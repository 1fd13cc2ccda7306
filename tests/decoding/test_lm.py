"""The public calls: prompts in every form, ends, events, counts, and bad input in one line."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import nextblock as nb
from families import EOS_ID, MASK_ID, longrope_model, nested_model, tiny_model
from nextblock.config.errors import UsageError
from nextblock.config.sections import BlockDiffusionSettings
from nextblock.decoding.events import BlockFinished, Committed, Prefilled, Rejected, RowFinished
from nextblock.decoding.lm import BlockDiffusionLM, load
from nextblock.decoding.request import make_request
from nextblock.model.parent import byte_tokenizer
from nextblock.model.probe import why_no_blocks
from nextblock.training.export import export
from samples import byte_level, sentencepiece

MODES = ["ar", "diffusion", "speculative"]
TOKENIZER = byte_level()
BYTES = len(TOKENIZER)  # 256 tokens, then the end token, then the mask token


@pytest.fixture
def lm():
    """A random model over bytes, which writes something like text."""
    model = tiny_model("llama", vocab_size=BYTES + 2, eos_token_id=BYTES, max_position_embeddings=256)
    TOKENIZER.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    return BlockDiffusionLM(model, TOKENIZER, BlockDiffusionSettings(block_size=8, mask_token_id=BYTES + 1))


def ids_only(**settings):
    return BlockDiffusionLM(
        tiny_model("llama"), None, BlockDiffusionSettings(block_size=8, mask_token_id=MASK_ID, **settings)
    )


# ------------------------------------------------------------------------------------------- prompts


def test_texts_lists_chats_and_token_ids_are_the_same_prompts(lm):
    messages = [{"role": "user", "content": "hi"}]
    text = "[user]hi[assistant]"
    ids = torch.tensor([TOKENIZER(text)["input_ids"]])
    answers = [lm.generate(p, max_new_tokens=12).answers for p in (text, [text], messages, [messages], ids, ids[0])]
    assert all(a == answers[0] for a in answers)
    assert lm.generate([messages, messages], max_new_tokens=12).answers == answers[0] * 2


def random_prompts(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (1, n), generator=generator) for n in lengths]


def together(prompts: list[torch.Tensor]) -> dict[str, Any]:
    """Prompts of unequal length as one padded batch."""
    width = max(prompt.shape[1] for prompt in prompts)
    padded = [torch.nn.functional.pad(prompt[0], (0, width - prompt.shape[1])) for prompt in prompts]
    real = [torch.arange(width) < prompt.shape[1] for prompt in prompts]
    return {"prompts": torch.stack(padded), "attention_mask": torch.stack(real)}


def plain_greedy(model: Any, prompt: torch.Tensor, count: int) -> list[int]:
    """The tokens of transformers' own `generate`; the mask token is no answer."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": [MASK_ID]}
    out = model.generate(prompt, max_new_tokens=count, **options)
    return out[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_a_window_in_a_nested_text_config_is_kept_in_decoding(mode):
    model = nested_model(9)
    lm = BlockDiffusionLM(model, None, BlockDiffusionSettings(block_size=8, mask_token_id=MASK_ID))
    (prompt,) = random_prompts(30)
    out = lm.generate(prompt, mode=mode, max_new_tokens=24, eos_token_id=[])
    assert out.answers == [plain_greedy(model, prompt, 24)]


@pytest.mark.parametrize("mode", MODES)
def test_longrope_prompts_on_one_side_of_the_change_decode_together_as_alone(mode):
    model = longrope_model(32)
    lm = BlockDiffusionLM(model, None, BlockDiffusionSettings(block_size=8, mask_token_id=MASK_ID))
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 40, "eos_token_id": []}
    for lengths, counts in (((10, 3), [22, 29]), ((60, 33), [40, 40])):  # the first two end where the factors change
        prompts = random_prompts(*lengths)
        alone = [lm.generate(prompt, **options).answers[0] for prompt in prompts]
        assert lm.generate(**together(prompts), **options).answers == alone
        assert [len(answer) for answer in alone] == counts
        if mode != "diffusion":
            assert alone == [plain_greedy(model, p, n) for p, n in zip(prompts, counts, strict=True)]


def test_longrope_prompts_on_both_sides_of_the_change_are_refused():
    lm = BlockDiffusionLM(longrope_model(32), None)
    with pytest.raises(UsageError, match=r"prompt 1 has 60 tokens and another at most 32, .* longrope factors change"):
        lm.generate(**together(random_prompts(10, 60)), mode="ar")


def test_a_model_with_weights_that_are_no_numbers_is_not_loaded(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[:] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"weight lm_head.weight holds NaN"):
        load(tmp_path)


def test_what_a_tokenizer_returns_is_taken_as_token_ids_and_one_message_as_a_chat(lm):
    TOKENIZER.pad_token = TOKENIZER.convert_ids_to_tokens(0)
    texts: Any = ["hello", "yo"]
    options: Any = {"mode": "ar", "max_new_tokens": 6}
    expected = lm.generate(texts, **options).answers
    for side in ("left", "right"):
        encoded = TOKENIZER(texts, return_tensors="pt", padding=True, padding_side=side)
        assert lm.generate(encoded, **options).answers == expected
    assert lm.generate(TOKENIZER(texts), **options).answers == expected  # lists of unequal length
    assert lm.generate(TOKENIZER(texts[0]), **options).answers == expected[:1]
    assert lm.generate({"input_ids": TOKENIZER(texts[0])["input_ids"]}, **options).answers == expected[:1]
    message = {"role": "user", "content": "hi"}
    assert lm.generate(message, **options).answers == lm.generate([message], **options).answers


@pytest.mark.parametrize("prompts", [5, None, Path("prompt.txt"), torch.ones(1, 3, dtype=torch.bool)])
def test_what_is_no_prompt_is_named(lm, prompts):
    with pytest.raises(UsageError, match="prompts is"):
        lm.generate(prompts)


def test_numbers_of_numpy_are_numbers(lm):
    free = lm.generate("one two", mode="ar", max_new_tokens=9, eos_token_id=[]).answers[0]
    plain: dict[str, Any] = {"eos_token_id": free[4], "max_new_tokens": 6, "seed": 3, "temperature": 0.5, "top_k": 9}
    given = {name: np.asarray(value)[()] for name, value in plain.items()}
    for more in ({}, {"mode": "speculative", "draft_length": np.int64(2)}):
        assert lm.generate("one two", **given, **more).answers == lm.generate("one two", **plain, **more).answers
    several = lm.generate(["a", "b"], mode="ar", max_new_tokens=np.array([2, 3]), eos_token_id=np.array([[], []]))
    assert [len(answer) for answer in several.answers] == [2, 3]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side):
    lm = ids_only()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (3, 6)]
    tokens = [([0] * 3 + prompts[0]) if side == "left" else (prompts[0] + [0] * 3), prompts[1]]
    mask = torch.tensor([[0, 0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0, 0], [1] * 6])
    out = lm.generate(torch.tensor(tokens), attention_mask=mask, max_new_tokens=6, mode="ar", eos_token_id=[])
    assert out.answers == [
        lm.generate(torch.tensor([p]), max_new_tokens=6, mode="ar", eos_token_id=[]).answers[0] for p in prompts
    ]
    front = tokens[0] if side == "left" else prompts[0]
    assert out.sequences[0].tolist()[: len(front) + 6] == front + out.answers[0]
    assert out.sequences[1].tolist() == tokens[1] + out.answers[1]


def test_a_text_is_what_its_tokens_add_to_the_text_of_the_prompt():
    """Of a tokenizer whose decoder takes the first space of a text away, too."""
    tokenizer: Any = sentencepiece("prepend")
    lm = BlockDiffusionLM(tiny_model("llama", vocab_size=len(tokenizer)), tokenizer)
    with torch.no_grad():
        lm.model.lm_head.weight[:259] = 0  # bytes may be no characters
    prompts = ["The", "What is 5?", "Paris "]
    for prompt in prompts:
        out = lm.generate(prompt, mode="ar", max_new_tokens=8, eos_token_id=[])
        ids = tokenizer(prompt)["input_ids"]
        before, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids + out.answers[0]))
        assert whole == before + out.texts[0]
        assert (
            "".join(piece for _, piece in lm.stream_text(prompt, mode="ar", max_new_tokens=8, eos_token_id=[]))
            == (out.texts[0])
        )


# ---------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("options", [{"stop": [["zzz"], "e 5"]}, {"eos_token_id": [[1], 2]}, {"stop": ["a", ["b"]]}])
def test_a_bare_item_among_lists_of_each_row_is_refused(lm, options):
    with pytest.raises(UsageError, match="beside a list; give a list for each prompt, or one for all"):
        lm.generate(["one", "two"], mode="ar", **options)


@pytest.mark.parametrize("mode", MODES)
def test_each_row_ends_at_its_own_end_tokens_limit_and_stop_strings(lm, mode):
    prompts = ["one", "another one", "x", "four"]
    free = lm.generate(prompts, mode=mode, max_new_tokens=40, eos_token_id=[])
    assert free.finish == ["length"] * 4
    end, stop = free.answers[0][9], free.texts[1][5:7]
    out = lm.generate(
        prompts,
        mode=mode,
        max_new_tokens=[40, 40, 1, 30],
        eos_token_id=[[end], [], [], [end, EOS_ID]],
        stop=[[], [stop], [], []],
    )
    assert out.finish[:3] == ["end_token", "stop_string", "length"]
    first = free.answers[0].index(end)
    assert out.answers[0] == free.answers[0][: first + 1]
    assert out.texts[1] == free.texts[1][: free.texts[1].index(stop)]
    assert free.answers[1][: len(out.answers[1])] == out.answers[1]
    assert out.answers[2] == free.answers[2][:1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", [1, 7, 8, 9, 16, 17])
def test_a_longer_limit_only_adds_to_the_answer(mode, limit):
    lm = ids_only()
    ids = torch.tensor([[5, 6, 7]])
    full = lm.generate(ids, mode=mode, max_new_tokens=32, eos_token_id=[], threshold=0.3)
    out = lm.generate(ids, mode=mode, max_new_tokens=limit, eos_token_id=[], threshold=0.3)
    assert out.answers[0] == full.answers[0][:limit]
    assert out.stats.new_tokens == limit


@pytest.mark.parametrize("mode", MODES)
def test_seeds_make_sampling_repeatable_and_rows_differ(mode):
    lm, ids = ids_only(), torch.tensor([[5, 6, 7]] * 3)
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 16, "temperature": 1.0}
    first = lm.generate(ids, seed=1, **options)
    assert first.answers == lm.generate(ids, seed=[1, 2, 3], **options).answers
    assert len({tuple(a) for a in first.answers}) == 3
    torch.manual_seed(4)
    unseeded = lm.generate(ids, **options)
    assert lm.generate(ids, **options).answers != unseeded.answers
    torch.manual_seed(4)
    assert lm.generate(ids, **options).answers == unseeded.answers


def test_greedy_decoding_leaves_the_global_random_state():
    before = torch.random.get_rng_state()
    ids_only().generate(torch.tensor([[5]]), max_new_tokens=4)
    assert torch.equal(before, torch.random.get_rng_state())


# -------------------------------------------------------------------------------- events and counts


@pytest.mark.parametrize("mode", MODES)
def test_events_tell_the_answers(mode):
    lm = ids_only()
    ids = torch.tensor([[5, 6, 7], [9, 8, 4], [4, 3, 50]])
    stream = lm.stream(ids, mode=mode, max_new_tokens=20, threshold=0.3)
    events = list(stream)
    for row in stream.rows:
        mine = [e for e in events if e.row == row.number]
        assert mine[0] == Prefilled(row.number, 3)
        finished = [e for e in mine if isinstance(e, RowFinished)]
        assert finished == [RowFinished(row.number, len(row.answer), row.finish)]  # type: ignore[arg-type]
        committed = {e.offset: e for e in mine if isinstance(e, Committed)}
        assert len(committed) == sum(isinstance(e, Committed) for e in mine)  # once each
        assert [committed[i].token for i in range(len(row.answer))] == row.answer
        assert all(0 < e.confidence <= 1 + 1e-6 for e in committed.values())
        assert max(e.step for e in committed.values()) <= row.passes
        assert max(committed) < 20
        ends = [e.end for e in mine if isinstance(e, BlockFinished)]
        if mode != "ar":
            assert ends == sorted(ends)
            assert ends[-1] == len(row.answer)
        if mode == "speculative":
            rejected = [e for e in mine if isinstance(e, Rejected)]
            assert rejected
    assert stream.stats.new_tokens == sum(len(row.answer) for row in stream.rows)


def test_a_stream_that_is_open_when_python_ends_says_nothing():
    code = "import nextblock as nb; s = nb.load('tiny-bd').stream('Q', max_new_tokens=9, mode='ar'); next(s)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == ""
    assert "Error" not in ended.stderr


@pytest.mark.parametrize("mode", MODES)
def test_every_forward_of_the_model_is_counted(mode):
    lm = ids_only()
    calls = []
    lm.model.base_model.register_forward_hook(lambda *_: calls.append(1))
    out = lm.generate(torch.tensor([[5, 6, 7], [9, 8, 4]]), mode=mode, max_new_tokens=20, eos_token_id=[])
    assert out.stats.forwards == len(calls)
    assert out.stats.tokens_per_forward == 40 / sum(out.stats.row_forwards.values())
    assert 0 < out.stats.first_token_seconds < out.stats.seconds


def test_diffusion_counts_one_prefill_its_denoising_passes_and_one_commit_per_block():
    out = ids_only().generate(torch.tensor([[5]]), max_new_tokens=24, threshold=None, eos_token_id=[])
    # three blocks of eight, seven masked tokens each; the last one is never read again
    assert out.stats.row_forwards == {"prefill": 1, "denoise": 21, "commit": 2}


@pytest.mark.parametrize("mode", MODES)
def test_streamed_text_is_the_text(lm, mode):
    prompts = ["one", "another one", "x"]
    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 40, "threshold": 0.3}
    whole = lm.generate(prompts, **options).texts
    stop = whole[1][3:5]
    expected = lm.generate(prompts, stop=stop, **options).texts
    pieces = ["", "", ""]
    for row, piece in lm.stream_text(prompts, stop=stop, **options):
        pieces[row] += piece
    assert pieces == expected
    assert stop not in expected[1]


def test_an_open_stream_leaves_gradients_and_training_alone(lm):
    stream = lm.stream("one", max_new_tokens=20)
    next(stream)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert lm.model(torch.tensor([[5]])).logits.requires_grad


# ---------------------------------------------------------------------------------- checkpoints


def test_a_saved_checkpoint_loads_with_its_settings_and_default_options(lm, tmp_path):
    section = {"block_size": 4, "mask_token_id": BYTES + 1, "decoding": {"mode": "speculative", "max_new_tokens": 9}}
    lm.model.config.block_diffusion = section
    lm.model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.settings == BlockDiffusionSettings(**section)  # type: ignore[arg-type]
    out = loaded.generate("hello", eos_token_id=[])
    assert len(out.answers[0]) == 9
    assert "check" in out.stats.row_forwards
    assert out.answers == lm.generate("hello", mode="ar", max_new_tokens=9, eos_token_id=[]).answers


def test_a_folder_without_a_tokenizer_takes_token_ids(lm, tmp_path):
    lm.model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.generate(torch.tensor([[5, 6]]), mode="ar", max_new_tokens=3).texts == []
    with pytest.raises(UsageError, match="no tokenizer; give token ids"):
        loaded.generate("hello", mode="ar")


def test_a_folder_without_settings_takes_them_from_the_caller(lm, tmp_path):
    lm.model.save_pretrained(tmp_path)
    prompt = torch.tensor([[5, 6]])
    given: Any = load(tmp_path, settings={"block_size": 8, "mask_token_id": BYTES + 1})
    for mode in MODES:
        options: Any = {"mode": mode, "max_new_tokens": 9}
        assert given.generate(prompt, **options).answers == lm.generate(prompt, **options).answers
    inside: Any = {"custom_generate": nb.block_diffusion, "mode": "diffusion", "max_new_tokens": 9}
    wanted = lm.generate(prompt, mode="diffusion", max_new_tokens=9).sequences
    assert torch.equal(given.model.generate(prompt, **inside), wanted)
    with pytest.raises(UsageError, match=r"settings.mask_token_id=45830 is outside the vocabulary"):
        load(tmp_path, settings="nbdiff-7b")
    with pytest.raises(UsageError, match="settings and a draft adapter do not go together"):
        load(tmp_path, settings="nbdiff-7b", draft_adapter="tiny-draft")


def test_a_tokenizer_that_reads_another_mask_token_than_the_settings_is_told(tmp_path):
    model, tokenizer = tiny_model("llama", vocab_size=260), byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    export(tmp_path, model, tokenizer, BlockDiffusionSettings(mask_token_id=257))
    with warnings.catch_warnings(action="error"):
        load(tmp_path)
    export(tmp_path, model, tokenizer, BlockDiffusionSettings(mask_token_id=7))
    with pytest.warns(UserWarning, match="reads its mask token as id 257, the model was trained with 7"):
        load(tmp_path)


def test_text_for_a_tokenizer_that_is_code_is_refused_in_one_line(pangu):
    folder, _ = pangu
    lm = load(folder, settings={"block_size": 4, "mask_token_id": 299})
    assert lm.generate(torch.tensor([[5, 6]]), max_new_tokens=3).texts == []
    with pytest.raises(UsageError, match=r"tokenizer of .*pangu is code in its folder.*; give token ids"):
        lm.generate("hello")


def test_a_checkpoint_without_settings_works_in_ar_mode_only(llama):
    plain = BlockDiffusionLM(llama, None, None)
    assert plain.generate(torch.tensor([[5, 6]]), mode="ar", max_new_tokens=3).stats.forwards == 3
    for options in ({"mode": "diffusion"}, {"mode": "speculative"}, {}):
        with pytest.raises(UsageError, match=r"works in ar mode only.*nextblock adapt"):
            plain.generate(torch.tensor([[5, 6]]), **options)  # type: ignore[arg-type]


def test_a_block_above_the_trained_size_works_with_a_warning():
    lm = ids_only()
    with pytest.warns(UserWarning, match="block_size=16 is larger than the 8"):
        out = lm.generate(torch.tensor([[5, 6]]), block_size=16, max_new_tokens=20, eos_token_id=[])
    assert len(out.answers[0]) == 20


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("hi", {"mode": "speculativ"}, "did you mean 'speculative'"),
        ("hi", {"sampler": "margn"}, "did you mean 'margin'"),
        ("hi", {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        (["hi", "ho"], {"max_new_tokens": [3, -1]}, "max_new_tokens=-1 must be at least 1"),
        (["hi", "ho"], {"max_new_tokens": [3]}, "max_new_tokens has 1 values for 2 prompts"),
        ("hi", {"sub_blocks": 3}, "sub_blocks=3 does not divide the block of 8"),
        ("hi", {"threshold": 1.1}, r"threshold=1.1 must lie in \(0, 1\]"),
        ("hi", {"thresold": 0.5}, "unknown key 'thresold'; did you mean 'threshold'"),
        ([], {}, "prompts is empty"),
        (["hi", ""], {}, "prompt 1 is empty"),
        ("x" * 256, {}, "prompt 0 has 256 tokens, but the model's context is 256"),
        (torch.tensor([[1, BYTES + 2]]), {}, "prompt 0 has token ids outside the vocabulary"),
        (torch.tensor([[0.5]]), {}, "give int64"),
        (torch.tensor([[1, 2]]), {"attention_mask": torch.tensor([[0, 0]])}, "prompt 0 is empty"),
        (torch.tensor([[1, 2, 3]]), {"attention_mask": torch.tensor([[1, 0, 1]])}, "has holes"),
        (torch.tensor([[1, 2]]), {"attention_mask": torch.tensor([[1]])}, "they must be equal"),
        ("hi", {"stop": [""]}, "empty string"),
        ("hi", {"seed": [1, 2], "temperature": 1.0}, "seed has 2 values for 1 prompts"),
        ("hi", {"seed": 2**64}, r"seed=18446744073709551616 must be a whole number from -2\*\*63"),
        ("hi", {"seed": "x", "temperature": 1.0}, "seed='x' must be a whole number"),
        ("hi", {"seed": [1, None]}, "seed=None must be a whole number"),
        ("hi", {"stop": ["a", 5]}, "stop holds 5; give strings"),
        (["hi", "ho"], {"stop": [["a"], 5]}, "stop holds 5; give strings"),
        ("hi", {"max_new_tokens": ["x"]}, "max_new_tokens=x is not a whole number"),
        ("hi", {"eos_token_id": "x"}, "eos_token_id holds 'x'; give whole numbers"),
        ("hi", {"block_size": 10**6}, "block_size=1000000 is larger than the model's context of 256"),
        (torch.tensor([[1, 2]]), {"attention_mask": [[1], [1, 1]]}, "they must be equal"),
        ({"input_ids": [[1, 2]], "attention_mask": 1}, {}, "attention_mask holds something else than whole numbers"),
        ({"input_ids": "ab"}, {}, "input_ids holds something else than whole numbers"),
        ({"input": [1]}, {}, "neither a text nor a list of chat messages"),
        ([["hi"]], {}, "neither a text nor a list of chat messages"),
    ],
)
def test_bad_input_ends_in_one_line(lm, prompts, options, message):
    for call in (lm.generate, lm.stream, lm.stream_text):  # all before the first event
        with pytest.raises(UsageError, match=message) as error:
            call(prompts, **options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options", [{"mode": "ar"}, {"mode": "speculative"}, {"mode": "speculative", "temperature": 1.0}]
)
def test_the_confidence_of_tokens_is_worked_out_only_for_those_who_read_events(monkeypatch, options):
    lm, tokens = ids_only(), torch.tensor([[5, 6, 7], [9, 8, 4]])
    told = [event for event in lm.stream(tokens, max_new_tokens=9, **options) if isinstance(event, Committed)]
    assert all(0 < event.confidence <= 1 + 1e-6 for event in told)
    if not options.get("temperature"):
        monkeypatch.setattr("nextblock.decoding.head.probability_of", lambda *_: pytest.fail("nobody reads it"))
        assert lm.generate(tokens, max_new_tokens=9, **options).stats.new_tokens == len(told)


@pytest.mark.parametrize(
    "options", [{"mode": "ar"}, {"mode": "speculative"}, {"mode": "speculative", "draft_paths": 3}]
)
def test_a_row_that_goes_along_costs_no_further_call_of_a_processor(options):
    lm, counts = ids_only(), []
    for rows in (1, 3):
        calls: list[int] = []

        def count(prefixes: torch.Tensor, logits: torch.Tensor, calls: list[int] = calls) -> torch.Tensor:
            calls.append(len(prefixes))
            return logits

        asked = {"max_new_tokens": 12, "eos_token_id": [], **options}
        request = make_request(lm.decoder, None, lm.settings, torch.tensor([[5, 6, 7]] * rows), asked)
        with lm.run(request, 0.0, count) as stream:
            assert list(stream)
        assert set(calls) == {rows}
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_the_clock_is_read_once_a_pass_and_not_for_each_event(monkeypatch):
    reads = []
    clock = SimpleNamespace(perf_counter=lambda: float(len(reads.append(1) or reads)))
    for module in ("lm", "engine"):
        monkeypatch.setattr(f"nextblock.decoding.{module}.time", clock)
    out = ids_only().generate(torch.tensor([[5, 6, 7]] * 4), mode="ar", max_new_tokens=10, eos_token_id=[])
    assert out.stats.new_tokens == 40
    assert len(reads) == out.stats.forwards + 2  # the beginning and the end


def test_streams_in_turns_leave_a_models_own_attention_alone():
    """FlexAttention takes no dense masks: each pass runs SDPA, whoever else decodes the model meanwhile."""
    lm = ids_only()
    prompts = [torch.tensor([[5, 6, 7]]), torch.tensor([[9, 8, 4, 3, 50]])]
    options: dict[str, Any] = {"mode": "speculative", "eos_token_id": []}
    limits = [8, 20]  # the first to end must not set attention back under the other
    expected = [lm.generate(p, max_new_tokens=n, **options).answers[0] for p, n in zip(prompts, limits, strict=True)]
    lm.model.set_attn_implementation("flex_attention")
    streams = [lm.stream(p, max_new_tokens=n, **options) for p, n in zip(prompts, limits, strict=True)]
    for _ in range(400):
        for stream in streams:
            next(stream, None)
            assert lm.model.config._attn_implementation == "flex_attention"
    assert [stream.rows[0].answer for stream in streams] == expected


def test_flex_attention_is_not_a_decoding_backend(tmp_path):
    with pytest.raises(UsageError, match="attention='flex_attention' cannot decode"):
        load(tmp_path, attention="flex_attention")


def test_an_end_token_that_completes_a_stop_string_is_cut_off_with_it(lm):
    """In `texts` as in `stream_text`."""
    text = lm.generate("one two", mode="ar", max_new_tokens=12, eos_token_id=[]).answers[0]
    last = text[3]
    letter = str(TOKENIZER.decode([last]))
    for mode in MODES:
        options = {"mode": mode, "max_new_tokens": 12, "eos_token_id": [last], "stop": [letter]}
        streamed = "".join(piece for _, piece in lm.stream_text("one two", **options))
        assert lm.generate("one two", **options).texts == [streamed]


def test_an_answer_ends_at_a_special_token_that_is_a_stop_string_and_does_not_show_it(lm):
    free = lm.generate("one two", mode="ar", max_new_tokens=12, eos_token_id=[]).answers[0]
    tokenizer, place = byte_level(), next(n for n in range(1, 10) if free[n] not in free[:n])
    turn = str(tokenizer.convert_ids_to_tokens(free[place]))
    tokenizer.add_special_tokens({"additional_special_tokens": [turn]})
    ids = torch.tensor([tokenizer("one two")["input_ids"]])
    rules: Any = {"max_new_tokens": 12, "eos_token_id": None, "suppress_tokens": [BYTES + 1], "do_sample": False}
    plain = lm.model.generate(ids, **rules, stop_strings=[turn], tokenizer=tokenizer)
    lm = BlockDiffusionLM(lm.model, tokenizer, lm.settings)
    for mode in ("ar", "speculative"):
        out = lm.generate("one two", mode=mode, max_new_tokens=12, eos_token_id=[], stop=turn)
        assert out.finish == ["stop_string"]
        assert out.sequences.tolist() == plain.tolist()
        assert out.texts == [tokenizer.decode(free[:place])]


def test_masks_are_taken_as_lists_and_for_one_row_and_refused_for_texts(lm):
    ids = torch.tensor([0, 0, 65, 66, 67])
    expected = lm.generate(ids[2:], mode="ar", max_new_tokens=4).answers
    for mask in ([0, 0, 1, 1, 1], torch.tensor([0, 0, 1, 1, 1]), torch.tensor([[0, 0, 1, 1, 1]])):
        assert lm.generate(ids, attention_mask=mask, mode="ar", max_new_tokens=4).answers == expected
    with pytest.raises(UsageError, match="goes with token ids"):
        lm.generate("words", attention_mask=torch.ones(1, 5), mode="ar")


def test_an_option_of_the_call_puts_aside_those_of_the_checkpoint_that_must_fit_it():
    stored = {"mode": "speculative", "draft_ahead": 2}
    lm = ids_only(decoding=stored)
    prompt = torch.tensor([[5, 6, 7]])
    expected = lm.generate(prompt, max_new_tokens=8, draft_ahead=0).answers
    assert lm.generate(prompt, max_new_tokens=8, draft_paths=2).answers == expected
    lm = ids_only(decoding={"mode": "diffusion", "sub_blocks": 2, "steps": 4})
    assert lm.generate(prompt, max_new_tokens=5, block_size=5).answers


@pytest.mark.parametrize("steps", [1, 3])
def test_a_number_of_draft_steps_that_an_older_version_stored_is_passed_over(steps):
    lm, prompt = ids_only(decoding={"mode": "speculative", "draft_steps": steps}), torch.tensor([[5, 6, 7]])
    assert lm.generate(prompt, max_new_tokens=8).answers == lm.generate(prompt, mode="ar", max_new_tokens=8).answers


def test_a_model_that_ignores_positions_decodes_one_prompt_in_ar_mode_and_no_batch():
    lm = BlockDiffusionLM(tiny_model("llama"), None, None)
    blind = lm.model.model.forward
    lm.model.model.forward = lambda *args, position_ids=None, **rest: blind(*args, **rest)  # type: ignore[method-assign]
    lm.refusal = why_no_blocks(lm.model)
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert lm.generate(tokens, mode="ar", max_new_tokens=2).answers
    with pytest.raises(UsageError, match="ignores the attention mask or the position"):
        lm.generate(tokens.expand(2, -1), mode="ar", max_new_tokens=2)
