"""A model's parameters on the devices of a mesh, and the meshes that a run has."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float

from qwen_jax.config import ModelConfig
from qwen_jax.engine.memory import device
from qwen_jax.engine.weights import PlainWeights
from qwen_jax.errors import UserError
from qwen_jax.mesh import MeshShape
from qwen_jax.model.split import AXIS, WHOLE, On, Split, Whole

if TYPE_CHECKING:
    from qwen_jax.model.decoder import Parameters


def splits_of(shape: MeshShape) -> list[Whole]:
    """The devices of each of its models: the first ones that JAX has, of each host as many. A model
    that is not dealt out is whole on one, the first on the default device.

    Raises:
        UserError: there are not as many, or some hosts would have none.
    """
    platform = device().platform  # says it where JAX finds none
    devices = jax.devices()
    if shape.devices > 1 and (processes := jax.process_count()) > 1:
        return _of_hosts(shape, devices, processes)
    if shape.devices > len(devices):
        more = "XLA_FLAGS=--xla_force_host_platform_device_count=N makes more of a CPU"
        raise UserError(
            f"mesh is {shape}, which takes {shape.devices} devices, but JAX has {len(devices)} of "
            f"the platform {platform}; choose a smaller one{f'; {more}' * (platform == 'cpu')}."
        )
    if shape.tp == 1:
        return [WHOLE, *map(On, devices[1 : shape.dp])]
    dealt = np.array(devices[: shape.devices]).reshape(shape.dp, shape.tp)
    return [Split(Mesh(each, (AXIS,))) for each in dealt]


def _of_hosts(shape: MeshShape, devices: list[jax.Device], processes: int) -> list[Whole]:
    """All hosts make the same calls, so that each has a part of every model."""
    each = shape.tp // processes
    if shape.tp % processes:
        raise UserError(
            f"mesh is {shape}, but its tp must be a multiple of the {processes} hosts, which all "
            "have a part of each model; where a model fits on one host, run an experiment on each "
            "of them by --shard=I/N, which exchanges nothing."
        )
    of_process = [[d for d in devices if d.process_index == p] for p in range(processes)]
    if (fewest := min(map(len, of_process))) < each * shape.dp:
        raise UserError(
            f"mesh is {shape}, which takes {each * shape.dp} devices of each of {processes} hosts, "
            f"but one has {fewest}; choose a smaller one."
        )
    return [
        Split(
            Mesh(np.array([own[i * each : (i + 1) * each] for own in of_process]).ravel(), (AXIS,))
        )
        for i in range(shape.dp)
    ]


def least(number: int) -> int:
    """The smallest of all processes' numbers: they make the same calls, of one size."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).min())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitWeights(PlainWeights):
    """Parameters by name, dealt out as `weights.shards.iter_split` does."""

    config: ModelConfig = dataclasses.field(metadata={"static": True})
    split: Whole = dataclasses.field(metadata={"static": True})

    @classmethod
    def deal(
        cls, config: ModelConfig, split: Split, whole: Iterable[tuple[str, jax.Array]]
    ) -> "SplitWeights":
        """Deals out what one device would have, parameter by parameter."""
        from qwen_jax.model.decoder import dealt_axis  # and flax with it

        named = {}
        for name, x in whole:
            there = split.sharding(dealt_axis(name))
            named[name] = jax.device_put(_by_device(config, split, name, x), there)
        return cls(named, config, split)

    def parameters(self) -> "Parameters":
        """Every one as one device would have it, made when it is asked for."""
        return _Whole(self)

    def on(self, split: Split) -> Self:
        """The same on other devices, each of which is of the same host as the one before it."""
        assert isinstance(self.split, Split)
        then = dict(zip(self.split.devices.devices.flat, split.devices.devices.flat, strict=True))

        def there(x: jax.Array) -> jax.Array:
            # Part by part: JAX sends no whole array to other devices of several hosts.
            parts = [jax.device_put(part.data, then[part.device]) for part in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape, split.alike(x.sharding), parts)

        return dataclasses.replace(self, named=jax.tree.map(there, self.named), split=split)

    def whole(self, name: str) -> Float[Array, "..."]:
        """One parameter, its heads and its feed-forward in the checkpoint's order."""
        x, split = self.named[name], self.split
        part, cached = split.part(self.config), split.cached(self.config)
        if "qkv_proj" in name:
            q, kv = part.num_heads * part.head_dim, part.num_kv_heads * part.head_dim
            by_device = x.reshape(split.size, q + 2 * kv, *x.shape[1:])
            copies = cached.num_kv_heads // self.config.num_kv_heads
            found = []
            for own, each in zip(
                jnp.split(by_device, [q, q + kv], axis=1), (1, copies, copies), strict=True
            ):
                heads = own.reshape(-1, part.head_dim, *x.shape[1:])[::each]
                found.append(heads.reshape(-1, *x.shape[1:]))
            return jnp.concatenate(found)
        if "gate_up_proj" in name:
            by_device = x.reshape(split.size, 2, part.ffn_size, *x.shape[1:])
            return by_device.swapaxes(0, 1).reshape(x.shape)
        return x


def _by_device(
    config: ModelConfig, split: Split, name: str, x: Float[Array, "..."]
) -> Float[Array, "..."]:
    """A parameter whose rows of one device lie together: what `SplitWeights.whole` undoes."""
    size, head, kv = split.size, config.head_dim, config.num_kv_heads
    if "qkv_proj" in name:
        copies = split.cached(config).num_kv_heads // kv
        q, k, v = jnp.split(x, [x.shape[0] - 2 * kv * head, x.shape[0] - kv * head])
        k, v = (jnp.repeat(own.reshape(kv, head, *x.shape[1:]), copies, axis=0) for own in (k, v))
        dealt = [own.reshape(size, -1, *x.shape[1:]) for own in (q, k, v)]
        return jnp.concatenate(dealt, axis=1).reshape(-1, *x.shape[1:])
    if "gate_up_proj" in name:
        return x.reshape(2, size, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
    return x


class _Whole(Mapping[str, jax.Array]):
    def __init__(self, held: SplitWeights):
        self._held = held

    def __getitem__(self, name: str) -> jax.Array:
        return self._held.whole(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held.named)

    def __len__(self) -> int:
        return len(self._held.named)
