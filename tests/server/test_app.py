"""A real server on a free port, and OpenAI's own client."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import socket
from typing import Any

import httpx
import openai
import pytest
import torch

import nextblock as nb
from nextblock.config.errors import UsageError
from nextblock.data.text import TextStream
from nextblock.decoding.events import Committed
from nextblock.decoding.request import make_request
from nextblock.server import app
from nextblock.server.answers import Choice, token_bytes
from nextblock.server.batching import Progress
from nextblock.server.bodies import TextBody
from nextblock.server.limits import Limits
from nextblock.server.run import listen, run
from samples import sentencepiece
from serving import served, until

PROMPT = "Q: Leo has 8 bags with 7 coins in each. He loses 13. How many coins does Leo have?\nA:"
MODES = ("ar", "diffusion", "speculative")


@pytest.fixture(scope="module")
def lm():
    return nb.load("tiny-bd")


@pytest.fixture(scope="module")
def place(lm):
    with served(lm, limits=Limits(max_rows=8, max_waiting=8, max_tokens=400, max_body=20000)) as found:
        yield found


@pytest.fixture
def client(place):
    with openai.OpenAI(base_url=f"{place[1]}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def post(place, path, **body):
    return httpx.post(f"{place[1]}{path}", json={"model": "tiny-bd", **body}, timeout=60)


# ------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("drawn", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=["greedy", "drawn"])
def test_an_answer_is_that_of_generate_streamed_or_not(lm, client, mode, drawn):
    how = {"mode": mode, **({"draft_length": 8} if mode == "speculative" else {})}  # not by what was kept before
    expected = lm.generate(PROMPT, max_new_tokens=60, **how, **drawn)
    call = {"model": "tiny-bd", "prompt": PROMPT, "max_tokens": 60, "extra_body": how, **drawn}
    whole = client.completions.create(**call)
    assert whole.choices[0].text == expected.texts[0]
    assert whole.usage.completion_tokens == expected.stats.new_tokens
    assert whole.usage.forwards == expected.stats.forwards
    assert whole.usage.tokens_per_forward == pytest.approx(expected.stats.tokens_per_forward, abs=1e-4)
    assert whole.usage.prompt_tokens == len(lm.tokenizer(PROMPT)["input_ids"])
    assert whole.choices[0].finish_reason == {"end_token": "stop", "length": "length"}[expected.finish[0]]
    chunks = [*client.completions.create(**call, stream=True, stream_options={"include_usage": True})]
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected.texts[0]
    assert chunks[-1].usage == whole.usage


def test_a_chat_is_answered_streamed_or_not(lm, client):
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    expected = lm.generate(messages, max_new_tokens=40).texts[0]
    call = {"model": "tiny-bd", "messages": messages, "max_completion_tokens": 40}
    assert client.chat.completions.create(**call).choices[0].message.content == expected
    chunks = [*client.chat.completions.create(**call, stream=True)]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_n_choices_are_drawn_with_seeds_that_follow_each_other(lm, client):
    drawn = {"temperature": 1.0, "max_new_tokens": 20, "mode": "ar"}
    expected = [lm.generate(PROMPT, seed=7 + n, **drawn).texts[0] for n in range(3)]
    call = {"model": "tiny-bd", "prompt": PROMPT, "max_tokens": 20, "temperature": 1.0, "seed": 7, "n": 3}
    found = client.completions.create(**call, extra_body={"mode": "ar"})
    assert [choice.text for choice in found.choices] == expected
    streamed = ["", "", ""]
    for chunk in client.completions.create(**call, extra_body={"mode": "ar"}, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == expected


def test_several_prompts_are_answered_in_their_order_as_texts_or_ids(lm, client):
    prompts = [PROMPT, "Q: 3 + 4 = ?\nA:"]
    expected = [lm.generate(prompt, max_new_tokens=30).texts[0] for prompt in prompts]
    for given in (prompts, [lm.tokenizer(prompt)["input_ids"] for prompt in prompts]):
        found = client.completions.create(model="tiny-bd", prompt=given, max_tokens=30)
        assert [choice.text for choice in found.choices] == expected
        assert [choice.index for choice in found.choices] == [0, 1]
    one = client.completions.create(model="tiny-bd", prompt=lm.tokenizer(PROMPT)["input_ids"], max_tokens=30)
    assert one.choices[0].text == expected[0]


def test_a_stop_string_cuts_the_answer(client):
    for stop in ("56", ["never", "56"]):
        for mode in MODES:
            found = client.completions.create(
                model="tiny-bd", prompt=PROMPT, max_tokens=60, stop=stop, extra_body={"mode": mode}
            )
            assert found.choices[0].text == " 8 * 7 = "
            assert found.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_log_probabilities_are_those_of_the_model(lm, client, mode):
    def expected(ids, answer):
        with torch.no_grad():
            logits = lm.model(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1].float()
        logits[:, lm.settings.mask_token_id] = -torch.inf
        return logits.log_softmax(-1)

    call = {"model": "tiny-bd", "max_tokens": 12, "extra_body": {"mode": mode}}
    told = client.completions.create(prompt=PROMPT, logprobs=0, **call).choices[0]
    assert "".join(told.logprobs.tokens) == told.text
    assert told.logprobs.top_logprobs is None
    answer = lm.generate(PROMPT, mode=mode, max_new_tokens=12).answers[0]
    values = expected(lm.tokenizer(PROMPT)["input_ids"], answer)
    chosen = [float(line[token]) for line, token in zip(values, answer, strict=True)]
    assert told.logprobs.token_logprobs == pytest.approx(chosen, abs=1e-3)
    told = client.completions.create(prompt=PROMPT, logprobs=2, **call).choices[0].logprobs
    for line, token, found in zip(values, answer, told.top_logprobs, strict=True):
        likeliest = {lm.tokenizer.decode([n]): float(line[n]) for n in [*line.topk(2).indices.tolist(), token]}
        assert found == pytest.approx(likeliest, abs=1e-3)

    messages = [{"role": "user", "content": "3 + 4"}]
    chat = {"messages": messages, "logprobs": True, "top_logprobs": 3, "temperature": 1.5, "seed": 1}
    whole = client.chat.completions.create(**chat, **call).choices[0].logprobs.content
    answer = lm.generate(messages, mode=mode, max_new_tokens=12, temperature=1.5, seed=1).answers[0]
    ids = make_request(lm.decoder, lm.tokenizer, lm.settings, messages, {}).rows[0].prompt
    for line, token, found in zip(expected(ids, answer), answer, whole, strict=True):
        assert found.logprob == pytest.approx(float(line[token]), abs=1e-3)
        assert [other.token for other in found.top_logprobs] == [
            lm.tokenizer.decode([n]) for n in line.topk(3).indices.tolist()
        ]
        assert [other.logprob for other in found.top_logprobs] == pytest.approx(line.topk(3).values.tolist(), abs=1e-3)
    stream = client.chat.completions.create(**chat, **call, stream=True)
    told = [token for chunk in stream for c in chunk.choices if c.logprobs for token in c.logprobs.content]
    assert told == whole


def test_a_token_that_is_part_of_a_character_is_told_by_its_bytes(lm, client):
    told = []
    for character in "aé€":
        for token in lm.tokenizer(character)["input_ids"]:
            told += token_bytes(lm.tokenizer, token, lm.tokenizer.decode([token]))
    assert bytes(told).decode() == "aé€"
    pieces = {"convert_ids_to_tokens": lambda self, token: "<0xE2>"}
    assert token_bytes(type("Pieces", (), pieces)(), 5, "\ufffd") == b"\xe2"
    drawn = {"temperature": 5.0, "seed": 1, "max_tokens": 60, "logprobs": 20, "extra_body": {"mode": "ar"}}
    found = client.completions.create(model="tiny-bd", prompt="é€", **drawn).choices[0].logprobs
    assert any(name.startswith("bytes:\\x") for name in found.tokens)
    assert all(name in line and len(line) >= 20 for name, line in zip(found.tokens, found.top_logprobs, strict=True))


def test_tokens_join_to_the_text_where_a_decoder_takes_the_first_space_away():
    tokenizer: Any = sentencepiece("prepend")
    tokens = tokenizer.convert_tokens_to_ids(["▁Paris", "Paris", "▁5", "5"])
    body = TextBody(prompt="The", logprobs=2, stream=True, events=True)
    choice = Choice(0, tokenizer, (), body)
    likely = tuple((token, -1.0) for token in tokens[:2])
    decided = [Committed(0, n, token, 0.5, n, likely) for n, token in enumerate(tokens)]
    choice.take(Progress(decided, tokens, 4, "length"))
    told = choice.whole()
    assert "".join(told["logprobs"]["tokens"]) == told["text"] == " ParisParis 55"
    assert set(told["logprobs"]["top_logprobs"][0]) == {" Paris", "Paris"}
    assert [told["text"][at:][:6] for at in told["logprobs"]["text_offset"]] == [" Paris", "Paris ", " 55", "5"]
    assert "".join(event["text"] for event in choice.chunk()[1]) == told["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_off_ends_in_openais_shape(lm, stream):
    """As when the time to stop is over: the task of the request is cancelled."""
    body = json.dumps({"prompt": PROMPT, "max_tokens": 400, "mode": "ar", "temperature": 2.0, "stream": stream})
    sent: list[dict[str, Any]] = []

    async def ask(server):
        asked, running = iter([{"type": "http.request", "body": body.encode()}]), asyncio.Event()

        async def receive():
            return next(asked, None) or await asyncio.Future()

        async def send(message):
            sent.append(message)
            running.set()

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
        scope |= {"headers": [(b"content-type", b"application/json")]}
        task = asyncio.create_task(server.app(scope, receive, send))
        while not (running.is_set() if stream else server.engine.rows):
            await asyncio.sleep(0)
        task.cancel()
        await task

    server = app.Server(lm, "tiny-bd")
    asyncio.run(ask(server))
    until(lambda: not server.engine.rows)
    server.engine.close()
    assert sent[0]["status"] == (200 if stream else 503)
    error = json.loads(sent[-1]["body"].removeprefix(b"data: "))["error"]
    assert (error["type"], sent[-1].get("more_body", False)) == ("server_error", False)
    assert "cut this answer off" in error["message"]


def say(monkeypatch, lm, answer):
    """The model says this, whatever it is asked."""
    generate, rest = type(lm.decoder).logits, iter(answer)

    def logits(self, hidden):
        found = generate(self, hidden)
        found[:, next(rest)] = 1e4
        return found

    monkeypatch.setattr(type(lm.decoder), "logits", logits)


def streamed_offsets(client, **call):
    told = [chunk.choices[0] for chunk in client.completions.create(**call, stream=True) if chunk.choices]
    return [offset for choice in told if choice.logprobs for offset in choice.logprobs.text_offset]


@pytest.mark.parametrize("mode", ["ar", "speculative"])
def test_text_offsets_are_the_characters_in_front_of_each_token(lm, client, mode):
    call = {"model": "tiny-bd", "prompt": [PROMPT, "Q: 3 + 4 = ?\nA:"], "max_tokens": 60, "logprobs": 0}
    for drawn in ({}, {"n": 2, "temperature": 0.7, "seed": 2}):
        found = client.completions.create(**call, **drawn, extra_body={"mode": mode})
        for choice in found.choices:
            place, expected = 0, []
            for token in choice.logprobs.tokens:
                expected.append(place)
                place += len(token) if token in choice.text else 0  # an end token is not shown
            assert choice.logprobs.text_offset == expected
            assert place == len(choice.text)
            for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
                assert choice.text[offset:].startswith(token) or offset == len(choice.text)
    call["prompt"] = PROMPT
    whole = client.completions.create(**call, extra_body={"mode": mode}).choices[0].logprobs.text_offset
    assert streamed_offsets(client, **call, extra_body={"mode": mode}) == whole
    # A stop string cuts the text, and its tokens stand where it would have been.
    cut = client.completions.create(**call, stop="56", extra_body={"mode": mode}).choices[0]
    assert cut.logprobs.text_offset == whole[: len(cut.logprobs.text_offset)]
    assert cut.logprobs.text_offset[-1] >= len(cut.text)


@pytest.mark.parametrize(
    ("pieces", "offsets"),
    [
        (["a", "€", "é", "b"], [0, 1, 1, 1, 2, 2, 3]),
        (["a", b"\xe2", "b", "c"], [0, 1, 2, 3]),
        (["a", b"\xe2\x82", "b"], [0, 1, 1, 2]),
        (["a", "\U0001f600"], [0, 1, 1, 1, 1]),
    ],
    ids=str,
)
def test_parts_of_a_character_have_its_offset(lm, client, monkeypatch, pieces, offsets):
    of = {bytes(token_bytes(lm.tokenizer, n, lm.tokenizer.decode([n]))): n for n in range(len(lm.tokenizer))}
    said = [of[bytes([byte])] for piece in pieces for byte in (piece.encode() if isinstance(piece, str) else piece)]
    call = {"model": "tiny-bd", "prompt": "Q", "max_tokens": len(said), "logprobs": 0, "extra_body": {"mode": "ar"}}
    say(monkeypatch, lm, said * 2)
    choice = client.completions.create(**call).choices[0]
    assert choice.text == "".join(p if isinstance(p, str) else "\ufffd" for p in pieces)
    assert choice.logprobs.text_offset == offsets
    assert streamed_offsets(client, **call) == offsets


def test_events_tell_each_token_at_the_step_that_decides_it(lm, place):
    body = {"model": "tiny-bd", "prompt": PROMPT, "max_tokens": 40, "stream": True, "events": True}
    for mode in MODES:
        answer = lm.generate(PROMPT, mode=mode, max_new_tokens=40).answers[0]
        decided, steps = {}, set()
        with httpx.stream("POST", f"{place[1]}/v1/completions", json={**body, "mode": mode}, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    for event in json.loads(line[6:])["events"] if '"events"' in line else []:
                        if event["type"] == "committed":
                            decided[event["offset"]] = event["text"]
                            steps.add(event["step"])
        assert [decided[n] for n in range(len(answer))] == [lm.tokenizer.decode([token]) for token in answer]
        assert (len(steps) < len(answer)) == (mode != "ar")


def test_an_unfinished_character_at_the_end_is_told_as_such(lm, place, monkeypatch):
    """A byte tokenizer may stop in the middle of a character."""
    euro = lm.tokenizer("€")["input_ids"]
    assert len(euro) == 3
    say(monkeypatch, lm, [*euro, *euro[:2]])
    body = {"prompt": "a", "max_tokens": 5, "mode": "ar"}
    text = ""
    with httpx.stream("POST", f"{place[1]}/v1/completions", json={**body, "stream": True}, timeout=60) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
    assert text == "€\ufffd"


def test_models_health_and_metrics(lm, client, place):
    assert [model.id for model in client.models.list()] == ["tiny-bd"]
    assert client.models.retrieve("tiny-bd").block_size == 32
    client.completions.create(model="tiny-bd", prompt=PROMPT, max_tokens=5)
    until(lambda: httpx.get(f"{place[1]}/health").json() == {"status": "ok", "running": 0, "waiting": 0})
    told = httpx.get(f"{place[1]}/metrics").text
    for name in ("requests_total", "generated_tokens_total", "forwards_total", "rows_running", "prompt_tokens_total"):
        assert f"nextblock_{name}" in told
    assert 'nextblock_requests_total{path="/v1/completions",status="200"}' in told
    assert "Leo" not in told


# ------------------------------------------------------------------------------------------- bad input


CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        (TEXT, {"prompt": "a", "model": "gpt-9"}, 404, "use 'tiny-bd'"),
        (TEXT, {}, 400, "prompt is missing"),
        (TEXT, {"prompt": ""}, 400, "empty"),
        (TEXT, {"prompt": []}, 400, "prompt must be"),
        (TEXT, {"prompt": ["a", 3]}, 400, "prompt must be"),
        (TEXT, {"prompt": [[10**30]]}, 400, "vocabulary"),
        (TEXT, {"prompt": [-1]}, 400, "vocabulary"),
        (TEXT, {"prompt": "a" * 5000}, 400, "context"),
        (TEXT, {"prompt": "a\ud800"}, 400, "prompt 0"),
        (TEXT, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens=-1 must be at least 1"),
        (TEXT, {"prompt": "a", "max_tokens": 10**9}, 400, "ask for less"),
        (TEXT, {"prompt": "a", "max_tokens": 5, "max_completion_tokens": 6}, 400, "different"),
        (TEXT, {"prompt": "a", "temperature": -1}, 400, "temperature=-1"),
        (TEXT, {"prompt": "a", "temperature": "hot"}, 400, 'temperature="hot" is not a number'),
        (TEXT, {"prompt": "a", "top_p": 7}, 400, "top_p=7"),
        (TEXT, {"prompt": "a", "n": 0}, 400, "n=0"),
        (TEXT, {"prompt": "a", "n": 10**9}, 400, "n=1000000000 must"),
        (TEXT, {"prompt": "a", "n": 100}, 400, "at most 8"),
        (TEXT, {"prompt": ["a"] * 9}, 400, "at most 8"),
        (TEXT, {"prompt": "a", "seed": 2**70}, 400, "seed="),
        (TEXT, {"prompt": "a", "stop": [1]}, 400, "stop must be"),
        (TEXT, {"prompt": "a", "stop": ""}, 400, "stop must be"),
        (TEXT, {"prompt": "a", "mode": "difusion"}, 400, "did you mean 'diffusion'"),
        (TEXT, {"prompt": "a", "block_size": 0}, 400, "block_size=0"),
        (TEXT, {"prompt": "a", "sub_blocks": 3}, 400, "does not divide"),
        (TEXT, {"prompt": "a", "temprature": 1}, 400, "did you mean 'temperature'"),
        (TEXT, {"prompt": "a", "logprobs": 21, "mode": "ar"}, 400, "logprobs=21 must lie in [0, 20]"),
        (TEXT, {"prompt": "a", "logprobs": -1, "mode": "ar"}, 400, "logprobs=-1"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2}, 400, "logprobs=true"),
        (TEXT, {"prompt": "a", "logprobs": 0, "mode": "diffusion"}, 400, "diffusion mode"),
        (TEXT, {"prompt": "a", "frequency_penalty": 0.5}, 400, "leave frequency_penalty out"),
        (TEXT, {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream=true"),
        (TEXT, {"prompt": "a", "block_size": 600}, 400, "block_size=600 makes passes of 600 tokens"),
        (TEXT, {"prompt": "a", "block_size": 64, "mode": "speculative", "draft_ahead": 10**9}, 400, "at most 512"),
        (TEXT, {"prompt": "a", "block_size": 64, "mode": "speculative", "draft_paths": 99}, 400, "98 drafts beside"),
        (TEXT, {"prompt": "a", "top_p": ["x" * 9000]}, 400, "x is not a number"),
        (TEXT, {"prompt": "a", "max_tokens": "5"}, 400, 'max_tokens="5" is not a whole number'),
        (TEXT, {"prompt": "a", "temperature": "0.5"}, 400, 'temperature="0.5" is not a number'),
        (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, 400, "role='robot' is unknown; choose from system"),
        (CHAT, {"messages": []}, 400, "messages is empty; give at least one"),
        (CHAT, {"messages": None}, 400, "messages=None is not a list"),
        (CHAT, {"messages": [5]}, 400, "messages.0=5 is not a mapping"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, 400, "no text"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "no content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only parts of type 'text'"),
        (CHAT, {"messages": "hello"}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]}, 400, "tools"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "prompt": "a"}, 400, "unknown key 'prompt'"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_line_that_says_what_to_do(place, path, body, status, said):
    content = json.dumps({"model": "tiny-bd", **body})
    response = httpx.post(f"{place[1]}{path}", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert said in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500


DEEP = b'{"prompt":' + b"[" * 99 + b"]" * 99 + b"}"
NO_BODIES = [b"", b"{", b"[]", b'"a"', b"\xff\xfe", b'{"n": NaN, "prompt": "a"}', b"[" * 9000, DEEP]


@pytest.mark.parametrize("content", NO_BODIES, ids=lambda content: repr(content[:20]))
def test_what_is_no_json_object_is_refused(place, content):
    response = httpx.post(f"{place[1]}{TEXT}", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "body" in response.json()["error"]["message"]


def test_the_models_endpoint_tells_what_is_used_where_a_request_says_nothing(place):
    (model,) = httpx.get(f"{place[1]}/v1/models").json()["data"]
    assert model["defaults"].items() >= {"mode": "diffusion", "threshold": 0.9, "temperature": 0.0}.items()


def test_prompts_longer_than_the_context_are_not_promised():
    lm = nb.load("tiny-bd")
    with pytest.raises(UsageError, match="max_prompt=100000 is more than the model's context of 2048; lower it"):
        run(lm, "tiny-bd", socket.socket(), limits=Limits(max_prompt=100_000))


def test_fields_that_change_nothing_are_accepted(place):
    body = {"prompt": "a", "max_tokens": 3, "user": "me", "frequency_penalty": 0, "temperature": None, "echo": False}
    assert post(place, TEXT, **body).status_code == 200


def test_other_paths_and_methods_and_forms_get_errors_of_the_same_shape(place):
    for response, status in (
        (httpx.get(f"{place[1]}/v1/nothing"), 404),
        (httpx.get(f"{place[1]}{TEXT}"), 405),
        (httpx.post(f"{place[1]}{TEXT}", data={"prompt": "a"}), 415),
        (httpx.get(f"{place[1]}/v1/models/other"), 404),
        (post(place, TEXT, prompt="a" * 30000), 413),
    ):
        assert response.status_code == status
        assert response.json()["error"]["message"]
        assert "access-control-allow-origin" not in response.headers


def test_a_body_without_a_declared_length_is_bounded_as_well(place):
    def parts():
        for _ in range(100):
            yield b" " * 1000

    headers = {"Content-Type": "application/json"}
    assert httpx.post(f"{place[1]}{TEXT}", content=parts(), headers=headers).status_code == 413


def test_a_model_without_a_template_refuses_chats_and_one_without_settings_decodes_token_by_token(lm):
    plain = nb.load("tiny-ar")
    plain.tokenizer.chat_template = None
    with served(plain, "tiny-ar") as place:
        response = post(place, CHAT, model="tiny-ar", messages=[{"role": "user", "content": "a"}])
        assert response.status_code == 400
        assert "no chat template" in response.json()["error"]["message"]
        found = post(place, TEXT, model="tiny-ar", prompt=PROMPT, max_tokens=40).json()
        assert found["choices"][0]["text"] == plain.generate(PROMPT, mode="ar", max_new_tokens=40).texts[0]
        refused = post(place, TEXT, model="tiny-ar", prompt=PROMPT, mode="diffusion")
        assert refused.status_code == 400
        assert "ar mode only" in refused.json()["error"]["message"].replace("in ar mode only", "ar mode only")


# ------------------------------------------------------------------------------------------- manners


def test_a_key_is_asked_for_where_there_is_one(lm):
    with served(lm, key="secret") as place:
        for key in (b"", b"Bearer wrong", b"secret", "Bearer sécret".encode()):
            headers = {b"Authorization": key}
            for response in (
                httpx.get(f"{place[1]}/v1/models", headers=headers),
                httpx.post(f"{place[1]}{TEXT}", json={"prompt": "a"}, headers=headers),
            ):
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
        with openai.OpenAI(base_url=f"{place[1]}/v1", api_key="secret") as client:
            assert client.completions.create(model="tiny-bd", prompt="a", max_tokens=2).choices
        assert httpx.get(f"{place[1]}/health").status_code == 200


SECRET = "the merger of Leo and Ada"


def fails(*_, **__):
    raise ValueError(f"no good: {SECRET}")


@pytest.mark.parametrize("log_prompts", [False, True])
def test_prompts_are_in_the_log_only_when_asked_also_those_in_errors(monkeypatch, caplog, capfd, log_prompts):
    lm = nb.load("tiny-bd")
    caplog.set_level("INFO", "nextblock.server")

    def logged():
        found = caplog.text + "".join(capfd.readouterr())
        caplog.clear()
        return found

    with served(lm, log_prompts=log_prompts) as place:
        chat = [{"role": "user", "content": SECRET}]
        assert post(place, CHAT, messages=chat, max_tokens=3).status_code == 200
        assert (SECRET in logged()) == log_prompts
        assert post(place, TEXT, prompt=SECRET, max_tokens=3, sub_blocks=7).status_code == 400
        assert (SECRET in logged()) == log_prompts
        assert post(place, TEXT, prompt=SECRET, temprature=1).status_code == 400
        assert SECRET not in logged()  # never understood
        engine = place[0].engine
        broken = [(app, "make_request"), (TextStream, "put"), (type(lm.decoder), "hidden"), (engine, "_round")]
        for (target, name), stream in [*itertools.product(broken[:3], (False, True)), (broken[3], False)]:
            with monkeypatch.context() as patch:
                patch.setattr(target, name, fails)
                answer = post(place, TEXT, prompt="Q:", max_tokens=9, stream=stream)
            assert answer.status_code == 500 or stream
            assert "ValueError" in answer.text or name == "_round"
            assert SECRET not in answer.text
            found = logged()
            assert (SECRET in found) == log_prompts
            assert "ValueError" in found
            assert "in fails" in found  # where it happened
        assert not engine.alive


def begin(place, **body):
    """A connection on which a stream has begun."""
    host, port = place[1].removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)
    content = json.dumps(
        {"prompt": "Q:", "stream": True, "max_tokens": 400, "mode": "ar", "stop": "\x00never", **body}
    )
    connection.request("POST", TEXT, content, {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def test_a_client_that_goes_away_frees_its_row(place):
    server = place[0]
    for stream in (True, False):
        until(lambda: server.engine.rows == 0)
        passes = server.engine.stats.forwards
        if stream:
            connection, response = begin(place, temperature=2.0, seed=1)
            response.read(200)
            response.close()
            connection.close()
        else:
            host, port = place[1].removeprefix("http://").split(":")
            plain = socket.create_connection((host, int(port)))
            content = json.dumps({"prompt": "Q:", "max_tokens": 400, "mode": "ar", "temperature": 2.0, "seed": 1})
            plain.sendall(
                f"POST {TEXT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "
                f"{len(content)}\r\n\r\n{content}".encode()
            )
            until(lambda: server.engine.rows == 1)
            plain.close()
        until(lambda: server.engine.rows == 0 and not server.engine._running)
        assert server.engine.stats.forwards - passes < 400


def test_too_many_requests_are_told_to_come_back(lm):
    with served(lm, limits=Limits(max_rows=1, max_waiting=1)) as place:
        held = [begin(place, temperature=2.0, seed=n, max_tokens=1500) for n in range(2)]
        response = post(place, TEXT, prompt="a")
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) > 0
        for connection, answer in held:
            answer.close()
            connection.close()
        until(lambda: place[0].engine.rows == place[0].engine.waiting == 0)
        assert post(place, TEXT, prompt="a", max_tokens=2).status_code == 200


def test_a_client_that_reads_nothing_stalls_nobody_and_is_given_up(lm):
    with served(lm, limits=Limits(send_seconds=0.5)) as place:
        host, port = place[1].removeprefix("http://").split(":")
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        body = {"prompt": "Q:", "stream": True, "events": True, "n": 16, "max_tokens": 1900, "mode": "ar"}
        content = json.dumps({**body, "temperature": 2.0, "seed": 1})
        slow.sendall(
            f"POST {TEXT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "
            f"{len(content)}\r\n\r\n{content}".encode()
        )
        until(lambda: place[0].engine.rows > 0)
        other = post(place, TEXT, prompt=PROMPT, max_tokens=30)
        assert other.json()["choices"][0]["text"] == lm.generate(PROMPT, max_new_tokens=30).texts[0]
        until(lambda: place[0].engine.rows == 0, 60)
        slow.close()


def test_an_address_in_use_is_told_in_one_line():
    listener = listen("127.0.0.1", 0)
    listener.listen()
    port = listener.getsockname()[1]
    with pytest.raises(UsageError, match=f"cannot listen at 127.0.0.1:{port}: .*choose another"):
        listen("127.0.0.1", port)
    for port in (70000, -1):
        with pytest.raises(UsageError, match="choose another"):
            listen("127.0.0.1", port)
    listener.close()
