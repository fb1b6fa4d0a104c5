"""Parameters on an accelerator: weights travel as the file has them and become numbers there.

To decode a 7B in Q8_0 kept 16 cores busy for 17 s. So the host only hands over bytes of the mapped
file, in pieces of some megabytes that several threads send at a time. The compiled program of a
piece decodes it and puts it into its rows of the parameter. Its sizes are those of the piece and
the parameter, so a model of any number of layers takes about a dozen programs.

Matrices that are multiplied in their blocks stay bytes; their values are looked at all the same.

A block format has one definition, in `simple_quants`, `kquants` and `iquants`: its decoder is
given JAX's arrays here. Weights in other forms (GPTQ, AWQ, FP8, float64, adapters' changes) are
rarer; the threads decode them a piece at a time, and the numbers travel.
"""

import collections
import functools
import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from gguf.constants import GGMLQuantizationType
from jax import lax
from jaxtyping import Array, Float32, Int32, Shaped, UInt8

from qwen_jax.executables.kept import Kept
from qwen_jax.weights.blocks import FORMATS
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.names import Parameter
from qwen_jax.weights.open_files import Progress
from qwen_jax.weights.stored import Blocked, Plain, Stored, not_finite

PIECE = 32 << 20
"""Bytes of a piece at most, if a row is no longer: transfers near their full speed, while few of
them are little memory."""

SENDERS = 8
"""Pieces on the way at a time: 256 MB. One thread copies out of a mapped file at 6 to 9 GB/s, and a
GPU's bus takes several times that."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


Raw = tuple[UInt8[Array, "rows bytes"], ...]
"""The bytes of a parameter's weights, of each one's rows."""


class Piece(NamedTuple):
    """Rows [start, stop) of a stored weight, the `number`th of its checkpoint.

    They go to the rows from `row` on of its parameter; `sent` of its bytes have come with them.
    """

    stored: Stored
    number: int
    start: int
    stop: int
    row: int
    sent: int

    def read(self, dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
        """What travels: bytes of the mapped file, blocks or numbers, or else decoded numbers.

        JAX has no float64: such numbers are rounded here, to the parameter's `dtype`.
        """
        if isinstance(self.stored, Plain) and block_type(self.stored) is not None:
            return self.stored.raw(self.start, self.stop)
        # Damaged scales overflow or are NaN; the device sees what has become of them.
        with np.errstate(over="ignore", invalid="ignore"):
            values = self.stored.rows(self.start, self.stop)
            return values if values.itemsize <= 4 else values.astype(dtype)


def iter_decoded(
    checkpoint: Checkpoint,
    dtype: np.dtype,
    device: jax.Device | jax.sharding.Sharding | None,
    progress: Progress | None,
    keep: Collection[str] = (),
) -> Iterator[tuple[str, Any]]:
    """As `loader.iter_parameters`, which says more; the values are looked at when all are there.

    The host holds no more than the pieces on their way.

    Args:
        keep: parameters that stay as the file has them, each all in blocks: a `Raw`.
    """
    names = [name for parameter in checkpoint.parameters for name in parameter.sources]
    sizes = [sum(info.nbytes for info in checkpoint.stored[name].infos) for name in names]
    before = [0, *itertools.accumulate(sizes)]
    numbers = itertools.count()
    plan = [(p, list(_pieces(p, checkpoint, numbers))) for p in checkpoint.parameters]
    first_bad = jax.device_put(np.int32(len(names)), device)

    def dtype_of(parameter: Parameter) -> np.dtype:
        return np.dtype(np.float32) if parameter.keep_float32 else dtype

    def send(item: tuple[Parameter, Piece]) -> jax.Array:
        parameter, piece = item
        if parameter.name in keep:
            data = _blocked(piece.stored).read(piece.start, piece.stop)
            data = data.reshape(piece.stop - piece.start, -1)
        else:
            data = piece.read(dtype_of(parameter))
        return jax.device_put(data, device).block_until_ready()

    with ThreadPoolExecutor(SENDERS, thread_name_prefix="send") as pool:
        arrived = _ahead(pool, send, ((p, piece) for p, pieces in plan for piece in pieces))
        for parameter, pieces in plan:
            raw = parameter.name in keep
            arrays = _arrays(parameter, checkpoint, dtype_of, raw)
            outs, first = [_empty(*array, device) for array in arrays], pieces[0].number
            for piece, data in zip(pieces, arrived, strict=False):
                at = piece.number - first if raw else 0
                place = np.array([piece.start if raw else piece.row, piece.number], np.int32)
                kind = block_type(piece.stored)
                outs[at], first_bad = _insert(outs[at], first_bad, data, place, kind, raw)
                if progress:
                    progress(before[piece.number] + piece.sent, before[-1])
            yield parameter.name, tuple(outs) if raw else outs[0]
    if (bad := int(first_bad)) < len(names):
        (parameter,) = (p for p in checkpoint.parameters if names[bad] in p.sources)
        raise not_finite(names[bad], checkpoint.stored[names[bad]], dtype_of(parameter))


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Iterator[_Result]:
    """The function's results in order, with twice as many begun as there are senders."""
    begun: collections.deque[Future[_Result]] = collections.deque()
    for item in items:
        begun.append(pool.submit(function, item))
        if len(begun) == 2 * SENDERS:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _pieces(
    parameter: Parameter, checkpoint: Checkpoint, numbers: Iterator[int]
) -> Iterator[Piece]:
    """The parameter's weights, each in pieces of one size, so that one program takes them all.

    The last piece may overlap the one before it.
    """
    row = 0
    for name, shape in parameter.sources.items():
        stored, rows, number = checkpoint.stored[name], shape[0], next(numbers)
        size = sum(info.nbytes for info in stored.infos)
        travels = size if isinstance(stored, Plain) else 4 * int(np.prod(shape))
        # A vector's rows need not be whole blocks.
        step = rows if len(shape) == 1 else -(-rows // min(-(-travels // PIECE), rows))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield Piece(stored, number, stop - step, stop, row + stop - step, size * stop // rows)
        row += rows


def block_type(stored: Stored) -> GGMLQuantizationType | None:
    """The type of the blocks that a weight travels in, or None where it does as numbers."""
    kind = stored.infos[0].type
    return GGMLQuantizationType(kind) if isinstance(stored, Plain) and kind in FORMATS else None


def _arrays(
    parameter: Parameter,
    checkpoint: Checkpoint,
    dtype_of: Callable[[Parameter], np.dtype],
    raw: bool,
) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of a parameter on the device, or of each of its sources' bytes."""
    if not raw:
        return [(parameter.shape, dtype_of(parameter))]
    byte = np.dtype(np.uint8)
    return [(raw_shape(checkpoint, name), byte) for name in parameter.sources]


def raw_shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """Rows of a weight, and bytes of one."""
    stored = checkpoint.stored[name]
    return stored.shape[0], _blocked(stored).row_bytes


def _blocked(stored: Stored) -> Blocked:
    assert stored.blocks is not None, "what is kept is in blocks"
    return stored.blocks


@functools.partial(jax.jit, static_argnames=("kind", "raw"), donate_argnums=(0, 1))
def insert(
    out: Shaped[Array, "rows ..."],
    first_bad: Int32[Array, ""],
    data: Shaped[Array, "..."],
    place: Int32[Array, "2"],
    kind: GGMLQuantizationType | None,
    raw: bool = False,
) -> tuple[Shaped[Array, "rows ..."], Int32[Array, ""]]:
    """The piece's values in their rows of `out`, rounded to nearest even as `blocks.fill` does.

    Args:
        out: donated, as is `first_bad`.
        first_bad: the lowest number of a weight with a value that is not finite in `out`'s dtype.
        data: blocks of the type `kind`, or numbers where it is None.
        place: where the piece's rows begin, and its weight's number.
        raw: whether `out` takes the piece's bytes, rows of blocks.
    """
    values = data if kind is None else decoded(data, kind)
    values = values.astype(jnp.float32)
    if not raw:
        values = values.astype(out.dtype).reshape(-1, *out.shape[1:])
    row, number = place
    bad = jnp.where(jnp.isfinite(values).all(), first_bad, jnp.minimum(first_bad, number))
    return lax.dynamic_update_slice_in_dim(out, data if raw else values, row, 0), bad


@functools.partial(jax.jit, static_argnums=(0, 1))
def zeros(shape: tuple[int, ...], dtype: np.dtype) -> Shaped[Array, "..."]:
    """What `insert` fills."""
    return jnp.zeros(shape, dtype)


_insert = Kept(sys.modules[__name__], "insert", static=(4, 5))
_zeros = Kept(sys.modules[__name__], "zeros", static=(0, 1))


def _empty(
    shape: tuple[int, ...], dtype: np.dtype, device: jax.Device | jax.sharding.Sharding | None
) -> Shaped[Array, "..."]:
    return _zeros(shape, dtype) if device is None else jnp.zeros(shape, dtype, device=device)


def decoded(raw: UInt8[Array, "bytes"], kind: GGMLQuantizationType) -> Float32[Array, " values"]:
    """The values of some whole blocks, as `blocks.decoded` has them on the host."""
    block = FORMATS[kind]
    return block.decode(_fields(raw.reshape(-1, block.layout.itemsize), block.layout)).reshape(-1)


def _fields(raw: UInt8[Array, "*n bytes"], layout: np.dtype) -> dict[str, Any]:
    """What a structured NumPy array would give by name."""
    assert layout.fields is not None
    found: dict[str, Any] = {}
    for name, (dtype, offset, *_) in layout.fields.items():
        part = raw[..., offset : offset + dtype.itemsize]
        part = part.reshape(*raw.shape[:-1], *dtype.shape, dtype.base.itemsize)
        found[name] = (_fields if dtype.base.fields else _numbers)(part, dtype.base)
    return found


def _numbers(raw: UInt8[Array, "*n bytes"], dtype: np.dtype) -> Shaped[Array, "*n"]:
    """Little-endian numbers, put together by shifts, which XLA fuses with what reads them."""
    word = np.dtype(f"u{dtype.itemsize}")
    shifted = (raw[..., i].astype(word) << np.array(8 * i, word) for i in range(dtype.itemsize))
    return functools.reduce(jnp.bitwise_or, shifted).view(dtype)
