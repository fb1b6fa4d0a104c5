"""What a checkpoint file holds, whatever its format: named tensors, read through a memory map."""

import dataclasses
import enum
import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import UInt8

from qwen_jax.weights.open_files import OpenFiles


class OtherType(enum.Enum):
    """What safetensors files hold and GGML has no type for."""

    BOOL = enum.auto()
    U8 = enum.auto()
    U16 = enum.auto()
    U32 = enum.auto()
    U64 = enum.auto()
    F8_E4M3 = enum.auto()
    F8_E5M2 = enum.auto()
    F8_E4M3FNUZ = enum.auto()
    F8_E5M2FNUZ = enum.auto()
    F8_E8M0 = enum.auto()
    F4 = enum.auto()
    F6_E2M3 = enum.auto()
    F6_E3M2 = enum.auto()
    C64 = enum.auto()


TensorType = GGMLQuantizationType | OtherType

_OTHER_SIZES = {
    OtherType.F4: (2, 1),
    OtherType.F6_E2M3: (4, 3),
    OtherType.F6_E3M2: (4, 3),
    OtherType.U16: (1, 2),
    OtherType.U32: (1, 4),
    OtherType.U64: (1, 8),
    OtherType.C64: (1, 8),
}


def block_size(kind: TensorType) -> tuple[int, int]:
    """How many values make a block of this type, and its bytes; plain numbers are blocks of one."""
    if isinstance(kind, OtherType):
        return _OTHER_SIZES.get(kind, (1, 1))
    return GGML_QUANT_SIZES[kind]


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes from `offset` in the file `path`.

    `shape` is row-major, so a linear weight reads [out, in]; rows are whole blocks of `type`.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    path: Path
    offset: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        block, size = block_size(self.type)
        return self.elements // block * size


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """One checkpoint's files: its metadata, and its tensors by name.

    `paths` lists the files in order; `metadata` holds plain values, lists of strings and NumPy
    arrays; `opened` has the files, from which all of it comes.
    """

    paths: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    opened: OpenFiles = dataclasses.field(default_factory=OpenFiles, kw_only=True, repr=False)

    def raw(self, name: str) -> UInt8[np.ndarray, "n"]:
        """The tensor's bytes, a flat read-only view of the memory-mapped file.

        Raises UserError where the file has changed since it was opened.
        """
        info = self.tensors[name]
        return self.opened[info.path].bytes(info.offset, info.offset + info.nbytes)

    def forget(self, name: str) -> None:
        """Gives back the memory that a tensor's bytes take since they were read, where the system
        can; they are read again when they are asked for."""
        info = self.tensors[name]
        if hasattr(mmap, "MADV_DONTNEED"):
            start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            length = info.offset + info.nbytes - start
            if length > 0:
                self.opened[info.path].map.madvise(mmap.MADV_DONTNEED, start, length)
