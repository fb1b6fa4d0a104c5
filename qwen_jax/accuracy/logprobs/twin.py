"""A model in bfloat16 that shares the memory of one in float32."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax.api import Model
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.weights import PlainWeights

if TYPE_CHECKING:
    from qwen_jax.model.decoder import Qwen2

BFLOAT16 = jnp.dtype(jnp.bfloat16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedWeights(PlainWeights):
    """Parameters in float32, which programs round as they use them; norms stay as they are."""

    @property
    def dtype(self) -> jnp.dtype:
        return BFLOAT16

    def model(self, spec: Spec) -> "Qwen2":
        # The barrier keeps XLA from dropping a conversion there and back as excess precision.
        rounded = {
            name: value
            if name.endswith("norm")
            else lax.optimization_barrier(value.astype(BFLOAT16))
            for name, value in self.named.items()
        }
        return PlainWeights(rounded).model(spec)


def twin(exact: Model) -> Model | None:
    """The same model in bfloat16, or None where its weights are in no form that can be shared."""
    engine = exact.engine
    if type(engine.weights) is not PlainWeights:
        return None
    weights = RoundedWeights(engine.weights.named)
    made = Engine(engine.config, weights, implementation=engine.spec.implementation)
    return Model(made, exact.tokenizer)
