"""Which implementation serves an operation: asked for by name, or chosen and logged once."""

import functools
from typing import Literal, get_args

from absl import logging

Implementation = Literal["auto", "mosaic_gpu", "xla"]

OPERATIONS = ("rope", "gqa_prefill_attention", "gqa_decode_attention")
"""Every operation the decoder calls, in the order of a layer."""


class UnsupportedError(NotImplementedError):
    """An implementation asked for by name can't serve the case; the message says why."""


def refusal(operation: str) -> str | None:
    """Why no Mosaic GPU kernel serves `operation`, or None where one does."""
    return f"{operation} has no Mosaic GPU kernel in this version"


@functools.cache
def choose(operation: str, implementation: str) -> str:
    """The implementation to run: "mosaic_gpu" or "xla".

    Args:
        operation: one of `OPERATIONS`.
        implementation: "auto" takes the kernel where there is one and the XLA reference
            elsewhere, and logs the choice once; a name is taken literally.

    Raises:
        UnsupportedError: `implementation` names one that can't serve the operation.
        ValueError: `implementation` is not a known name.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"{implementation=} must be one of {', '.join(get_args(Implementation))}")
    if implementation == "xla":
        return "xla"
    why_not = refusal(operation)
    if why_not is None:
        return "mosaic_gpu"
    if implementation == "mosaic_gpu":
        raise UnsupportedError(f"implementation='mosaic_gpu' was asked for, but {why_not}.")
    logging.info("%s runs on XLA: %s.", operation, why_not)
    return "xla"
