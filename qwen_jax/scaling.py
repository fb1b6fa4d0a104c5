"""How long a decode step would take on so many GPUs, and what each would hold: docs/scaling.md.

A model of few numbers, for machines that one does not have. Those of one GPU are fitted to what was
measured; those between GPUs are assumed, and said to be.
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


@dataclasses.dataclass(frozen=True)
class Machine:
    """GPUs of one host; times in seconds, sizes in bytes.

    Attributes:
        memory: of a GPU, that programs may have.
        bandwidth: of its memory, as products read weights and attention keys and values.
        operations: of 16 bits a second, as products reach them.
        layer: what a layer's kernels take besides, from launch to launch.
        link: bytes a second that a GPU sends to the others.
        meeting: what a collective of two GPUs takes, however little is sent,
        each: and of every further one.
    """

    name: str
    memory: float
    bandwidth: float
    operations: float
    layer: float
    link: float
    meeting: float
    each: float


H200 = Machine(
    name="H200",
    memory=139 * 2**30,
    bandwidth=0.92 * 4.04e12,
    operations=600e12,
    layer=26.5e-6,
    link=350e9,
    meeting=10e-6,
    each=1e-6,
)


class Step(NamedTuple):
    """A decode step of one model: bytes of each device, and seconds.

    Attributes:
        weights: bytes that a device holds,
        cache: and those of its rows' keys and values.
        reading: seconds for weights and cache, or for the products where these take longer.
        layers: for launches.
        meeting: for collectives.
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
    config: ModelConfig, dtype: jnp.dtype, tp: int, rows: int, context: int, machine: Machine = H200
) -> Step:
    """One step of so many rows, each with so many tokens in the cache, on `tp` devices."""
    own, size = part(config, tp), dtype.itemsize
    weights = weight_bytes(own, dtype)
    cache = rows * context * bytes_per_token(own, size)
    # Of an embedding that is not the head some rows are read alone.
    matrices = weights - (0 if config.tied else own.vocab_size * own.hidden_size * size)
    products = 2 * rows * matrices / size / machine.operations
    meeting = 0.0
    if tp > 1:
        latency = machine.meeting + (tp - 2) * machine.each
        hidden, logits = rows * config.hidden_size * size, rows * config.vocab_size * 4
        share = (tp - 1) / tp / machine.link
        reduced = latency + 2 * share * hidden  # scattered, then gathered
        meeting = (2 * config.num_layers + 1) * reduced + latency + share * logits
    reading = max((matrices + cache) / machine.bandwidth, products)
    return Step(weights, cache, reading, config.num_layers * machine.layer, meeting)


def step_lines(config: ModelConfig, mesh: MeshShape) -> list[str]:
    """What a step in bfloat16 would take on that machine, for one row and for many."""
    machine, context = H200, min(CONTEXT, config.context_length)
    lines = [f"expected of {machine.name}s in bfloat16, by a model (docs/scaling.md):"]
    for rows in ROWS:
        found = step(config, BFLOAT16, mesh.tp, rows, context)
        rate = mesh.dp * rows / found.seconds
        fits = "" if found.weights + found.cache < machine.memory else "; does not fit"
        lines.append(
            f"  {rows:>2} texts of {context:,}: {found.seconds * 1e3:.2f} ms a step, "
            f"{found.meeting * 1e3:.2f} of them collectives; {rate:,.0f} tokens/s{fits}"
        )
    return lines
