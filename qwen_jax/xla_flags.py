"""Flags of XLA that numbers depend on; JAX reads them once, when it starts."""

import contextlib
import importlib.metadata
import os
from pathlib import Path

REDUCTIONS = "--xla_cpu_experimental_ynn_fusion_type"
"""Which operations XLA hands to the library YNNPACK on a CPU."""

WRONG_REDUCTIONS = ("0.10.2",)
"""Versions of jaxlib in which that library gets some large reductions wrong (jax-ml/jax#39103):
on two cores a sum of squares over 32,769 rows of 3 takes the last row for another. 0.11.0 to
0.12.0 are right."""


def set_before_jax() -> None:
    """Keeps reductions from that library where it is wrong, unless the user has said otherwise.

    The bundled model then compiles 4 % longer, in 4.2 s, and writes some 5 % slower.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if given and not given.startswith("-"):  # XLA takes it for the name of a file with flags
        try:
            given = Path(given).read_text()
        except (OSError, ValueError):
            return  # XLA says what is wrong with it
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.version("jaxlib") in WRONG_REDUCTIONS and REDUCTIONS not in given:
            os.environ["XLA_FLAGS"] = f"{given} {REDUCTIONS}=-reduce".strip()
