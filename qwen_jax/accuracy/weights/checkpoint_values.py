"""A checkpoint's weights as others decode them: gguf.quants, safetensors, or `packed_values`.

Only where a tensor lies is taken from our own parser, which has checked it against the file.
"""

import functools

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, quants
from jaxtyping import Float, Shaped, UInt8
from safetensors import safe_open

from qwen_jax.accuracy import spread
from qwen_jax.accuracy.weights.packed_values import Packed, packed_rows
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.tensors import TensorInfo, block_size

_FLOAT32 = np.dtype(np.float32)
_FLOAT8 = {
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


class CheckpointValues:
    """Weights of an open checkpoint by their own names, in float32, a few rows at a time."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.quantised = checkpoint.format == "gguf"
        self._open = functools.cache(lambda path: safe_open(path, "np"))

    def info(self, name: str) -> TensorInfo:
        return self.checkpoint.tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.stored[name].shape

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Float[np.ndarray, "..."]:
        """Rows [start, stop) of a matrix, or so many elements of a vector."""
        weight, count = self.checkpoint.stored[name], self.shape(name)[0]
        stop = count if stop is None else min(stop, count)
        if isinstance(weight, Packed):
            return packed_rows(weight, self._tensor, start, stop)
        info = self.info(name)
        if info.type.name in _FLOAT8:
            return self._tensor(name)[start:stop].astype(_FLOAT32)
        if not self.quantised:
            return self._open(info.path).get_slice(info.name)[start:stop].astype(_FLOAT32)
        if len(info.shape) == 1:
            return self.decode(name, self.bytes(name))[start:stop]
        row = info.nbytes // info.shape[0]
        out = np.empty((stop - start, *info.shape[1:]), _FLOAT32)

        def some(part: slice) -> None:
            first, last = start + part.start, start + part.stop
            out[part] = self.decode(name, self.bytes(name, first * row, last * row))

        spread.each(some, spread.parts(len(out), out[:1].size))
        return out

    def _tensor(self, name: str) -> Shaped[np.ndarray, "..."]:
        """A tensor of a Hugging Face directory; safetensors has no float8 for NumPy."""
        info = self.info(name)
        if info.type.name in _FLOAT8:
            return self.bytes(name).view(_FLOAT8[info.type.name]).reshape(info.shape)
        tensor: np.ndarray = self._open(info.path).get_tensor(info.name)
        return tensor

    def decode(self, name: str, raw: UInt8[np.ndarray, "bytes"]) -> Float[np.ndarray, "..."]:
        """Whole rows of this tensor, from bytes that need not be its own."""
        info = self.info(name)
        if info.type is GGMLQuantizationType.F64:  # gguf decodes all types but this
            return raw.view("<f8").astype(_FLOAT32).reshape(-1, *info.shape[1:])
        with np.errstate(all="ignore"):  # what planted bytes hold may be anything
            values = quants.dequantize(raw, GGMLQuantizationType[info.type.name]).astype(
                _FLOAT32, copy=False
            )
        return values.reshape(-1, *info.shape[1:])

    def bytes(self, name: str, start: int = 0, stop: int | None = None) -> UInt8[np.ndarray, "n"]:
        """The file's bytes, counted from the tensor's first; zero where the file has none.

        They are to be read only.
        """
        info = self.info(name)
        stop = info.nbytes if stop is None else stop
        file = self.checkpoint.files.opened[info.path]
        first, last, size = info.offset + start, info.offset + stop, len(file.map)
        inside = file.bytes(max(first, 0), max(min(last, size), 0))
        if first >= 0 and last <= size:
            return inside
        return np.pad(inside, (max(-first, 0), max(last - size, 0)))

    def block(self, name: str) -> int:
        """Values in one block of the tensor's type; 1 for plain numbers."""
        return block_size(self.info(name).type)[0] if self.quantised else 1
