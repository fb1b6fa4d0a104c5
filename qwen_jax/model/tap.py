"""One way into the model: `tap(name, x)`, the identity unless something looks or intervenes."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import jax

Intervention = Callable[[str, jax.Array], jax.Array]
"""Name and tensor to the tensor that takes its place; called in the order of the forward pass."""

_recording: ContextVar[dict[str, jax.Array] | None] = ContextVar("recording", default=None)
_intervention: ContextVar[Intervention | None] = ContextVar("intervention", default=None)


def tap(name: str, x: jax.Array) -> jax.Array:
    """Returns `x`, or what an open intervention puts in its place; an open recording keeps that.

    Called while a function is traced, so it costs nothing in the compiled program. The
    traced function must open the recording itself and return what it holds; an intervention
    must be open when the function is traced, and stays in what was compiled.
    """
    intervention = _intervention.get()
    if intervention is not None:
        x = intervention(name, x)
    record = _recording.get()
    if record is not None:
        record[name] = x
    return x


def watched() -> bool:
    """Whether a recording or an intervention is open, so that a tensor made only to be looked at
    is worth its cost."""
    return _recording.get() is not None or _intervention.get() is not None


@contextlib.contextmanager
def recording() -> Iterator[dict[str, jax.Array]]:
    """Collects every tapped tensor of the code inside, by its name."""
    record: dict[str, jax.Array] = {}
    token = _recording.set(record)
    try:
        yield record
    finally:
        _recording.reset(token)


@contextlib.contextmanager
def intervening(intervention: Intervention) -> Iterator[None]:
    """Passes every tapped tensor of the code inside through `intervention`."""
    token = _intervention.set(intervention)
    try:
        yield
    finally:
        _intervention.reset(token)
