"""One way to look at a named tensor inside the model: `tap`, the identity unless recording."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_recording: ContextVar[dict[str, jax.Array] | None] = ContextVar("recording", default=None)


def tap(name: str, x: jax.Array) -> jax.Array:
    """Returns `x`; while a recording is open, keeps it under `name` as well.

    Called while a function is traced, so it costs nothing in the compiled program. The
    traced function must open the recording itself and return what it holds.
    """
    record = _recording.get()
    if record is not None:
        record[name] = x
    return x


@contextlib.contextmanager
def recording() -> Iterator[dict[str, jax.Array]]:
    """Collects every tapped tensor of the code inside, by its canonical name."""
    record: dict[str, jax.Array] = {}
    token = _recording.set(record)
    try:
        yield record
    finally:
        _recording.reset(token)
