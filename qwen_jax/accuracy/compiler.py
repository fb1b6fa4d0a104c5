"""Whether the compiler under us can be trusted: reductions whose results are known, on this device.

The laboratory's truth is NumPy in float64, but what it judges, and references in float32, are
programs that XLA compiled. XLA has been wrong (jax-ml/jax#39103), and then nobody's model is.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class Probe:
    """What was found.

    Attributes:
        compiler: the versions, and the device it compiled for.
        reductions: how many were compared.
        wrong: one sentence for each that was not exact.
    """

    compiler: str
    reductions: int
    wrong: tuple[str, ...]

    def __str__(self) -> str:
        if not self.wrong:
            return f"{self.compiler}: {self.reductions} reductions of known results are exact"
        return f"{self.compiler}: WRONG, {'; '.join(self.wrong)}"


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A program, and what it gives for `x`: integers, so that adding is exact in every order."""

    name: str
    program: Callable[[jax.Array], jax.Array]
    x: Float[np.ndarray, "..."]
    right: Float[np.ndarray, "..."]


@functools.cache
def probe() -> Probe:
    """Compiles and compares, once a process; some tenths of a second."""
    found = list(reductions())
    with ThreadPoolExecutor(len(found), "probe") as pool:
        wrong = tuple(said for said in pool.map(judged, found) if said)
    device = jax.local_devices()[0]
    compiler = f"JAX {jax.__version__} on a {device.device_kind}"
    return Probe(compiler, len(found), wrong)


def judged(one: Reduction) -> str:
    """What is wrong with a reduction, or nothing."""
    ours = np.asarray(jax.jit(one.program)(one.x))
    off = np.argwhere(ours != one.right)
    if not len(off):
        return ""
    first = tuple(off[0])
    return (
        f"{one.name} is {ours[first]:.10g} at {list(map(int, first))}, but exactly "
        f"{one.right[first]:.10g} ({len(off)} of {ours.size} are wrong)"
    )


def reductions() -> Iterator[Reduction]:
    """The shapes of norms, softmax and sampling, and those of the public report."""
    rng = np.random.default_rng(0)
    for rows in (16_385, 32_769):
        squares = np.arange(rows, dtype=np.float32) ** 2
        x = np.zeros((rows, 3), np.float32)
        x[:, 0] = np.arange(rows)
        yield Reduction(f"a sum of squares over {rows} x 3", _squares_of_products, x, squares)
    for rows, width in ((257, 4864), (1, 151_936)):
        x = rng.integers(0, 4, (rows, width)).astype(np.float32)
        size = f"over {rows} x {width}"
        yield Reduction(f"a sum of squares {size}", _squares, x, (x * x).sum(-1))
        yield Reduction(f"a maximum {size}", _maximum, x, x.max(-1))


def _squares(x: jax.Array) -> jax.Array:
    return (x * x).sum(-1)


def _maximum(x: jax.Array) -> jax.Array:
    return x.max(-1)


def _squares_of_products(x: jax.Array) -> jax.Array:
    """The program of the report: the squares' sum is fused with a product of each row."""
    matrix = jnp.eye(x.shape[1], dtype=x.dtype)
    return jax.vmap(lambda row: (jnp.dot(matrix, row, precision="highest") ** 2).sum())(x)
