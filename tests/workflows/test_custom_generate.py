"""`model.generate(custom_generate=...)` behaves as users of transformers expect."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StopStringCriteria,
)
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from families import EOS_ID, MASK_ID, PAD_ID, tiny_model
from nextblock.config.errors import UsageError
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.model.loading import read_settings
from nextblock.training.export import CUSTOM_GENERATE_SOURCE
from nextblock.workflows.custom_generate import block_diffusion
from samples import byte_level

SECTION = {"block_size": 8, "mask_token_id": MASK_ID}


@pytest.fixture
def adapted():
    model = tiny_model("llama")
    model.config.block_diffusion = SECTION
    # transformers itself must not say the mask token either
    model.generation_config.suppress_tokens = [MASK_ID]
    return model


def left_padded(lengths=(4, 9)):
    longest = max(lengths)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((len(lengths), longest), PAD_ID)
    for row, length in zip(tokens, lengths, strict=True):
        row[longest - length :] = torch.randint(3, 96, (length,), generator=generator)
    return {"input_ids": tokens, "attention_mask": (tokens != PAD_ID).long()}


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


class NoRepeat(LogitsProcessor):
    """A stateless processor: no token of the prefix again."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids, -torch.inf)


class After(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([row.shape[0] >= self.length for row in input_ids])


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_left_padded_batches_give_what_plain_generate_gives(adapted, mode):
    inputs = left_padded()
    plain = adapted.generate(**inputs, max_new_tokens=20, do_sample=False)
    ours = adapted.generate(**inputs, max_new_tokens=20, do_sample=False, custom_generate=block_diffusion, mode=mode)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("how", [{"mode": "ar"}, {"mode": "speculative"}, {"mode": "speculative", "draft_paths": 3}])
def test_logits_processors_and_stopping_criteria_act_as_in_plain_generate(adapted, how):
    options = {
        "max_new_tokens": 20,
        "min_new_tokens": 12,
        "do_sample": False,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 1,
        "stopping_criteria": [After(22)],
    }
    inputs = left_padded()
    plain = adapted.generate(**inputs, **options)
    ours = adapted.generate(**inputs, **options, custom_generate=block_diffusion, **how)
    assert torch.equal(ours, plain)


STATELESS = [
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 2},
    {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 1},
    {"min_new_tokens": 15, "bad_words_ids": [[7], [8, 9]]},
    {"min_length": 25, "exponential_decay_length_penalty": (5, 1.5), "forced_eos_token_id": 5},
    {"suppress_tokens": [MASK_ID, 9, 10], "begin_suppress_tokens": [11], "sequence_bias": {(12,): 3.0, (13, 14): 2.0}},
    {"remove_invalid_values": True, "renormalize_logits": True},
]


@pytest.mark.parametrize("how", [{}, {"draft_ahead": 2}, {"draft_paths": 3}], ids=str)
@pytest.mark.parametrize("rule", STATELESS, ids=str)
def test_what_depends_on_prefix_and_scores_alone_acts_in_speculative_mode_as_in_plain_generate(adapted, rule, how):
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": PAD_ID, **rule}
    inputs = left_padded((4, 9, 6))
    plain = adapted.generate(**inputs, **options)
    options |= {"custom_generate": block_diffusion, "mode": "speculative"}
    assert torch.equal(adapted.generate(**inputs, **options, **how), plain)


class Counting(LogitsProcessor):
    """Each call forbids other tokens: it depends on how often it was called before."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores[:, self.calls % 3 :: 3] = -torch.inf
        return scores


STATEFUL = [
    lambda: {"guidance_scale": 1.5},
    lambda: {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[9, 8, 7], [6, 5, 4], [3, 9, 9]])},
    lambda: {"logits_processor": [Counting()]},
    lambda: {"prefix_allowed_tokens_fn": lambda row, ids: list(range(3 + row, 90, 1 + len(ids) % 3))},
]


@pytest.mark.parametrize("stateful", STATEFUL)
@pytest.mark.parametrize("lengths", [(9,), (4, 9, 6)])
def test_ar_mode_calls_any_processor_as_plain_generate_does_and_speculative_mode_refuses_it(
    adapted, stateful, lengths
):
    inputs = left_padded((4, 9, 6))
    if len(lengths) == 1:
        inputs = {name: part[1:2] for name, part in inputs.items()}

    def options():
        made = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": PAD_ID, "eos_token_id": ends, **stateful()}
        if "negative_prompt_ids" in made:
            made["negative_prompt_ids"] = made["negative_prompt_ids"][: len(lengths)]
        return made

    ends = None
    free = adapted.generate(**inputs, **options())
    ends = int(free[0, -12])  # so that rows end at different times
    plain = adapted.generate(**inputs, **options())
    assert torch.equal(adapted.generate(**inputs, **options(), custom_generate=block_diffusion, mode="ar"), plain)
    with pytest.raises(UsageError, match=r"logits processor \w+ may depend .* use mode='ar'"):
        adapted.generate(**inputs, **options(), custom_generate=block_diffusion, mode="speculative")


def test_a_processor_of_the_generation_config_is_refused_with_the_setting_that_makes_it(adapted):
    adapted.generation_config.repetition_penalty = 1.05
    inputs = left_padded((6,))
    with pytest.raises(UsageError, match=r"made of repetition_penalty=1\.05 .*; set repetition_penalty=1\.0, or use"):
        adapted.generate(**inputs, max_new_tokens=4, custom_generate=block_diffusion)
    adapted.generation_config.bad_words_ids = [[5]]
    cured = {"repetition_penalty": 1.0, "max_new_tokens": 4, "custom_generate": block_diffusion}
    with pytest.raises(UsageError, match=r"set model\.generation_config\.bad_words_ids=None, or use"):
        adapted.generate(**inputs, **cured)
    adapted.generation_config.bad_words_ids = None
    assert adapted.generate(**inputs, **cured).shape[1] > 6
    with pytest.raises(UsageError, match=r"UnbatchedClassifierFreeGuidance.*set guidance_scale=1, or use mode='ar'$"):
        adapted.generate(**inputs, **cured, guidance_scale=1.5)


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_a_warper_of_the_callers_own_acts_beside_an_equal_one_of_the_config(adapted, mode):
    inputs, options = left_padded((6,)), {"do_sample": True, "max_new_tokens": 20, "top_k": 0, "eos_token_id": None}
    options |= {"custom_generate": block_diffusion, "mode": mode, "seed": 3, "pad_token_id": PAD_ID}
    warper = LogitsProcessorList([TemperatureLogitsWarper(0.5)])
    twice = adapted.generate(**inputs, **options, temperature=0.5, logits_processor=warper)
    assert torch.equal(twice, adapted.generate(**inputs, **options, temperature=0.25))
    assert not torch.equal(twice, adapted.generate(**inputs, **options, temperature=0.5))


def test_stop_strings_come_as_a_stopping_criterion(adapted):
    tokenizer = byte_level()
    inputs, options = left_padded((6,)), {"max_new_tokens": 20, "do_sample": False}
    stop = str(tokenizer.decode(adapted.generate(**inputs, **options)[0, 12:13]))
    plain = adapted.generate(**inputs, **options, stop_strings=[stop], tokenizer=tokenizer)
    options |= {"stopping_criteria": [StopStringCriteria(tokenizer, [stop])], "custom_generate": block_diffusion}
    for mode in ("ar", "speculative"):
        assert torch.equal(adapted.generate(**inputs, **options, mode=mode), plain)


def test_diffusion_mode_is_the_library_s_own(adapted):
    inputs = left_padded()
    lm = BlockDiffusionLM(adapted, None, read_settings(adapted.config))
    expected = lm.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=20,
        threshold=None,
        sub_blocks=2,
    )
    ours = adapted.generate(
        **inputs, max_new_tokens=20, custom_generate=block_diffusion, mode="diffusion", threshold=None, sub_blocks=2
    )
    assert torch.equal(ours, expected.sequences)


def test_sampling_takes_its_options_from_the_generation_config(adapted):
    inputs = left_padded()
    lm = BlockDiffusionLM(adapted, None, read_settings(adapted.config))
    for mode in ("ar", "diffusion", "speculative"):
        expected = lm.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            mode=mode,
            max_new_tokens=12,
            temperature=0.7,
            top_k=9,
            top_p=0.8,
            seed=3,
        )
        ours = adapted.generate(
            **inputs,
            max_new_tokens=12,
            do_sample=True,
            temperature=0.7,
            top_k=9,
            top_p=0.8,
            custom_generate=block_diffusion,
            mode=mode,
            seed=3,
        )
        assert torch.equal(ours, expected.sequences)


@pytest.mark.parametrize("paths", [1, 3])
def test_sampling_with_a_processor_keeps_its_rule(adapted, paths):
    inputs = left_padded((6,))
    out = adapted.generate(
        **inputs,
        max_new_tokens=20,
        do_sample=True,
        no_repeat_ngram_size=1,
        custom_generate=block_diffusion,
        mode="speculative",
        draft_paths=paths,
        seed=3,
    )
    assert len(set(out[0].tolist())) == out.shape[1] - (6 - len(set(inputs["input_ids"][0].tolist())))


@pytest.mark.parametrize("mode", ["ar", "diffusion", "speculative"])
def test_streamers_get_the_answer_in_order_and_an_end(adapted, mode):
    inputs, streamer = left_padded((6,)), Collector()
    out = adapted.generate(**inputs, max_new_tokens=20, custom_generate=block_diffusion, mode=mode, streamer=streamer)
    assert streamer.tokens == out[0].tolist()
    assert streamer.ended


def test_the_streamer_is_found_behind_a_function_of_the_callers(adapted):
    @functools.wraps(block_diffusion)
    def through(*args, **kwargs):
        return block_diffusion(*args, **kwargs)

    inputs, streamer = left_padded((6,)), Collector()
    out = adapted.generate(**inputs, max_new_tokens=9, custom_generate=through, mode="ar", streamer=streamer)
    assert streamer.tokens == out[0].tolist()


def test_the_dict_form_and_several_answers_per_prompt(adapted):
    inputs = left_padded((6,))
    out = adapted.generate(
        **inputs,
        max_new_tokens=8,
        do_sample=True,
        num_return_sequences=3,
        return_dict_in_generate=True,
        custom_generate=block_diffusion,
        mode="ar",
        seed=0,
    )
    assert out.sequences.shape[0] == 3
    assert len({tuple(row) for row in out.sequences.tolist()}) > 1


def test_what_has_no_meaning_is_refused_in_one_line(adapted):
    inputs = left_padded()
    with pytest.raises(UsageError, match="NoRepeat has no meaning in diffusion mode"):
        adapted.generate(
            **inputs,
            max_new_tokens=4,
            custom_generate=block_diffusion,
            mode="diffusion",
            logits_processor=[NoRepeat()],
        )
    with pytest.raises(UsageError, match="num_beams=2"):
        adapted.generate(**inputs, max_new_tokens=4, num_beams=2, custom_generate=block_diffusion, mode="ar")
    with pytest.raises(UsageError, match="did you mean 'speculative'"):
        adapted.generate(**inputs, max_new_tokens=4, custom_generate=block_diffusion, mode="speculativ")
    with pytest.raises(UsageError, match="streaming 2 rows"):
        adapted.generate(**inputs, max_new_tokens=4, custom_generate=block_diffusion, mode="ar", streamer=Collector())


def test_an_exported_folder_decodes_by_its_own_name(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "exported"
    (folder / "custom_generate").mkdir(parents=True)
    (folder / "custom_generate" / "generate.py").write_text(CUSTOM_GENERATE_SOURCE)
    inputs, streamer = left_padded((6,)), Collector()
    expected = adapted.generate(**inputs, max_new_tokens=15, do_sample=False)
    out = adapted.generate(
        **inputs,
        max_new_tokens=15,
        do_sample=False,
        custom_generate=str(folder),
        trust_remote_code=True,
        mode="speculative",
        streamer=streamer,
    )
    assert torch.equal(out, expected)
    assert streamer.tokens == expected[0].tolist()
    assert EOS_ID in expected[0] or expected.shape[1] == 21


@pytest.mark.parametrize("mode", ["ar", "speculative"])
@pytest.mark.parametrize("warper", [TopKLogitsWarper(1), TemperatureLogitsWarper(1e-4), TopPLogitsWarper(1e-6)])
def test_a_warper_of_the_callers_own_acts_whatever_the_config_says(adapted, mode, warper):
    """Each of these leaves the likeliest token alone, so that sampling is greedy."""
    options = {"do_sample": True, "logits_processor": LogitsProcessorList([warper])}
    greedy = adapted.generate(**left_padded((6,)), max_new_tokens=10, do_sample=False, eos_token_id=EOS_ID)
    out = adapted.generate(
        **left_padded((6,)),
        **options,
        max_new_tokens=10,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        custom_generate=block_diffusion,
        mode=mode,
        seed=1,
    )
    assert torch.equal(out, greedy)


def test_of_sampling_nothing_is_taken_from_the_checkpoint(adapted):
    """A stored top_k=1 would make all seeds equal."""
    adapted.config.block_diffusion = {**SECTION, "decoding": {"top_k": 1, "temperature": 0.0}}
    options = {"do_sample": True, "temperature": 5.0, "top_k": 0, "repetition_penalty": 1.01, "max_new_tokens": 12}
    answers = [
        adapted.generate(
            **left_padded((6,)), **options, custom_generate=block_diffusion, mode="ar", seed=seed, pad_token_id=PAD_ID
        ).tolist()
        for seed in (1, 2)
    ]
    assert answers[0] != answers[1]


@pytest.mark.parametrize(
    "option", [{"output_scores": True}, {"output_logits": True}, {"prompt_lookup_num_tokens": 3}], ids=str
)
def test_what_the_method_does_not_do_is_refused(adapted, option):
    with pytest.raises(UsageError, match=next(iter(option))):
        adapted.generate(
            **left_padded((6,)),
            **option,
            return_dict_in_generate=True,
            max_new_tokens=4,
            custom_generate=block_diffusion,
            mode="ar",
        )


@pytest.mark.parametrize("alone", [True, False])
def test_embeddings_are_refused_by_name(adapted, alone):
    given = left_padded((6,))
    embeddings = adapted.get_input_embeddings()(given["input_ids"])
    given = {} if alone else given
    with pytest.raises(UsageError, match="inputs_embeds: give input_ids"):
        adapted.generate(**given, inputs_embeds=embeddings, max_new_tokens=4, custom_generate=block_diffusion)


@pytest.mark.parametrize(
    "option",
    [
        {"position_ids": torch.arange(3, 9)[None]},
        {"past_key_values": DynamicCache()},
        {"dola_layers": "low"},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"cache_implementation": "static"},
        {"assistant_model": "itself"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_argument_that_plain_generate_heeds_is_refused_by_name(adapted, option):
    name = next(iter(option))
    option = {"assistant_model": adapted} if name == "assistant_model" else option
    with pytest.raises(UsageError, match=f"^{name}: "):
        adapted.generate(**left_padded((6,)), **option, max_new_tokens=4, custom_generate=block_diffusion, mode="ar")


def test_behind_padding_on_the_right_the_answer_stands_where_the_input_ends(adapted):
    left = left_padded((4, 9))
    right = {"input_ids": left["input_ids"].clone(), "attention_mask": left["attention_mask"].clone()}
    right["input_ids"][0] = left["input_ids"][0].roll(-5)
    right["attention_mask"][0] = left["attention_mask"][0].roll(-5)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    expected = adapted.generate(**left, **options)[:, 9:]
    for mode in ("ar", "speculative"):
        out = adapted.generate(**right, **options, custom_generate=block_diffusion, mode=mode)
        assert torch.equal(out[:, :9], right["input_ids"])
        assert torch.equal(out[:, 9:], expected)
