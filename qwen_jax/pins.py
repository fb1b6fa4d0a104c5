"""Names of the Hub in a config become names of commits, so that all of a run reads one state."""

import sys
from collections.abc import Iterable

from ml_collections import ConfigDict

from qwen_jax.weights.hub import pin

OF_RUN = ("model",)
OF_COMPARE = ("model", "compare.base.model")
OF_EXPERIMENT = ("model", "experiment.reference.model")
"""The fields of a config that name models, by what reads them."""


def pin_models(config: ConfigDict, fields: Iterable[str], known: dict[str, str]) -> None:
    """Pins the fields in place; `known` has the names that are pinned already, and gets the new.

    Raises UserError where a name is malformed, or nobody can be asked what it means.
    """
    for field in fields:
        *parents, name = field.split(".")
        section = config
        for parent in parents:
            section = section[parent]
        if (model := section[name]) is not None:
            if model not in known:
                known[model] = pin(model, adapter=field == "adapter")
            section[name] = known[model]


def pin_and_tell(config: ConfigDict, fields: Iterable[str]) -> None:
    """Pins the fields in place, and says on stderr which commits that made of which names."""
    known: dict[str, str] = {}
    pin_models(config, fields, known)
    for name, pinned in known.items():
        if pinned != name:
            print(f"{name} is {pinned}", file=sys.stderr)
