"""A model on several devices that each have a part of every layer: tensor parallelism.

A device has whole heads of q, k and v, its share of the feed-forward and of the vocabulary, and
computes with them alone what the decoder computes with all (Shoeybi et al., 2019,
arXiv:1909.08053). Parts meet where o_proj and down_proj add up what devices have each of a
product, and where the logits are put together: `sum` and `join`.

Where there are more devices than key/value heads, each head is on several. The cache then holds
it as often, and the decoder's config is `Split.cached`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import (
    AbstractMesh,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from jaxtyping import Array, Bool, Int, Shaped

import pallas_kernels
from qwen_jax import mesh
from qwen_jax.config import ModelConfig

AXIS = "tp"
"""Of the mesh: devices that have a model together."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Whole:
    """All of a model on one device: what `Split` does with parts, done with the whole."""

    @property
    def size(self) -> int:
        """Devices that have the model together."""
        return 1

    def over(
        self, function: Callable[..., T], given: tuple[Any, ...], made: Any
    ) -> Callable[..., T]:
        """What runs `function` on every device with its parts of the arguments.

        Args:
            given: of each argument, or each of its arrays, the axis that is dealt out, or None.
            made: the same of the result. What isn't dealt out must be equal on all devices.
        """
        return function

    def sum(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Inside of `over`: the sum of all devices' arrays."""
        return x

    def join(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        """Inside of `over`: all devices' arrays, put together along the last axis."""
        return x

    def look_up(self, rows: Any, ids: Int[Array, "B T"]) -> Shaped[Array, "B T D"]:
        """Rows of a matrix of which every device has some, by their numbers."""
        return rows[ids]

    def placed(self, tree: T) -> T:
        """Arrays that are equal on all devices, put there."""
        there: T = jax.device_put(tree)
        return there

    def sharding(self, axis: int | None) -> Sharding | None:
        """Of an array of which that axis is dealt out; of None where it is the default device's."""
        return None

    def cached(self, config: ModelConfig) -> ModelConfig:
        """The config with as many key/value heads as the cache holds."""
        return config

    def part(self, config: ModelConfig) -> ModelConfig:
        """The config of what one device has."""
        return config


WHOLE = Whole()


@dataclasses.dataclass(frozen=True)
class On(Whole):
    """All of a model on one device, which needn't be the default one.

    Attributes:
        device: makes no difference to what is traced.
    """

    device: jax.Device = dataclasses.field(compare=False)

    def placed(self, tree: T) -> T:
        there: T = jax.device_put(tree, self.device)
        return there

    def sharding(self, axis: int | None) -> Sharding:
        return SingleDeviceSharding(self.device)


@dataclasses.dataclass(frozen=True)
class Split(Whole):
    """A model dealt out to the devices of a mesh, whose one axis is `AXIS`.

    Attributes:
        exchange: whether few rows are added up by a kernel of ours, where it serves.
    """

    devices: Mesh | AbstractMesh
    exchange: bool = False

    @property
    def size(self) -> int:
        return self.devices.size

    def over(
        self, function: Callable[..., T], given: tuple[Any, ...], made: Any
    ) -> Callable[..., T]:
        def mapped(*arguments: Any) -> T:
            # Some know of each of their arrays how it is dealt out.
            axes = (
                getattr(argument, "dealt_axes", axes)
                for argument, axes in zip(arguments, given, strict=True)
            )
            run: Callable[..., T] = jax.shard_map(
                function,
                mesh=self.devices,
                in_specs=tuple(map(_specs, axes)),
                out_specs=_specs(made),
                # What kernels and loops make can't be followed; the tests compare all devices.
                check_vma=False,
            )
            return run(*arguments)

        return mapped

    @property
    def numbers(self) -> tuple[int, ...]:
        """The devices' numbers, as JAX counts them; of none in particular, those that they could
        have."""
        if isinstance(self.devices, AbstractMesh):
            return tuple(range(self.size))
        return tuple(self.devices.device_ids.ravel().tolist())

    def sum(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        if self.exchange:
            rows = x.reshape(-1, x.shape[-1])
            return pallas_kernels.all_reduce(rows, AXIS, self.numbers).reshape(x.shape)
        return lax.psum(x, AXIS)

    def join(self, x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        return lax.all_gather(x, AXIS, axis=x.ndim - 1, tiled=True)

    def look_up(self, rows: Any, ids: Int[Array, "B T"]) -> Shaped[Array, "B T D"]:
        """Each device looks its own up; the others' are zeros there."""

        def own(rows: Shaped[Array, "V D"], ids: Int[Array, "B T"]) -> Shaped[Array, "B T D"]:
            local, mine = self.own_rows(ids, len(rows))
            return self.sum(jnp.where(mine[..., None], rows[local], 0))

        return self.over(own, (0, None), None)(rows, ids)

    def own_rows(
        self, ids: Int[Array, "*T"], each: int
    ) -> tuple[Int[Array, "*T"], Bool[Array, "*T"]]:
        """Inside of `over`: which of a device's rows, of which each has so many, these are, and
        whether they are its own; of others the first."""
        local = ids - lax.axis_index(AXIS) * each
        mine = (local >= 0) & (local < each)
        return jnp.where(mine, local, 0), mine

    def placed(self, tree: T) -> T:
        there: T = jax.device_put(tree, self.sharding(None))
        return there

    def sharding(self, axis: int | None) -> NamedSharding:
        return NamedSharding(self.devices, _spec(axis))

    def alike(self, other: Any) -> NamedSharding:
        """A sharding of other devices on these."""
        return NamedSharding(self.devices, other.spec)

    def cached(self, config: ModelConfig) -> ModelConfig:
        return mesh.cached(config, self.size)

    def part(self, config: ModelConfig) -> ModelConfig:
        return mesh.part(config, self.size)


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)


_specs = functools.partial(jax.tree.map, _spec, is_leaf=lambda axis: axis is None)
