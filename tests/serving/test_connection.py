"""Connections that never finish a request's headers, and those that only take their time."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import pytest

import qwen_jax
from qwen_jax.serving import connection
from tests.serving.conftest import Served, served

SECONDS = 0.6
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def hurried(model: qwen_jax.Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(connection, "HEADER_SECONDS", SECONDS)
    with served(model) as found:
        yield found


@contextlib.contextmanager
def connected(found: Served) -> Iterator[socket.socket]:
    host, _, port = found.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as line:
        yield line


def seconds_to_the_end(line: socket.socket, trickle: bytes = b"") -> float:
    """Until the server ends the connection, while one byte after another is sent."""
    begun, left = time.monotonic(), list(trickle)
    line.settimeout(0.05)
    while time.monotonic() - begun < 15:
        with contextlib.suppress(TimeoutError):
            try:
                if not line.recv(1000):
                    return time.monotonic() - begun
                continue
            except ConnectionError:
                return time.monotonic() - begun
        with contextlib.suppress(ConnectionError):
            line.send(bytes(left[:1]))
        del left[:1]
    raise AssertionError("the connection is never ended")


ENDLESS = b"GET /health HTTP/1.1\r\nX: " + b"x" * 1000


@pytest.mark.parametrize("sent", [b"", ENDLESS])
def test_headers_that_never_end(hurried: Served, sent: bytes) -> None:
    with connected(hurried) as line:
        assert seconds_to_the_end(line, sent) > SECONDS / 2


@pytest.mark.parametrize(
    "first, then",
    [
        (GET, ENDLESS),
        # Answered without its body, which goes on.
        (b"POST /no HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\n\r\n", b"x" * 1000),
    ],
)
def test_after_an_answer(hurried: Served, first: bytes, then: bytes) -> None:
    with connected(hurried) as line:
        line.sendall(first)
        assert line.recv(1000).startswith(b"HTTP/1.1 ")
        assert seconds_to_the_end(line, then) > SECONDS / 2


def test_a_request_may_take_longer(hurried: Served) -> None:
    """Its body, its answer, and the next one on the same connection."""
    body = json.dumps({"prompt": "snow", "max_tokens": 2}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with connected(hurried) as line:
        for _ in range(2):
            line.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body))
            time.sleep(SECONDS + 0.3)
            line.sendall(body)
            assert line.recv(10_000).startswith(b"HTTP/1.1 200 ")
