"""One device's part of a checkpoint: a checkpoint itself, of fewer heads, feed-forward and rows.

Whatever loads a checkpoint loads such a part, and reads no more of the files: rows of q, k, v,
gate, up, the embedding and the head, columns of o_proj and down_proj. Blocks stay as they are where
a part begins and ends between two; else whole rows are decoded, and the part is cut out.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, UInt8

from qwen_jax import mesh
from qwen_jax.model.split import Split
from qwen_jax.weights import names
from qwen_jax.weights.blocks import decoded
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.loader import iter_parameters
from qwen_jax.weights.open_files import Progress
from qwen_jax.weights.stored import Blocked, Plain, Stored
from qwen_jax.weights.tensors import TensorInfo, block_size


def iter_split(
    checkpoint: Checkpoint, dtype: DTypeLike, split: Split, progress: Progress | None = None
) -> Iterator[tuple[str, jax.Array]]:
    """Each parameter dealt out to a mesh's devices, as `loader.iter_parameters` has it otherwise.

    The host holds for every device of its own what that holds for one.

    Raises:
        UserError: as there.
    """

    def parts(
        part: Checkpoint, device: jax.Device, told: Progress
    ) -> Iterator[tuple[str, jax.Array]]:
        return iter_parameters(part, dtype, device=device, progress=told)

    return on_devices(checkpoint, split, parts, progress)


def on_devices(
    checkpoint: Checkpoint,
    split: Split,
    parts: Callable[[Checkpoint, jax.Device, Progress], Iterator[tuple[str, Any]]],
    progress: Progress | None,
) -> Iterator[tuple[str, Any]]:
    """Parameters of one array each, or of several, put together from what devices of this host
    have.

    Args:
        parts: of a device's part of the checkpoint the parameters, on that device.
    """
    from qwen_jax.model.decoder import dealt_axis  # and flax with it

    devices = [d for d in split.devices.devices.flat if d.process_index == jax.process_index()]
    sums = dict.fromkeys(devices, (0, 0))

    def parts_of(device: jax.Device) -> Iterator[tuple[str, Any]]:
        index = list(split.devices.devices.flat).index(device)

        def told(done: int, total: int) -> None:
            sums[device] = done, total
            if progress is not None:
                progress(sum(done for done, _ in sums.values()), total * len(sums))

        return parts(part_of(checkpoint, split.size, index), device, told)

    def joined(axis: int | None, *arrays: jax.Array) -> jax.Array:
        shape = list(arrays[0].shape)
        if axis is not None:
            shape[axis] *= split.size
        return jax.make_array_from_single_device_arrays(
            tuple(shape), split.sharding(axis), list(arrays)
        )

    for own in zip(*map(parts_of, devices), strict=True):
        name = own[0][0]
        join = functools.partial(joined, dealt_axis(name))
        yield name, jax.tree.map(join, *(tree for _, tree in own))


def part_of(checkpoint: Checkpoint, tp: int, index: int) -> Checkpoint:
    """What one device, by its number, has of a checkpoint that so many have together."""
    config = mesh.part(checkpoint.config, tp)
    stored: dict[str, Stored] = {}
    for parameter in checkpoint.parameters:
        for name, shape in parameter.sources.items():
            ranges = [
                _share(letter, size, tp, index, checkpoint.config.num_kv_heads)
                for letter, size in zip(parameter.axes[name], shape, strict=True)
            ]
            stored[name] = _cut(checkpoint.stored[name], ranges)
    parameters = names.parameters(config, checkpoint.format)
    return dataclasses.replace(checkpoint, config=config, parameters=parameters, stored=stored)


def _share(letter: str, size: int, tp: int, index: int, kv_heads: int) -> range:
    """A device's part of an axis with that letter of `names.Source`."""
    if letter == "D":
        return range(size)
    # A key/value head that is on several devices is whole on each.
    parts = min(tp, kv_heads) if letter == "KH" else tp
    number, each = index * parts // tp, size // parts
    return range(number * each, (number + 1) * each)


def _cut(stored: Stored, ranges: list[range]) -> Stored:
    if all(len(part) == size for part, size in zip(ranges, stored.shape, strict=True)):
        return stored
    shape = tuple(map(len, ranges))
    if isinstance(stored, Plain) and len(shape) == 2:
        block, _ = block_size(stored.infos[0].type)
        if ranges[1].start % block == ranges[1].stop % block == 0:
            return PlainPart(stored.files, stored.name, shape, whole=stored, ranges=tuple(ranges))
    return Part(stored, shape, tuple(ranges))


@dataclasses.dataclass(frozen=True)
class PlainPart(Plain):
    """Some rows and columns of a matrix that is one tensor, cut between its blocks."""

    whole: Plain = dataclasses.field(kw_only=True)
    ranges: tuple[range, ...] = dataclasses.field(kw_only=True)

    @property
    def blocks(self) -> Blocked | None:
        info = self.infos[0]
        found = self.whole.blocks
        if found is None:
            return None
        block, size = block_size(info.type)
        return Blocked(found.name, self.shape[1] // block * size, self.raw)

    def rows(self, start: int, stop: int) -> Float[np.ndarray, "rows in"]:
        return decoded(self.raw(start, stop), self.infos[0].type).reshape(-1, self.shape[1])

    def raw(self, start: int, stop: int) -> UInt8[np.ndarray, "bytes"]:
        rows, columns = self.ranges
        found = self.whole.raw(rows.start + start, rows.start + stop)
        if len(columns) == self.whole.shape[1]:
            return found
        block, size = block_size(self.infos[0].type)
        first, last = (n // block * size for n in (columns.start, columns.stop))
        return np.ascontiguousarray(found.reshape(stop - start, -1)[:, first:last]).reshape(-1)


@dataclasses.dataclass(frozen=True)
class Part:
    """The same of a weight in any form, cut out of its decoded rows."""

    whole: Stored
    shape: tuple[int, ...]
    ranges: tuple[range, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.whole.tensors

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return self.whole.infos

    @property
    def kind(self) -> str:
        return self.whole.kind

    @property
    def blocks(self) -> Blocked | None:
        return None

    def check(self, path: Path) -> None:
        """The whole was checked when the checkpoint was opened."""

    def rows(self, start: int, stop: int) -> Float[np.ndarray, "rows ..."]:
        first = self.ranges[0].start
        if len(self.ranges) == 1:  # a vector's values can't be asked for from anywhere
            values: Any = self.whole.rows(0, self.whole.shape[0])
            return values[first + start : first + stop]
        columns = self.ranges[1]
        return self.whole.rows(first + start, first + stop)[:, columns.start : columns.stop]
