"""Weights packed for the decode-step kernel on several devices, each with a part of a model.

A device has the weight stream of its part, as if that were a model of its own. Few rows take a
step in one kernel a device, which exchange sums through each other's memory; others, and prefill,
multiply with the same streams as one device does.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf.constants import GGMLQuantizationType
from jaxtyping import Array, Bool, Float, Int, UInt32

import pallas_kernels
from pallas_kernels import peers
from pallas_kernels.decode_step import GATE_UP, HEAD, Packed, StepPlan, put_matrix, tile_offsets
from pallas_kernels.decode_step import refusal as kernel_refusal
from pallas_kernels.decode_step.packed.plan import DOWN, O_PROJ
from qwen_jax.config import ModelConfig
from qwen_jax.engine.forward import Forward
from qwen_jax.engine.packed_matrices import PackedMatrix
from qwen_jax.engine.packing import BlockRows, Put, pack_all
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.split_weights import SplitWeights
from qwen_jax.engine.weights import (
    PackedWeights,
    decoder,
    named,
    plan_for,
    step,
)
from qwen_jax.engine.weights import refusal as refusal_on_one
from qwen_jax.mesh import part
from qwen_jax.model.cache import HEADS, Cache
from qwen_jax.model.split import Split
from qwen_jax.model.tap import watched
from qwen_jax.weights import names
from qwen_jax.weights.on_device import Raw

if TYPE_CHECKING:  # Flax is heavy, and only tracing needs it
    from qwen_jax.model.decoder import Parameters, Qwen2

AXES: Any = Packed(0, 1, None, None)  # type: ignore[arg-type]
"""Of what a step reads of a model, the axis that is dealt out."""
CACHE: Any = Cache(HEADS, None)  # type: ignore[arg-type]
"""Of a cache the same."""


def refusal(config: ModelConfig, dtype: jnp.dtype, devices: Sequence[int]) -> str | None:
    """Why the decode step's kernel can't run one row of a model on these devices, or None."""
    return peers.refusal(devices) or refusal_on_one(part(config, len(devices)), dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DealtMatrix(PackedMatrix):
    """A matrix of which every device has a part in its own stream."""

    @property
    def dealt_axes(self) -> Any:
        """As `Split.over` asks for them."""
        return dataclasses.replace(self, packed=AXES)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitPacked:
    """A model's parameters on a mesh, as the decode-step kernel reads them.

    Attributes:
        packed: all devices' streams, one after the other, and their biases, side by side.
        embed: the embedding where the head is not tied to it; each device has some of its rows.
        config: of all of the model.
        plan: of each device's part.
    """

    packed: Packed
    embed: "Float[Array, 'V D'] | BlockRows | None"
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    plan: StepPlan = dataclasses.field(metadata={"static": True})
    dtype: jnp.dtype = dataclasses.field(metadata={"static": True})
    implementation: str = dataclasses.field(metadata={"static": True})
    split: Split = dataclasses.field(metadata={"static": True})

    @property
    def in_blocks(self) -> bool:
        return any(storage.name != self.dtype.name for storage in self.plan.storages)

    def devices(self) -> set[jax.Device]:
        return self.packed.stream.devices()

    def parameters(self) -> "Parameters":
        """Every one as one device would have it."""
        return SplitWeights(_dealt(self), self.config, self.split).parameters()

    def _dealt(self) -> dict[str, jax.Array]:
        """Every one dealt out, its matrices put together."""
        from qwen_jax.model.decoder import dealt_axis  # and flax with it

        def own(packed: Packed, embed: Any) -> dict[str, jax.Array]:
            return self._part(packed, embed).parameters()

        every = (parameter.name for parameter in names.parameters(self.config, "gguf"))
        axes = {name: dealt_axis(name) for name in every}
        found: dict[str, jax.Array] = self.split.over(own, (AXES, 0), axes)(self.packed, self.embed)
        return found

    def _part(self, packed: Packed, embed: Any) -> PackedWeights:
        """A device's own, as weights of a model."""
        config = self.split.part(self.config)
        return PackedWeights(packed, embed, config, self.plan, self.dtype, self.implementation)

    def model(self, spec: Spec) -> "Qwen2":
        """Its products are taken with the weight streams; but for a trace blocks are made numbers,
        since products with them make others than those that it declares."""

        def matrix(phase: int, layer: int = 0) -> DealtMatrix:
            return DealtMatrix(self.packed, self.plan, phase, layer, self.implementation)

        if self.in_blocks and watched():
            return decoder(spec, self._dealt(), look_up=self.look_up)
        params = named(self.packed, self.config, self.dtype, matrix) | {"embed": self.embed}
        params["embed" if self.embed is None else "lm_head"] = matrix(HEAD)
        return decoder(spec, params, look_up=self.look_up)

    def look_up(self, tokens: Int[Array, "*T"]) -> Float[Array, "*T D"]:
        """Rows of the embedding, each of them on one device."""

        def own(packed: Packed, embed: Any, tokens: Int[Array, "*T"]) -> Float[Array, "*T D"]:
            return self._looked_up(self._part(packed, embed), tokens)

        return self.split.over(own, (AXES, 0, None), None)(self.packed, self.embed, tokens)

    def _looked_up(self, own: PackedWeights, tokens: Int[Array, "*T"]) -> Float[Array, "*T D"]:
        """On every device with its part."""
        local, mine = self.split.own_rows(tokens, self.config.vocab_size // self.split.size)
        found = own.look_up(local).astype(self.dtype)
        return self.split.sum(jnp.where(mine[..., None], found, 0))

    def forward(self, spec: Spec, rows: int) -> Forward:
        if self.serves(rows):
            return self._through_kernels
        return functools.partial(step, self.model(spec))

    def serves(self, rows: int) -> bool:
        """Whether a step of so many rows is a kernel's.

        Raises:
            UnsupportedError: the kernel was asked for by name and can't serve the case.
        """
        pairs = self.config.rope_dim // 2
        why_not = kernel_refusal(self.plan, rows, self.dtype, pairs)
        return pallas_kernels.choose("decode_step", self.implementation, why_not) == "mosaic_gpu"

    def _through_kernels(
        self,
        token: Int[Array, "B"],
        cache: Cache,
        position: Int[Array, "B"],
        live: Bool[Array, "B"],
        preceding: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        def own(
            packed: Packed, embed: Any, token: Int[Array, "B"], cache: Cache, *rest: Any
        ) -> tuple[Float[Array, "B V"], Cache]:
            position, live, preceding = rest
            part, devices = self._part(packed, embed), self.split.size
            hidden = self._looked_up(part, token)
            return part.stepped(hidden, cache, position, live, preceding, devices)

        given = (AXES, 0, None, CACHE, None, None, None)
        over = self.split.over(own, given, (None, CACHE))
        return over(self.packed, self.embed, token, cache, position, live, preceding)


# In one program: each operation by itself would be compiled, for every matrix.
_dealt = jax.jit(SplitPacked._dealt)


def pack_split(
    config: ModelConfig,
    parameters: Iterable[tuple[str, jax.Array | Raw]],
    dtype: jnp.dtype,
    implementation: str,
    split: Split,
    plan: StepPlan | None = None,
    embed: GGMLQuantizationType | None = None,
) -> SplitPacked:
    """Packs parameters, as they come, that are dealt out as `weights.shards.on_devices` does.

    Args:
        plan, embed: as of `engine.weights.pack`, of each device's part.
    """
    plan = plan or plan_for(split.part(config), dtype.name)
    granules, words = plan.stream_shape
    stream = jnp.zeros((split.size * granules, words), jnp.uint32, device=split.sharding(0))
    offsets = split.placed(tile_offsets(plan))
    packed, embedding = pack_all(config, parameters, plan, stream, offsets, embed, _put(split))
    return SplitPacked(packed, embedding, config, plan, dtype, implementation, split)


def _put(split: Split) -> Put:
    """Puts each device's part of a matrix into its stream, which is donated."""

    @functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4))
    def put(
        stream: UInt32[Array, "n words"],
        at: Int[np.ndarray, " tiles"],
        values: tuple[jax.Array, ...],
        phase: int,
        stored: str,
    ) -> UInt32[Array, "n words"]:
        def own(stream: jax.Array, at: jax.Array, *values: jax.Array) -> jax.Array:
            return put_matrix(stream, at, jnp.concatenate(values), phase == GATE_UP, stored)

        axis = 1 if phase in (O_PROJ, DOWN) else 0
        return split.over(own, (0, None, *(axis,) * len(values)), 0)(stream, at, *values)

    return put
