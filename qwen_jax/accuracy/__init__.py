"""The accuracy laboratory: traces of a run, references to hold them against, and causes named."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwen_jax.accuracy.api import (
        Certificate,
        Change,
        Report,
        certify,
        compare,
        quantisation_costs,
        verify,
    )

__all__ = ["Certificate", "Change", "Report", "certify", "compare", "quantisation_costs", "verify"]


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, as `qwen_jax` does."""
    if name in __all__:
        return getattr(importlib.import_module("qwen_jax.accuracy.api"), name)
    raise AttributeError(f"module 'qwen_jax.accuracy' has no attribute {name!r}")
