"""Sweeps: lists of points, each a mapping from config fields to values, and how they combine.

    product(axis("sampling.temperature", [0.5, 1.0]), axis("sampling.seed", range(3)))

has six points. Only combines what it is given; fields and types are checked with the config.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from qwen_jax.errors import UserError

Sweep = list[dict[str, Any]]


def axis(field: str, values: Iterable[Any]) -> Sweep:
    """One point a value. Values of NumPy become Python's."""
    return [{field: getattr(value, "item", lambda value=value: value)()} for value in values]


def product(*sweeps: Sweep) -> Sweep:
    """Every combination of one point of each; the last sweep varies fastest."""
    return [_joined(points) for points in itertools.product(*sweeps)]


def zipped(*sweeps: Sweep) -> Sweep:
    """The first points together, the second together, and so on."""
    lengths = [len(sweep) for sweep in sweeps]
    if len(set(lengths)) > 1:
        raise UserError(f"zipped() got sweeps of {lengths} points; they must be of one length.")
    return [_joined(points) for points in zip(*sweeps, strict=True)]


def when(
    sweep: Sweep,
    condition: Mapping[str, Any] | Callable[[Mapping[str, Any]], bool],
    then: Sweep,
    otherwise: Sweep | None = None,
) -> Sweep:
    """The points of a sweep that hold a condition, each with every one of `then`; the others with
    every one of `otherwise`, or as they are.

        when(axis("sampling.temperature", [0, 0.7]), lambda p: p["sampling.temperature"] > 0,
             axis("sampling.seed", range(3)))

    has four points: greedy decoding has no use for seeds.

    Args:
        condition: of a point; or fields and the values that it must have.
    """
    holds = condition if callable(condition) else functools.partial(_has, condition)
    more = [{}] if otherwise is None else otherwise
    return [_joined((point, one)) for point in sweep for one in (then if holds(point) else more)]


def _has(fields: Mapping[str, Any], point: Mapping[str, Any]) -> bool:
    return all(name in point and point[name] == value for name, value in fields.items())


def chain(*sweeps: Sweep) -> Sweep:
    """The points of the first, then those of the second, and so on."""
    return [point for sweep in sweeps for point in sweep]


def _joined(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for point in points:
        if twice := joined.keys() & point.keys():
            raise UserError(f"A sweep sets {min(twice)} twice in one point; keep one of the axes.")
        joined |= point
    return joined
