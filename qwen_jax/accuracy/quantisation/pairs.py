"""A quantised file's tensors beside those of its base, checked to be of one model."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from qwen_jax.errors import UserError
from qwen_jax.weights.blocks import fill
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.loader import aligned
from qwen_jax.weights.stored import Stored, not_finite

ROUNDED = 2.0**-7
"""Relative error of a tensor rounded to bfloat16 is 2^-9 at most; that four times over."""

ANY = ("source", "context_length")
"""Fields of a config that no logit depends on."""

NOT_QUANTISED = ("F64", "F32", "F16", "BF16")
_FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One tensor of both.

    Attributes:
        name: the file's own for it.
        kind: as `kind_of` says.
        layer: or None outside of them.
        parameter: the engine's, of which it is some rows.
        shape: of the tensor.
        file, base: how the two hold it.
    """

    name: str
    kind: str
    layer: int | None
    parameter: str
    shape: tuple[int, ...]
    file: Stored
    base: Stored

    @property
    def size(self) -> int:
        """Values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """That the file spends on it."""
        return sum(info.nbytes for info in self.file.infos)

    @property
    def base_bytes(self) -> int:
        return sum(info.nbytes for info in self.base.infos)

    def values(self, *, base: bool) -> Float[np.ndarray, "rows ..."]:
        """In float32. Raises UserError where one is not finite."""
        out = aligned(self.shape, _FLOAT32)
        stored = self.base if base else self.file
        if not fill(out, stored.rows):
            raise not_finite(self.name, stored, _FLOAT32)
        return out


def pairs(file: Checkpoint, base: Checkpoint) -> tuple[Pair, ...]:
    """Every tensor, in the order in which a forward pass meets them.

    Raises:
        UserError: the file is not quantised, or the base is of another model or coarser.
    """
    _check_configs(file, base)
    found = tuple(_pairs(file, base))
    if all(pair.file.kind in NOT_QUANTISED for pair in found):
        kinds = ", ".join(file.quantization)
        raise UserError(
            f"{file.path} is not quantised, its tensors are {kinds}; give the quantised file as "
            "--model, and what it was made from as --base_model."
        )
    for pair in found:
        if len(pair.shape) > 1 and pair.base_bytes < pair.bytes:
            raise UserError(
                f"{base.path} holds {pair.name} as {pair.base.kind}, with fewer bits than "
                f"{pair.file.kind} in {file.path}; a base must be at least as exact, so give the "
                "file that the other was made from."
            )
    return found


def kind_of(name: str) -> str:
    """A tensor's name without its layer, `blk.*.ffn_down.weight`."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def layer_of(name: str) -> int | None:
    """Its layer, if it is in one."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def _pairs(file: Checkpoint, base: Checkpoint) -> Iterator[Pair]:
    for ours, theirs in zip(file.parameters, base.parameters, strict=True):
        for (name, shape), other in zip(ours.sources.items(), theirs.sources, strict=True):
            yield Pair(
                name,
                kind_of(name),
                layer_of(name),
                ours.name,
                shape,
                file.stored[name],
                base.stored[other],
            )


def _check_configs(file: Checkpoint, base: Checkpoint) -> None:
    for field in dataclasses.fields(file.config):
        ours, theirs = (getattr(config, field.name) for config in (file.config, base.config))
        if field.name not in ANY and not _alike(ours, theirs):
            raise UserError(
                f"{base.path}: the base's {field.name} is {theirs}, but {file.path} has {ours}; "
                "give the file that the other was made from."
            )


def _alike(ours: Any, theirs: Any) -> bool:
    """The same, but for a rounding to float32, in which GGUF has its numbers."""
    if dataclasses.is_dataclass(ours) and dataclasses.is_dataclass(theirs):
        names = (field.name for field in dataclasses.fields(ours))
        return all(_alike(getattr(ours, name), getattr(theirs, name)) for name in names)
    if isinstance(ours, float):
        return math.isclose(ours, theirs, rel_tol=1e-6)
    return bool(ours == theirs)


def check_same_weights(
    file: Checkpoint, base: Checkpoint, every: Sequence[Pair], errors: Mapping[str, float]
) -> None:
    """Raises UserError where the base is not what the file was made from.

    What a file does not quantise is then the base's but for a rounding to 16 bits, and zeros would
    be further from most matrices than what the file has.
    """
    matrices = [errors[pair.name] for pair in every if len(pair.shape) > 1]
    off = next(
        (p for p in every if p.file.kind in NOT_QUANTISED and errors[p.name] > ROUNDED), None
    )
    if off is None and np.median(matrices) < 1:
        return
    why = (
        f"{off.name}, which the file does not quantise, differs by {errors[off.name]:.1%}"
        if off
        else f"the weights differ by {np.median(matrices):.0%} on the median"
    )
    raise UserError(
        f"{base.path} is no base of {file.path}: {why}. Give the file that the other was made from."
    )
