"""The weights of one layer, or of what is outside of all, as a variant has them."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType as Type
from jaxtyping import Float

from qwen_jax.accuracy.quantisation.pairs import Pair
from qwen_jax.accuracy.quantisation.programs import PREFIX
from qwen_jax.weights.blocks import decode_into
from qwen_jax.weights.encoding import encode
from qwen_jax.weights.loader import aligned


@dataclasses.dataclass(frozen=True)
class Variant:
    """The base with some tensors of the file, or the file with some of the base.

    Attributes:
        base: which of the two has been changed.
        changed: the tensors that come from the other one, by name.
        type: what the base's values are rounded to for them; None leaves them as they are. Of
            changes to the file alone.
    """

    base: bool
    changed: frozenset[str] = frozenset()
    type: Type | None = None

    @property
    def origin(self) -> "Variant":
        """The same with nothing changed."""
        return BASE if self.base else FILE


BASE, FILE = Variant(base=True), Variant(base=False)


class Weights:
    """Decoded when they are asked for, and kept as long as this is."""

    def __init__(self, pairs: Sequence[Pair]):
        self.pairs = {pair.name: pair for pair in pairs}
        self._parameters: dict[str, list[Pair]] = {}
        for pair in pairs:
            self._parameters.setdefault(pair.parameter, []).append(pair)
        self._values: dict[tuple[str, bool], np.ndarray] = {}
        self._whole: dict[tuple[str, bool], jax.Array] = {}

    def changed_by(self, variant: Variant) -> bool:
        return not variant.changed.isdisjoint(self.pairs)

    def values(self, pair: Pair, *, base: bool) -> Float[np.ndarray, "rows ..."]:
        """A tensor of one of the two, in float32."""
        if (pair.name, base) not in self._values:
            self._values[pair.name, base] = pair.values(base=base)
        return self._values[pair.name, base]

    def layer(self, variant: Variant) -> dict[str, jax.Array]:
        """All of a layer's parameters, as those of `layers.0`."""
        return {
            PREFIX + name.split(".", 2)[2]: self.parameter(variant, name)
            for name in self._parameters
        }

    def parameter(self, variant: Variant, name: str) -> jax.Array:
        """One of the engine's parameters."""
        pairs = self._parameters[name]
        if not any(pair.name in variant.changed for pair in pairs):
            if (name, variant.base) not in self._whole:
                values = [self.values(pair, base=variant.base) for pair in pairs]
                self._whole[name, variant.base] = _stacked(values)
            return self._whole[name, variant.base]
        return _stacked([self._of(variant, pair) for pair in pairs])

    def _of(self, variant: Variant, pair: Pair) -> Float[np.ndarray, "rows ..."]:
        if pair.name not in variant.changed:
            return self.values(pair, base=variant.base)
        values = self.values(pair, base=not variant.base)
        return values if variant.type is None else rounded(values, variant.type)


def rounded(values: Float[np.ndarray, "R C"], kind: Type) -> Float[np.ndarray, "R C"]:
    """What is read again once the values are written in a type."""
    out = aligned(values.shape, np.dtype(np.float32))
    decode_into(encode(values, kind).reshape(-1).view(np.uint8), kind, out)
    return out


def _stacked(values: Sequence[Float[np.ndarray, "rows ..."]]) -> jax.Array:
    if len(values) == 1:
        return jnp.asarray(values[0])
    shape = (sum(len(part) for part in values), *values[0].shape[1:])
    return jnp.asarray(np.concatenate(values, out=aligned(shape, np.dtype(np.float32))))
