"""From a server to a socket: listens, serves, and ends once what runs is answered."""

import asyncio
import importlib.util
import logging
import os
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

from qwen_jax.errors import UserError
from qwen_jax.serving.limits import Limits

if TYPE_CHECKING:
    import uvicorn

LIBRARIES = ("starlette", "uvicorn", "prometheus_client")


def check_installed() -> None:
    """Raises UserError where a library of the extra is missing."""
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} is not installed; install qwen_jax[serve].")


def bound(limits: Limits) -> socket.socket:
    """A socket that has the limits' address, and takes callers when it is served. Raises UserError
    where it is taken."""
    family = socket.AF_INET6 if ":" in limits.host else socket.AF_INET
    try:
        return socket.create_server((limits.host, limits.port), family=family, backlog=1024)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise UserError(
            f"Nothing can listen at {limits.host} port {limits.port}: {why.lower()}; choose "
            "another --host or --port."
        ) from error


def address(listener: socket.socket) -> str:
    """The URL of what listens there."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def config_of(app: Any, limits: Limits) -> "uvicorn.Config":
    """How uvicorn serves an application: no log, header or protocol that nobody asked for."""
    import uvicorn

    from qwen_jax.serving.connection import Connection

    return uvicorn.Config(
        app,
        http=Connection,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=int(limits.timeout) + 1,
    )


def serve(app: object, listener: socket.socket, limits: Limits) -> bool:
    """Serves until Ctrl-C or SIGTERM; then finishes what runs, and a second one ends it at once.

    Returns:
        Whether all is answered.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.force_exit = self.should_exit  # whichever signal is the second
            super().handle_exit(sig, frame)

    server = Server(config_of(app, limits))
    logging.getLogger("uvicorn.error").addFilter(_of_no_end)
    # uvicorn answers signals while it serves, and raises them once more when it has ended.
    before = {number: signal.signal(number, _ended) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    print("ended in the midst of answers" if server.force_exit else "ended", file=sys.stderr)
    return not server.force_exit


def _of_no_end(record: logging.LogRecord) -> bool:
    """Whether a line is of no task that a second signal has ended."""
    error = record.exc_info[1] if record.exc_info else None
    cancelled = asyncio.CancelledError
    return not isinstance(error, cancelled) and cancelled.__name__ not in record.getMessage()


def _ended(_signal: int, _frame: object) -> None:
    """All is answered, so that it ended as it should."""
