"""From the tensors of one call after another to a trace."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped

from qwen_jax.accuracy.traces.trace import Header, Trace, split_name

MASKED = {"attn_scores": -np.inf, "attn_probs": 0.0}
"""Tensors whose last axis is the keys, and what stands where a query doesn't see one."""


class Collector:
    """Takes every call's tensors and keeps the header's positions of the wanted ones.

    Args:
        header: of the trace; `start` and `stop` say what to keep.
        names: the wanted tensors.
    """

    def __init__(self, header: Header, names: Sequence[str]):
        self.header = header
        self._parts: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def wants(self, name: str, position: int, length: int) -> bool:
        """Whether `add` would keep anything of a call from `position` on."""
        inside = position < self.header.stop and position + length > self.header.start
        return inside and name in self._parts

    def add(self, name: str, position: int, tensor: Shaped[np.ndarray, "T ..."]) -> None:
        """Takes one tensor of a call that began at `position`; the call's positions come first.

        Keys of `attn_scores` and `attn_probs` may be fewer or more than `stop`: those that are
        missing or stand after it are masked.
        """
        if not self.wants(name, position, len(tensor)):
            return
        start, stop = self.header.start, self.header.stop
        part = tensor[max(start - position, 0) : stop - position]
        fill = MASKED.get(split_name(name)[1])
        if fill is not None:
            part = part[..., :stop]
            missing = [(0, 0)] * (part.ndim - 1) + [(0, stop - part.shape[-1])]
            part = np.pad(part, missing, constant_values=part.dtype.type(fill))
        self._parts[name].append(part)

    def trace(self, *notes: str) -> Trace:
        """The trace of all calls, with further notes in its header."""
        header = dataclasses.replace(self.header, notes=(*self.header.notes, *notes))
        return Trace(header, {name: _joined(p) for name, p in self._parts.items() if p})


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """One after the other; the only one as it is, unless it keeps a larger array alive."""
    only = parts[0]
    whole = only.base is None or only.nbytes == getattr(only.base, "nbytes", None)
    return only if len(parts) == 1 and whole else np.concatenate(parts)
