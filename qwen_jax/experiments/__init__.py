"""Experiments: a declared sweep of settings, run once each, recorded, resumed and shown."""

from qwen_jax.experiments.sweep import Sweep, axis, chain, product, zipped

__all__ = ["Sweep", "axis", "chain", "product", "zipped"]
