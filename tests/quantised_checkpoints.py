"""Tiny directories in the formats of GPTQ, AWQ and FP8, with what their formulas say in float64.

Integers are packed as one large number, bit by bit, and not by the arrays of words of any reader.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from qwen_jax.config import ModelConfig
from tests.tiny_checkpoints import Written, hf_config

Tensors = dict[str, np.ndarray]
Quantise = Callable[[np.random.Generator, tuple[int, int]], tuple[Tensors, np.ndarray]]
"""Makes a random matrix [out, in]: its tensors by the end of their names, and its values."""

AWQ_ORDER = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
"""Which output stands at which place of a word, the lowest first."""

DTYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """Rows of small integers as rows of int32 words, the first in the lowest bits."""
    words = []
    for row in values.tolist():
        number = sum(int(value) << (bits * place) for place, value in enumerate(row))
        words.append(np.frombuffer(number.to_bytes(len(row) * bits // 8, "little"), "<i4"))
    return np.stack(words)


def _draw(
    rng: np.random.Generator, shape: tuple[int, int], bits: int, group_size: int, scales: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """q [out, in], zero and scale [out, groups], and the group of each input."""
    rows, columns = shape
    size = columns if group_size == -1 else group_size
    order = np.arange(columns) // size
    groups = int(order[-1]) + 1
    q = rng.integers(0, 2**bits, shape)
    zero = rng.integers(0, 2**bits, (rows, groups))
    scale = rng.uniform(0.5, 2, (rows, groups)) * columns**-0.5 / 2**bits
    return q, zero, scale.astype(DTYPES[scales]), order


def gptq(
    bits: int = 4,
    group_size: int = 32,
    *,
    less_one: bool = True,
    act_order: bool = False,
    g_idx: bool = True,
    scales: str = "F16",
) -> Quantise:
    def make(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Tensors, np.ndarray]:
        q, zero, scale, order = _draw(rng, shape, bits, group_size, scales)
        if act_order:
            order = rng.permutation(order)
        values = (q - zero[:, order]) * scale.astype(np.float64)[:, order]
        tensors = {
            "qweight": packed(q, bits).T,
            "qzeros": packed(((zero - less_one) % 2**bits).T, bits),
            "scales": scale.T,
        }
        return tensors | ({"g_idx": order.astype(np.int32)} if g_idx else {}), values

    return make


def awq(bits: int = 4, group_size: int = 32, *, scales: str = "F16") -> Quantise:
    def make(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Tensors, np.ndarray]:
        q, zero, scale, order = _draw(rng, shape, bits, group_size, scales)
        values = (q - zero[:, order]) * scale.astype(np.float64)[:, order]
        turn = np.concatenate([np.add(AWQ_ORDER[bits], i) for i in range(0, len(q), 32 // bits)])
        return {
            "qweight": packed(q[turn].T, bits),
            "qzeros": packed(zero[turn].T, bits),
            "scales": scale.T,
        }, values

    return make


def fp8(
    scaled: str = "block",
    *,
    block: tuple[int, int] = (128, 128),
    name: str = "weight_scale_inv",
    scales: Any = np.float32,
) -> Quantise:
    """`scaled` by "block", "row", or "matrix" (of the shapes (1,) and ())."""

    def make(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Tensors, np.ndarray]:
        q = rng.normal(0, 60, shape).astype(ml_dtypes.float8_e4m3fn)
        sizes = {"block": block, "row": (1, shape[1]), "matrix": shape, "scalar": shape}[scaled]
        grid = tuple(-(-n // side) for n, side in zip(shape, sizes, strict=True))
        scale = (rng.uniform(0.5, 2, grid) * shape[1] ** -0.5 / 60).astype(scales)
        values = np.empty(shape)
        for row in range(shape[0]):
            for column in range(shape[1]):
                of = float(scale[row // sizes[0], column // sizes[1]])
                values[row, column] = float(q[row, column]) * of
        flat = {"matrix": (1,), "scalar": ()}.get(scaled, scale.shape)
        return {"weight": q, name: scale.reshape(flat)}, values

    return make


@dataclasses.dataclass(frozen=True)
class Quantised(Written):
    """A written directory; `tensors` are all that it holds, to be changed and saved again."""

    tensors: Tensors = dataclasses.field(default_factory=dict)

    def save(self, **changes: np.ndarray | None) -> None:
        """Writes the tensors again with some changed, "/" standing for "."; None drops one."""
        named = {name.replace("/", "."): value for name, value in changes.items()}
        kept = {k: v for k, v in (self.tensors | named).items() if v is not None}
        _save(self.path, kept)


def write_quantised(
    directory: Path,
    config: ModelConfig,
    params: Mapping[str, np.ndarray],
    quantise: Quantise,
    settings: Mapping[str, Any] | None,
    *,
    plain: tuple[str, ...] = ("embed_tokens", "lm_head"),
    dtype: str = "F16",
    seed: int = 0,
) -> Quantised:
    """A directory whose matrices are random and quantised, but for those of the modules `plain`.

    The values that are returned are rounded to float32 once.
    """
    rng = np.random.default_rng(seed)
    tensors, held = {}, {}
    for name, value in params.items():
        module = name.removesuffix(".weight")
        if value.ndim == 2 and not any(part in name for part in plain):
            parts, values = quantise(rng, value.shape)
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
            held[name] = values.astype(np.float32)
        else:
            tensors[name] = value.astype(DTYPES[dtype])
            held[name] = tensors[name].astype(np.float32)
    directory.mkdir(parents=True, exist_ok=True)
    text = hf_config(config) | ({"quantization_config": settings} if settings else {})
    (directory / "config.json").write_text(json.dumps(text), encoding="utf-8")
    _save(directory, tensors)
    return Quantised(directory, held, tensors)


def _save(directory: Path, tensors: Tensors) -> None:
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    for name, value in tensors.items():  # ascontiguousarray makes a vector of a scalar
        contiguous[name] = contiguous[name].reshape(value.shape)
    save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})
