"""Engines of one random model, on one GPU and on several, whose weights are made on the devices."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_decode import DTYPE, random_parameters
from qwen_jax.config import ModelConfig
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.split_packed import SplitPacked, pack_split
from qwen_jax.engine.split_weights import SplitWeights, splits_of
from qwen_jax.engine.weights import prepare
from qwen_jax.mesh import MeshShape
from qwen_jax.model.decoder import dealt_axis
from qwen_jax.model.split import Split
from qwen_jax.weights.names import parameters

SEED = 11


def drawn_in_parts(config: ModelConfig, split: Split) -> SplitWeights:
    """Random parameters, each part made where it is to lie."""
    return SplitWeights(dict(drawn(config, split)), config, split)


def packed_in_parts(config: ModelConfig, split: Split) -> SplitPacked:
    """The same for the decode step's kernel, packed as they are made: devices hold their streams,
    and few parameters at a time."""
    return _packed(config, drawn(config, split), split)


def packed_of(config: ModelConfig, weights: SplitWeights) -> SplitPacked:
    """The same parameters for the decode step's kernel."""
    assert isinstance(weights.split, Split)
    return _packed(config, weights.named.items(), weights.split)


def _packed(
    config: ModelConfig, named: Iterable[tuple[str, jax.Array]], split: Split
) -> SplitPacked:
    there = dataclasses.replace(split, exchange=True)
    return pack_split(config, named, DTYPE, "mosaic_gpu", there)


def drawn(config: ModelConfig, split: Split) -> Iterator[tuple[str, jax.Array]]:
    keys = jax.random.split(jax.random.key(SEED), 13 * config.num_layers + 3)
    for key, parameter in zip(keys, parameters(split.part(config), "gguf"), strict=False):
        axis, shape = dealt_axis(parameter.name), list(parameter.shape)
        if axis is not None:
            shape[axis] *= split.size
        made = draw(tuple(shape), split.sharding(axis), parameter.keep_float32)
        yield parameter.name, made(key)


@functools.cache
def draw(shape: tuple[int, ...], there: Any, norm: bool) -> Any:
    def make(key: jax.Array) -> jax.Array:
        values = jax.random.normal(key, shape, DTYPE) * 0.02
        return 1 + values.astype(jnp.float32) if norm else values

    return jax.jit(make, out_shardings=there)


def split_of(tp: int) -> Split:
    (split,) = splits_of(MeshShape(tp=tp))
    assert isinstance(split, Split), "one GPU has nothing to send"
    return split


def on_one(config: ModelConfig, implementation: str, **options: Any) -> Engine:
    drawn = random_parameters(config, DTYPE, SEED)
    weights = prepare(config, drawn, DTYPE, implementation)
    return Engine(config, weights, implementation=implementation, **options)


def dealt(config: ModelConfig, split: Split) -> SplitWeights:
    """The parameters that `on_one` has."""
    return SplitWeights.deal(config, split, random_parameters(config, DTYPE, SEED))


def on_several(
    config: ModelConfig,
    weights: SplitWeights | SplitPacked,
    implementation: str,
    **options: Any,
) -> Engine:
    split = weights.split
    assert isinstance(split, Split)
    return Engine(config, weights, implementation=implementation, split=split, **options)
