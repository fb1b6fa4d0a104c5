"""Servers of the bundled model on loopback, in this process, and clients that we did not write."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

# This file is read before ../conftest.py has told JAX what to do, so it must not import JAX.
if TYPE_CHECKING:
    from qwen_jax import api
    from qwen_jax.options import Options
    from qwen_jax.serving.app import Server
    from qwen_jax.serving.limits import Key


@dataclasses.dataclass
class Served:
    """A server that takes callers.

    Attributes:
        url: without a path.
        stop: tells it to end, as SIGTERM does.
        ended: is set once it has.
    """

    server: Server
    url: str
    stop: Callable[[], None]
    ended: threading.Event

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=60, **more)

    def settle(self) -> None:
        """Waits until nothing is being answered, and checks that nothing is held."""
        until = time.monotonic() + 20
        pool = self.server.worker._model.engine.pool
        while self.server.worker.present or pool.available != pool.size:
            assert time.monotonic() < until, "something is never let go"
            time.sleep(0.01)


Serve = Callable[..., contextlib.AbstractContextManager[Served]]


@contextlib.contextmanager
def served(
    model: api.Model, key: Key | None = None, options: Options | None = None, **limits: Any
) -> Iterator[Served]:
    """A server of a model on a free port, until it is left.

    Args:
        options: how it answers who doesn't say.
    """
    import uvicorn

    from qwen_jax.engine.sampling import Sampling
    from qwen_jax.options import Options
    from qwen_jax.serving import listening
    from qwen_jax.serving.app import Server
    from qwen_jax.serving.limits import Limits

    bounds = Limits(port=0, **limits)
    defaults = Options(**{"max_tokens": 24, "sampling": Sampling(), **(options or {})})
    server = Server(model, "haiku", defaults, bounds, key)
    with listening.bound(bounds) as listener:
        runner = uvicorn.Server(listening.config_of(server.app, bounds))
        ended = threading.Event()

        def run() -> None:
            runner.run(sockets=[listener])
            ended.set()

        def stop() -> None:
            runner.should_exit = True

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while not runner.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield Served(server, listening.address(listener), stop, ended)
        finally:
            stop()
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def model() -> api.Model:
    from qwen_jax import api

    # Whatever runs beside it, an answer is the same, bit for bit: what is mixed up shows.
    return api.load(batch_invariant=True)


@pytest.fixture(scope="module")
def haiku(model: api.Model) -> Iterator[Served]:
    """The bundled model, without a key."""
    with served(model) as found:
        yield found
