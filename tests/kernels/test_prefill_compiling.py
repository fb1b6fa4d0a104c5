"""A prefill program has the same kernels in every layer, which only `make compile` can tell."""

import re

import pytest

from qwen_jax.config import ModelConfig
from qwen_jax.model.cache import PAGE
from tests.kernels import hopper
from tests.kernels.prefill import extending


@pytest.mark.lower
@pytest.mark.usefixtures("as_if_on_hopper")
def test_what_xla_compiles_does_not_grow_with_layers() -> None:
    """Fusions that are the same but for their names are compiled once; the first layers' differ."""
    if not hopper.compiles():
        pytest.skip("JAX's CUDA plugin is not installed")
    few = fusions(8)
    assert few and len(fusions(12)) == len(few)


def fusions(layers: int) -> set[str]:
    """Of the compiled program, without names and places."""
    config = ModelConfig(layers, 256, 4, 2, 64, 512, 1024, 32768, 1e6, 1e-6, tied=True)
    extend, arguments = extending(config, 4, 1, PAGE // 2)
    text = hopper.compiled(extend, *arguments)
    bodies = dict(re.findall(r"^%?(\S+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    called = re.findall(r" fusion\(.*?calls=%?([\w.]+)", text)
    return {re.sub(r", metadata=\{[^}]*\}|%[\w.-]+", "", bodies[name]) for name in called}
