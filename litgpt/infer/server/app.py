"""The routes of the server."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from litgpt.errors import UserError
from litgpt.infer.requests import GeneratedToken
from litgpt.infer.server import chat_page
from litgpt.infer.server.contents import find_urls
from litgpt.infer.server.engine_thread import EngineThread, QueueFull
from litgpt.infer.server.errors import ApiError, add_error_handlers, describe_user_error, write_error
from litgpt.infer.server.metrics import Metrics
from litgpt.infer.server.model import Job, ServedModel, list_prompts
from litgpt.infer.server.request_checks import check_key, check_size
from litgpt.infer.server.responses import ResponseWriter
from litgpt.infer.server.schemas import Body, ChatCompletion, Completion, Prediction
from litgpt.infer.server.url_files import FetchLimits, UrlFiles

Result = TypeVar("Result")
OPEN_PATHS = ("/health", *chat_page.FILES)  # GET needs no API key
DISCONNECT_SECONDS = 0.2  # how often a request that is not streamed looks whether its client has left


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server.

    Attributes:
        api_key: that clients send as `Authorization: Bearer KEY`; None for no key.
        max_body_bytes: larger requests are refused.
        timeout: seconds that a request waits for its first token.
        predict_path: LitGPT's own route; None for none.
        stream: whether that route answers in pieces.
        fetch_limits: of the files at URLs in messages; None to fetch none.
    """

    api_key: str | None
    max_body_bytes: int
    timeout: float
    predict_path: str | None
    stream: bool
    fetch_limits: FetchLimits | None = None


class Server:
    """Answers requests with a model, and with adapters of it.

    Args:
        models: the first one answers requests that name none.
    """

    def __init__(self, models: Sequence[ServedModel], thread: EngineThread, settings: ServerSettings) -> None:
        self.models = {model.name: model for model in models}
        self.model, self.thread, self.settings = models[0], thread, settings
        self.metrics, self.started = Metrics(thread), int(time.time())
        self.url_files = None if settings.fetch_limits is None else UrlFiles(settings.fetch_limits)

    async def health(self) -> Response:
        """Whether the engine runs."""
        return JSONResponse(
            {"status": "ok"} if self.thread.is_alive() else {"status": "stopped"},
            200 if self.thread.is_alive() else 503,
        )

    async def list_models(self) -> dict[str, Any]:
        """The models."""
        return {"object": "list", "data": [self._describe_model(model) for model in self.models.values()]}

    async def get_model(self, name: str) -> dict[str, Any]:
        """A model, by its name."""
        return self._describe_model(self._find_model(name))

    def _describe_model(self, model: ServedModel) -> dict[str, Any]:
        about = {"id": model.name, "object": "model", "created": self.started, "owned_by": "litgpt"}
        base = {} if model is self.model else {"parent": self.model.name}
        return {**about, **base, "max_model_len": model.model.config.block_size}

    def _find_model(self, name: str | None) -> ServedModel:
        """The model of a request.

        Raises:
            ApiError: 404 if there is none of this name.
        """
        if name is None:
            return self.model
        if name not in self.models:
            message = f"The model {name!r} does not exist; use {' or '.join(map(repr, self.models))}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.models[name]

    async def show_metrics(self) -> Response:
        """Counters for Prometheus."""
        return Response(self.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def complete(self, body: Completion, request: Request) -> Response:
        """Continue prompts."""
        model = self._find_model(body.model)
        self._check_count(len(list_prompts(body.prompt)) * body.n)
        job = await asyncio.to_thread(model.start_completion, body)
        if body.echo and body.logprobs is not None:
            raise ApiError(400, "echo: true is not supported with logprobs; leave one of them out", param="echo")
        if body.echo and len({r.prompt for r in job.requests}) > 1:
            raise ApiError(400, "echo: is not supported with several prompts; send them one by one", param="echo")
        echo = model.tokenizer.decode(list(job.requests[0].prompt)) if body.echo else ""
        has_logprobs = body.logprobs is not None
        return await self._answer(body, model, job, request, is_chat=False, has_logprobs=has_logprobs, echo=echo)

    async def chat(self, body: ChatCompletion, request: Request) -> Response:
        """Write the next message of a chat."""
        model = self._find_model(body.model)
        self._check_count(body.n)
        job = await run_until_disconnect(self._start_chat(model, body), request)
        return await self._answer(body, model, job, request, is_chat=True, has_logprobs=body.logprobs)

    async def _start_chat(self, model: ServedModel, body: ChatCompletion) -> Job:
        """The requests of a chat, whose files are fetched if the server does that."""
        if self.url_files is None:
            return await asyncio.to_thread(model.start_chat, body)
        urls = find_urls((message.content for message in body.messages), model.defaults.media)
        async with self.url_files.fetch(urls) as files:
            return await asyncio.to_thread(model.start_chat, body, files)

    def _check_count(self, count: int) -> None:
        """Check that the texts of a request can wait at all, before its prompts are encoded."""
        if count > self.thread.max_waiting:
            message = f"{count} texts are more than may wait ({self.thread.max_waiting}); send fewer at a time"
            raise ApiError(429, message, kind="rate_limit_error", code="queue_full")

    async def predict(self, body: Prediction, request: Request) -> Response:
        """LitGPT's own route: `output` for a prompt, or pieces of it."""
        job = await asyncio.to_thread(self.model.start_prediction, body.prompt, self.model.defaults.max_new_tokens)
        tokens = await run_until_disconnect(self._start(self.model, job), request)
        if not self.settings.stream:
            await run_until_disconnect(self._collect(job, tokens), request)
            return JSONResponse({"output": job.answers[0].text})

        async def write() -> AsyncIterator[str]:
            async for _, token in tokens:
                if piece := job.answers[0].push(token):
                    yield json.dumps({"output": piece}) + "\n"
                if job.answers[0].finish_reason is not None:
                    break

        return StreamingResponse(close_after(write(), tokens), media_type="application/x-ndjson")

    async def _answer(
        self,
        body: Body,
        model: ServedModel,
        job: Job,
        request: Request,
        *,
        is_chat: bool,
        has_logprobs: bool,
        echo: str = "",
    ) -> Response:
        writer = ResponseWriter(
            is_chat=is_chat, name=model.name, tokenizer=model.tokenizer, has_logprobs=has_logprobs, echo=echo
        )
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options: needs stream: true", param="stream_options")
        tokens = await run_until_disconnect(self._start(model, job), request)
        if not body.stream:
            await run_until_disconnect(self._collect(job, tokens), request)
            return JSONResponse(writer.write_whole(job))
        has_usage = body.stream_options is not None and body.stream_options.include_usage
        events = write_events(self._stream(job, tokens, writer, has_usage=has_usage))
        return StreamingResponse(close_after(events, tokens), media_type="text/event-stream")

    async def _start(self, model: ServedModel, job: Job) -> AsyncIterator[tuple[int, GeneratedToken]]:
        """Submit the requests, and wait for the first token, whose errors have a status."""
        if not self.thread.is_alive():
            raise ApiError(503, "the engine has stopped", kind="server_error")
        start, tokens = time.perf_counter(), self.thread.generate(model.engine, job.requests)
        try:
            first = await asyncio.wait_for(anext(tokens), self.settings.timeout)
        except TimeoutError:
            seconds = self.settings.timeout
            await tokens.aclose()  # type: ignore[attr-defined]
            raise ApiError(504, f"no token within timeout: {seconds:g} seconds", kind="server_error") from None
        except QueueFull:
            message = f"{self.thread.waiting} requests wait already; try again later"
            raise ApiError(429, message, kind="rate_limit_error", code="queue_full") from None
        self.metrics.first_token.observe(time.perf_counter() - start)
        self.metrics.prompt_tokens.inc(sum(len(r.prompt) for r in job.requests))
        return self._continue(first, tokens)

    async def _continue(
        self, first: tuple[int, GeneratedToken], tokens: AsyncIterator[tuple[int, GeneratedToken]]
    ) -> AsyncIterator[tuple[int, GeneratedToken]]:
        try:
            self.metrics.generated_tokens.inc()
            yield first
            async for item in tokens:
                self.metrics.generated_tokens.inc()
                yield item
        finally:
            await tokens.aclose()  # type: ignore[attr-defined]

    async def _collect(self, job: Job, tokens: AsyncIterator[tuple[int, GeneratedToken]]) -> None:
        """Wait for all answers."""
        try:
            async for index, token in tokens:
                if job.answers[index].finish_reason is None:
                    job.answers[index].push(token)
                if all(answer.finish_reason is not None for answer in job.answers):
                    break
        finally:
            await tokens.aclose()  # type: ignore[attr-defined]

    async def _stream(
        self, job: Job, tokens: AsyncIterator[tuple[int, GeneratedToken]], writer: ResponseWriter, *, has_usage: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """The pieces of all answers, as their tokens arrive."""
        for index in range(len(job.answers)):
            if writer.is_chat or writer.echo:
                yield writer.write_first(index)
        unsent: list[list[GeneratedToken]] = [[] for _ in job.answers]
        async for index, token in tokens:
            answer = job.answers[index]
            if answer.finish_reason is not None:
                continue
            unsent[index].append(token)
            if (text := answer.push(token)) or answer.finish_reason is not None:
                yield writer.write_piece(index, answer, text, unsent[index])
                unsent[index] = []
            if all(answer.finish_reason is not None for answer in job.answers):
                break
        if has_usage:
            yield writer.write_usage(job)


async def write_events(pieces: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Pieces as server-sent events; an error after the first of them is an event too."""
    try:
        async for piece in pieces:
            yield f"data: {json.dumps(piece, ensure_ascii=False)}\n\n"
    except UserError as error:
        yield f"data: {json.dumps(describe_user_error(error).to_body())}\n\n"
    yield "data: [DONE]\n\n"


async def close_after(pieces: AsyncIterator[str], tokens: Any) -> AsyncIterator[str]:
    """The pieces; the requests are cancelled when the client leaves."""
    try:
        async for piece in pieces:
            yield piece
    finally:
        await tokens.aclose()


async def run_until_disconnect(work: Awaitable[Result], request: Request) -> Result:
    """The result of some work, which is cancelled if the client leaves."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait([task], timeout=DISCONNECT_SECONDS))[0]:
            if await request.is_disconnected():
                raise ApiError(499, "the client has left")
        return await task
    finally:
        task.cancel()


def build_app(server: Server) -> FastAPI:
    """The application of a server, which starts and stops its engine."""

    @asynccontextmanager
    async def run_engine(_app: FastAPI) -> AsyncIterator[None]:
        server.thread.start()
        yield
        await asyncio.to_thread(server.thread.close)

    app = FastAPI(title="litgpt", lifespan=run_engine, docs_url=None, redoc_url=None)
    app.get("/health")(server.health)
    app.get("/metrics")(server.show_metrics)
    app.get("/v1/models")(server.list_models)
    app.get("/v1/models/{name:path}")(server.get_model)
    app.post("/v1/completions")(server.complete)
    app.post("/v1/chat/completions")(server.chat)
    if server.settings.predict_path is not None:
        app.post(server.settings.predict_path)(server.predict)
    for path in chat_page.FILES:
        app.get(path)(chat_page.send_file)
    add_error_handlers(app)

    @app.middleware("http")
    async def check(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            check_request(server.settings, request)
            response = await call_next(request)
        except ApiError as error:
            response = write_error(error)
        route = request.scope.get("route")
        path = getattr(route, "path", "other")
        server.metrics.requests.labels(path, str(response.status_code)).inc()
        return response

    return app


def check_request(settings: ServerSettings, request: Request) -> None:
    """Check key and size of a request.

    Raises:
        ApiError: 401, 411 or 413.
    """
    is_open = request.method == "GET" and request.url.path in OPEN_PATHS
    if settings.api_key is not None and not is_open:
        check_key(settings.api_key, request)
    check_size(settings.max_body_bytes, request)
