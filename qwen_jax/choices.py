"""What a model may be loaded as, and how much may be asked of it: by name and by number."""

from collections.abc import Sequence
from typing import Any, get_args

import jax.numpy as jnp

import pallas_kernels
from qwen_jax.engine.drafts import MOST_DRAFTED
from qwen_jax.engine.memory import device
from qwen_jax.engine.sampling import is_whole
from qwen_jax.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("auto", "packed", "expanded")
PRECISIONS = ("highest", "high", "default")
SPECULATION = ("none", "lookup", "draft")
MOST_SLOTS = 4096
"""Far more than any device has room for texts."""

MOST_SAMPLES = 1_000_000
"""Of one prompt: days of a GPU's work, and a number that was mistyped."""


def dtype_of(name: str) -> jnp.dtype:
    """The parameters' dtype; "auto" is float32 on a CPU and bfloat16 elsewhere."""
    _one_of("dtype", name, DTYPES)
    if name == "auto":
        name = "float32" if device().platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def cache_dtype_of(name: str | None, parameters: jnp.dtype, implementation: str) -> jnp.dtype:
    """The dtype of keys and values; None is that of the parameters, the one that kernels serve."""
    if name is None:
        return parameters
    _one_of("cache_dtype", name, DTYPES[1:])
    if jnp.dtype(name) != parameters and device().platform != "cpu" and implementation != "xla":
        raise UserError(
            f"cache_dtype is {name!r} beside parameters in {parameters.name}, which no kernel "
            "serves; leave it out, or set implementation to 'xla'."
        )
    return jnp.dtype(name)


def check_implementation(name: str) -> None:
    """Raises UserError where no such implementation serves every operation."""
    _one_of("implementation", name, get_args(pallas_kernels.Implementation))
    for operation in pallas_kernels.OPERATIONS:
        try:
            pallas_kernels.choose(operation, name)
        except pallas_kernels.UnsupportedError as error:
            reason = str(error).rstrip(".")
            raise UserError(f"{reason}; use implementation 'auto' or 'xla'.") from error


def check_precision(name: str) -> None:
    """Raises UserError for a matmul precision that there is not."""
    _one_of("matmul_precision", name, PRECISIONS)


def check_weights(name: str) -> None:
    """Raises UserError for a form of weights that there is not."""
    _one_of("weights", name, WEIGHTS)


def check_slots(slots: int | None) -> None:
    """Raises UserError for a number of slots that there can't be."""
    if slots is not None:
        _whole("slots", slots, 1, MOST_SLOTS)


def check_speculation(method: str, draft_model: object, tokens: int | None, devices: int) -> None:
    """Raises UserError for a kind of speculation that there is not, or that can't be had so.

    Args:
        draft_model, tokens: None where they are not given.
        devices: that the model is dealt out to, or that have it.
    """
    _one_of("speculate", method, SPECULATION)
    if tokens is not None:
        _whole("draft_tokens", tokens, 1, MOST_DRAFTED)
    if method == "draft" and draft_model is None:
        raise UserError(
            "speculate is 'draft', which needs draft_model, a smaller model of the same vocabulary."
        )
    if method == "none" and tokens is not None:
        raise UserError(
            "draft_tokens does nothing where speculate is 'none'; choose lookup or draft, or leave "
            "it out."
        )
    if method != "draft" and draft_model is not None:
        raise UserError(
            f"draft_model does nothing where speculate is {method!r}; choose 'draft', or leave it "
            "out."
        )
    if method != "none" and devices > 1:
        raise UserError(
            f"speculate is {method!r}, but drafts are for one device, and mesh has {devices}; "
            "leave one of the two out."
        )


def check_samples(n: int) -> None:
    """Raises UserError for a number of samples of a prompt that nobody can want."""
    _whole("n", n, 1, MOST_SAMPLES)


def check_max_tokens(most: int) -> None:
    """Raises UserError for a number of new tokens that is no answer."""
    _whole("max_tokens", most, 1)


def check_top_logprobs(top: int | None) -> None:
    """Raises UserError for fewer than no log-probabilities."""
    if top is not None:
        _whole("top_logprobs", top, 0)


def _whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    allowed = f"at least {least}" if most is None else f"from {least} to {most}"
    if not is_whole(value):
        allowed = f"a whole number, {allowed}"
    elif least <= value and (most is None or value <= most):
        return
    raise UserError(f"{name} is {value!r:.60}, but it must be {allowed}.", field=name)


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{name} is {value!r:.60}, but it must be one of {', '.join(allowed)}.")
