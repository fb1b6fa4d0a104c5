"""How a checkpoint holds one weight: as a tensor, or as several that make it up together."""

import dataclasses
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import Float

from qwen_jax.errors import UserError
from qwen_jax.weights.blocks import DECODABLE, decode_into
from qwen_jax.weights.tensors import TensorFiles


class Stored(Protocol):
    """One weight of an open checkpoint, in the form the files have it."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of all tensors that it is made of."""

    def check(self, path: Path) -> None:
        """Raises UserError, naming the checkpoint `path`, where their shapes or types are wrong."""

    def decode(self, out: Float[np.ndarray, "..."]) -> bool:
        """Fills `out`, C-contiguous and of the weight's shape; see `blocks.decode_into`."""


@dataclasses.dataclass(frozen=True)
class Plain:
    """A weight that is one tensor: plain numbers, or blocks of GGUF."""

    files: TensorFiles
    name: str
    shape: tuple[int, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.name,)

    def check(self, path: Path) -> None:
        info = self.files.tensors[self.name]
        if info.shape != self.shape:
            raise UserError(
                f"{path}: the tensor {self.name!r} has the shape {info.shape}, but the config asks "
                f"for {self.shape}; the metadata belong to another model, so convert the "
                "checkpoint again."
            )
        if info.type not in DECODABLE:
            raise UserError(
                f"{path}: the tensor {self.name!r} is of type {info.type.name}, which cannot be "
                f"decoded; choose one of {', '.join(sorted(kind.name for kind in DECODABLE))}."
            )

    def decode(self, out: Float[np.ndarray, "..."]) -> bool:
        return decode_into(self.files.raw(self.name), self.files.tensors[self.name].type, out)
