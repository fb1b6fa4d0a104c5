"""How another engine lays a tensor out, in one line of text, and from there to canonical axes.

A layout names every axis of the stored array, outermost first, in the letters of
docs/trace-format.md:

    T N H              as it is here
    1 N T H            a batch of one, heads before positions
    T (N H)            two axes flattened into one, the left one outermost
    T ([N]+K+K H)      q of a fused qkv; the bracket marks which part is meant
    T K [G]+1+1 H      q of a qkv interleaved by key/value head (N = K G)
    T F+[F]            up of a fused gate and up
    [T]+* D            positions padded to some length; * is whatever is left
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Shaped

from qwen_jax.errors import UserError


class Factor(NamedTuple):
    """One factor of an axis: parts that lie one after another, of which one is kept."""

    parts: tuple[str, ...]
    kept: int

    @property
    def letter(self) -> str | None:
        """None for a single index, which is taken and leaves no axis."""
        part = self.parts[self.kept]
        return part if part.isalpha() else None


def parse(layout: str) -> tuple[tuple[Factor, ...], ...]:
    """The factors of every axis.

    Raises:
        UserError: the text is no layout.
    """
    axes = re.findall(r"\([^()]*\)|[^\s()]+", layout)
    if re.sub(r"\s", "", "".join(axes)) != re.sub(r"\s", "", layout) or not axes:
        raise UserError(f"the axes {layout!r} are empty or have an odd parenthesis.")
    return tuple(tuple(_factor(f, layout) for f in axis.strip("()").split()) for axis in axes)


def _factor(text: str, layout: str) -> Factor:
    written = text.split("+")
    kept = [i for i, part in enumerate(written) if part.startswith("[") and part.endswith("]")]
    parts = tuple(part.strip("[]") for part in written)
    wrong = [p for p in parts if not re.fullmatch(r"[TSNKGHDFV]|[1-9]\d*|\*", p)]
    if wrong:
        raise UserError(
            f"the axes {layout!r} have {wrong[0]!r}, but an axis is one of T S N K G H D F V, a "
            "number or *."
        )
    if len(parts) == 1 and not kept:
        kept = [0]
    if len(kept) != 1:
        raise UserError(f"of {text!r} in the axes {layout!r}, one part must be in [brackets].")
    factor = Factor(parts, kept[0])
    if factor.letter is None and parts[kept[0]] != "1":
        raise UserError(
            f"the axes {layout!r} keep {parts[kept[0]]!r}, but only a letter or 1 can be kept."
        )
    return factor


def rearrange(
    array: Shaped[np.ndarray, "..."], layout: str, target: str, sizes: Mapping[str, int]
) -> Shaped[np.ndarray, "..."]:
    """The array as `target` says, from what `layout` says it is.

    Args:
        target: axes as in `trace.AXES`.
        sizes: of every letter.

    Raises:
        UserError: the layout does not fit the array, or has other axes than the target.
    """
    axes = parse(layout)
    if len(axes) != array.ndim:
        raise UserError(f"has the shape {array.shape}, but the axes {layout!r} are {len(axes)}.")
    factors = [factor for axis in axes for factor in axis]
    letters = [factor.letter for factor in factors if factor.letter]
    wanted = re.findall("[A-Z]", target)
    if "G" in letters:
        wanted = [x for letter in wanted for x in ("KG" if letter == "N" else letter)]
    if sorted(letters) != sorted(wanted):
        raise UserError(
            f"has the axes {layout!r}, of which {' '.join(letters) or 'nothing'} is kept, but must "
            f"keep {' '.join(wanted)}."
        )
    shape: list[int] = []
    index: list[slice | int] = []
    for axis, size in zip(axes, array.shape, strict=True):
        for factor, parts in zip(axis, _part_sizes(axis, size, layout, sizes), strict=True):
            first = sum(parts[: factor.kept])
            shape.append(sum(parts))
            index.append(slice(first, first + parts[factor.kept]) if factor.letter else first)
    kept = array.reshape(shape)[tuple(index)].transpose([letters.index(x) for x in wanted])
    return kept.reshape(flat_shape(target, sizes))


def flat_shape(target: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of axes as in `trace.AXES`, such as `T (N H)`."""
    axes = re.findall(r"\([^)]*\)|\S+", target)
    return tuple(math.prod(sizes[letter] for letter in re.findall("[A-Z]", axis)) for axis in axes)


def _part_sizes(
    axis: tuple[Factor, ...], size: int, layout: str, sizes: Mapping[str, int]
) -> list[list[int]]:
    """The sizes of every factor's parts, that of a `*` so that the axis is full."""

    def known(factor: Factor) -> list[int]:
        return [sizes[p] if p.isalpha() else int(p) if p != "*" else 0 for p in factor.parts]

    parts = [known(factor) for factor in axis]
    starred = [i for i, factor in enumerate(axis) if "*" in factor.parts]
    if len(starred) == 1 and axis[starred[0]].parts.count("*") == 1:
        (i,) = starred
        rest = size // math.prod(sum(p) for j, p in enumerate(parts) if j != i) - sum(parts[i])
        parts[i][axis[i].parts.index("*")] = max(rest, 0)
    total = math.prod(sum(p) for p in parts)
    if total != size:
        text = " ".join("+".join(factor.parts) for factor in axis)
        raise UserError(f"has an axis of {size}, but {text!r} of the axes {layout!r} is {total}.")
    return parts
