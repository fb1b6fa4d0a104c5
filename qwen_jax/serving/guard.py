"""Before and after every request: who may ask, what the log says, what is counted."""

import json
import sys
import time
from collections.abc import Collection
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen_jax.serving.limits import Key, Limits, host_is_local
from qwen_jax.serving.metrics import Metrics
from qwen_jax.serving.refusal import RefusalError
from qwen_jax.terminal import one_line

OPEN = ("/", "/health")
"""Paths that need no key: a page that asks for it, and what whoever restarts servers looks at."""


class Guard:
    """An application behind its door.

    Args:
        paths: those that there are; others are counted as one.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        key: Key | None,
        metrics: Metrics,
        paths: Collection[str],
    ):
        self._app, self._limits, self._key = app, limits, key
        self._metrics, self._paths = metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.perf_counter(), 499  # nginx's, of a caller who left before an answer

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, receive, noted)
            else:
                await _answer(refusal, noted)
        finally:
            seconds = time.perf_counter() - begun
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.ended(path, status, seconds)
            # As it stands in a URL, so that it can't pretend to be what comes after it.
            asked = f"{scope['method']} {quote(scope['path'][:200])}"
            print(one_line(f"{asked} {status} {seconds:.3f} s"), file=sys.stderr, flush=True)

    def _refusal(self, scope: Scope) -> RefusalError | None:
        headers = Headers(scope=scope)
        if self._limits.is_loopback and not host_is_local(headers.get("host", "localhost")):
            text = "This server answers to localhost alone; --host opens it to others."
            return RefusalError(403, text, code="host_not_allowed")
        if self._key is None or scope["path"] in OPEN:
            return None
        if self._key.fits(headers.get("authorization", "")):
            return None
        text = "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
        challenge = {"WWW-Authenticate": "Bearer"}
        return RefusalError(401, text, code="invalid_api_key", headers=challenge)


async def _answer(refusal: RefusalError, send: Send) -> None:
    content = json.dumps(refusal.body()).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(content)),
        **(refusal.headers or {}),
    }
    pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})
