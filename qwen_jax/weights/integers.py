"""Weights of GPTQ and AWQ: integers of a few bits packed into 32-bit words, with scales by group.

A weight is (q - zero) * scale of its output and group. q - zero is exact, and one product with the
scale as it is stored is rounded to float32: of float16 and bfloat16 scales the result is exact.

GPTQ (Frantar et al., 2022, arXiv:2210.17323) packs along the inputs, as AutoGPTQ and GPTQModel
write it; AWQ (Lin et al., 2023, arXiv:2306.00978) along the outputs, in the order of AutoAWQ's
`gemm`. Both store a matrix as [in, out], which the model has as [out, in].
"""

import abc
import dataclasses
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType as Type
from jaxtyping import Float32, Int32, UInt8, UInt32

from qwen_jax.errors import UserError
from qwen_jax.weights import simple_quants
from qwen_jax.weights.blocks import decoded
from qwen_jax.weights.stored import Blocked, not_finite
from qwen_jax.weights.tensors import TensorFiles, TensorInfo

BLOCK = 32
"""Inputs of a block of `PackedIntegers.blocks`."""
SCALE_TYPES = (Type.F16, Type.BF16, Type.F32)


@dataclasses.dataclass(frozen=True)
class PackedIntegers(abc.ABC):
    """One matrix [out, in]; `module` is its name without ".weight".

    Attributes:
        bits: of one integer.
        group_size: inputs that share a scale; -1 for all of them.
    """

    files: TensorFiles
    module: str
    shape: tuple[int, ...]
    bits: int
    group_size: int

    @property
    def tensors(self) -> tuple[str, ...]:
        return tuple(f"{self.module}.{part}" for part in self.layout())

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        return tuple(self.files.tensors[name] for name in self.tensors)

    @property
    def kind(self) -> str:
        return f"{type(self).__name__.upper()}-Int{self.bits}"

    @property
    def inputs_per_group(self) -> int:
        return self.shape[1] if self.group_size == -1 else min(self.group_size, self.shape[1])

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.inputs_per_group)

    @abc.abstractmethod
    def layout(self) -> dict[str, tuple[int, ...]]:
        """The parts that it is stored as, and the shapes they must have."""

    def check(self, path: Path) -> None:
        if any(side * self.bits % 32 for side in self.packed_sides()):
            raise UserError(
                f"{path}: {self.module!r} has the shape {self.shape}, which {self.bits} bits do "
                f"not pack into whole 32-bit words; quantization_config is not of this checkpoint."
            )
        for info, (part, shape) in zip(self.infos, self.layout().items(), strict=True):
            if info.shape != shape:
                raise UserError(
                    f"{path}: the tensor {info.name!r} has the shape {info.shape}, but bits "
                    f"{self.bits} and group_size {self.group_size} in quantization_config make "
                    f"{shape} of a weight of {self.shape}; take both from the same checkpoint."
                )
            types = SCALE_TYPES if part == "scales" else (Type.I32,)
            if info.type not in types:
                raise UserError(
                    f"{path}: the tensor {info.name!r} is of type {info.type.name}, but it must be "
                    f"{' or '.join(kind.name for kind in types)}; convert the checkpoint again."
                )

    @property
    def blocks(self) -> Blocked | None:
        """Scales are float16 in them, and the inputs of a group follow one another."""
        whole = self.shape[1] % BLOCK == 0 and self.inputs_per_group % BLOCK == 0
        (scales,) = (info for info in self.infos if info.name.endswith(".scales"))
        if not whole or scales.type is not Type.F16 or not self._in_turn(self.order()):
            return None
        bits = 4 if self.bits <= 4 else 8
        size = self.shape[1] // BLOCK * (4 + BLOCK * bits // 8)
        return Blocked(f"int{bits}", size, self._in_blocks)

    def _in_turn(self, order: Int32[np.ndarray, " columns"]) -> bool:
        return np.array_equal(order, PackedIntegers.order(self))

    def _in_blocks(self, start: int, stop: int) -> UInt8[np.ndarray, "bytes"]:
        """Blocks of 32 inputs: scale, zero point, a byte of nothing, and the integers, of 4 bits
        those of the first 16 inputs in the low half bytes.
        """
        quants, zeros = self.integers(start, stop)
        rows, count = len(quants), self.shape[1] // BLOCK
        group = np.arange(count) * BLOCK // self.inputs_per_group
        name = f"{self.module}.scales"
        shape = self.files.tensors[name].shape
        scales = self.files.raw(name).view("<f2").reshape(shape)[:, start:stop].T
        if not np.isfinite(scales).all():
            raise not_finite(f"{self.module}.weight", self, np.dtype(np.float32))
        codes = quants.reshape(rows, count, BLOCK)
        if self.bits <= 4:
            codes = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
        blocks = np.zeros((rows, count, 4 + codes.shape[-1]), np.uint8)
        blocks[..., :2] = np.ascontiguousarray(scales[:, group])[..., None].view(np.uint8)
        blocks[..., 2], blocks[..., 4:] = zeros[:, group], codes
        return blocks.reshape(-1)

    @abc.abstractmethod
    def integers(
        self, start: int, stop: int
    ) -> tuple[UInt8[np.ndarray, "rows columns"], UInt8[np.ndarray, "rows g"]]:
        """Integers of the rows [start, stop), and the zero points of their groups."""

    def rows(self, start: int, stop: int) -> Float32[np.ndarray, "rows columns"]:
        return self.scaled(start, *self.integers(start, stop))

    @abc.abstractmethod
    def packed_sides(self) -> tuple[int, ...]:
        """The sizes along which integers are packed."""

    def words(self, part: str) -> UInt32[np.ndarray, "rows columns"]:
        name = f"{self.module}.{part}"
        return self.files.raw(name).view("<u4").reshape(self.files.tensors[name].shape)

    def order(self) -> Int32[np.ndarray, " columns"]:
        """The group of each input."""
        return np.arange(self.shape[1], dtype=np.int32) // self.inputs_per_group

    def scaled(
        self,
        start: int,
        quants: UInt8[np.ndarray, "rows columns"],
        zeros: UInt8[np.ndarray, "rows g"],
    ) -> Float32[np.ndarray, "rows columns"]:
        """(q - zero) * scale of the rows from `start` on."""
        values, offsets = quants.astype(np.float32), zeros.astype(np.float32)
        name = f"{self.module}.scales"
        info = self.files.tensors[name]
        stored = decoded(self.files.raw(name), info.type).reshape(info.shape)
        scales = stored[:, start : start + len(values)].T.astype(np.float32)
        order, size = self.order(), self.inputs_per_group
        if len(order) % size == 0 and self._in_turn(order):
            grouped = values.reshape(len(values), -1, size)
            grouped -= offsets[..., None]
            grouped *= scales[..., None]
        else:  # four times as slow
            values -= offsets[:, order]
            values *= scales[:, order]
        return values


@dataclasses.dataclass(frozen=True)
class Gptq(PackedIntegers):
    """GPTQ's layout: `qweight` packed along the inputs, `qzeros` along the outputs.

    Attributes:
        zeros_less_one: of format "gptq" (v1), whose zero points are stored less one, in so many
            bits: 0 is stored as the largest number. Format "gptq_v2" stores them as they are.
        ordered: whether `g_idx` says which input is of which group (act-order); else they follow
            one another.
    """

    zeros_less_one: bool
    ordered: bool

    def layout(self) -> dict[str, tuple[int, ...]]:
        rows, columns = self.shape
        parts: dict[str, tuple[int, ...]] = {
            "qweight": (columns * self.bits // 32, rows),
            "qzeros": (self.groups, rows * self.bits // 32),
            "scales": (self.groups, rows),
        }
        return parts | ({"g_idx": (columns,)} if self.ordered else {})

    def packed_sides(self) -> tuple[int, ...]:
        return self.shape

    def check(self, path: Path) -> None:
        super().check(path)
        if self.ordered and (order := self.order()).size:
            first, last = int(order.min()), int(order.max())
            if first < 0 or last >= self.groups:
                raise UserError(
                    f"{path}: the tensor '{self.module}.g_idx' has groups from {first} to {last}, "
                    f"but there are {self.groups}; take the checkpoint and its config together."
                )

    def order(self) -> Int32[np.ndarray, " columns"]:
        return self.words("g_idx").view(np.int32) if self.ordered else super().order()

    def integers(
        self, start: int, stop: int
    ) -> tuple[UInt8[np.ndarray, "rows columns"], UInt8[np.ndarray, "rows g"]]:
        quants = unpack(self.words("qweight")[:, start:stop].T, self.bits)
        # 32 integers fill whole words, whatever their bits.
        first, last = start // 32, -(-stop // 32)
        packed = self.words("qzeros")[:, first * self.bits : last * self.bits]
        zeros = unpack(packed, self.bits).T[start - 32 * first : stop - 32 * first]
        if self.zeros_less_one:
            zeros = (zeros + np.uint8(1)) & np.uint8(2**self.bits - 1)
        return quants, zeros


@dataclasses.dataclass(frozen=True)
class Awq(PackedIntegers):
    """AWQ's layout `gemm`: `qweight` and `qzeros` packed along the outputs, the even ones first."""

    def layout(self) -> dict[str, tuple[int, ...]]:
        rows, columns = self.shape
        return {
            "qweight": (columns, rows * self.bits // 32),
            "qzeros": (self.groups, rows * self.bits // 32),
            "scales": (self.groups, rows),
        }

    def packed_sides(self) -> tuple[int, ...]:
        return self.shape[:1]

    def integers(
        self, start: int, stop: int
    ) -> tuple[UInt8[np.ndarray, "rows columns"], UInt8[np.ndarray, "rows g"]]:
        quants, zeros = (self.unpacked(part, start, stop) for part in ("qweight", "qzeros"))
        return quants, zeros

    def unpacked(self, part: str, start: int, stop: int) -> UInt8[np.ndarray, "rows columns"]:
        """Outputs [start, stop), a row each: words hold 0, 2, 4, 6, 1, 3, 5, 7 of every eight."""
        per_word = 32 // self.bits
        first, last = start // per_word, -(-stop // per_word)
        words = np.ascontiguousarray(self.words(part)[:, first:last].T)
        out = np.empty((len(words), per_word, words.shape[1]), np.uint8)
        for place, row in enumerate((*range(0, per_word, 2), *range(1, per_word, 2))):
            out[:, row] = (words >> np.uint32(self.bits * place)) & np.uint32(2**self.bits - 1)
        return out.reshape(-1, words.shape[1])[start - first * per_word : stop - first * per_word]


def unpack(words: UInt32[np.ndarray, "rows words"], bits: int) -> UInt8[np.ndarray, "rows n"]:
    """Each row's integers, the lowest bits first; of 3 bits, one may lie across two words."""
    packed = np.ascontiguousarray(words).view(np.uint8)
    if 8 % bits:
        columns = simple_quants.bits(packed).reshape(len(packed), -1, bits)
        return columns @ (1 << np.arange(bits, dtype=np.uint8))
    out = np.empty((*packed.shape, 8 // bits), np.uint8)
    for place in range(8 // bits):
        out[..., place] = (packed >> (bits * place)) & (2**bits - 1)
    return out.reshape(len(packed), -1)
