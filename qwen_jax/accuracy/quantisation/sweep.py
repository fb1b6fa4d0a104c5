"""What the model says with some tensors in place of others, for many such changes in one sweep.

A change is felt from its layer on. So layers are taken one after the other, each decoded once, and
the hidden states of all variants are carried on: those for which a layer is as it was run through
it together, the others with weights of their own. Of each file one layer's weights are in memory.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from qwen_jax.accuracy.finding import Progress
from qwen_jax.accuracy.quantisation import programs
from qwen_jax.accuracy.quantisation.pairs import Pair
from qwen_jax.accuracy.quantisation.weights import BASE, FILE, Variant, Weights
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError

TOGETHER = 512
"""Tokens of a call where several variants share weights."""

ROWS = 128
"""Positions of one variant whose logits are held at a time."""

BEHIND = ("final_norm", "lm_head")
"""Parameters that come after all layers."""

State = Float[Array, "T D"]


@dataclasses.dataclass(frozen=True)
class Said:
    """What a variant says beside the base, at each of T positions.

    Attributes:
        kld: KL(base || variant), in nats.
        same_top: whether both have the same likeliest token.
    """

    kld: Float[np.ndarray, "T"]
    same_top: Bool[np.ndarray, "T"]


class Sweep:
    """Runs variants over one text.

    Args:
        pairs: all tensors of both.
        tokens: T ids.
    """

    def __init__(
        self,
        config: ModelConfig,
        pairs: Sequence[Pair],
        tokens: Sequence[int],
        implementation: str = "auto",
    ):
        self.config, self.pairs = config, pairs
        self.spec = programs.spec_for(config, implementation)
        self.tokens = np.asarray(tokens, np.int32)
        self._place = {pair.name: self._layer_of(pair) for pair in pairs}

    def _layer_of(self, pair: Pair) -> int:
        """The first layer that feels it; one more than there are for the head alone."""
        if pair.layer is not None:
            return pair.layer
        return self.config.num_layers if pair.parameter in BEHIND else 0

    def weights(self, layer: int | None) -> Weights:
        return Weights([pair for pair in self.pairs if pair.layer == layer])

    def first(self, variant: Variant) -> int:
        """The layer before which a variant is what it was made from."""
        return min((self._place[name] for name in variant.changed), default=0)

    def steps(self, variants: Collection[Variant]) -> int:
        """Layers, and heads, that these are to be run through."""
        return sum(self.config.num_layers + 1 - self.first(variant) for variant in variants)

    def passes(self, variants: Collection[Variant]) -> float:
        """The same as forward passes of the text."""
        return self.steps(variants) / (self.config.num_layers + 1)

    def run(
        self, variants: Collection[Variant], progress: Progress | None = None
    ) -> dict[Variant, Said]:
        """What each variant says, and FILE; of BASE that is nothing but zeros.

        Raises:
            UserError: a weight, or a logit of one of the two files, is not finite.
        """
        wanted = list(dict.fromkeys((BASE, FILE, *variants)))
        count = _Count(progress, self.steps(wanted))
        layers = self.config.num_layers
        starting = {layer: [v for v in wanted if self.first(v) == layer] for layer in range(layers)}
        outside = self.weights(None)
        states = {v: self.embedded(outside, v) for v in starting[0]}
        for layer in range(layers):
            states |= {v: states[v.origin] for v in starting[layer] if layer}
            self._advance(self.weights(layer), states, count)
        states |= {v: states[v.origin] for v in wanted if v not in states}
        base = self._logits(outside, BASE, states[BASE])
        truth = np.concatenate([np.asarray(part) for part in base])
        _check("base", truth)
        said = {}
        for variant in wanted:
            parts = list(self._compared(outside, variant, states[variant], truth))
            said[variant] = Said(*map(np.concatenate, zip(*parts, strict=True)))
            count.add(1)
        if not np.isfinite(said[FILE].kld).all():
            raise _not_finite("quantised file", int(np.isfinite(said[FILE].kld).argmin()))
        return said

    def embedded(self, outside: Weights, variant: Variant) -> State:
        return outside.parameter(variant, "embed")[jnp.asarray(self.tokens)]

    def _advance(self, weights: Weights, states: dict[Variant, State], count: "_Count") -> None:
        """Takes every state through a layer."""
        groups = [
            [v for v in states if v.origin == origin and not weights.changed_by(v)]
            for origin in (BASE, FILE)
        ]
        groups += [[v] for v in states if weights.changed_by(v)]
        for group in groups:
            if not group:
                continue
            parameters = weights.layer(group[0])
            # A shape of several is compiled once, so that what is left over is filled up.
            size = max(TOGETHER // len(self.tokens), 1) if len(group) > 1 else 1
            for start in range(0, len(group), size):
                some = group[start : start + size]
                rows = [states[variant] for variant in some]
                full = jnp.stack(rows + rows[:1] * (size - len(rows)))
                states |= dict(zip(some, programs.layer(self.spec, parameters, full), strict=False))
                count.add(len(some))

    def head(self, outside: Weights, variant: Variant) -> Float[Array, "V D"]:
        return outside.parameter(variant, "embed" if self.config.tied else "lm_head")

    def _logits(
        self, outside: Weights, variant: Variant, state: State
    ) -> Iterator[Float[Array, "n V"]]:
        hidden = programs.normed(self.spec, outside.parameter(variant, "final_norm"), state)
        head = self.head(outside, variant)
        for start in range(0, len(hidden), ROWS):
            yield programs.product(self.spec, hidden[start : start + ROWS], head)

    def _compared(
        self, outside: Weights, variant: Variant, state: State, base: Float[np.ndarray, "T V"]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number, logits in enumerate(self._logits(outside, variant, state)):
            rows = slice(number * ROWS, number * ROWS + len(logits))
            kld, same = programs.compared(logits, base[rows])
            yield np.asarray(kld, np.float64), np.asarray(same)


class _Count:
    """Steps that are done, for whoever wants to hear of them."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def add(self, steps: int) -> None:
        self.done += steps
        if self.progress:
            self.progress(self.done, self.total)


def _check(which: str, logits: Float[np.ndarray, "T V"]) -> None:
    finite = np.isfinite(logits).all(-1)
    if not finite.all():
        raise _not_finite(which, int(finite.argmin()))


def _not_finite(which: str, position: int) -> UserError:
    return UserError(
        f"The {which} has logits that are not finite at position {position} of the text, from "
        "which nothing can be told; choose another file."
    )
