"""How programs get at the parameters: by name, or packed for the decode-step kernel.

Packed ones are the only copy a GPU holds. They are made once, while loading, parameter by
parameter. Prefill multiplies with the same weight stream, and so do decode steps of more rows than
the kernel takes.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from gguf.constants import GGMLQuantizationType
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

import pallas_kernels
from pallas_kernels.decode_step import (
    GATE_UP,
    HEAD,
    MOST_ROWS,
    ModelShape,
    Packed,
    StepPlan,
    empty_stream,
    tile_offsets,
)
from pallas_kernels.decode_step import refusal as kernel_refusal
from pallas_kernels.decode_step.packed import packing
from pallas_kernels.target import HOPPER
from qwen_jax.config import ModelConfig
from qwen_jax.engine.forward import Forward
from qwen_jax.engine.packed_matrices import PackedGateUp, PackedMatrix
from qwen_jax.engine.packing import MATRICES, BlockRows, pack_all
from qwen_jax.engine.spec import Spec
from qwen_jax.executables.kept import Kept
from qwen_jax.model.cache import Cache
from qwen_jax.model.rotary import inverse_frequencies
from qwen_jax.model.tap import watched
from qwen_jax.weights import names
from qwen_jax.weights.on_device import Raw

if TYPE_CHECKING:  # Flax is heavy, and only tracing needs it
    from qwen_jax.model.decoder import Parameters, Qwen2


_put_matrix = Kept(packing, "put_matrix", static=(3, 4))


class Weights(Protocol):
    """The parameters of a model on a device: a pytree, so that programs take it."""

    @property
    def dtype(self) -> jnp.dtype:
        """Of the matrices."""

    @property
    def in_blocks(self) -> bool:
        """Whether matrices are as a quantised file has them, and made numbers as they are used."""

    def parameters(self) -> "Parameters":
        """Every parameter by its canonical name."""

    def model(self, spec: Spec) -> "Qwen2":
        """The decoder over these weights, inside a program."""

    def forward(self, spec: Spec, rows: int) -> Forward:
        """One decode step of so many rows, inside a program.

        Raises:
            UnsupportedError: a kernel was asked for by name and can't serve the case.
        """

    def devices(self) -> set[jax.Device]:
        """Where they lie."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlainWeights:
    """Parameters by name, as `qwen_jax.weights.loader` makes them."""

    named: "Parameters"

    @property
    def dtype(self) -> jnp.dtype:
        return self.named["embed"].dtype

    @property
    def in_blocks(self) -> bool:
        return False

    def parameters(self) -> "Parameters":
        return self.named

    def model(self, spec: Spec) -> "Qwen2":
        return decoder(spec, self.named)

    def forward(self, spec: Spec, rows: int) -> Forward:
        return functools.partial(step, self.model(spec))

    def devices(self) -> set[jax.Device]:
        return self.named["embed"].devices()


def decoder(spec: Spec, parameters: "Parameters", **options: Any) -> "Qwen2":
    """The decoder over parameters by name, inside a program."""
    from qwen_jax.model.decoder import Qwen2

    return Qwen2(
        spec.config,
        parameters,
        precision=spec.precision,
        implementation=spec.implementation,
        split=spec.split,
        **options,
    )


def step(
    model: "Qwen2",
    token: Int[Array, "B"],
    cache: Cache,
    position: Int[Array, "B"],
    live: Bool[Array, "B"],
    preceding: Int[Array, "B"] | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """As `Forward` says; a row that isn't live has no length, so that it writes nothing. A layer
    writes the keys and values of all rows before any of them looks."""
    hidden, cache = model(token[:, None], cache, position, jnp.where(live, position + 1, 0))
    return model.logits(hidden)[:, 0], cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedWeights:
    """A model's parameters as the decode-step kernel reads them.

    Attributes:
        packed: the stream of weight tiles, biases and norms.
        embed: the embedding where the head is not tied to it; else it is the stream's head.
        dtype: of activations, of matrices where they are put together, and of the cache.
        implementation: of the step, as asked for; "xla" runs the kernel's reference.
    """

    packed: Packed
    embed: "Float[Array, 'V D'] | BlockRows | None"
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    plan: StepPlan = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    implementation: str = dataclasses.field(metadata={"static": True})

    @property
    def in_blocks(self) -> bool:
        return any(storage.name != self.dtype.name for storage in self.plan.storages)

    def devices(self) -> set[jax.Device]:
        return self.packed.stream.devices()

    def model(self, spec: Spec) -> "Qwen2":
        """Its products are taken with the weight stream."""

        def look_up(tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
            return self.look_up(tokens).astype(self.dtype)

        # Products with blocks make other numbers of them than those that a trace declares.
        matrix = self._matrix if self.in_blocks and watched() else self._product
        return decoder(spec, self._named(matrix), look_up=look_up)

    def forward(self, spec: Spec, rows: int) -> Forward:
        if self.serves(rows):
            return self._through_kernel
        return functools.partial(step, self.model(spec))

    def _through_kernel(
        self,
        token: Int[Array, "B"],
        cache: Cache,
        position: Int[Array, "B"],
        live: Bool[Array, "B"],
        preceding: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        return self.stepped(self.look_up(token), cache, position, live, preceding)

    def stepped(
        self,
        hidden: Float[Array, "B D"],
        cache: Cache,
        position: Int[Array, "B"],
        live: Bool[Array, "B"],
        preceding: Int[Array, "B"] | None,
        devices: int = 1,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """A step by the kernel. A row that isn't live goes along as the shortest row, which costs
        least.

        Args:
            devices: that take it together, each with a part of the model: see `decode_step`.
        """
        logits, new = pallas_kernels.decode_step(
            self.packed,
            self.plan,
            hidden,
            cache.pages,
            cache.tables,
            jnp.where(live, position, 0),
            jnp.asarray(inverse_frequencies(self.config)),
            attention_factor=self.config.attention_factor,
            preceding=preceding,
            implementation=self.implementation,
            devices=devices,
        )
        return logits, cache.write_all(new, position, live)

    def serves(self, rows: int) -> bool:
        """Whether a step of so many rows runs on the packed weights; else on `parameters`.

        Raises:
            UnsupportedError: the kernel was asked for by name and can't serve the case.
        """
        if self.implementation == "xla":
            return rows <= MOST_ROWS
        why_not = kernel_refusal(self.plan, rows, self.dtype, self.config.rope_dim // 2)
        return pallas_kernels.choose("decode_step", self.implementation, why_not) == "mosaic_gpu"

    def parameters(self) -> dict[str, jax.Array]:
        """Every parameter by its canonical name, its matrices put together."""
        return self._named(self._matrix)

    def _named(self, matrix: Callable[..., Any]) -> dict[str, Any]:
        """The parameters, of which `matrix` makes those of a phase and a layer."""
        params = named(self.packed, self.config, self.dtype, matrix)
        head = matrix(HEAD)
        if self.embed is None:
            return params | {"embed": head}
        return params | {"embed": self.embed[...].astype(self.dtype), "lm_head": head}

    def look_up(self, tokens: Int[Array, "*T"]) -> Float[Array, "*T D"]:
        """Rows of the embedding, without all of it where it is the head."""
        if self.embed is not None:
            return self.embed[tokens]
        found = self.packed.embeddings(self.plan, tokens.reshape(-1))
        return found.reshape(*tokens.shape, -1)

    def _product(self, phase: int, layer: int = 0) -> PackedMatrix:
        kind = PackedGateUp if phase == GATE_UP else PackedMatrix
        return kind(self.packed, self.plan, phase, layer, self.implementation)

    def _matrix(self, phase: int, layer: int = 0) -> Float[Array, "rows columns"]:
        return self.packed.matrix(self.plan, phase, layer).astype(self.dtype)


def named(
    packed: Packed, config: ModelConfig, dtype: jnp.dtype, matrix: Callable[[int, int], Any]
) -> dict[str, Any]:
    """What a step reads but for the head and the embedding, by canonical names; `matrix` makes
    those of a phase and a layer.

    Norms and biases are cut out before anything is fused with them. Fusions that cut differ from
    layer to layer, and XLA compiles each; without cuts they are alike, and are compiled once.
    """
    # XLA cuts rows out in one kernel if it doesn't know their numbers, else in a kernel for each.
    numbers = lax.optimization_barrier(np.arange(len(packed.norms)))
    norms = packed.norms.at[numbers].get(mode="promise_in_bounds")
    small = {"final_norm": norms[-1]}
    for i in range(config.num_layers):
        small[f"layers.{i}.attn_norm"] = norms[2 * i]
        small[f"layers.{i}.ffn_norm"] = norms[2 * i + 1]
        small[f"layers.{i}.qkv_proj.bias"] = packed.bias[i].astype(dtype)
    matrices = {
        f"layers.{i}.{name}.weight": matrix(phase, i)
        for i in range(config.num_layers)
        for phase, name in enumerate(MATRICES)
    }
    return lax.optimization_barrier(small) | matrices


def read_back(weights: Weights) -> "Parameters":
    """Every parameter outside of a program. Packed ones come out of one program: each operation by
    itself would be compiled for every matrix."""
    return _read_back(weights) if isinstance(weights, PackedWeights) else weights.parameters()


_read_back = jax.jit(PackedWeights.parameters)


def plan_for(config: ModelConfig, stored: str) -> StepPlan:
    """How the model, its matrices all stored so, is dealt out to the multiprocessors of the default
    device, or a GPU's where that is none.
    """
    blocks = getattr(jax.local_devices()[0], "core_count", None) or HOPPER.multiprocessors
    shape = ModelShape(
        layers=config.num_layers,
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        ffn=config.ffn_size,
        vocab=config.vocab_size,
        eps=config.rms_eps,
    )
    return StepPlan.uniform(shape, blocks, stored)


def refusal(config: ModelConfig, dtype: jnp.dtype) -> str | None:
    """Why the decode-step kernel can't run this model, were it for one row; or None."""
    return kernel_refusal(plan_for(config, dtype.name), 1, dtype, config.rope_dim // 2)


def prepare(
    config: ModelConfig,
    parameters: Iterable[tuple[str, jax.Array]],
    dtype: jnp.dtype,
    implementation: str,
) -> Weights:
    """The parameters as the engine runs them: packed where the kernel serves, else by name.

    Raises:
        UnsupportedError: the kernel was asked for by name and can't run this model.
    """
    chosen = pallas_kernels.choose("decode_step", implementation, refusal(config, dtype))
    if chosen == "xla":
        return PlainWeights(dict(parameters))
    return pack(config, parameters, dtype, implementation)


def prepared_shapes(
    config: ModelConfig,
    parameters: Iterable[names.Parameter],
    dtype: jnp.dtype,
    implementation: str,
) -> Weights:
    """What `prepare` will return, as shapes alone."""
    shapes = {
        p.name: jax.ShapeDtypeStruct(p.shape, jnp.float32 if p.keep_float32 else dtype)
        for p in parameters
    }
    made: Weights = jax.eval_shape(
        lambda given: prepare(config, given.items(), dtype, implementation), shapes
    )
    return made


def pack(
    config: ModelConfig,
    parameters: Iterable[tuple[str, jax.Array | Raw]],
    dtype: jnp.dtype,
    implementation: str,
    plan: StepPlan | None = None,
    embed: GGMLQuantizationType | None = None,
) -> PackedWeights:
    """Packs parameters as they come.

    Args:
        plan: how matrices are stored, all in `dtype` by default. Of those that stay in blocks the
            parameter is the bytes of each of its sources.
        embed: the type of an embedding that is not the head and comes as bytes.
    """
    plan = plan or plan_for(config, dtype.name)
    made = empty_stream(plan), tile_offsets(plan)
    packed, embedding = pack_all(config, parameters, plan, *made, embed, _put)
    return PackedWeights(packed, embedding, config, plan, dtype, implementation)


def _put(
    stream: UInt32[Array, "n words"],
    at: Int[np.ndarray, " tiles"],
    values: tuple[jax.Array, ...],
    phase: int,
    stored: str,
) -> UInt32[Array, "n words"]:
    whole = values[0] if len(values) == 1 else jnp.concatenate(values)
    return _put_matrix(stream, at, whole, phase == GATE_UP, stored)
