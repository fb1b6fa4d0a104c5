"""What prefill of packed weights holds besides its cache, which only `make compile` can tell."""

import pytest

from qwen_jax.config import ModelConfig
from qwen_jax.model.cache import PAGE
from tests.kernels import hopper
from tests.kernels.prefill import extending

CONFIG = ModelConfig(10, 256, 4, 2, 64, 512, 1024, 32768, 1e6, 1e-6, tied=True)
ROWS = 4


@pytest.mark.lower
@pytest.mark.usefixtures("as_if_on_hopper")
def test_one_cache_is_enough() -> None:
    """Pages are written where they lie, and read there too."""
    if not hopper.compiles():
        pytest.skip("JAX's CUDA plugin is not installed")
    extend, arguments = extending(CONFIG, ROWS, CONFIG.context_length // PAGE, PAGE)
    pages = arguments[1]
    held = hopper.temporary_bytes(extend, *arguments, donate=1)
    assert held < 0.12 * pages.size * pages.dtype.itemsize
