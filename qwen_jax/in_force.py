"""Which sampling settings are in force: greedy decoding has no use for filters or a seed."""

import dataclasses
from collections.abc import Collection

from absl import logging

from qwen_jax.engine.sampling import Sampling

DRAWS = ("top_k", "top_p", "min_p", "seed")
"""Fields of `Sampling` that do nothing at temperature 0."""


def changed(sampling: Sampling) -> list[str]:
    """The fields that are not the defaults."""
    default = Sampling()
    names = [field.name for field in dataclasses.fields(Sampling)]
    return [name for name in names if getattr(sampling, name) != getattr(default, name)]


def describe(sampling: Sampling, *, drawn: bool = False) -> str:
    """Only what is in force, as in "temperature 0.8, top_p 0.9, seed 0" or "greedy".

    Args:
        drawn: whether each answer gets a seed of its own, so that there is none to be named.
    """
    idle = ("seed", *(DRAWS if sampling.temperature == 0 else ()))
    said = [f"{n} {getattr(sampling, n)}" for n in changed(sampling) if n not in idle]
    if sampling.temperature == 0:
        return ", ".join(["greedy", *said])
    return ", ".join([*said, "a new seed each time" if drawn else f"seed {sampling.seed}"])


def warn_of_greedy(idle: Collection[str], n: int = 1) -> None:
    """Warns that greedy decoding makes nothing of these fields, and equal samples, if any."""
    named = [name for name in DRAWS if name in idle]
    nothing = [f"{' and '.join(named)} {'do' if len(named) > 1 else 'does'} nothing"] * bool(named)
    equal = [f"all {n} samples of a prompt are equal"] * (n > 1)
    if nothing or equal:
        logging.warning(
            "The temperature is 0, so answers are greedy: %s; set a temperature.",
            ", and ".join(nothing + equal),
        )
