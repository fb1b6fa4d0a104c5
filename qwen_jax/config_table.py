"""What becomes of every key of a model's file: used, neutral, or refused by name and value.

A file format has a table from key to rule and a reader of the keys used. What its table does not
name is ignored, with one warning a load.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn, TypeVar

import numpy as np
from absl import logging

from qwen_jax.config import ModelConfig
from qwen_jax.errors import UserError

T = TypeVar("T", bool, int, float, str, list[Any], dict[str, Any])

MAX_VALUE = 60
"""Characters of a value that a message shows."""

LARGEST = 2**53
"""An integer of a file: products with a float stay finite or, at worst, become infinite."""


@dataclasses.dataclass(frozen=True)
class Used:
    """Read into the ModelConfig, or by the part of the program that `by` names."""

    by: str = "config"


@dataclasses.dataclass(frozen=True)
class Neutral:
    """Changes none of the model's numbers, whatever the value: `why`."""

    why: str


@dataclasses.dataclass(frozen=True)
class Only:
    """Refused, for what it `does`, unless it is absent, empty or one of the `plain` values.

    A list is plain if all its elements are: it is one value a layer.
    """

    does: str
    plain: tuple[Any, ...] = ()

    def allows(self, value: Any) -> bool:
        if isinstance(value, list | dict | str) and not value:
            return True
        if isinstance(value, list):
            return all(map(self.allows, value))
        return value in self.plain  # where a flag is 0 or 1, it is False or True


@dataclasses.dataclass(frozen=True)
class Where:
    """Refused, for what it `does`, unless it `holds` beside the rest of the file.

    Attributes:
        kind: of the value.
        supported: where it holds, in words.
    """

    does: str
    kind: type
    holds: Callable[[Any, "Fields", ModelConfig], bool]
    supported: str


def equals(size: str) -> Callable[[Any, "Fields", ModelConfig], bool]:
    """For `Where.holds`: the value is one that the ModelConfig has."""
    return lambda value, fields, config: value == getattr(config, size)


Rule = Used | Neutral | Only | Where


def plain(value: Any) -> Any:
    """A value of a file without NumPy, whose arrays, once compared, are neither true nor false."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


class Fields:
    """The keys of one namespace of a file. An absent key and JSON's null are the same.

    Args:
        values: the keys without the prefix that `label` gives them in messages.
        source: the file's name, for messages.

    Raises:
        UserError: of a key that the table allows at some values only, and not at this one.
    """

    def __init__(
        self, values: Mapping[str, Any], table: Mapping[str, Rule], source: str, label: str = ""
    ):
        self.values = {key: plain(value) for key, value in values.items()}
        self.table, self.source, self.label = table, source, label
        self.ignored = [label + key for key in values if key not in table]
        for key, value in self.values.items():
            rule = table.get(key)
            if isinstance(rule, Only) and value is not None and not rule.allows(value):
                supported = " or ".join(map(repr, rule.plain)) or "a model without it"
                self._refuse_value(key, rule.does, supported)

    def check(self, config: ModelConfig) -> None:
        """Raises UserError of a key that is refused beside the rest of the model."""
        for key, rule in self.table.items():
            if not isinstance(rule, Where) or not self.given(key):
                continue
            if not rule.holds(self.need(key, rule.kind), self, config):
                self._refuse_value(key, rule.does, rule.supported)

    def given(self, key: str) -> bool:
        return self.values.get(key) is not None

    def need(self, key: str, kind: type[T]) -> T:
        """The value as `kind`; an integer may stand for a float, nothing else converts."""
        name = self.label + key
        if key not in self.values:
            raise UserError(
                f"{self.source}: the key {name!r} is missing; without it the model's output would "
                "be wrong, so convert the checkpoint again."
            )
        value = self.values[key]
        if not _is(value, kind):
            what: str = kind.__name__
        elif kind is float and not _is_finite(value):
            what = "a finite number"
        elif kind is int and abs(value) > LARGEST:
            what = "a size"
        else:
            return kind(value)
        raise UserError(
            f"{self.source}: the key {name!r} holds {shown(value)}, not {what}; correct it, or "
            "convert the checkpoint again."
        )

    def maybe(self, key: str, kind: type[T], default: Any = None) -> Any:
        return self.need(key, kind) if self.given(key) else default

    def same_in_all_layers(self, key: str, layers: int) -> int:
        """A size that a file may give layer by layer."""
        value = self.values.get(key)
        if isinstance(value, list) and len(value) == layers and value:
            if any(other != value[0] for other in value):
                self.refuse(
                    f"{self.label}{key} is {shown(value)}, one value a layer, and only layers of "
                    "one size are supported; choose a Qwen2.5 file"
                )
            return Fields({key: value[0]}, {}, self.source, self.label).need(key, int)
        return self.need(key, int)

    def refuse(self, text: str) -> NoReturn:
        raise UserError(f"{self.source}: {text}.")

    def _refuse_value(self, key: str, does: str, supported: str) -> NoReturn:
        self.refuse(
            f"{self.label}{key} is {shown(self.values[key])}, which {does}, and only {supported} "
            "is supported; choose a plain Qwen2.5 model, or drop the key if this one was trained "
            "without it"
        )


def agreed(kind: type[T], *places: tuple[Fields, str]) -> T | None:
    """The value that may stand in several places; UserError where two of them disagree."""
    found = [(at.label + key, at.need(key, kind)) for at, key in places if at.given(key)]
    for name, value in found[1:]:
        if value != found[0][1]:
            places[0][0].refuse(
                f"{found[0][0]} is {found[0][1]!r}, but {name} is {value!r}; keep the one that the "
                "model was trained with"
            )
    return found[0][1] if found else None


def warn_of_ignored(source: str, keys: Iterable[str]) -> None:
    """One warning of all that a file says and nobody reads."""
    if names := ", ".join(map(repr, keys)):
        logging.warning(
            "%s: ignored %s, which this engine does not know or use here; if the model was trained "
            "with it, the output may be wrong.",
            source,
            names,
        )


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + "…"


def _is(value: Any, kind: type) -> bool:
    # bool is an int to Python.
    accepted = (int, float) if kind is float else kind
    return isinstance(value, bool) is (kind is bool) and isinstance(value, accepted)


def _is_finite(value: float) -> bool:
    try:  # JSON as Python reads it has NaN and Infinity
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
