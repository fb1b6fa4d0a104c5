"""Models of the Hub that two descriptions of an experiment have at different commits."""

import dataclasses
from typing import Any

from qwen_jax.pins import OF_EXPERIMENT, names_in
from qwen_jax.weights.hub_names import HubName, is_hub_name, parse


@dataclasses.dataclass(frozen=True)
class Moved:
    """A model, without its revision, and its commits."""

    name: HubName
    old: str
    new: str

    @property
    def pinned(self) -> HubName:
        """The name that means the old commit for ever."""
        return self.name.at(self.old)


def moved(old: dict[str, Any], new: dict[str, Any]) -> list[Moved]:
    """Those of one commit in either; where there are several, who can say which became which?"""
    before, after = _commits(old), _commits(new)
    found = []
    for name in sorted(before.keys() & after.keys(), key=str):
        ours, theirs = before[name] - after[name], after[name] - before[name]
        if len(ours) == len(theirs) == 1:
            found.append(Moved(name, *ours, *theirs))
    return found


def _commits(description: dict[str, Any]) -> dict[HubName, set[str]]:
    """The commits of each model and adapter of the Hub that an experiment names."""
    found: dict[HubName, set[str]] = {}
    for fields in (description["config"], *(p["overrides"] for p in description["points"])):
        for model in (m for field in OF_EXPERIMENT for m in names_in(fields.get(field))):
            if is_hub_name(model) and (name := parse(model)).is_commit:
                found.setdefault(name.at(None), set()).add(str(name.revision))
    return found
