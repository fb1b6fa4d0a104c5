"""Faults planted in our own engine, to be found again.

Wrong parameters go into an engine of their own. Wrong arithmetic takes the place of what `tap`
shows while the engine's functions are traced: the operation is computed again, in float32, from
the tensors that the engine itself had before it. Cache faults send keys and values to wrong slots.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.accuracy.exact.operations import (
    OPERATIONS,
    Calls,
    Context,
    Knobs,
    input_names,
)
from qwen_jax.accuracy.exact.parameters import (
    FUSED,
    LAYER,
    OUTER,
    ArraySource,
    EngineSource,
    Weights,
    parts,
)
from qwen_jax.accuracy.tensors.faults.catalogue import FAULTS
from qwen_jax.accuracy.tensors.faults.fault import Overlay, Planted, parse
from qwen_jax.accuracy.traces.trace import split_name
from qwen_jax.config import ModelConfig
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.split_weights import SplitWeights
from qwen_jax.engine.weights import PlainWeights, read_back
from qwen_jax.model.split import Split
from qwen_jax.model.tap import intervening

ATTENTION = ("attn_scores", "attn_probs", "attn_out")


@contextlib.contextmanager
def planted(engine: Engine, faults: str | Sequence[Planted]) -> Iterator[Engine]:
    """An engine with faults in it; whatever is traced inside the block has them.

    Args:
        faults: as `faults.parse` takes them, or what it returns. Of several that change the
            same parameters, the first of the catalogue comes first.

    Raises:
        UserError: a fault is unknown, or the model can't have it.
    """
    chosen = parse(faults, engine.config) if isinstance(faults, str) else faults
    order = list(FAULTS)
    chosen = sorted(chosen, key=lambda p: order.index(p.fault.name))
    wrong = _with_parameters(engine, chosen)
    with intervening(_Intervention(wrong, chosen)):
        yield wrong


def _with_parameters(engine: Engine, chosen: Sequence[Planted]) -> Engine:
    """A new engine, whose weights are the old ones where no fault changes them."""
    new = dict(read_back(engine.weights))
    config, source = engine.config, ArraySource(engine.config, dict(new))
    layers: list[int | None] = [None, *range(config.num_layers)]
    for layer in layers:
        weights, changed = Weights(source, layer), set()
        for one in chosen:
            if one.fault.parameters and any(one.covers(n, layer) for n in OPERATIONS):
                weights = Overlay(weights, one.fault)
                changed |= set(one.fault.operations)
        if layer is None and config.tied and changed & {"embed", "logits"}:
            # The fault is in one of the two; they share an array no longer.
            config, new["lm_head"] = dataclasses.replace(config, tied=False), new["embed"]
        for name in changed & set(OUTER if layer is None else LAYER):
            if layer is None:
                key = "lm_head" if name == "logits" else name
                _put(new, key, slice(None), weights[name][0])
                continue
            fused = FUSED.get(name, name)
            rows = parts(config, fused)[name] if name in FUSED else slice(None)
            if "norm" in name:
                _put(new, f"layers.{layer}.{name}", rows, weights[name][0])
                continue
            for kind, array in zip(("weight", "bias"), weights[name], strict=False):
                _put(new, f"layers.{layer}.{fused}.{kind}", rows, array)
    split, weights_of = engine.spec.split, PlainWeights(new)
    if isinstance(split, Split):
        weights_of = SplitWeights.deal(config, split, new.items())
    wrong = Engine(config, weights_of, slots=engine.shapes.slots, split=split)
    # The faults are in what is traced: no program is shared with another engine.
    spec = dataclasses.replace(engine.spec, config=config, variant=object())
    wrong.layout = wrong.layout._replace(spec=spec)
    return wrong


def _put(weights: dict[str, jax.Array], name: str, rows: slice, new: np.ndarray) -> None:
    weights[name] = weights[name].at[rows].set(new.astype(weights[name].dtype))


def knobs_of(chosen: Sequence[Planted], name: str, layer: int | None, config: ModelConfig) -> Knobs:
    """An operation's knobs with all faults that turn them, each in its first variant."""
    knobs = Knobs()
    for one in chosen:
        if one.covers(name, layer):
            for change in one.fault.knobs(config)[:1]:
                knobs = dataclasses.replace(knobs, **change)
    return knobs


class _Intervention:
    """Called by `tap` with each tensor while a function is traced."""

    def __init__(self, engine: Engine, chosen: Sequence[Planted]):
        self.config, self.chosen = engine.config, chosen
        self.source = EngineSource(engine)
        self.seen: dict[str, jax.Array] = {}

    def __call__(self, name: str, x: jax.Array) -> jax.Array:
        layer, operation = split_name(name)
        if operation == "tokens":  # another trace begins
            self.seen.clear()
        if operation in OPERATIONS:
            x = self._computed(operation, layer, x)
        elif operation == "cache_slots":
            for one in self._cache_faults(layer):
                assert one.fault.slots is not None
                x = one.fault.slots(x, self._calls(0).decode[0])
        self.seen[name] = x
        return x

    def _calls(self, row: int) -> Calls:
        """Of a row of the call that is traced; padding is none of its tokens."""
        positions, length = self.seen["positions"][row], self.seen["lengths"][row : row + 1]
        return Calls(positions, positions[:1], length)

    def _cache_faults(self, layer: int | None) -> list[Planted]:
        return [p for p in self.chosen if p.fault.slots and p.covers("attn_scores", layer)]

    def _computed(self, name: str, layer: int | None, x: jax.Array) -> jax.Array:
        """The tensor as the faults make it, or as it is where none touches it."""
        # The cache itself is wrong already.
        knobs = dataclasses.replace(knobs_of(self.chosen, name, layer, self.config), held=None)
        inherits = name == "attn_out" and any(
            self._turned(n, layer) for n in ("attn_scores", "attn_probs")
        )
        if not (self._turned(name, layer) or inherits):
            return x
        params = tuple(jnp.asarray(a, jnp.float32) for a in Weights(self.source, layer)[name])
        rows = []
        for row in range(len(x)):
            tokens = self.seen["tokens"][row]
            ctx = Context(self.config, self._calls(row), tokens, knobs, jnp)
            with jax.default_matmul_precision("highest"):
                value = OPERATIONS[name](ctx, self._inputs(name, layer, row), params)
            rows.append(value.reshape(x.shape[1:]))
        return jnp.stack(rows).astype(x.dtype)

    def _turned(self, name: str, layer: int | None) -> bool:
        return any(
            p.covers(name, layer) and p.fault.slots is None and p.fault.knobs(self.config)
            for p in self.chosen
        )

    def _inputs(self, name: str, layer: int | None, row: int) -> list[jax.Array]:
        inputs = [self.seen[n][row] for n in input_names(name, layer, self.config)]
        cache = {"attn_scores": "k_cache", "attn_out": "v_cache"}.get(name)
        if cache:  # the keys and values of earlier calls too
            inputs[1] = self.seen[f"layers.{layer}.{cache}"][row].swapaxes(0, 1)
        return [x.astype(jnp.float32) for x in inputs]
