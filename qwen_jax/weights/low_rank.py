"""Weights that adapters change: low-rank updates are added, a few rows at a time, as they are read.

LoRA (Hu et al., 2021, arXiv:2106.09685): W + scale * B A. The products and sums are in float32,
before anything is rounded to the compute dtype, and no second copy of the model is made.
"""

import dataclasses
from pathlib import Path

import numpy as np
from jaxtyping import Float, Float32

from qwen_jax.weights.stored import Plain, Stored
from qwen_jax.weights.tensors import TensorInfo

_TILE = 1 << 18
"""Multiplications that OpenBLAS does on the calling thread. In larger products its own threads and
the pool's wait for one another: merging took fifty times as long."""


@dataclasses.dataclass(frozen=True)
class Factor:
    """One of an update's two matrices; `transposed` where the file has it the other way round."""

    tensor: Plain
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[::-1] if self.transposed else self.tensor.shape

    def rows(self, start: int, stop: int) -> Float[np.ndarray, "rows columns"]:
        if self.transposed:
            return self.tensor.rows(0, self.tensor.shape[0]).T[start:stop]
        return self.tensor.rows(start, stop)


@dataclasses.dataclass(frozen=True)
class LowRank:
    """scale * left @ right, of the shapes [out, rank] and [rank, in]."""

    left: Factor
    right: Factor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.left.shape[0], self.right.shape[1]

    def rows(self, start: int, stop: int) -> Float32[np.ndarray, "rows columns"]:
        left = self.left.rows(start, stop).astype(np.float32)
        right = self.right.rows(0, self.right.shape[0]).astype(np.float32, copy=False)
        out = np.empty((len(left), right.shape[1]), np.float32)
        width = max(_TILE // left.size, 1)
        for first in range(0, right.shape[1], width):
            part = slice(first, first + width)
            np.matmul(left, right[:, part], out=out[:, part])
        out *= np.float32(self.scale)
        return out


@dataclasses.dataclass(frozen=True)
class Merged:
    """A matrix of a checkpoint with the updates of adapters."""

    base: Stored
    updates: tuple[LowRank, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.base.tensors

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        factors = (factor for update in self.updates for factor in (update.left, update.right))
        return *self.base.infos, *(info for factor in factors for info in factor.tensor.infos)

    @property
    def kind(self) -> str:
        return f"{self.base.kind}+LoRA"

    @property
    def blocks(self) -> None:
        """There are none."""

    def check(self, path: Path) -> None:
        self.base.check(path)

    def rows(self, start: int, stop: int) -> Float32[np.ndarray, "rows columns"]:
        values = self.base.rows(start, stop).astype(np.float32)
        for update in self.updates:
            values += update.rows(start, stop)
        return values
