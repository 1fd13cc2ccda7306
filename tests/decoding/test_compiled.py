"""Passes of fixed shapes give what passes in the shapes that they have give, and few of them are compiled."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._guards import TracingContext

from families import MASK_ID, tiny_model
from nextblock.config.sections import BlockDiffusionSettings, DraftAdapterConfig
from nextblock.decoding import lm as calls
from nextblock.decoding.compiled import StaticCache, StaticPasses, rounded_capacity, rounded_rows, rounded_width
from nextblock.decoding.lm import PASSES, BlockDiffusionLM, compiled_passes
from nextblock.decoding.request import make_request
from nextblock.model.costs import Costs
from nextblock.model.draft_adapter import DraftAdapter

LENGTHS, LIMITS = (5, 11, 1, 7, 9), [30, 7, 18, 25, 12]
MODES: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "diffusion", "threshold": 0.3},
    {"mode": "speculative"},
    {"mode": "speculative", "draft_length": None},
    {"mode": "speculative", "draft_ahead": 2},
    {"mode": "speculative", "draft_paths": 3},
]


def prompts(*lengths, seed=0) -> dict[str, Any]:
    tokens = torch.randint(3, 96, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    return {"prompts": tokens, "attention_mask": (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()}


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def pair(model, passes=None, adapter=None, **section) -> tuple[BlockDiffusionLM, Any]:
    """The same model decoded as ever, and in fixed shapes."""
    settings = BlockDiffusionSettings(**{"block_size": 8, "mask_token_id": MASK_ID, **section})
    ordinary, static = (BlockDiffusionLM(model, None, settings, adapter, compile=False) for _ in range(2))
    static.passes = passes or StaticPasses(uncompiled)
    return ordinary, static


@pytest.fixture(autouse=True)
def _same_costs(monkeypatch):
    """How many drafts pay is then the same in each call."""
    costs = {"check": {1: {1: 1.0, 16: 1.5}}, "draft": {1: 1.2}, "alone": {1: 1.0}}
    monkeypatch.setattr(calls, "costs_of", lambda *_: Costs(**costs))


def assert_same(ordinary, static, batch=None, **options):
    batch = batch or prompts(*LENGTHS)
    options = {"max_new_tokens": LIMITS[: len(batch["prompts"])], "seed": 3, **options}
    expected, found = (lm.generate(**batch, **options) for lm in (ordinary, static))
    assert found.answers == expected.answers
    assert found.finish == expected.finish
    greedy_auto = options.get("mode") == "speculative" and not options.get("temperature")
    if not greedy_auto or options.keys() & {
        "draft_length",
        "draft_ahead",
    }:  # else blocks are of two widths
        assert found.stats.row_forwards == expected.stats.row_forwards
    assert static.passes._compiled
    assert not static.passes.failed
    return found


# ------------------------------------------------------------------------------------------ same tokens


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_mode_gives_the_tokens_of_ordinary_passes(family_model, options, temperature):
    assert_same(*pair(family_model), temperature=temperature, **options)


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("family", ["mistral", "gemma3", "phi3"])
def test_a_sliding_window_is_kept(family, options):
    assert_same(*pair(tiny_model(family, sliding_window=4)), **options)


@pytest.mark.parametrize("section", [{"context": "block_causal"}, {"prediction": "aligned"}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_other_recipes_decode_the_same(llama, section, temperature):
    assert_same(*pair(llama, **section), mode="diffusion", threshold=0.3, temperature=temperature)


def drafting(model, merged: bool) -> DraftAdapter:
    """An adapter with random weights."""
    adapter = DraftAdapter(model, DraftAdapterConfig(rank=3)).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0.0, 0.3)
    if merged:
        adapter.merge_copies()
    return adapter


@pytest.mark.parametrize("merged", [False, True])  # on CUDA copies are not merged
@pytest.mark.parametrize("options", MODES[1:], ids=str)
def test_a_draft_adapter_acts_where_it_acts_in_ordinary_passes(llama, options, merged):
    adapter = drafting(llama, merged)
    ordinary, static = pair(llama, adapter=adapter, mask_token_id=adapter.mask_token_id)
    assert_same(ordinary, static, **options)
    assert_same(ordinary, static, temperature=1.0, **options)


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_answers_end_at_the_models_last_position(family, options):
    sizes = {"n_positions": 24} if family == "gpt2" else {"max_position_embeddings": 24}
    ordinary, static = pair(tiny_model(family, **sizes))
    assert_same(ordinary, static, prompts(19, 2), max_new_tokens=50, eos_token_id=[], **options)


def test_each_row_gets_what_it_gets_alone():
    _, static = pair(tiny_model("llama").double())  # rounding must not decide what is drawn
    batch = prompts(*LENGTHS)
    for options in MODES:
        together = static.generate(**batch, max_new_tokens=LIMITS, seed=5, temperature=1.0, **options)
        for i, length in enumerate(LENGTHS):
            own = batch["prompts"][i : i + 1, :length]
            alone = static.generate(own, max_new_tokens=LIMITS[i], seed=5 + i, temperature=1.0, **options)
            assert together.answers[i] == alone.answers[0]


# ------------------------------------------------------------------------------------------ shapes, memory


def test_few_sizes_each_holding_what_is_rounded_up_to_it():
    for number in range(1, 5000):
        for rounded, excess in ((rounded_rows, 2), (rounded_width, 8), (rounded_capacity, 256)):
            assert number <= rounded(number) <= excess * number
        assert rounded_capacity(number) < max(257, 2 * number)
    assert {rounded_rows(n) for n in range(1, 65)} == {1, 2, 4, 8, 16, 32, 64}
    assert {rounded_width(n) for n in range(1, 41)} == {1, 8, 16, 24, 32, 40}
    assert len({rounded_capacity(n) for n in range(1, 8193)}) == 6
    assert len({rounded_capacity(n) for n in range(4096, 32769)}) == 4  # each is compiled for every width


def addresses(passes):
    return {key: slots.data_ptr() for key, slots in passes._slots.items()}


def test_the_memory_outlives_the_batch_and_grows_only_for_a_larger_one(llama):
    ordinary, static = pair(llama)
    assert_same(ordinary, static, prompts(5, 3), mode="ar")
    first, tensors = addresses(static.passes), dict(static.passes._slots)
    assert {key[2] for key in first} == {1, 2}  # one row finishes sooner
    assert_same(ordinary, static, prompts(9, 4, seed=1), mode="diffusion")
    assert_same(ordinary, static, prompts(9), mode="speculative")
    assert all(static.passes._slots[key] is slots for key, slots in tensors.items())
    assert_same(ordinary, static, prompts(*[6] * 7), max_new_tokens=9, mode="speculative")
    assert {key[2] for key in addresses(static.passes)} >= {8}
    assert len(static.passes._memory) == 2 * llama.config.num_hidden_layers
    count = 8 * 2 * 256 * 8  # rows, heads, slots, head size
    assert {len(memory) for memory in static.passes._memory.values()} == {count}


def test_what_an_earlier_batch_left_is_nowhere_to_be_seen(llama):
    ordinary, static = pair(llama)
    assert_same(ordinary, static, prompts(5, 3), mode="ar")
    for memory in static.passes._memory.values():
        memory.fill_(torch.nan)
    for options in MODES:
        assert_same(ordinary, static, prompts(4, 6, 2), **options)


def test_two_streams_read_in_turns_do_not_write_over_each_other(llama):
    ordinary, static = pair(llama)
    batches = [prompts(5, 3), prompts(4, 7, seed=1)]
    streams = [static.stream(**batch, mode="speculative", max_new_tokens=20) for batch in batches]
    next(streams[0])
    with pytest.warns(UserWarning, match="this one goes without torch.compile; read streams to their end, or close"):
        next(streams[1])
    for _ in range(400):
        for stream in streams:
            next(stream, None)
    for batch, stream in zip(batches, streams, strict=True):
        expected = ordinary.generate(**batch, mode="speculative", max_new_tokens=20).answers
        assert [row.answer for row in stream.rows] == expected


def test_a_stream_that_is_given_up_gives_the_memory_back(llama):
    _, static = pair(llama)
    for give_up in ("dropped", "closed", "left"):
        stream = static.stream(**prompts(5, 3), mode="ar", max_new_tokens=20)
        next(stream)
        with pytest.warns(UserWarning, match="without torch.compile"):
            assert not isinstance(static.passes.cache(static.decoder, 1, 10, 1), StaticCache)
        if give_up == "dropped":
            del stream
            gc.collect()
        elif give_up == "closed":
            stream.close()
            assert next(stream, None) is None
        else:
            with stream:
                next(stream)
        cache = static.passes.cache(static.decoder, 1, 10, 1)
        assert isinstance(cache, StaticCache)
        static.passes.release(cache)


def test_a_model_with_compiled_passes_is_copied_and_pickled_without_them(llama):
    _, static = pair(copy.deepcopy(llama))
    setattr(static.model, PASSES, static.passes)
    wanted = static.generate(**prompts(5), mode="speculative", max_new_tokens=9).answers
    for other in (copy.deepcopy(static.model), pickle.loads(pickle.dumps(static.model))):
        assert vars(other)[PASSES] is not vars(static.model)[PASSES]
        assert not vars(other)[PASSES]._memory
        assert pair(other)[0].generate(**prompts(5), mode="speculative", max_new_tokens=9).answers == wanted


def test_a_call_that_fails_gives_the_memory_back_even_if_its_exception_is_kept(llama):
    ordinary, static = pair(llama)

    def refuse(answer):
        raise ValueError("no more")

    request = make_request(static.decoder, None, static.settings, prompts(5)["prompts"], {"max_new_tokens": 9})
    request.rows[0].stop = refuse
    kept = []
    try:
        list(static.run(request, 0.0))
    except ValueError as error:
        kept.append(error)
    assert kept
    with warnings.catch_warnings(action="error"):
        assert_same(ordinary, static, mode="speculative")


def test_memory_that_runs_out_ends_compiled_passes_for_that_call_alone(llama):
    left = [3, 1000]

    def runs_out(function):
        def run(*arguments):
            left[0] -= 1
            if left[0] == 0:
                raise torch.OutOfMemoryError("out of memory, tried to allocate 2 GiB")
            return function(*arguments)

        return run

    ordinary, static = pair(llama, StaticPasses(runs_out))
    expected = ordinary.generate(**prompts(*LENGTHS), max_new_tokens=LIMITS)
    with pytest.warns(UserWarning, match="without torch.compile to the end of this call: out of memory"):
        assert static.generate(**prompts(*LENGTHS), max_new_tokens=LIMITS).answers == expected.answers
    before = left[0]
    with warnings.catch_warnings(action="error"):
        assert_same(ordinary, static, mode="speculative")
    assert left[0] < before


# ------------------------------------------------------------------------------------------ compilation


def test_compiled_passes_give_the_same_tokens_and_their_number_does_not_grow_with_the_tokens():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    passes = StaticPasses(lambda f: torch.compile(f, backend=count, fullgraph=True, dynamic=False))
    ordinary, static = pair(tiny_model("llama", num_hidden_layers=1), passes)
    for mode in ("ar", "diffusion", "speculative"):
        assert_same(ordinary, static, prompts(9), mode=mode, max_new_tokens=12, eos_token_id=[])
    assert len(graphs) == 5  # of 1 token, of 8, of drafts in half a block and in a whole one, and of a prompt
    for mode, tokens in (("ar", 40), ("diffusion", 50), ("speculative", 60)):
        assert_same(ordinary, static, prompts(7, seed=1), mode=mode, max_new_tokens=tokens, eos_token_id=[])
        assert_same(ordinary, static, prompts(3), mode=mode, max_new_tokens=tokens, temperature=1.0)
    assert len(graphs) == 5
    rows = {"eos_token_id": [], "max_new_tokens": [30, 22, 9]}
    for _ in range(2):
        assert_same(ordinary, static, prompts(5, 3, 8), mode="ar", **rows)
        assert len(graphs) == 7  # of 1 token for 4 rows and for 2; the one for 1 row is there


def watched(compiler=lambda f: f) -> tuple[StaticPasses, list[int]]:
    """Passes, and how many tokens each of those that read prompts had."""
    widths: list[int] = []

    def watch(function):
        compiled = compiler(function)

        def run(decoder, cache, tokens, *rest):
            if not cache.seen:
                widths.append(tokens.shape[1])
            return compiled(decoder, cache, tokens, *rest)

        return run

    return StaticPasses(watch), widths


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_prompts_of_every_length_are_read_by_one_compiled_pass(family):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    passes, widths = watched(lambda f: torch.compile(f, backend=count, fullgraph=True, dynamic=False))
    sizes = {} if family == "gpt2" else {"sliding_window": 4}
    ordinary, static = pair(tiny_model(family, **sizes), passes)
    options = {"mode": "ar", "max_new_tokens": 3, "eos_token_id": []}
    assert_same(ordinary, static, prompts(9), **options)
    assert widths == []  # what a layer keeps is not known yet
    before = len(graphs)
    for length in (9, 2, 14, 5):
        assert_same(ordinary, static, prompts(length), **options)
    assert widths == [9, 2, 14, 5]
    assert len(graphs) == before + 1
    for lengths in ((7, 3), (4, 6)):  # padded to the longer one
        assert_same(ordinary, static, prompts(*lengths), **options)
    assert widths[4:] == [7, 6]
    assert len(graphs) == before + 3  # and one of decoding, for two rows


def test_what_is_no_prompt_for_a_compiled_pass_is_read_by_an_ordinary_one(llama, monkeypatch):
    passes, widths = watched()
    ordinary, static = pair(llama, passes)
    options = {"mode": "speculative", "max_new_tokens": 4, "eos_token_id": []}
    monkeypatch.setattr("nextblock.decoding.compiled.LONG", 8)
    for lengths in ((5,), (9,), (1,), (5, 6, 7), (8,)):
        assert_same(ordinary, static, prompts(*lengths), **options)
    assert widths == [8]


def test_a_model_of_another_dtype_is_read_by_an_ordinary_pass_first():
    passes, widths = watched()
    model: Any = tiny_model("llama")
    ordinary, static = pair(model, passes)
    options = {"mode": "ar", "max_new_tokens": 4, "eos_token_id": []}
    with warnings.catch_warnings(action="error"):
        for dtype, read in ((torch.float32, [5]), (torch.float64, [5, 5]), (torch.float32, [5, 5, 5])):
            model.to(dtype)
            for _ in range(2):
                assert_same(ordinary, static, prompts(5), **options)
            assert widths == read
        model.to(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                static.generate(**prompts(5), **options)
    assert widths == [5, 5, 5]
    assert not passes.failed


@pytest.mark.parametrize(
    ("error", "said", "tries"),
    [
        (RuntimeError("no dynamic shapes\nand more"), "without torch.compile: no dynamic shapes$", 1),
        (torch.OutOfMemoryError("out of memory"), "without torch.compile in this call: out of memory$", 3),
    ],
)
def test_a_prompt_pass_that_fails_costs_the_other_passes_nothing(llama, error, said, tries):
    reads = []

    def fails_on_prompts(function):
        def run(decoder, cache, *rest):
            if not cache.seen:
                reads.append(cache)
                raise error
            return function(decoder, cache, *rest)

        return run

    ordinary, static = pair(llama, StaticPasses(fails_on_prompts))
    options = {"mode": "diffusion", "max_new_tokens": 9}
    assert_same(ordinary, static, prompts(5, 8), **options)
    for number in range(1, 4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert_same(ordinary, static, prompts(5, 8), **options)
        assert len(caught) == (number <= tries)
        assert all(re.search("prompts of 'llama' are read " + said, str(one.message)) for one in caught)
    assert len(reads) == tries


@pytest.mark.parametrize("failing", range(6))
def test_a_call_that_ended_while_its_cache_was_made_harms_no_later_one(failing, monkeypatch):
    """Three layers have six tensors: the first, and the first that is larger, end at each of them."""
    ordinary, static = pair(tiny_model("llama", num_hidden_layers=3))
    options = {"mode": "speculative", "max_new_tokens": 6, "eos_token_id": []}
    make = StaticPasses.allocate

    def interrupted(batch):
        left = [failing]

        def allocate(self, *arguments):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return make(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(StaticPasses, "allocate", allocate)
            with pytest.raises(KeyboardInterrupt):
                static.generate(**batch, **options)

    with warnings.catch_warnings(action="error"):
        interrupted(prompts(5))
        for batch in (prompts(5), prompts(9)):
            assert_same(ordinary, static, batch, **options)
        interrupted(prompts(5, 6))
        for batch in (prompts(5), prompts(5, 6), prompts(9)):
            assert_same(ordinary, static, batch, **options)
    assert static.passes.reads


def test_a_pass_is_given_the_slots_up_to_where_something_may_be():
    """More of them as the answer grows, never the whole of a long cache at once."""
    seen: list[tuple[int, int]] = []

    def watch(function):
        def run(decoder, cache, *rest):
            seen.append((cache.end, cache.seen))
            return function(decoder, cache, *rest)

        return run

    ordinary, static = pair(tiny_model("llama", max_position_embeddings=600), StaticPasses(watch))
    assert_same(ordinary, static, prompts(250), mode="ar", max_new_tokens=300, eos_token_id=[])
    assert {size for _, size in seen} == {256, 512, 1024}
    assert all(end <= size <= max(256, 2 * end) for end, size in seen)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tokens_that_see_nothing_do_no_harm_in_float64(attention):
    model = tiny_model("llama").double()
    model.set_attn_implementation(attention)
    options = {"mode": "speculative", "draft_paths": 2, "draft_length": None, "max_new_tokens": 20}
    assert_same(*pair(model, block_size=3), prompts(5), eos_token_id=[], **options)


def test_copies_that_are_merged_between_two_calls_are_used():
    torch._dynamo.reset()
    model: Any = tiny_model("llama", num_hidden_layers=1)
    adapter = drafting(model, False)
    lms = pair(model, StaticPasses(unguarded), adapter, mask_token_id=adapter.mask_token_id)
    for _ in range(2):
        assert_same(*lms, prompts(9), mode="speculative", draft_length=None)
        adapter.merge_copies()
    assert len(lms[1].passes._passes) == 2


@pytest.mark.parametrize("merged", [False, True])
def test_passes_of_a_draft_adapter_that_begin_with_the_free_token_are_compiled(merged):
    torch._dynamo.reset()
    model: Any = tiny_model("llama", num_hidden_layers=1)
    adapter = drafting(model, merged)
    passes = StaticPasses(lambda f: torch.compile(f, backend="eager", fullgraph=True, dynamic=False))
    lms = pair(model, passes, adapter, mask_token_id=adapter.mask_token_id)
    for draft_length in ("auto", None):
        assert_same(*lms, prompts(9, 7), mode="speculative", draft_length=draft_length)


def test_a_replay_copies_tokens_and_row_numbers_and_never_the_cache():
    """What torch takes for inputs at fixed addresses: weights and the cache, which alone is written to."""
    passes = []

    def look(graph, inputs):
        context: Any = TracingContext.get()
        fixed = context.fw_metadata.static_input_indices
        written = [i for i, info in enumerate(context.fw_metadata.input_info) if info.mutates_data]
        copied = [tuple(part.shape) for i, part in enumerate(inputs) if i not in fixed]
        passes.append((len(written), set(written) <= set(fixed), copied))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=look, inference_compiler=look, keep_inference_input_mutations=True)
    compiled = StaticPasses(lambda f: torch.compile(f, backend=backend, fullgraph=True, dynamic=False))
    assert_same(*pair(tiny_model("llama"), compiled), prompts(5, 7), mode="diffusion", max_new_tokens=12)
    keys_and_values = 2 * 2  # of two layers
    assert passes[0] == (keys_and_values, True, [(2, 2), (2, 8)])
    assert all(written == keys_and_values and fixed for written, fixed, _ in passes)


class Louder(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.base(x)


def softer(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output / 2


CHANGES: dict[str, Callable[[Any], object]] = {
    "the dtype": lambda model: model.double(),
    "a module": lambda model: model.set_submodule("model.layers.0.mlp", Louder(model.model.layers[0].mlp)),
    "a hook": lambda model: model.model.layers[0].mlp.register_forward_hook(softer),
    "the weights": lambda model: model.model.layers[0].mlp.down_proj.weight.data.mul_(-2),
}


def unguarded(function):
    """As compiled for a device, without looking at modules before each pass, but soon done."""
    options: Any = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
    return torch.compile(function, backend="eager", options=options, fullgraph=True, dynamic=False)


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_in_a_model_between_two_calls_counts(change):
    torch._dynamo.reset()
    model: Any = tiny_model("llama", num_hidden_layers=1, std=0.3)
    lms = pair(model, StaticPasses(unguarded))
    options = {"mode": "speculative", "eos_token_id": [], "max_new_tokens": 12}
    assert_same(*lms, prompts(9), **options)
    before = lms[0].generate(**prompts(9), **options).answers
    CHANGES[change](model)
    assert_same(*lms, prompts(9), **options)
    assert change == "the dtype" or lms[0].generate(**prompts(9), **options).answers != before


def test_compiled_models_of_other_forms_in_one_process_do_not_meet():
    torch._dynamo.reset()
    for layers in (1, 2, 3):
        lms = pair(tiny_model("llama", num_hidden_layers=layers), StaticPasses(unguarded))
        assert_same(*lms, prompts(9), mode="ar", max_new_tokens=6, eos_token_id=[])


@pytest.mark.slow
def test_torch_compile_on_this_device_gives_the_same_tokens():
    torch._dynamo.reset()
    ordinary, _ = pair(tiny_model("llama", num_hidden_layers=1))
    static = BlockDiffusionLM(ordinary.model, None, ordinary.settings, compile=True)
    assert static.passes is compiled_passes(ordinary.model)
    assert_same(ordinary, static, prompts(9), mode="ar", max_new_tokens=12)


def test_a_model_that_cannot_be_compiled_is_decoded_without_and_says_so_once(llama):
    calls = []

    def third_fails(function):
        def run(*arguments):
            calls.append(function)
            if len(calls) == 3:
                raise RuntimeError("no such kernel\nand more")
            return function(*arguments)

        return run

    for options in MODES:
        calls.clear()
        ordinary, static = pair(llama, StaticPasses(third_fails))
        expected = ordinary.generate(**prompts(*LENGTHS), max_new_tokens=LIMITS, **options)
        with pytest.warns(UserWarning, match="decoding of 'llama' goes on without torch.compile: no such kernel$"):
            found = static.generate(**prompts(*LENGTHS), max_new_tokens=LIMITS, **options)
        assert found.answers == expected.answers
        assert found.stats.row_forwards == expected.stats.row_forwards
        with warnings.catch_warnings(action="error"):
            again = static.generate(**prompts(*LENGTHS), max_new_tokens=LIMITS, **options)
        assert again.answers == expected.answers
        assert len(calls) == 3
        assert not static.passes._memory


def test_decoding_is_compiled_on_cuda_alone_unless_it_is_asked_for(llama):
    on_cuda = llama.device.type == "cuda"
    assert (BlockDiffusionLM(llama, None).passes is not None) == on_cuda
    assert BlockDiffusionLM(llama, None, compile=False).passes is None
    once, again = (BlockDiffusionLM(llama, None, compile=True).passes for _ in range(2))
    assert once is not None
    assert once is again  # what is compiled serves whoever decodes the model


# ------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("options", MODES, ids=str)
def test_cuda_graphs_give_the_tokens_of_ordinary_passes(options):
    torch._dynamo.reset()
    model: Any = tiny_model("llama")
    ordinary, _ = pair(model.cuda())
    static = BlockDiffusionLM(ordinary.model, None, ordinary.settings)
    skips = torch._dynamo.utils.counters["inductor"]
    skips.clear()
    for _ in range(3):  # compiled, recorded, replayed
        assert_same(ordinary, static, prompts(5, 11), max_new_tokens=[30, 20], eos_token_id=[], **options)
    assert_same(ordinary, static, prompts(5, 11), max_new_tokens=[30, 20], temperature=1.0, **options)
    assert skips["cudagraph_skips"] == 0


@pytest.mark.gpu
def test_cuda_graphs_run_a_draft_adapter():
    torch._dynamo.reset()
    model: Any = tiny_model("llama")
    adapter = DraftAdapter(model.cuda(), DraftAdapterConfig(rank=3)).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0.0, 0.3)
    ordinary, _ = pair(model, adapter=adapter, mask_token_id=adapter.mask_token_id)
    static = BlockDiffusionLM(model, None, ordinary.settings, adapter)
    for options in MODES[1:]:
        assert_same(ordinary, static, prompts(5, 11), max_new_tokens=[30, 20], **options)
