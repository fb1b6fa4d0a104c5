"""How long a decode step would take on so many GPUs, and what each would hold: docs/scaling.md.

A model of few numbers, for machines that one does not have. Those of one GPU and of two are fitted
to what was measured; those of more are assumed, and said to be.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from qwen_jax.config import ModelConfig
from qwen_jax.engine.memory import weight_bytes
from qwen_jax.mesh import MeshShape, part
from qwen_jax.model.cache import bytes_per_token

BFLOAT16 = jnp.dtype(jnp.bfloat16)
ROWS = (1, 8, 64)
"""Texts of each model, and what each has in the cache."""

CONTEXT = 2048


class Times(NamedTuple):
    """What a way to take a step costs on a machine; in seconds.

    Attributes:
        bandwidth: bytes a second at which weights, keys and values are read.
        layer: what a layer takes besides, of one row;
        rows: of more, times the hidden size, times the rows to the power of 2/3.
        meeting: what one exchange of two GPUs takes, however little is sent,
        each: and of every further one.
        whole: whether every GPU sends all others its float32 sums, where collectives send parts.
    """

    bandwidth: float
    layer: float
    rows: float
    meeting: float
    each: float
    whole: bool


@dataclasses.dataclass(frozen=True)
class Machine:
    """GPUs of one host; times in seconds, sizes in bytes.

    Attributes:
        memory: of a GPU, that programs may have.
        operations: of 16 bits a second, as products reach them.
        link: bytes a second that a GPU sends to the others.
        kernel: a step that is the decode step's kernel, on each.
        xla: one of XLA's products, and collectives.
    """

    name: str
    memory: float
    operations: float
    link: float
    kernel: Times
    xla: Times


H200 = Machine(
    name="H200",
    memory=139 * 2**30,
    operations=600e12,
    link=350e9,
    kernel=Times(4.53e12, 7.6e-6, 0.73e-9, 1.3e-6, 0.5e-6, whole=True),
    xla=Times(0.92 * 4.04e12, 26.5e-6, 0.0, 10e-6, 1e-6, whole=False),
)


class Step(NamedTuple):
    """A decode step of one model: bytes of each device, and seconds.

    Attributes:
        weights: bytes that a device holds,
        cache: and those of its rows' keys and values.
        reading: seconds for weights and cache, or for the products where these take longer.
        layers: for launches, and what else a layer takes.
        meeting: for what devices exchange.
    """

    weights: int
    cache: int
    reading: float
    layers: float
    meeting: float

    @property
    def seconds(self) -> float:
        return self.reading + self.layers + self.meeting


def step(
    config: ModelConfig,
    dtype: jnp.dtype,
    tp: int,
    rows: int,
    context: int,
    *,
    kernel: bool,
    machine: Machine = H200,
) -> Step:
    """One step of so many rows, each with so many tokens in the cache, on `tp` devices.

    Args:
        kernel: whether it is the decode step's kernel.
    """
    times = machine.kernel if kernel else machine.xla
    own, size = part(config, tp), dtype.itemsize
    weights = weight_bytes(own, dtype)
    cache = rows * context * bytes_per_token(own, size)
    # Of an embedding that is not the head some rows are read alone.
    matrices = weights - (0 if config.tied else own.vocab_size * own.hidden_size * size)
    products = 2 * rows * matrices / size / machine.operations
    reading = max((matrices + cache) / times.bandwidth, products)
    layer = times.layer + times.rows * config.hidden_size * rows ** (2 / 3)
    meeting = 0.0
    if tp > 1:
        latency = times.meeting + (tp - 2) * times.each
        hidden, logits = rows * config.hidden_size, rows * config.vocab_size * 4
        share = (tp - 1) / tp
        # Collectives scatter sums, then gather them.
        sent = (tp - 1) * hidden * 4 if times.whole else 2 * share * hidden * size
        sums, join = 2 * config.num_layers + 1, share * logits / machine.link
        meeting = sums * (latency + sent / machine.link) + latency + join
    return Step(weights, cache, reading, config.num_layers * layer, meeting)


def step_lines(config: ModelConfig, mesh: MeshShape, kernel: bool) -> list[str]:
    """What a step in bfloat16 would take on that machine, for one row and for many."""
    machine, context = H200, min(CONTEXT, config.context_length)
    lines = [f"expected of {machine.name}s in bfloat16, by a model (docs/scaling.md):"]
    for rows in ROWS:
        found = step(config, BFLOAT16, mesh.tp, rows, context, kernel=kernel)
        rate = mesh.dp * rows / found.seconds
        fits = "" if found.weights + found.cache < machine.memory else "; does not fit"
        texts = f"{rows:>2} text{'s' * (rows > 1)} of {context:,}{' a model' * (mesh.dp > 1)}"
        lines.append(
            f"  {texts}: {found.seconds * 1e3:.2f} ms a step, "
            f"{found.meeting * 1e3:.2f} of them between GPUs; {rate:,.0f} tokens/s{fits}"
        )
    return lines
