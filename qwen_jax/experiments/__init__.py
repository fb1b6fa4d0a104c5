"""Experiments: a declared sweep of settings, run once each, recorded, resumed and shown.

From Python, `run` runs a sweep into a workdir, `load_results` reads one as rows, and `compare` says
whether one setting is better than another.
"""

import importlib
from typing import TYPE_CHECKING, Any

from qwen_jax.experiments.sweep import Sweep, axis, chain, product, when, zipped

if TYPE_CHECKING:
    from qwen_jax.experiments.python import Comparison, compare, load_results, run

__all__ = [
    "Comparison",
    "Sweep",
    "axis",
    "chain",
    "compare",
    "load_results",
    "product",
    "run",
    "when",
    "zipped",
]


def __getattr__(name: str) -> Any:
    """What a config file has no use for is imported when it is first used."""
    if name in ("Comparison", "compare", "load_results", "run"):
        return getattr(importlib.import_module("qwen_jax.experiments.python"), name)
    raise AttributeError(f"module 'qwen_jax.experiments' has no attribute {name!r}")
