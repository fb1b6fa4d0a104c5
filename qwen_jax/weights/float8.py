"""Weights of 8-bit floating point with scales: one a matrix, a row, or a block of rows and columns.

A weight is its float8 value times its scale: a product of two float32 numbers, rounded once. The
blocks are DeepSeek-V3's (arXiv:2412.19437, 3.3); those at the edges may be cut short.
"""

import dataclasses
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from jaxtyping import Float32

from qwen_jax.errors import UserError
from qwen_jax.weights.blocks import FLOAT8, decoded
from qwen_jax.weights.tensors import OtherType, TensorFiles, TensorInfo

SCALES = ("weight_scale_inv", "weight_scale")
"""Names of the scales; in spite of the first's, a weight is multiplied by either."""

NOT_NEEDED = (
    *(".input_scale", ".activation_scale", ".output_scale"),
    *(".k_scale", ".v_scale", ".kv_scale"),
)
"""Ends of the names of scales of activations, keys and values, which are not quantised here."""

_SCALE_TYPES = (Type.F32, Type.BF16, Type.F16, OtherType.F8_E8M0)


@dataclasses.dataclass(frozen=True)
class Float8:
    """One matrix [out, in].

    Attributes:
        scale: the name of its scales' tensor.
        block: rows and columns of a block, or None where a scale is of a row or of the matrix.
    """

    files: TensorFiles
    name: str
    shape: tuple[int, ...]
    scale: str
    block: tuple[int, int] | None

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.name, self.scale

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return tuple(self.files.tensors[name] for name in self.tensors)

    @property
    def kind(self) -> str:
        return self.files.tensors[self.name].type.name

    @property
    def sides(self) -> tuple[int, ...]:
        """Those of a block, or of the matrix where a block is larger."""
        return tuple(map(min, self.block or self.shape, self.shape))

    @property
    def blocks(self) -> None:
        """There are none."""

    def check(self, path: Path) -> None:
        weight, scale = self.infos
        if weight.shape != self.shape:
            raise UserError(
                f"{path}: the tensor {weight.name!r} has the shape {weight.shape}, but the config "
                f"asks for {self.shape}; take both from the same checkpoint."
            )
        if scale.type not in _SCALE_TYPES:
            raise UserError(
                f"{path}: the tensor {scale.name!r} is of type {scale.type.name}, but it must be "
                f"{' or '.join(kind.name for kind in _SCALE_TYPES)}; convert the checkpoint again."
            )
        if self.block:
            grid = tuple(-(-n // side) for n, side in zip(self.shape, self.block, strict=True))
            wanted = f"{grid}, one for each block of {self.block[0]} x {self.block[1]}"
            fits = scale.shape == grid
        else:
            wanted = f"(1,) or ({self.shape[0]}, 1), as quantization_config has no blocks"
            fits = scale.shape in whole_shapes(self.shape[0])
        if not fits:
            raise UserError(
                f"{path}: the tensor {scale.name!r} has the shape {scale.shape}, but it must be "
                f"{wanted}; take the checkpoint and its config together."
            )

    def rows(self, start: int, stop: int) -> Float32[np.ndarray, "rows columns"]:
        columns = self.shape[1]
        raw = self.files.raw(self.name)[start * columns : stop * columns]
        values = decoded(raw, self.files.tensors[self.name].type).reshape(-1, columns)
        info = self.files.tensors[self.scale]
        scales = decoded(self.files.raw(self.scale), info.type).astype(np.float32, copy=False)
        if self.block:
            height, width = self.sides
            by_row = scales.reshape(info.shape)[np.arange(start, stop) // height]
            values *= np.repeat(by_row, width, axis=1)[:, :columns]
        else:
            values *= scales if scales.size == 1 else scales.reshape(-1, 1)[start:stop]
        return values


def whole_shapes(rows: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of a matrix's one scale, and of a scale for each of its rows."""
    return (), (1,), (1, 1), (rows,), (rows, 1)


def is_float8(files: TensorFiles, name: str) -> bool:
    return name in files.tensors and files.tensors[name].type in FLOAT8
