"""From a config file and flags to the points of an experiment, every value checked."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from qwen_jax import config_program, pins, settings, task_fields, utf8
from qwen_jax.errors import UserError
from qwen_jax.experiments import inputs
from qwen_jax.weights.hub_names import abbreviated

EXAMPLE = "configs/experiments/haiku_temperature.py"
NOT_HASHED = ("workdir", "output", "hosts", "runner.", "answer.")
"""Fields that say where and how, but not what."""

LONGEST = 40
"""Letters of a value, such as a prompt, in a table, a picture or a point's label."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a task.

    Attributes:
        id: a hash of the resolved config and of the contents of the files it names.
        overrides: what the sweep sets.
        asked: fields that the sweep or a flag sets, or that are not the defaults.
        config: everything resolved; models of the Hub are at a commit, here and in `overrides`.
    """

    id: str
    overrides: dict[str, Any]
    asked: frozenset[str]
    config: ConfigDict

    @property
    def label(self) -> str:
        return label(self.overrides)


@dataclasses.dataclass(frozen=True)
class Declaration:
    """A sweep over a config.

    Attributes:
        source: the config file's text, and its name.
        base: what all points share.
        changed: the fields of `base` that are not the defaults.
        points: in the order of the sweep.
        inputs: fingerprints of the files the points read.
    """

    name: str
    source: str
    base: dict[str, Any]
    changed: dict[str, Any]
    points: tuple[Point, ...]
    inputs: dict[str, str]


def label(overrides: Mapping[str, Any]) -> str:
    """Short names and values of what the sweep sets, as in "temperature=0.5 seed=1"."""
    pairs = (f"{short(name)}={clipped(one_line(value))}" for name, value in overrides.items())
    return " ".join(pairs) or "(one point)"


def one_line(value: Any) -> str:
    """A value where a line is all there is; of several, as adapters are, each."""
    if isinstance(value, list | tuple):
        return ", ".join(map(one_line, value)) or "none"
    return str(value).replace("\r", "\\r").replace("\n", "\\n")


def clipped(text: str) -> str:
    """A text without its middle, if it is long: prompts differ first, and paths last."""
    text, half = abbreviated(text), LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[: half - 1]}…{text[-half:]}"


def short(field: str) -> str:
    """A field's name in tables: without `sampling.` and the like, where that is plain enough."""
    for prefix in ("sampling.", "experiment.bench.", "experiment."):
        if field.startswith(prefix):
            return field.removeprefix(prefix)
    return field


def hashed_fields(config: ConfigDict) -> dict[str, Any]:
    """What a point's id depends on, in JSON's types."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in settings.flatten(config)
        if not name.startswith(NOT_HASHED)
    }


def declare(command: settings.Command) -> Declaration:
    """The points of a command's experiment.

    Raises:
        UserError: there is no config file, the sweep fails, sets what is no field or gives it a
            wrong type, a flag sets what is swept, points are equal, or a file can't be read.
    """
    if command.config_file is None:
        raise UserError(f"An experiment needs --config=FILE.py; {EXAMPLE} is one.")
    path = command.config_file.partition(":")[0]
    sweep = config_program.call(command.config_file, "get_sweep", EXAMPLE)
    return declared(
        command.config,
        sweep,
        path,
        name=command.config_file,
        source=lambda _: utf8.read(path),  # Python reads other encodings, too, where told which.
        given=command.overrides,
    )


def declared(
    config: ConfigDict,
    sweep: Any,
    path: str,
    *,
    name: str,
    source: Callable[[Mapping[str, Any]], str],
    given: Collection[str] = (),
) -> Declaration:
    """The points of a sweep over a config.

    Args:
        path: what made them, for messages.
        name: what made them, for records.
        source: the config file's text, of the fields that are not the defaults.
        given: fields that a flag sets.

    Raises:
        UserError: as `declare` does.
    """
    sweep = _swept(sweep, path)
    points: list[tuple[dict[str, Any], ConfigDict]] = []
    commits: dict[str, str] = {}
    for number, overrides in enumerate(sweep, start=1):
        point = config.copy_and_resolve_references()
        settings.update(point, overrides, f"{path}: point {number} of the sweep")
        fields = ((f"{field}, which {path} sweeps,", field) for field in overrides)
        task_fields.check("experiment", fields)
        for field in overrides:
            if field.startswith(NOT_HASHED):
                raise UserError(f"{path}: a sweep can't set {field}, which changes no result.")
            if field in given:
                raise UserError(f"{field} is given by a flag, but {path} sweeps it; drop one.")
        pins.pin_models(point, pins.OF_EXPERIMENT, commits)
        points.append((overrides | _models_of(overrides, commits), point))
    # What all points override is not asked for: nothing reads it.
    base = config.copy_and_resolve_references()
    settings.update(base, _models_of(dict(settings.flatten(base)), commits), path)
    prints = inputs.of_points(point for _, point in points)
    default = dict(settings.flatten(settings.get_config()))
    changed = {
        field: value
        for field, value in settings.flatten(base)
        if value != default[field] and not field.startswith(NOT_HASHED)
    }
    return Declaration(
        name=name,
        source=source(changed),
        base=hashed_fields(base),
        changed=changed,
        points=_identified(points, prints, {*changed, *given}, path),
        inputs=prints,
    )


def _models_of(fields: Mapping[str, Any], commits: Mapping[str, str]) -> dict[str, Any]:
    """Of the fields those that name models, with the names' commits where they are known."""
    given = {name: fields[name] for name in pins.OF_EXPERIMENT if name in fields}
    return {name: pins.pinned(value, commits) for name, value in given.items()}


def _swept(sweep: Any, path: str) -> list[dict[str, Any]]:
    if not isinstance(sweep, list) or not all(isinstance(point, dict) for point in sweep):
        raise UserError(f"{path}: get_sweep() must return a sweep, as product(axis(...)) makes it.")
    if not sweep:
        raise UserError(f"{path}: the sweep has no points; give its axes values.")
    return sweep


def _identified(
    points: list[tuple[dict[str, Any], ConfigDict]],
    prints: dict[str, str],
    asked: set[str],
    path: str,
) -> tuple[Point, ...]:
    found: dict[str, Point] = {}
    for overrides, config in points:
        fields = hashed_fields(config)
        read = [name for value in fields.values() for name in _texts(value)]
        files = {name: prints[name] for name in read if name in prints}
        text = json.dumps([fields, files], sort_keys=True)
        identity = hashlib.sha256(text.encode()).hexdigest()[:12]
        if identity in found:
            raise UserError(f"{path}: the sweep has the point {label(overrides)} twice; keep one.")
        found[identity] = Point(identity, overrides, frozenset({*asked, *overrides}), config)
    return tuple(found.values())


def _texts(value: Any) -> Sequence[str]:
    """What may name an input, in a field of any type."""
    return [value] if isinstance(value, str) else value if isinstance(value, list) else []
