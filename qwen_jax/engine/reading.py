"""What a device's answer to a call of `step` means."""

from collections.abc import Collection, Iterable, Sequence

import jax.numpy as jnp

from pallas_kernels.sample_tokens import Logprobs
from qwen_jax.engine import steps
from qwen_jax.engine.engine import Engine


def overflow(source: str, dtype: jnp.dtype) -> str:
    """What to say of logits that are not finite."""
    way_out = "check the model's file, and try --weights=expanded if its weights stay in blocks."
    if dtype == jnp.float16:
        way_out = "choose --dtype=bfloat16 or float32, and check the model's file."
    return f"{source}: the logits are not finite in {dtype}: a value has overflowed; {way_out}"


def why_not(chosen: Collection[int], engine: Engine) -> str | None:
    """Why a text can't go on, where the device says so in place of a token."""
    if steps.NOT_FINITE in chosen:
        return overflow(engine.config.source, engine.spec.cache)
    if steps.BANNED in chosen:
        return (
            "sampling.logit_bias bans every token there is, or that a constraint allows, so that "
            "nothing is left to choose; leave some without -inf."
        )
    return None


def logprobs_of(
    found: Logprobs | None, places: Iterable[Sequence[int]]
) -> list[tuple[float, list[tuple[int, float]]]]:
    """Log-probabilities of the tokens in these steps and rows, and the likeliest ones' as asked
    for."""
    assert found is not None
    shown = []
    for step, row in places:
        chosen, ids, top = (x[step, row] for x in found)
        asked = ids >= 0  # There is room for more than were asked for.
        pairs = list(zip(ids[asked].tolist(), top[asked].tolist(), strict=True))
        shown.append((float(chosen), pairs))
    return shown
