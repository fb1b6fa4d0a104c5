"""What a compiled program is made for: one frozen, hashable value, its static argument."""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax

from qwen_jax.config import ModelConfig
from qwen_jax.model.split import WHOLE, Whole


@dataclasses.dataclass(frozen=True)
class Spec:
    """Equal specs share programs, whatever engines and weights they come from.

    Attributes:
        config: sizes and constants; its `source` counts for nothing.
        weights: dtype of the parameters, and of products' inputs.
        cache: dtype of keys and values.
        precision: of float32 matrix products.
        implementation: "auto", "mosaic_gpu" or "xla", for every operation.
        stop_ids: tokens that end a row; they are emitted, then the row is done.
        valid_tokens: vocabulary rows in use; ids from here on are never chosen.
        unused_ids: rows below them that no token has, and that are never chosen either.
        variant: tells programs apart that are traced while an intervention is open.
        split: the devices that have the model together.
    """

    config: ModelConfig
    weights: jnp.dtype
    cache: jnp.dtype
    precision: lax.Precision = lax.Precision.HIGHEST
    implementation: str = "auto"
    stop_ids: tuple[int, ...] = ()
    valid_tokens: int = 0
    unused_ids: tuple[int, ...] = ()
    variant: object = None
    split: Whole = WHOLE

    @property
    def cached(self) -> ModelConfig:
        """The config with as many key/value heads as the pool of pages holds."""
        return self.split.cached(self.config)

    @functools.cached_property
    def without_tokenizer(self) -> "Spec":
        """What programs that choose no token depend on, known before a tokenizer is read."""
        return dataclasses.replace(self, stop_ids=(), valid_tokens=0, unused_ids=())

    @property
    def activations(self) -> jnp.dtype:
        from qwen_jax.model.products import activation_dtype  # heavy, and only tracing needs it

        return activation_dtype(self.weights)
