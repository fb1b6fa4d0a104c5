"""A Qwen2.5 engine in JAX that is fast on a GPU and can prove its numbers."""

import importlib
import os
from typing import TYPE_CHECKING, Any

from qwen_jax import xla_flags

if TYPE_CHECKING:
    from qwen_jax import accuracy
    from qwen_jax.api import Model, Options, load
    from qwen_jax.completions import Completion, TokenLogprob
    from qwen_jax.config import ModelConfig
    from qwen_jax.engine.sampling import Sampling
    from qwen_jax.errors import UserError
    from qwen_jax.generation import Generation
    from qwen_jax.requests import Request
    from qwen_jax.text.constraint import Constraint

__version__ = "0.1.0"

# JAX would take three quarters of a GPU's memory when it wakes: on an H200 2 s, and 3.3 GB of the
# host to keep the books of it. Weights and cache are few large arrays, which take what they need.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
xla_flags.set_before_jax()

__all__ = [
    "Completion",
    "Constraint",
    "Generation",
    "Model",
    "ModelConfig",
    "Options",
    "Request",
    "Sampling",
    "TokenLogprob",
    "UserError",
    "accuracy",
    "load",
]

_HOME = {
    "api": ("Model", "Options", "load"),
    "config": ("ModelConfig",),
    "errors": ("UserError",),
    "completions": ("Completion", "TokenLogprob"),
    "generation": ("Generation",),
    "requests": ("Request",),
    "engine.sampling": ("Sampling",),
    "text.constraint": ("Constraint",),
}


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `run.py --help` needs no JAX."""
    for module, names in _HOME.items():
        if name in names:
            return getattr(importlib.import_module(f"qwen_jax.{module}"), name)
    if name == "accuracy":
        return importlib.import_module("qwen_jax.accuracy")
    raise AttributeError(f"module 'qwen_jax' has no attribute {name!r}")
