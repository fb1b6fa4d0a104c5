"""A decode step in float64, written apart from the kernels and their reference."""

from typing import Any

import numpy as np

from pallas_kernels.decode_step import HEAD
from pallas_kernels.decode_step.packed.plan import DOWN, GATE_UP, O_PROJ, QKV
from tests.kernels.streams import matrices


def exact_step(case: Any) -> tuple[np.ndarray, np.ndarray]:
    """The logits of an emulated `Case`, and its new keys and values, with nothing rounded."""
    plan, packed = case.plan, case.packed
    shape, rows, h = plan.shape, len(case.position), plan.shape.head_dim
    pages, slots = case.pages.astype(np.float64), case.pages.shape[3]
    held = matrices(packed, plan)
    angles = (case.position[:, None].astype(np.float32) * case.inv_freq).astype(np.float64)

    def product(x: np.ndarray, phase: int, layer: int = 0) -> np.ndarray:
        return x @ np.asarray(held[phase, layer], np.float64).T

    def norm(x: np.ndarray, index: int) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + shape.eps) * packed.norms[index]

    def rotated(x: np.ndarray) -> np.ndarray:
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        first, second = x[..., : h // 2], x[..., h // 2 :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def all_of(kept: np.ndarray, row: int, new: np.ndarray) -> np.ndarray:
        """A row's keys, or values, of a layer: `[slots, kv_heads, h]`."""
        before = np.arange(case.cached[row])
        pages_of = case.tables[row][before // slots]
        first = row - (case.position[row] - case.cached[row])
        return np.concatenate([kept[pages_of, :, before % slots], new[first : row + 1]])

    x = case.hidden.astype(np.float64)
    new = np.zeros((2, shape.layers, rows, shape.kv_heads, h))
    for i in range(shape.layers):
        qkv = (product(norm(x, 2 * i), QKV, i) + packed.bias[i]).reshape(rows, -1, h)
        q, k, v = np.split(qkv, [shape.heads, shape.heads + shape.kv_heads], axis=1)
        q, k = rotated(q), rotated(k)
        attended = np.zeros((rows, shape.heads, h))
        for row in range(rows):
            ours = all_of(pages[i], row, k), all_of(pages[shape.layers + i], row, v)
            every_k, every_v = (np.repeat(a, shape.group, axis=1) for a in ours)
            scores = np.einsum("nh,snh->ns", q[row], every_k) / np.sqrt(h)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            attended[row] = np.einsum("ns,snh->nh", weights, every_v)
        x = x + product(attended.reshape(rows, -1), O_PROJ, i)
        gate, up = np.split(product(norm(x, 2 * i + 1), GATE_UP, i), 2, axis=1)
        x = x + product(gate / (1 + np.exp(-gate)) * up, DOWN, i)
        new[:, i] = k, v
    return product(norm(x, 2 * shape.layers), HEAD), new.reshape(-1, *new.shape[2:])
