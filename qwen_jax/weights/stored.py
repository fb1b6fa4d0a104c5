"""How a checkpoint holds one weight: as a tensor, or as several that make it up together."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from qwen_jax.errors import UserError
from qwen_jax.weights.blocks import DECODABLE, FLOAT8, FORMATS, decoded
from qwen_jax.weights.tensors import TensorFiles, TensorInfo, block_size


class Blocked(NamedTuple):
    """A matrix in blocks of that name, so many bytes a row; `read` has the rows [start, stop)."""

    name: str
    row_bytes: int
    read: Callable[[int, int], UInt8[np.ndarray, "bytes"]]


class Stored(Protocol):
    """One weight of an open checkpoint, in the form the files have it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's own, however it is packed."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors that it is made of; they need not be there."""

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """Where these tensors lie, and those of what changes them."""

    @property
    def kind(self) -> str:
        """How it is stored, in a word: BF16, Q4_K, GPTQ-Int4."""

    @property
    def blocks(self) -> Blocked | None:
        """The matrix in blocks, or None where there are none that say the same."""

    def check(self, path: Path) -> None:
        """Raises UserError, naming the checkpoint `path`, where their shapes or types are wrong."""

    def rows(self, start: int, stop: int) -> Float[np.ndarray, "rows ..."]:
        """Rows [start, stop) of a matrix, or so many values of a vector, in float32 or as stored.

        Called by `blocks.fill`, which rounds them to the wanted dtype and uses all cores.
        """


@dataclasses.dataclass(frozen=True)
class Plain:
    """A weight that is one tensor: plain numbers, or blocks of GGUF."""

    files: TensorFiles
    name: str
    shape: tuple[int, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return (self.files.tensors[self.name],)

    @property
    def kind(self) -> str:
        return self.files.tensors[self.name].type.name

    @property
    def blocks(self) -> Blocked | None:
        info = self.files.tensors[self.name]
        if len(self.shape) == 1 or info.type not in FORMATS:
            return None
        return Blocked(info.type.name.lower(), info.nbytes // self.shape[0], self.raw)

    def check(self, path: Path) -> None:
        info = self.files.tensors[self.name]
        if info.shape != self.shape:
            raise UserError(
                f"{path}: the tensor {info.name!r} has the shape {info.shape}, but the config asks "
                f"for {self.shape}; the metadata belong to another model, so convert the "
                "checkpoint again."
            )
        if info.type not in DECODABLE | FLOAT8:
            raise UserError(
                f"{path}: the tensor {info.name!r} is of type {info.type.name}, which cannot be "
                "decoded; choose a checkpoint in BF16, F16 or F32, or a GGUF file such as one in "
                "Q4_K_M."
            )

    def rows(self, start: int, stop: int) -> Float[np.ndarray, "rows ..."]:
        info = self.files.tensors[self.name]
        return decoded(self.raw(start, stop), info.type).reshape(-1, *info.shape[1:])

    def raw(self, start: int, stop: int) -> UInt8[np.ndarray, "bytes"]:
        """The bytes of `rows`, as they lie in the file."""
        info = self.files.tensors[self.name]
        block, size = block_size(info.type)
        # Rows are whole blocks; a vector is asked for whole, or in pieces of `blocks.CHUNK`.
        row = info.elements // info.shape[0]
        first, last = (n * row // block * size for n in (start, stop))
        return self.files.raw(self.name)[first:last]

    def forget(self) -> None:
        """Lets go of the memory that `raw` has taken."""
        self.files.forget(self.name)


def not_finite(name: str, stored: Stored, dtype: np.dtype) -> UserError:
    """What to say of a weight that has values which are not finite in `dtype`."""
    file = " and ".join(dict.fromkeys(str(info.path) for info in stored.infos))
    if dtype == np.float16:
        return UserError(
            f"{file}: the weight {name!r} has values that float16 cannot hold (its limit is "
            "65504); use bfloat16 or float32."
        )
    return UserError(
        f"{file}: the weight {name!r} has values that are not finite, with which nothing can be "
        "computed; choose another checkpoint, or get this one again."
    )
