"""Weights that stay in the file's blocks, for a CPU that hasn't the memory for numbers.

A block's fields lie in arrays of their own, row by row, for XLA makes vector code of contiguous
bytes alone. A product decodes some hundred rows at a time inside the program, while they are in
the cache, and multiplies them: the numbers are those that the whole matrix would have.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from qwen_jax.engine.weights import PlainWeights
from qwen_jax.weights import names
from qwen_jax.weights.blocks import FORMATS, decoded
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.loader import aligned, decode
from qwen_jax.weights.open_files import Progress
from qwen_jax.weights.simple_quants import Parts
from qwen_jax.weights.stored import Plain, Stored, not_finite
from qwen_jax.weights.tensors import OtherType

if TYPE_CHECKING:
    from qwen_jax.model.decoder import Parameters

PIECE = 1 << 20
"""Values that are decoded at a time: 4 MB, a share of the cache; fewer cost more in starts."""

FLOAT32 = jnp.dtype(jnp.float32)
_HALVES = (GGMLQuantizationType.F16, GGMLQuantizationType.BF16)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """A matrix [out, in] in blocks of one type, or in 16 bits.

    Attributes:
        fields: arrays [out, blocks of a row, ...] by name, or names to such again; of numbers
            one array [out, in].
        kind: the type.
    """

    fields: Mapping[str, Any]
    kind: GGMLQuantizationType = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix; inside of a mesh's programs of a device's part."""
        out, across = jax.tree.leaves(self.fields)[0].shape[:2]
        return out, across * (GGML_QUANT_SIZES[self.kind][0] if self.kind in FORMATS else 1)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Any:
        """Itself for `...`, else the rows of such numbers, decoded."""
        if rows is ...:
            return self
        chosen = jax.tree.map(lambda field: field[rows.reshape(-1)], self.fields)
        return _in_order(chosen, self.kind).reshape(*rows.shape, -1)

    # Jitted, so that it is traced once for all layers: a third of what compiling takes.
    @functools.partial(jax.jit, static_argnums=(2, 3))
    def product(
        self, x: Float[Array, "*rows in"], precision: lax.Precision, dtype: jnp.dtype
    ) -> Float[Array, "*rows out"]:
        """x @ self.T in `dtype`, a piece of rows after another.

        The last piece begins early enough to be whole; rows in two pieces come out the same.
        """
        out, width = self.shape
        count = -(-out * width // PIECE)
        piece = -(-out // count)
        inputs = _dealt(
            x, jax.eval_shape(functools.partial(_parts, kind=self.kind), self._rows(0, 1))
        )

        def product_of(start: Int[Array, ""] | int) -> Float[Array, "*rows piece"]:
            # Multiplied as they are decoded, the values would be decoded for each row of `x`.
            parts = lax.optimization_barrier(_parts(self._rows(start, piece), self.kind))
            matrices = (part.reshape(piece, -1) for part in parts)
            found = [_matmul(a, w, precision, dtype) for a, w in zip(inputs, matrices, strict=True)]
            return functools.reduce(jnp.add, found)

        if count == 1:
            return product_of(0)

        def put(number: Int[Array, ""], y: Float[Array, "*rows out"]) -> Float[Array, "*rows out"]:
            start = jnp.minimum(number * piece, out - piece)
            return lax.dynamic_update_slice_in_dim(y, product_of(start), start, -1)

        return lax.fori_loop(0, count, put, jnp.zeros((*x.shape[:-1], out), dtype))

    def finite(self) -> jax.Array:
        """Whether all values are, looked at piece by piece."""
        out, width = self.shape
        piece = max(min(PIECE // width, out), 1)

        def look(number: Int[Array, ""], so_far: jax.Array) -> jax.Array:
            parts = _parts(self._rows(jnp.minimum(number * piece, out - piece), piece), self.kind)
            return so_far & jnp.stack([jnp.isfinite(part).all() for part in parts]).all()

        return lax.fori_loop(0, -(-out // piece), look, jnp.array(True))

    def _rows(self, start: Int[Array, ""] | int, count: int) -> Any:
        return jax.tree.map(
            lambda field: lax.dynamic_slice_in_dim(field, start, count), self.fields
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """A matrix whose rows are those of its sources, each in a form of its own."""

    sources: tuple[Blocks | jax.Array, ...]

    def __getitem__(self, rows: Any) -> Any:
        return self if rows is ... else expanded(self)[rows]

    def product(
        self, x: Float[Array, "*rows in"], precision: lax.Precision, dtype: jnp.dtype
    ) -> Float[Array, "*rows out"]:
        """x @ self.T in `dtype`."""
        return jnp.concatenate([_matmul(x, s, precision, dtype) for s in self.sources], axis=-1)


Matrix = Blocks | Stacked | jax.Array


def _matmul(
    x: Float[Array, "*rows in"], weight: Any, precision: lax.Precision, dtype: jnp.dtype
) -> Float[Array, "*rows out"]:
    from qwen_jax.model.products import matmul  # and flax with it, which only tracing needs

    return matmul(x, weight, precision, dtype)


def _parts(fields: Mapping[str, Any], kind: GGMLQuantizationType) -> Parts:
    """Decoded rows, of each part [rows, blocks of a row, groups, ...]."""
    if kind in FORMATS:
        parts: Parts = jax.vmap(FORMATS[kind].parts)(fields)
        return parts
    return (fields["values"].astype(jnp.float32),)


def _dealt(x: Float[Array, "*rows in"], parts: Parts) -> list[Float[Array, "*rows share"]]:
    """The inputs of each part's values, as `Parts` says where these stand."""
    if len(parts) == 1:
        return [x]
    run = math.prod(parts[0].shape[3:])
    runs = x.reshape(*x.shape[:-1], -1, len(parts), run)
    return [runs[..., part, :].reshape(*x.shape[:-1], -1) for part in range(len(parts))]


def _in_order(fields: Mapping[str, Any], kind: GGMLQuantizationType) -> Float[Array, "rows in"]:
    if kind not in FORMATS:
        return fields["values"].astype(jnp.float32)
    values = jax.vmap(FORMATS[kind].values)(fields)
    return values.reshape(len(values), -1)


def expanded(matrix: Matrix) -> Float[Array, "out in"]:
    """All its numbers."""
    if isinstance(matrix, jax.Array):
        return matrix
    if isinstance(matrix, Blocks):
        return _all_of(matrix)
    return jnp.concatenate([expanded(source) for source in matrix.sources])


@jax.jit
def _all_of(blocks: Blocks) -> Float[Array, "out in"]:
    return _in_order(blocks.fields, blocks.kind)


class _Expanded(Mapping[str, jax.Array]):
    """Parameters that are decoded each time they are asked for, so that no two need be there."""

    def __init__(self, held: Mapping[str, Matrix]):
        self._held = held

    def __getitem__(self, name: str) -> jax.Array:
        return expanded(self._held[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockWeights(PlainWeights):
    """Parameters by name, of which matrices are in blocks as far as the checkpoint has them so."""

    @property
    def dtype(self) -> jnp.dtype:
        return FLOAT32

    @property
    def in_blocks(self) -> bool:
        return True

    def parameters(self) -> "Parameters":
        """Every one in float32, decoded when it is asked for."""
        return _Expanded(self.named)

    def devices(self) -> set[jax.Device]:
        return self.named["final_norm"].devices()


def stays(weight: Stored) -> GGMLQuantizationType | None:
    """The type in which a matrix can stay, or None for what is expanded.

    That is all but GGUF's blocks and numbers of 16 bits: vectors, float32, GPTQ, AWQ, FP8, and what
    adapters change.
    """
    if not isinstance(weight, Plain) or len(weight.shape) == 1:
        return None
    kind = weight.infos[0].type
    if isinstance(kind, OtherType):
        return None
    return kind if kind in FORMATS or kind in _HALVES else None


def packed_bytes(checkpoint: Checkpoint) -> int | None:
    """What the weights take in blocks, or None where there are none to keep."""
    kinds = {name: stays(weight) for name, weight in checkpoint.stored.items()}
    if not any(kinds.values()):
        return None
    total = 0
    for name, weight in checkpoint.stored.items():
        kind = kinds[name] or GGMLQuantizationType.F32
        total += math.prod(weight.shape) // GGML_QUANT_SIZES[kind][0] * _held(kind)
    return total


@functools.cache
def _held(kind: GGMLQuantizationType) -> int:
    """Bytes that a block takes."""
    if kind not in FORMATS:
        return GGML_QUANT_SIZES[kind][1]
    fields = FORMATS[kind].apart(np.zeros(1, FORMATS[kind].layout))
    return (
        fields.nbytes if isinstance(fields, np.ndarray) else sum(f.nbytes for f in fields.values())
    )


def load_blocks(checkpoint: Checkpoint, progress: Progress | None = None) -> BlockWeights:
    """The checkpoint's weights on the CPU, matrices in their blocks.

    Raises:
        UserError: a value is not finite.
    """
    return BlockWeights(dict(iter_blocks(checkpoint, progress)))


def iter_blocks(
    checkpoint: Checkpoint, progress: Progress | None = None, device: jax.Device | None = None
) -> Iterator[tuple[str, Any]]:
    """Each parameter as `load_blocks` has it, on that device or the default one."""
    total = sum(info.nbytes for w in checkpoint.stored.values() for info in w.infos)
    done = 0
    for parameter in checkpoint.parameters:
        sources: list[Blocks | jax.Array] = []
        for name in parameter.sources:
            stored = checkpoint.stored[name]
            kind = stays(stored)
            sources.append(
                _blocks(name, stored, kind, device)
                if kind
                else _numbers(checkpoint, parameter, name, device)
            )
            done += sum(info.nbytes for info in stored.infos)
            if progress:
                progress(done, total)
        yield parameter.name, _one(sources)


def _one(sources: list[Blocks | jax.Array]) -> Matrix:
    if len(sources) == 1:
        return sources[0]
    numbers = [source for source in sources if isinstance(source, jax.Array)]
    return jnp.concatenate(numbers) if len(numbers) == len(sources) else Stacked(tuple(sources))


def _numbers(
    checkpoint: Checkpoint, parameter: names.Parameter, name: str, device: jax.Device | None
) -> jax.Array:
    """One source of a parameter, decoded."""
    alone = dataclasses.replace(parameter, sources={name: parameter.sources[name]})
    host = aligned(parameter.sources[name], np.dtype(np.float32))
    for _ in decode(checkpoint, alone, host):
        pass
    return jax.device_put(host, device)


def _blocks(
    name: str, stored: Stored, kind: GGMLQuantizationType, device: jax.Device | None
) -> Blocks:
    assert isinstance(stored, Plain) and len(stored.shape) == 2
    blocks = of_bytes(stored.raw(0, stored.shape[0]), kind, stored.shape[0], device)
    stored.forget()
    if not _finite(blocks):
        raise not_finite(name, stored, np.dtype(np.float32))
    return blocks


def of_bytes(
    raw: UInt8[np.ndarray, "bytes"],
    kind: GGMLQuantizationType,
    rows: int,
    device: jax.Device | None = None,
) -> Blocks:
    """A matrix of so many rows as the file has it, its fields copied apart."""
    if kind not in FORMATS:
        return Blocks({"values": _split(decoded(raw, kind), rows, device)}, kind)
    units = raw.view(FORMATS[kind].layout)
    return Blocks(_split(FORMATS[kind].apart(units), rows, device), kind)


_finite = jax.jit(Blocks.finite)


def _split(blocks: Any, rows: int, device: jax.Device | None) -> Any:
    """Each field on the device, row by row, copied into memory that JAX adopts."""
    names = blocks.dtype.names if isinstance(blocks, np.ndarray) else tuple(blocks)
    if names:
        return {name: _split(blocks[name], rows, device) for name in names}
    host = aligned((rows, len(blocks) // rows, *blocks.shape[1:]), blocks.dtype)
    host[...] = blocks.reshape(host.shape)
    return jax.device_put(host, device)
