"""Names of the Hub in a config become names of commits, so that all of a run reads one state."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from qwen_jax.weights.hub import pin

OF_RUN = ("model", "adapter", "speculate.draft_model")
OF_COMPARE = (*OF_RUN, "compare.base.model")
OF_EXPERIMENT = (*OF_RUN, "experiment.reference.model", "experiment.judge.model")
"""The fields of a config that name models and adapters, by what reads them."""


def pin_models(config: ConfigDict, fields: Iterable[str], known: dict[str, str]) -> None:
    """Pins the fields in place; `known` has the names that are pinned already, and gets the new.

    Raises UserError where a name is malformed, or nobody can be asked what it means.
    """
    for field in fields:
        *parents, name = field.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        for model in names_in(section[name]):
            if model not in known:
                known[model] = pin(model, adapter=field == "adapter")
        section[name] = pinned(section[name], known)


def names_in(value: str | Sequence[str] | None) -> Sequence[str]:
    """The names in a field of one name, of several, or of none."""
    return () if value is None else (value,) if isinstance(value, str) else value


def pinned(value: Any, known: Mapping[str, str]) -> Any:
    """A field's value with the commits of its names, where they are known."""
    if isinstance(value, tuple):
        return tuple(known.get(name, name) for name in value)
    return known.get(value, value)


def pin_and_tell(config: ConfigDict, fields: Iterable[str]) -> None:
    """Pins the fields in place, and says on stderr which commits that made of which names."""
    known: dict[str, str] = {}
    pin_models(config, fields, known)
    for name, commit in known.items():
        if commit != name:
            print(f"{name} is {commit}", file=sys.stderr)
