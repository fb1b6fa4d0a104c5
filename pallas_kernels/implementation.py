"""Which implementation serves an operation: asked for by name, or chosen and logged once."""

import functools
from typing import Literal, get_args

import jax
from absl import logging

from pallas_kernels.target import HOPPER

Implementation = Literal["auto", "mosaic_gpu", "xla"]

OPERATIONS = (
    "rope",
    "gqa_prefill_attention",
    "gqa_decode_attention",
    "decode_step",
    "packed_product",
    "sample_tokens",
)
"""Every operation the engine calls: those of a layer, a whole step of a few rows, products with
weights that are packed for it, and what follows it."""

SLOWER = {"rope": "XLA fuses it with what comes before and after, which beats a kernel of its own"}
"""Operations whose kernel runs only when asked for by name, and why."""


class UnsupportedError(NotImplementedError):
    """An implementation asked for by name can't serve the case; the message says why."""


def device_refusal() -> str | None:
    """Why the kernels can't run on the default device, or None where they can."""
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    platform = device if isinstance(device, str) else device.platform
    if platform not in ("gpu", "cuda"):
        return f"the default device is a {platform}"
    wanted = HOPPER.compute_capability
    capability = str(getattr(device, "compute_capability", wanted))
    if capability != wanted:
        return (
            f"the default device has compute capability {capability}, and the kernels are for "
            f"{wanted}"
        )
    return None


def refusal(operation: str) -> str | None:
    """Why "auto" never takes the kernel of `operation` here, or None where shapes decide."""
    return device_refusal() or SLOWER.get(operation)


@functools.cache
def choose(operation: str, implementation: str, why_not: str | None = None) -> str:
    """The implementation to run: "mosaic_gpu" or "xla".

    Args:
        operation: one of `OPERATIONS`.
        implementation: "auto" takes the kernel where it serves and the XLA reference
            elsewhere, and logs the choice once; a name is taken literally.
        why_not: why the kernel can't serve the shapes and dtypes at hand; None where it can,
            or where they are not known yet.

    Raises:
        UnsupportedError: `implementation` names one that can't serve the case.
        ValueError: `implementation` is not a known name.
    """
    if implementation not in get_args(Implementation):
        raise ValueError(f"{implementation=} must be one of {', '.join(get_args(Implementation))}")
    if implementation == "xla":
        return "xla"
    cannot = device_refusal() or why_not
    if implementation == "mosaic_gpu" and cannot:
        raise UnsupportedError(
            f"implementation='mosaic_gpu' was asked for, but {operation} can't use it: {cannot}."
        )
    reason = cannot or SLOWER.get(operation)
    if implementation == "mosaic_gpu" or reason is None:
        return "mosaic_gpu"
    logging.info("%s runs on XLA: %s.", operation, reason)
    return "xla"
