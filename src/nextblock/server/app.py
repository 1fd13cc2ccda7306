"""The endpoints: from a request to rows of the engine, and back to what an OpenAI client reads."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from nextblock.config.errors import UsageError
from nextblock.decoding.lm import BlockDiffusionLM
from nextblock.decoding.options import DecodingConfig, resolve_config, with_stored
from nextblock.decoding.request import Request as Rows
from nextblock.decoding.request import make_request
from nextblock.model.costs import Costs
from nextblock.server.answers import Answer, Choice, as_json
from nextblock.server.batching import Engine, Job, Progress, where
from nextblock.server.bodies import Body, ChatBody, TextBody, read_body
from nextblock.server.limits import Limits
from nextblock.server.metrics import Metrics

PAGE = Path(__file__).parent / "page"
FILES = {"": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
log = logging.getLogger(__name__)


class Refusal(Exception):
    """A request that is not answered: status, what to do, and where the fault lies."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class _Endpoint:
    """An ASGI application for bodies of one kind, which sees a client go away while it answers."""

    def __init__(self, answer: Callable[..., Awaitable[None]], kind: type[Body]) -> None:
        self.answer, self.kind = answer, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.answer(self.kind, scope, receive, send)


class Server:
    """One model, its engine and its endpoints. `app` is the ASGI application.

    name: what clients call the model. options: of `generate`, where a client gives none. key: API key; None: none.
    costs: as for `Engine`. log_prompts: each request is logged as it came, and errors with their messages.
    UsageError for options that every request without its own would be refused for.
    """

    def __init__(
        self,
        lm: BlockDiffusionLM,
        name: str,
        *,
        options: dict[str, Any] | None = None,
        limits: Limits | None = None,
        key: str | None = None,
        costs: Costs | None = None,
        log_prompts: bool = False,
    ) -> None:
        self.lm, self.name, self.key, self.log_prompts = lm, name, key, log_prompts
        self.limits = limits or Limits()
        self.options = ({} if lm.settings else {"mode": "ar"}) | (options or {})
        self.defaults = with_stored(lm.settings, self.options).model_dump(mode="json")
        self._check_width(resolve_config(lm.settings, self.options, drafted=lm.adapter is not None))
        self.engine = Engine(lm, self.limits.max_rows, self.limits.pass_tokens, costs, log_prompts)
        self.metrics = Metrics(self.engine)
        self.started = int(time.time())
        # A tokenizer is not used by two threads at once; and a long prompt must not hold the event loop.
        self._reader = ThreadPoolExecutor(1, "reader")
        self._promised = 0
        routes = [
            Route("/v1/chat/completions", _Endpoint(self.answer, ChatBody), methods=["POST"]),
            Route("/v1/completions", _Endpoint(self.answer, TextBody), methods=["POST"]),
            Route("/v1/models", self._plain(self._models)),
            Route("/v1/models/{name:path}", self._plain(self._models)),
            Route("/health", self._plain(self._health)),
            Route("/metrics", self._plain(self._metrics)),
            *(Route(f"/{file}", self._plain(self._page)) for file in FILES),
        ]
        handlers: dict[Any, Any] = {HTTPException: _http_error, Exception: _internal_error}
        self.app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self._reader.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.engine.close)

    # -------------------------------------------------------------------------------------- what only reads

    def _plain(self, endpoint: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            try:
                return endpoint(request)
            except Refusal as refusal:
                return _refused(refusal)

        return handle

    def _models(self, request: Request) -> Response:
        self._authorize(request)
        settings = self.lm.settings
        model = {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "nextblock",
            "max_model_len": self.lm.decoder.max_positions,
            "block_size": None if settings is None else settings.block_size,
            "modes": ["ar"] if settings is None else ["diffusion", "speculative", "ar"],
            "defaults": self.defaults,
        }
        if (name := request.path_params.get("name")) is None:
            return _json({"object": "list", "data": [model]})
        self._check_model(name)
        return _json(model)

    def _health(self, request: Request) -> Response:
        engine = self.engine
        told = {"status": "ok" if engine.alive else "dead", "running": engine.rows, "waiting": engine.waiting}
        return _json(told, 200 if engine.alive else 503)

    def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _page(self, request: Request) -> Response:
        file = request.url.path[1:]
        headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer", **SAFE}
        return Response((PAGE / (file or "index.html")).read_bytes(), headers=headers, media_type=FILES[file])

    # ------------------------------------------------------------------------------------------ what answers

    async def answer(self, kind: type[Body], scope: Scope, receive: Receive, client: Send) -> None:
        """The ASGI application of an endpoint. Whatever its end, its rows have then left the engine, or soon do."""
        began, status, started = time.perf_counter(), 500, False
        patient = _patient(client, self.limits.send_seconds)

        async def send(message: Message) -> None:
            nonlocal started
            started = True
            await patient(message)

        jobs: list[Job] = []
        stream = False
        try:
            request = Request(scope, receive)
            self._authorize(request)
            body = read_body(kind, await self._content(request))
            stream = body.stream
            self._check_model(body.model)
            if self.log_prompts:
                log.info("%s %s", scope["path"], as_json(body.model_dump(exclude_unset=True)).decode())
            answer, news = await self._submit(body, jobs)
            self.metrics.prompt_tokens.inc(answer.prompt_tokens)
            writing = asyncio.ensure_future(self._write(answer, news, began, scope, receive, send))
            gone = asyncio.ensure_future(_gone(receive))
            try:
                await asyncio.wait((writing, gone), return_when=asyncio.FIRST_COMPLETED)
                if writing.done():
                    writing.result()
                    status = 200
                else:
                    status = 499  # as nginx counts a client that closed the connection
            finally:
                for task in (writing, gone):
                    task.cancel()
                    with suppress(asyncio.CancelledError, Exception):
                        await task
        except UsageError as error:
            status = 400
            await _refused(_bad_input(error))(scope, receive, send)
        except Refusal as refusal:
            status = refusal.status
            await _refused(refusal)(scope, receive, send)
        except (TimeoutError, ClientDisconnect):
            status = 499
        except asyncio.CancelledError:  # the server stops, and the time that answers then have is over
            status, refusal = 503, Refusal(503, "the server stops, and cut this answer off; ask again later")
            with suppress(Exception):
                if not started:
                    await _refused(refusal)(scope, receive, send)
                elif stream:
                    await send(_error_chunk(refusal))
        except Exception as error:  # raised further, uvicorn would log its message, which may hold the prompt
            await _refused(self._failed(error, "the server failed"))(scope, receive, send)
        finally:
            for job in jobs:
                job.cancelled = True
            self.metrics.requests.labels(scope["path"], status).inc()

    def _failed(self, error: Exception, what: str) -> Refusal:
        log.error("a request failed:\n%s", where(error, self.log_prompts))
        return Refusal(500, f"{what} ({type(error).__name__}); try again, or see the server's log")

    def _authorize(self, request: Request) -> None:
        if self.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
            raise Refusal(
                401,
                "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                "invalid_api_key",
                WWW_Authenticate="Bearer",
            )

    async def _content(self, request: Request) -> bytes:
        """The body, of which no more is read than is allowed."""
        # A page of another site may send a form without asking, but not JSON: that takes CORS, which is off.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the body must be JSON; send the header `Content-Type: application/json`")
        most, content = self.limits.max_body, bytearray()
        too_large = Refusal(
            413, f"the body has more than {most} bytes; send less", "body_too_large", Connection="close"
        )
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.limits.send_seconds):
                async for part in request.stream():
                    content += part
                    if len(content) > most:
                        raise too_large
        except TimeoutError:
            raise Refusal(408, "the body did not come; send it at once", Connection="close") from None
        return bytes(content)

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.name):
            raise Refusal(404, f"model {name!r:.200} is not served here; use {self.name!r}", "model_not_found")

    async def _submit(self, body: Body, jobs: list[Job]) -> tuple[Answer, asyncio.Queue[tuple[int, Progress]]]:
        """Make rows of a request and give them to the engine; they are then in `jobs`."""
        limits, loop = self.limits, asyncio.get_running_loop()
        prompts = body.prompts
        count = len(prompts["input_ids"] if isinstance(prompts, dict) else prompts)
        if count > limits.max_rows:
            raise Refusal(
                400, f"the request asks for {count} answers; at most {limits.max_rows} are given, so send it in parts"
            )
        if (body.limit or 1) > limits.max_tokens:
            raise Refusal(
                400, f"max_tokens={body.limit} is more than the {limits.max_tokens} of this server; ask for less"
            )
        held = self.engine.rows + self.engine.waiting + self._promised
        if held + count > limits.max_rows + limits.max_waiting:
            raise Refusal(
                429,
                "the server has as many requests as it takes; try again in a second",
                "queue_full",
                Retry_After="1",
            )
        if not self.engine.alive:
            raise Refusal(503, "the engine stopped after an error; restart the server, whose log says why")
        self._promised += count
        try:
            rows = await loop.run_in_executor(self._reader, self._rows, body, prompts)
        finally:
            self._promised -= count
        news: asyncio.Queue[tuple[int, Progress]] = asyncio.Queue()
        for number, row in enumerate(rows.rows):

            def tell(progress: Progress, number: int = number) -> None:
                loop.call_soon_threadsafe(news.put_nowait, (number, progress))

            jobs.append(Job(row, rows.config, tell))
        texts = enumerate(zip(rows.stop, rows.opening, strict=True))
        choices = [Choice(n, self.lm.tokenizer, stop, body, opening) for n, (stop, opening) in texts]
        prompt_tokens = sum(len(row.prompt) for row in rows.rows[:: body.n])
        self.engine.submit(jobs)
        return Answer(self.name, body, choices, prompt_tokens), news

    def _rows(self, body: Body, prompts: Any) -> Rows:
        lm, most = self.lm, self.limits.max_prompt
        rows = make_request(lm.decoder, lm.tokenizer, lm.settings, prompts, {**self.options, **body.options})
        self._check_width(rows.config)
        if body.top is not None and rows.config.mode == "diffusion":
            raise UsageError(
                "logprobs are those of the AR head, which diffusion mode does not follow; use mode ar or speculative"
            )
        longest = max(len(row.prompt) for row in rows.rows)
        if most is not None and longest > most:
            raise UsageError(f"the prompt has {longest} tokens, more than the {most} of this server; send less")
        for row in rows.rows:
            row.limit, row.top = min(row.limit, self.limits.max_tokens), body.top or 0
            row.free = body.seed is None  # with a seed, what is drawn depends on the drafts: as `generate` makes them
        return rows

    def _check_width(self, config: DecodingConfig) -> None:
        """Refuse a block, or drafts side by side, that would make others wait for a pass of any length."""
        if self.lm.settings is None or config.block_size is None or config.mode == "ar":
            return
        block, most = config.block_size, max(self.limits.pass_tokens, self.lm.settings.block_size)
        beside = max(config.draft_ahead, config.draft_paths - 1) if config.mode == "speculative" else 0
        if (width := block * (1 + min(beside, block))) > most:
            said = f"block_size={block}" + (f" with {beside} drafts beside the first" if beside else "")
            raise UsageError(
                f"{said} makes passes of {width} tokens; at most {most} go here (--pass-tokens), so ask for less"
            )

    async def _write(
        self,
        answer: Answer,
        news: asyncio.Queue[tuple[int, Progress]],
        began: float,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Send the answer as it grows, or when it is whole. What waits to be sent is bounded by the answers' limit."""
        stream, first = answer.body.stream, True
        try:
            if stream:
                await send({"type": "http.response.start", "status": 200, "headers": STREAM})
                await send(_part(answer.first()))
            while not answer.done:
                waiting = [await news.get()]
                while not news.empty():
                    waiting.append(news.get_nowait())
                for number, progress in waiting:
                    if progress.error is not None:
                        raise progress.error
                    answer.choices[number].take(progress)
                if first and any(choice.tokens for choice in answer.choices):
                    self.metrics.first.observe(time.perf_counter() - began)
                    first = False
                if stream and (chunks := answer.news()):
                    await send(_part(chunks))
            if stream:
                await send(_part(answer.last(), more=False))
            else:
                await _json(answer.whole())(scope, receive, send)
            self.metrics.whole.observe(time.perf_counter() - began)
        except (TimeoutError, asyncio.CancelledError):
            raise
        except Exception as error:
            refusal = self._failed(error, "decoding failed")
            if not stream:
                raise refusal from None
            await send(_error_chunk(refusal))


SAFE = {"X-Content-Type-Options": "nosniff"}
STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
]


def _part(content: bytes, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


def _error_chunk(refusal: Refusal) -> Message:
    """The end of a stream that breaks off."""
    return _part(b"data: " + as_json(_shape(refusal)) + b"\n\n", more=False)


def _patient(send: Send, seconds: float) -> Send:
    """`send`, which waits for a slow client, but not for ever: TimeoutError."""

    async def within(message: Message) -> None:
        async with asyncio.timeout(seconds):
            await send(message)

    return within


async def _gone(receive: Receive) -> None:
    """Wait until the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(as_json(value), status, {**SAFE, **(headers or {})}, "application/json")


def _bad_input(error: UsageError) -> Refusal:
    said = " ".join(str(error).split())
    return Refusal(400, said, "context_length_exceeded" if "context" in said and "tokens" in said else None)


def _shape(refusal: Refusal) -> dict[str, Any]:
    """OpenAI's error object."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(refusal), "type": kind, "param": None, "code": refusal.code}}


def _refused(refusal: Refusal) -> Response:
    return _json(_shape(refusal), refusal.status, refusal.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    """No such path, or not with this method."""
    path = request.url.path
    said = {404: f"there is no {path!r:.200} here; see /v1/models", 405: f"{request.method} does not go with {path}"}
    return _refused(
        Refusal(error.status_code, said.get(error.status_code, str(error.detail)), **(error.headers or {}))
    )


async def _internal_error(request: Request, error: Exception) -> Response:
    log.error("a request failed: %s", type(error).__name__)
    return _refused(Refusal(500, f"the server failed ({type(error).__name__}); its log says more"))
