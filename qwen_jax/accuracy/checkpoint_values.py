"""A checkpoint's tensors as other libraries decode them: gguf.quants, or safetensors.

Only where a tensor lies is taken from our own parser, which has checked it against the file.
"""

import functools
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, quants
from jaxtyping import Float, UInt8
from safetensors import safe_open

from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.tensors import TensorInfo, block_size

_FLOAT32 = np.dtype(np.float32)


class CheckpointValues:
    """Tensors of an open checkpoint by their own names, in float32, a few rows at a time."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.quantised = checkpoint.format == "gguf"
        self._map = functools.cache(lambda path: np.memmap(path, np.uint8, "r"))
        self._open = functools.cache(lambda path: safe_open(path, "np"))

    def info(self, name: str) -> TensorInfo:
        return self.checkpoint.tensors[name]

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float[np.ndarray, "..."]:
        """Rows [start, stop) of a matrix, or so many elements of a vector."""
        info = self.info(name)
        stop = info.shape[0] if stop is None else min(stop, info.shape[0])
        if not self.quantised:
            return self._open(info.path).get_slice(name)[start:stop].astype(_FLOAT32)
        if len(info.shape) == 1:
            return self.decode(name, self.bytes(name))[start:stop]
        row = info.nbytes // info.shape[0]
        return self.decode(name, self.bytes(name, start * row, stop * row))

    def decode(self, name: str, raw: UInt8[np.ndarray, "bytes"]) -> Float[np.ndarray, "..."]:
        """Whole rows of this tensor, from bytes that need not be its own."""
        info = self.info(name)
        with np.errstate(all="ignore"):  # what planted bytes hold may be anything
            values = quants.dequantize(raw, GGMLQuantizationType[info.type.name]).astype(
                _FLOAT32, copy=False
            )
        return values.reshape(-1, *info.shape[1:])

    def bytes(self, name: str, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "n"]:
        """The file's bytes, counted from the tensor's first; zero where the file has none."""
        info = self.info(name)
        stop = info.nbytes if stop is None else stop
        file = self._map(Path(info.path))
        first, last = info.offset + start, info.offset + stop
        inside = np.array(file[max(first, 0) : max(min(last, file.size), 0)])
        return np.pad(inside, (max(-first, 0), max(last - file.size, 0)))

    def block(self, name: str) -> int:
        """Values in one block of the tensor's type; 1 for plain numbers."""
        return block_size(self.info(name).type)[0]
