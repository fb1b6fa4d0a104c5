"""Log-probabilities of a base, saved: ours in float32, or llama.cpp's in 16 bits.

Ours is a safetensors file: `windows` int32 [C, W], `logprobs` float32 [C, n, V] of the scored
positions, and the model's name in its metadata.

llama.cpp's is what `llama-perplexity --kl-divergence-base` writes, little-endian: "_logits_", then
as int32 W, V, C and the C W tokens; then of each scored position float32 scale and minimum and V
uint16 q, padded to an even number, that stand for scale * q + minimum. Scores more than 16 below
the position's highest are clipped. A step is at most 16 / 65,535, so divergences below about 1e-4
drown in it, and a text with tokens that unlikely gets too low a perplexity from such a base.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open

from qwen_jax import regular_files, strict_json
from qwen_jax.accuracy.measures.metrics import first_not_finite, log_softmax
from qwen_jax.errors import UserError

MAGIC = b"_logits_"
METADATA = "qwen_jax_base"

# Scores are clipped this far below the highest.
_CLIP = 16.0

# How far from 1 a position's probabilities may add up to: float32 log-probabilities are off by
# 2^-24 of 16 or so each, and clipped ones of 151,936 tokens come to 151,936 e^-16 = 0.02 more.
_OFF, _OFF_CLIPPED = 1e-3, 0.1


def scored(context: int) -> slice:
    """The positions of a window whose next token is scored: its second half but the last one."""
    return slice(context // 2, context - 1)


class SavedBase:
    """A base file open for reading; only one window is in memory at a time.

    Attributes:
        name: the model it was made with, as far as the file says.
        windows: the tokens, `[C, W]`.
        vocab: tokens of the vocabulary.
        exact: whether it holds float32.
    """

    def __init__(self, path: str | Path):
        """Raises UserError where the file is missing, truncated or no base."""
        self.path = Path(path)
        try:
            with regular_files.opened(self.path) as file:
                self.exact = file.read(len(MAGIC)) != MAGIC
            self._open_ours() if self.exact else self._open_theirs()
        except OSError as error:
            raise UserError(
                f"{path}: the base can't be read: {regular_files.why_not(error)}"
            ) from None
        odd = self.windows[(self.windows < 0) | (self.windows >= self.vocab)]
        if odd.size:
            raise UserError(
                f"{path}: its text has the token {odd[0]}, but its vocabulary is of {self.vocab}; "
                "save the base again."
            )

    def _open_ours(self) -> None:
        try:
            self._file = safe_open(self.path, "np")
            text = (self._file.metadata() or {})[METADATA]
            metadata = strict_json.parse_object(text, f"{self.path}, its metadata")
            self.name = str(metadata["model"])
            self.windows = self._file.get_tensor("windows")
            self._slice = self._file.get_slice("logprobs")
            count, positions, self.vocab = self._slice.get_shape()
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{self.path}: the file is neither a base of qwen_jax nor one of llama.cpp, or "
                f"truncated ({error}); save the base again."
            ) from None
        kinds = self.windows.dtype.name, self._slice.get_dtype()
        if kinds != ("int32", "F32"):
            raise UserError(
                f"{self.path}: its windows are {kinds[0]} and its logprobs {kinds[1]}, but a base "
                "has int32 and F32; save the base again."
            )
        context = self.windows.shape[-1]
        if (count, positions) != (len(self.windows), len(range(context)[scored(context)])):
            raise UserError(f"{self.path}: logprobs don't fit the windows; save the base again.")

    def _open_theirs(self) -> None:
        data = np.memmap(self.path, np.uint8, "r")
        start = len(MAGIC) + 12
        if len(data) < start:
            raise UserError(f"{self.path}: the file ends inside its header; save the base again.")
        context, self.vocab, count = (int(x) for x in data[len(MAGIC) : start].view("<i4"))
        if min(context - 2, self.vocab, count) < 1:
            raise UserError(
                f"{self.path}: it claims {count} contexts of {context} tokens and a vocabulary of "
                f"{self.vocab}; the file is damaged."
            )
        positions = len(range(context)[scored(context)])
        row = 2 * _padded(self.vocab)
        tokens = 4 * count * context
        expected = start + tokens + count * positions * row
        if len(data) != expected:
            raise UserError(
                f"{self.path}: the file has {len(data)} bytes, but {count} contexts of {context} "
                f"tokens take {expected}; it is truncated or of another version."
            )
        self.name = self.path.name
        self.windows = data[start : start + tokens].view("<i4").reshape(count, context)
        self._rows = data[start + tokens :].reshape(count, positions, row)

    def logprobs(self, index: int) -> Float[np.ndarray, "n V"]:
        """Log-probabilities after the scored positions of one window, float32.

        Raises:
            UserError: some are not finite, or those of a position are no distribution: nothing
                could be told from such a base.
        """
        if self.exact:
            found = self._slice[index]
        else:
            rows = np.ascontiguousarray(self._rows[index])
            scale, minimum = rows[:, :8].view("<f4").T
            steps = rows[:, 8 : 8 + 2 * self.vocab].view("<u2")
            with np.errstate(invalid="ignore", over="ignore"):  # of a damaged scale
                found = scale[:, None] * steps.astype(np.float32) + minimum[:, None]
        if (place := first_not_finite(found)) is not None:
            position, token = place
            raise UserError(
                f"{self.path}: window {index} has {found[position, token]} for token {token} at "
                f"scored position {position}; save the base again from an engine whose logits are "
                "finite."
            )
        total = np.exp(found.astype(np.float64)).sum(axis=-1)
        position = int(np.abs(total - 1).argmax())
        if abs(total[position] - 1) > (_OFF if self.exact else _OFF_CLIPPED):
            raise UserError(
                f"{self.path}: the probabilities at scored position {position} of window {index} "
                f"add up to {total[position]:.3g}, not to 1; save the base again."
            )
        return found


def _padded(vocab: int) -> int:
    """uint16 of a row: two float32, then the vocabulary, padded to an even number."""
    return 2 * ((vocab + 1) // 2) + 4


def save(
    path: str | Path,
    name: str,
    windows: Int[np.ndarray, "C W"],
    logits: Iterator[Float[np.ndarray, "n V"]],
    vocab: int,
) -> None:
    """Writes a base, window by window: ours to a name in .safetensors, else llama.cpp's.

    Args:
        name: of the model.
        windows: the text.
        logits: of each window, after its scored positions.
        vocab: tokens of the vocabulary.

    Raises:
        UserError: the file exists already or can't be written.
    """
    path = Path(path)
    write = _write_ours if path.suffix == ".safetensors" else _write_theirs
    try:
        with path.open("xb") as file:
            try:
                write(file, name, np.ascontiguousarray(windows, "<i4"), logits, vocab)
            except BaseException:  # Ctrl-C too: half a base is none
                path.unlink()
                raise
    except FileExistsError:
        raise UserError(f"{path} exists already; move it or choose another name.") from None
    except OSError as error:
        raise UserError(
            f"{path}: the base can't be written: {regular_files.why_not_written(error)}"
        ) from None


def _write_ours(
    file: BinaryIO, name: str, windows: np.ndarray, logits: Iterator[np.ndarray], vocab: int
) -> None:
    """By hand, since the library wants all tensors in memory at once."""
    count, context = windows.shape
    shape = [count, len(range(context)[scored(context)]), vocab]
    end = windows.nbytes + 4 * int(np.prod(shape))
    entries: dict[str, Any] = {
        "__metadata__": {METADATA: json.dumps({"model": name})},
        "windows": _entry("I32", windows.shape, 0, windows.nbytes),
        "logprobs": _entry("F32", shape, windows.nbytes, end),
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    file.write(struct.pack("<Q", len(header)) + header + windows.tobytes())
    for part in logits:
        file.write(log_softmax(part).astype("<f4").tobytes())


def _entry(dtype: str, shape: Any, start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def _write_theirs(
    file: BinaryIO, name: str, windows: np.ndarray, logits: Iterator[np.ndarray], vocab: int
) -> None:
    count, context = windows.shape
    file.write(MAGIC + struct.pack("<3i", context, vocab, count) + windows.tobytes())
    for part in logits:
        logprobs = log_softmax(part)
        low = np.maximum(logprobs.min(-1), logprobs.max(-1) - _CLIP).astype(np.float32)
        scale = ((logprobs.max(-1) - low) / 65535).astype(np.float32)
        rows = np.zeros((len(part), _padded(vocab)), "<u2")
        rows[:, :4] = np.stack([scale, low], 1).astype("<f4").view("<u2")
        steps = (logprobs - low[:, None]) / np.where(scale == 0, 1, scale)[:, None]
        rows[:, 4 : 4 + vocab] = np.rint(steps).clip(0, 65535)
        file.write(rows.tobytes())
