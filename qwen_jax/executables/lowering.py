"""Programs that are compiled ahead are traced and lowered one after another."""

import threading
from typing import Any

import jax

_ONE = threading.RLock()


def compiled(
    function: Any, *args: Any, options: dict[str, str | bool] | None = None
) -> jax.stages.Compiled:
    """A jitted function's program for arrays or shapes, lowered once no other is at that.

    All of it is Python, which runs one thread at a time: taken in turns, the first program would
    reach the compiler when the last one does. A call of the function finds what is compiled so.
    """
    with _ONE:
        program: jax.stages.Lowered = function.lower(*args)
    return program.compile(options)
