"""Versions of packages; our own is in the source, for that need not be installed."""

import importlib.metadata

import qwen_jax


def version(package: str) -> str:
    """Raises PackageNotFoundError where it isn't installed."""
    return qwen_jax.__version__ if package == "qwen_jax" else importlib.metadata.version(package)
