"""A mesh's programs for Hopper, lowered: attention and sampling are kernels on each device."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct
from jax.sharding import AbstractMesh, NamedSharding

from qwen_jax.engine import steps
from qwen_jax.engine.sampling import PLANS
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.split_weights import SplitWeights
from qwen_jax.engine.steps import Extras, State
from qwen_jax.model.cache import HEADS, PAGE, create_pages
from qwen_jax.model.decoder import dealt_axis
from qwen_jax.model.split import AXIS, Split
from qwen_jax.weights import names
from tests.kernels.sizes import SIZES

DTYPE = jnp.dtype(jnp.bfloat16)
ROWS, SLOTS, WIDTH = 8, 8, 4


@pytest.mark.lower
@pytest.mark.usefixtures("as_if_on_hopper")
@pytest.mark.parametrize("tp", [2, 4])
def test_kernels_on_each_device(tp: int) -> None:
    """Of one layer of 7B: on four devices a key/value head each."""
