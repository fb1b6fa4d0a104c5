"""The catalogue: faults that engines shipped, each a small change of one operation or more.

`FAULTS` holds all of them; the files beside this one define them by area. The same definition is
tried on a candidate's tensors (`diagnosis`) and planted in our engine (`planting`).
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qwen_jax.accuracy.exact.operations import INNER, Array
from qwen_jax.accuracy.exact.parameters import Arrays, Weights
from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError

Change = dict[str, Any]
"""Fields of `Knobs` and their wrong values."""


def always(config: ModelConfig) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Fault:
    """One way to be wrong.

    Attributes:
        operations: the operations it changes, wherever a layer has them.
        line: what is wrong, in a few words.
        report: a public report of it, where there is one.
        knobs: changes of an operation's knobs; several where a constant varies (a window's
            size), of which the first is planted.
        parameters: the wrong parameters of an operation, from the right ones of its layer.
        slots: the cache slots that an engine's call writes to instead of its own; `knobs`
            then say what attention reads there.
        possible: whether a model can have it at all.
        faint: whether it may be smaller than rounding in some layers, and there unseen.
    """

    name: str
    operations: tuple[str, ...]
    line: str
    report: str = ""
    knobs: Callable[[ModelConfig], Sequence[Change]] = lambda config: ()
    parameters: Callable[[Weights, str], Arrays] | None = None
    slots: Callable[[Array, Array], Array] | None = None
    possible: Callable[[ModelConfig], bool] = always
    faint: bool = False
    area: str = ""


def turn(**change: Any) -> Callable[[ModelConfig], Sequence[Change]]:
    """One change of knobs, the same for every model."""
    return lambda config: (change,)


def area(name: str, faults: Iterable[Fault]) -> tuple[Fault, ...]:
    return tuple(dataclasses.replace(fault, area=name) for fault in faults)


class Overlay(Weights):
    """A layer's parameters with a fault in them; overlays can be stacked."""

    def __init__(self, right: Weights, fault: Fault):
        super().__init__(right.source, right.layer)
        self._right, self._fault = right, fault

    def _fetch(self, operation: str) -> Arrays:
        if self._fault.parameters is None or operation not in self._fault.operations:
            return self._right.held(operation)
        return self._fault.parameters(self._right, operation)


@dataclasses.dataclass(frozen=True)
class Planted:
    """A fault to plant, in one layer or wherever it can be."""

    fault: Fault
    layer: int | None = None

    def covers(self, operation: str, layer: int | None) -> bool:
        return operation in self.fault.operations and self.layer in (None, layer)

    def __str__(self) -> str:
        return self.fault.name if self.layer is None else f"{self.fault.name}@{self.layer}"


def parse(text: str, config: ModelConfig) -> tuple[Planted, ...]:
    """Faults by name, with commas; `name@3` is in layer 3 alone.

    Raises:
        UserError: a name is unknown, or the model has no such layer or can't have the fault.
    """
    return tuple(_parse_one(part.strip(), config) for part in text.split(",") if part.strip())


def _parse_one(text: str, config: ModelConfig) -> Planted:
    from qwen_jax.accuracy.tensors.faults.catalogue import FAULTS

    name, at, layer = text.partition("@")
    if name not in FAULTS:
        close = difflib.get_close_matches(name, FAULTS, 1)
        hint = f"did you mean {close[0]!r}?" if close else "list_faults prints all of them."
        raise UserError(f"There is no fault {name!r:.60}; {hint}")
    fault = FAULTS[name]
    if not fault.possible(config):
        raise UserError(
            f"{config.source} can't have the fault {name!r} ({fault.line}); choose another."
        )
    if not at:
        return Planted(fault)
    if not re.fullmatch("[0-9]{1,9}", layer) or int(layer) >= config.num_layers:
        raise UserError(
            f"The fault {name!r} names layer {layer!r:.60}, but {config.source} has layers 0 to "
            f"{config.num_layers - 1}."
        )
    if not set(fault.operations) & set(INNER):
        raise UserError(f"The fault {name!r} lies outside of the layers; leave out '@{layer}'.")
    return Planted(fault, int(layer))
