"""The application: paths of OpenAI's API, each a function from a body to an answer."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qwen_jax import strict_json
from qwen_jax.api import Model
from qwen_jax.completions import Piece
from qwen_jax.errors import UserError
from qwen_jax.options import Options
from qwen_jax.scoring import Scored, ToScore
from qwen_jax.serving import asked, page
from qwen_jax.serving.asked import Asked
from qwen_jax.serving.guard import Guard
from qwen_jax.serving.limits import Key, Limits
from qwen_jax.serving.metrics import Metrics
from qwen_jax.serving.refusal import RefusalError, hiding
from qwen_jax.serving.replies import ChatReply, Models, Reply, TextReply
from qwen_jax.serving.worker import Answers, Work, Worker
from qwen_jax.terminal import json_visible

BODY_SECONDS = 30.0
"""In which a body has to arrive."""
UNREAD_SECONDS = 30.0
"""For which a stream's end may wait to be read, once it has taken as long as it may."""
GONE = 499
"""nginx's status of a caller who has left; nobody sees it but the log."""


class Server:
    """A model behind HTTP.

    Args:
        model: nobody else may use it meanwhile.
        name: what callers call it.
        defaults: how requests are answered that don't say.
        limits: what is let through.
        key: what callers have to know; None lets all of them in.
    """

    def __init__(
        self, model: Model, name: str, defaults: Options, limits: Limits, key: Key | None = None
    ):
        self._model, self.name, self._defaults, self._limits = model, name, defaults, limits
        self._models = Models(name, int(time.time()), model.config.context_length)
        self.worker = Worker(model, limits.queue)
        self._metrics = Metrics(self.worker)
        self._hide = hiding((model.config.source, model.tokenizer.source))
        routes = [
            Route("/", self._page, methods=["GET"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._text, methods=["POST"]),
            Route("/v1/embeddings", self._embeddings, methods=["POST"]),
            Route("/v1/models", self._list, methods=["GET"]),
            Route("/v1/models/{name:path}", self._entry, methods=["GET"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/detokenize", self._detokenize, methods=["POST"]),
            Route("/tokenizer_info", self._tokenizer_info, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._show_metrics, methods=["GET"]),
        ]
        guard = Middleware(
            Guard,
            limits=limits,
            key=key,
            metrics=self._metrics,
            paths=[route.path for route in routes],
        )
        self.app = Starlette(
            routes=routes,
            middleware=[guard],
            lifespan=self._life,
            exception_handlers={
                RefusalError: self._refused,
                UserError: self._mistaken,
                HTTPException: self._not_there,
                ClientDisconnect: _gone,
                Exception: self._failed,
            },
        )

    @contextlib.asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        self.worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.worker.close)

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RefusalError)
        return JSONResponse(error.body(self._hide), error.status, error.headers)

    async def _mistaken(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, UserError)
        return await self._refused(request, RefusalError.of(error))

    async def _not_there(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        paths = ", ".join(sorted(route.path for route in request.app.routes))
        text = f"{request.method} {request.url.path:.100}: {error.detail}; there are {paths}."
        refusal = RefusalError(error.status_code, text, headers=error.headers)
        return await self._refused(request, refusal)

    async def _failed(self, request: Request, error: Exception) -> Response:
        text = f"The server failed: {type(error).__name__}; its log says more."
        return await self._refused(request, RefusalError(500, text))

    async def _page(self, request: Request) -> Response:
        return page.response()

    async def _chat(self, request: Request) -> Response:
        return await self._complete(request, asked.chat, ChatReply)

    async def _text(self, request: Request) -> Response:
        return await self._complete(request, asked.text, TextReply)

    async def _complete(
        self,
        request: Request,
        understand: Callable[[Mapping[str, Any], Options], Asked],
        form: type[Reply],
    ) -> Response:
        begun = time.perf_counter()
        body = await self._body(request)
        wanted = understand(body, self._defaults)
        self.worker.check_room(wanted.answers)
        most = self._limits.max_prompt_tokens
        requests: list[Work] = list(await asyncio.to_thread(wanted.requests, self._model, most))
        reply = form(wanted, self._model.tokenizer, self.name)
        scored: list[int] = []
        if wanted.echo:
            prompts = [request.tokens for request in requests[:: wanted.n]]
            for prompt in prompts:
                reply.repeat(prompt)
            if wanted.scores:
                scored = [place for place, prompt in enumerate(prompts) if len(prompt) > 1]
            to_score = [ToScore(prompts[place]) for place in scored]
            requests = [*to_score, *([] if wanted.silent else requests)]
        answers = self.worker.submit(requests)
        timeout = self._limits.timeout
        answering = _Answering(answers, scored, reply, begun, timeout, self._metrics, self._hide)
        if wanted.stream:
            return _Stream(answering)
        try:
            return await _unless_gone(request, answering.whole())
        finally:
            answers.close()

    async def _tokenize(self, request: Request) -> Response:
        body = await self._body(request)
        found = await asyncio.to_thread(asked.tokens, body, self._model)
        context = self._model.config.context_length
        return JSONResponse({"tokens": found, "count": len(found), "max_model_len": context})

    async def _detokenize(self, request: Request) -> Response:
        body = await self._body(request)
        return JSONResponse({"prompt": await asyncio.to_thread(asked.text_of, body, self._model)})

    async def _tokenizer_info(self, request: Request) -> Response:
        tokenizer = self._model.tokenizer
        end = tokenizer.decode(tokenizer.stop_ids[:1], skip_special=False)
        named = {"eos_token": end, "bos_token": None, "pad_token": None}
        template = {"chat_template": tokenizer.chat_template}
        return JSONResponse({**named, **tokenizer.special_tokens, **template})

    async def _list(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._models.entry()]})

    async def _entry(self, request: Request) -> Response:
        self._check_name(request.path_params["name"])
        return JSONResponse(self._models.entry())

    async def _embeddings(self, request: Request) -> Response:
        text = "Qwen2.5 is trained to write and not to embed; ask a server of an embedding model."
        raise RefusalError(400, text, code="unsupported")

    async def _health(self, request: Request) -> Response:
        if not self.worker.alive:
            raise RefusalError(503, "The engine's thread has ended; start the server again.")
        return JSONResponse({"status": "ok"})

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _body(self, request: Request) -> dict[str, Any]:
        """The object that a request holds, and that names this model, if any.

        A page of another origin can't ask: a browser lets it send JSON only to who allows that.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            text = f"The content type is {kind!r:.60}; send JSON, as 'application/json'."
            raise RefusalError(415, text)
        body = strict_json.parse_object(await self._bytes(request), "the body")
        if self._limits.log_prompts:
            shown = {k: body[k] for k in ("prompt", "messages") if k in body}
            print(json_visible(json.dumps(shown, ensure_ascii=False)), file=sys.stderr, flush=True)
        if isinstance(body.get("model"), str):
            self._check_name(body["model"])
        return body

    async def _bytes(self, request: Request) -> bytes:
        most, data = self._limits.max_body, bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    data += part
                    if len(data) > most:
                        text = f"The body has more than {most} bytes; send less."
                        raise RefusalError(413, text, headers={"Connection": "close"})
        except TimeoutError:
            text = f"The body has not arrived in {BODY_SECONDS:.0f} s; send it at once."
            raise RefusalError(408, text, headers={"Connection": "close"}) from None
        return bytes(data)

    def _check_name(self, name: str) -> None:
        if name != self.name:
            text = f"There is no model {name!r:.80}, only {self.name!r}."
            raise RefusalError(404, text, param="model", code="model_not_found")


class _Answering:
    """What comes of one body's answers, whole or as a stream.

    Args:
        answers: of what was asked of the engine, the prompts to be scored first.
        scored: places of these.
        hide: what is not for callers, of a message.
    """

    def __init__(
        self,
        answers: Answers,
        scored: Sequence[int],
        reply: Reply,
        begun: float,
        timeout: float,
        metrics: Metrics,
        hide: Callable[[str], str],
    ):
        self.answers, self._reply, self._timeout = answers, reply, timeout
        self._scored, self._hide = scored, hide
        self._begun, self._metrics, self._begins = begun, metrics, True

    @property
    def left(self) -> float:
        """Seconds."""
        return self._timeout - (time.perf_counter() - self._begun)

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        until = asyncio.get_running_loop().time() + self.left
        async with contextlib.aclosing(self.answers.pieces()) as pieces:
            while True:
                try:
                    async with asyncio.timeout_at(until):
                        index, news = await anext(pieces)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    text = f"The answer has taken more than {self._timeout:g} s; ask for less."
                    raise RefusalError(504, text, code="timeout") from None
                if self._begins:
                    self._begins = False
                    self._metrics.began(time.perf_counter() - self._begun)
                if isinstance(news, Scored):
                    self._reply.score(self._scored[index], news.score)
                    continue
                index -= len(self._scored)
                if news.completion is not None:
                    self._reply.end(index, news.completion)
                yield index, news

    async def whole(self) -> Response:
        async for _ in self._pieces():
            pass
        return JSONResponse(self._reply.whole())

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events; the last is [DONE], or an error where the answer ends by one."""
        reply = self._reply
        for choice in reply.begin():
            yield _event(reply.chunk(choice))
        try:
            async for index, piece in self._pieces():
                for choice in reply.delta(index, piece):
                    yield _event(reply.chunk(choice))
        except RefusalError as error:
            yield _event(error.body(self._hide))
            return
        if reply.counts:
            yield _event(reply.chunk(usage=True))
        yield b"data: [DONE]\n\n"


class _Stream(StreamingResponse):
    """Frees the slots however it ends, even before its first event, and ends where a caller does
    not read."""

    def __init__(self, answering: _Answering):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(answering.events(), media_type="text/event-stream", headers=headers)
        self._answers, self._seconds = answering.answers, answering.left + UNREAD_SECONDS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await super().__call__(scope, receive, send)
        except TimeoutError:  # and the connection with it: uvicorn closes what is incomplete
            print("A caller has not read its stream, which is given up.", file=sys.stderr)
        finally:
            self._answers.close()


def _event(value: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


async def _unless_gone(request: Request, work: Any) -> Response:
    """The work's answer, which is given up where the caller has left."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(leave())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)
