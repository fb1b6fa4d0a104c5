"""Reads the values of a GGUF header one after another, never beyond its end.

Nothing in a file is trusted: each count and length is checked against what is left before any
memory is taken for it.
"""

import mmap
import struct
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGUFValueType

from qwen_jax.errors import UserError

# All before the tensors' bytes. A Qwen2.5 header is 6 MB; a vocabulary of a million tokens is 40.
# The bound caps every count and length a damaged file may claim, hence also the memory.
MAX_HEADER_BYTES = 64 << 20
MAX_ARRAY_DEPTH = 4

NOT_WELL_FORMED = (
    "this is no well-formed GGUF file, so compare its SHA-256 with the published one, or convert "
    "the checkpoint again"
)

_DTYPES = {
    GGUFValueType.UINT8: "u1",
    GGUFValueType.INT8: "i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "u1",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_NUMBERS = {kind: np.dtype(code) for kind, code in _DTYPES.items()}
_SMALLEST_STRING = 8
_SMALLEST_ARRAY = 12


class Cursor:
    """Reads one value after another, each checked against the end before it is touched."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.at = 0
        self._data = data
        self._end = min(len(data), MAX_HEADER_BYTES)

    def fail(self, problem: str) -> NoReturn:
        raise UserError(f"{self.path}: {problem}; {NOT_WELL_FORMED}.")

    def _past_end(self, field: str) -> NoReturn:
        if len(self._data) > MAX_HEADER_BYTES:
            raise UserError(
                f"{self.path}: {field} lies beyond the {MAX_HEADER_BYTES} bytes a header may have "
                "here, ten times Qwen2.5's; compare the file's SHA-256 with the published one."
            )
        raise UserError(
            f"{self.path}: {field} lies beyond the end of the file ({len(self._data)} bytes), "
            "which is cut off or damaged; finish the download, or compare size and SHA-256 with "
            "the published ones."
        )

    def _advance(self, size: int, field: str) -> int:
        """Where the next `size` bytes start; they are there."""
        start = self.at
        if size > self._end - start:
            self._past_end(field)
        self.at = start + size
        return start

    def bytes(self, size: int, field: str) -> bytes:
        start = self._advance(size, field)
        return self._data[start : start + size]

    def magic(self) -> bytes:
        """The first four bytes, which say what a file is even where it ends with them."""
        self.at = min(4, self._end)
        return self._data[: self.at]

    def number(self, code: str, field: str) -> Any:
        start = self._advance(struct.calcsize(code), field)
        return struct.unpack_from(code, self._data, start)[0]

    def count(self, field: str, smallest: int) -> int:
        """A number of things of at least `smallest` bytes each: so many must still fit."""
        found = self.number("<Q", field)
        if found > (self._end - self.at) // smallest:
            self._past_end(f"{field} is {found}, and the last of them")
        return found

    def name(self, owner: str) -> str:
        found = self.string(f"the name of {owner}")
        if not found:
            self.fail(f"{owner} has no name")
        return found

    def string(self, field: str) -> str:
        return self.strings(1, field)[0]

    def strings(self, count: int, field: str) -> list[str]:
        """`count` strings; one tight loop, since a Qwen header has 300,000 of them."""
        data, end, at = self._data, self._end, self.at
        unpack = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            start = at + 8
            at = start + unpack(data, at)[0] if start <= end else end + 1
            if at > end:
                self._past_end(field)
            try:
                found.append(data[start:at].decode())
            except UnicodeDecodeError:
                self.fail(f"{field} is not valid UTF-8 at byte {start}")
        self.at = at
        return found

    def value_type(self, field: str) -> GGUFValueType:
        code = self.number("<I", f"{field}: the type")
        try:
            return GGUFValueType(code)
        except ValueError:
            self.fail(f"{field} has the unknown type {code}")

    def value(self, kind: GGUFValueType, field: str, depth: int = 0) -> Any:
        if kind is GGUFValueType.STRING:
            return self.string(field)
        if kind is GGUFValueType.ARRAY:
            return self._array(field, depth + 1)
        return self._numbers(kind, 1, field)[0].item()

    def _array(self, field: str, depth: int) -> Any:
        if depth > MAX_ARRAY_DEPTH:
            self.fail(f"{field} nests arrays more than {MAX_ARRAY_DEPTH} deep")
        kind = self.value_type(f"{field}: an element")
        length = f"{field}: the length"
        if kind is GGUFValueType.STRING:
            return self.strings(self.count(length, _SMALLEST_STRING), field)
        if kind is GGUFValueType.ARRAY:
            count = self.count(length, _SMALLEST_ARRAY)
            return [self._array(field, depth + 1) for _ in range(count)]
        return self._numbers(kind, self.count(length, _NUMBERS[kind].itemsize), field)

    def _numbers(self, kind: GGUFValueType, count: int, field: str) -> np.ndarray:
        dtype = _NUMBERS[kind]
        raw = self.bytes(count * dtype.itemsize, field)
        numbers = np.frombuffer(raw, dtype)
        if kind is not GGUFValueType.BOOL:
            return numbers
        if count and numbers.max() > 1:
            self.fail(f"{field} is a truth value of {numbers.max()}, neither 0 nor 1")
        return numbers.astype(bool)
