"""Weights that stay in the file's blocks on the devices of a mesh, for CPUs: see `engine.blocks`.

A device has rows of blocks, or of o_proj and down_proj some blocks of every row. Of a matrix whose
parts don't end between two blocks it has numbers.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qwen_jax.engine.blocks import FLOAT32, Blocks, Stacked, expanded, iter_blocks, stays
from qwen_jax.engine.split_weights import SplitWeights
from qwen_jax.model.split import Split
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.open_files import Progress
from qwen_jax.weights.shards import on_devices, part_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SplitBlocks(SplitWeights):
    """Parameters by name, dealt out as in `SplitWeights`, matrices in blocks as far as they can be.
    Of fused ones each source is dealt out by itself."""

    @property
    def dtype(self) -> jnp.dtype:
        return FLOAT32

    @property
    def in_blocks(self) -> bool:
        return True

    def devices(self) -> set[jax.Device]:
        return self.named["final_norm"].devices()

    def whole(self, name: str) -> Float[Array, "..."]:
        """One parameter in float32, decoded when it is asked for."""
        matrix: Any = self.named[name]
        if isinstance(matrix, Stacked):
            copies = self.split.cached(self.config).num_kv_heads // self.config.num_kv_heads
            each = (1, copies, copies) if "qkv_proj" in name else (1,) * len(matrix.sources)
            found = []
            for source, times in zip(matrix.sources, each, strict=True):
                rows = expanded(source)
                if times > 1:
                    heads = rows.reshape(-1, self.config.head_dim, rows.shape[1])[::times]
                    rows = heads.reshape(-1, rows.shape[1])
                found.append(rows)
            return jnp.concatenate(found)
        return expanded(matrix) if isinstance(matrix, Blocks) else super().whole(name)


def load_split_blocks(
    checkpoint: Checkpoint, split: Split, progress: Progress | None = None
) -> SplitBlocks:
    """The checkpoint's weights on a mesh's CPUs, matrices in their blocks.

    Raises:
        UserError: a value is not finite.
    """

    def parts(part: Checkpoint, device: jax.Device, told: Progress) -> Iterator[tuple[str, Any]]:
        return iter_blocks(part, told, device)

    return SplitBlocks(
        dict(on_devices(checkpoint, split, parts, progress)), checkpoint.config, split
    )


def cut_through(checkpoint: Checkpoint, tp: int) -> tuple[str, ...]:
    """Matrices that could stay in blocks, were it not that parts of some don't end between two."""
    part = part_of(checkpoint, tp, 0)
    found = (
        parameter.name.split(".")[-2 if "." in parameter.name else -1]
        for parameter in checkpoint.parameters
        for name in parameter.sources
        if stays(checkpoint.stored[name]) and not stays(part.stored[name])
    )
    return tuple(dict.fromkeys(found))
