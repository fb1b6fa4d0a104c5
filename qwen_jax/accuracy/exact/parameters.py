"""Where the right parameters come from: a checkpoint or an engine, one parameter at a time.

The model's matrices are fused (q, k and v in one); operations want them apart, so `Weights` shows
one layer's parameters by the operation that uses them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import ml_dtypes  # noqa: F401  makes "bfloat16" a NumPy dtype
import numpy as np
from jaxtyping import Float, Shaped

from qwen_jax.accuracy import spread
from qwen_jax.accuracy.exact.operations import Array
from qwen_jax.config import ModelConfig
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.weights import read_back
from qwen_jax.weights.loader import Checkpoint, decode, open_checkpoint

Arrays = tuple[Float[np.ndarray, "..."], ...]

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Operations whose matrix is some rows of a larger one."""

BIASED = ("q_proj", "k_proj", "v_proj")
LAYER = ("attn_norm", *BIASED, "o_proj", "ffn_norm", "gate_proj", "up_proj", "down_proj")
"""Operations of a layer that have parameters."""

OUTER = ("embed", "final_norm", "logits")
"""The others that have some."""


class Source(Protocol):
    """A model's canonical parameters, `layers.3.qkv_proj.weight` say, in a dtype that holds them
    exactly."""

    @property
    def config(self) -> ModelConfig: ...

    def get(self, name: str) -> Float[np.ndarray, "..."]: ...


class CheckpointSource:
    """Parameters decoded from the files at every call, so that no two need be in memory.

    Args:
        dtype: what a candidate held them in, to which they are rounded first ("float32" for
            the values of the file itself, unless it holds float64). Norms are not rounded.
    """

    def __init__(self, checkpoint: Checkpoint | str | Path, dtype: str = "float32"):
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = open_checkpoint(checkpoint)
        self.checkpoint, self.dtype = checkpoint, np.dtype(dtype)
        self._by_name = {parameter.name: parameter for parameter in checkpoint.parameters}

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    def get(self, name: str) -> Float[np.ndarray, "..."]:
        parameter = self._by_name[name]
        host = np.empty(parameter.shape, np.float32 if parameter.keep_float32 else self.dtype)
        for _ in decode(self.checkpoint, parameter, host):
            pass
        return host


class ArraySource:
    """Parameters that somebody holds, by their canonical names."""

    def __init__(self, config: ModelConfig, arrays: Mapping[str, Shaped[Array, "..."]]):
        self.config, self.arrays = config, arrays

    def get(self, name: str) -> Float[np.ndarray, "..."]:
        return np.asarray(self.arrays[name])


class EngineSource(ArraySource):
    """Parameters as an engine holds them on its device."""

    def __init__(self, engine: Engine):
        super().__init__(engine.config, read_back(engine.weights))


class Weights:
    """The parameters of one layer, or of the rest of the model, by operation: (weight, bias), in
    float64; none of operations without.

    Fetched when asked for and kept, so a `Weights` should live no longer than its layer.
    """

    def __init__(self, source: Source, layer: int | None):
        self.source, self.layer, self.config = source, layer, source.config
        self._kept: dict[str, Arrays] = {}
        self._wide: dict[str, Arrays] = {}

    def __getitem__(self, operation: str) -> Arrays:
        if operation not in self._wide:
            self._wide[operation] = tuple(map(_float64, self.held(operation)))
        return self._wide[operation]

    def held(self, operation: str) -> Arrays:
        """As the source holds them: for who takes them to float64 a piece at a time."""
        if operation not in LAYER + OUTER:
            return ()
        if operation not in self._kept:
            self._kept[operation] = self._fetch(operation)
        return self._kept[operation]

    def _fetch(self, operation: str) -> Arrays:
        if self.layer is None:
            name = operation
            if operation == "logits":
                name = "embed" if self.config.tied else "lm_head"
            # A tied head is large: not fetched twice.
            if operation == "logits" and self.config.tied and "embed" in self._kept:
                return self._kept["embed"]
            return (self.source.get(name),)
        prefix = f"layers.{self.layer}."
        if operation in ("attn_norm", "ffn_norm"):
            return (self.source.get(prefix + operation),)
        whole = FUSED.get(operation, operation)
        arrays = [self.source.get(f"{prefix}{whole}.weight")]
        if whole == "qkv_proj":
            arrays.append(self.source.get(f"{prefix}{whole}.bias"))
        if whole == operation:
            return (arrays[0],)
        for part, rows in parts(self.config, whole).items():
            self._kept[part] = tuple(array[rows] for array in arrays)
        return self._kept[operation]


def _float64(array: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    if array.dtype == np.float64:
        return array
    some = spread.parts(len(array), array[:1].size)
    (wide,) = spread.gathered(lambda rows: (array[rows].astype(np.float64),), some, some)
    return wide


def parts(config: ModelConfig, fused: str) -> dict[str, slice]:
    """The rows of each operation in a fused matrix."""
    kv = config.num_kv_heads * config.head_dim
    sizes = {
        "qkv_proj": {"q_proj": config.num_heads * config.head_dim, "k_proj": kv, "v_proj": kv},
        "gate_up_proj": {"gate_proj": config.ffn_size, "up_proj": config.ffn_size},
    }[fused]
    stops = np.cumsum(list(sizes.values())).tolist()
    return {
        name: slice(stop - size, stop)
        for (name, size), stop in zip(sizes.items(), stops, strict=True)
    }
