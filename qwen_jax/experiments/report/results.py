"""Records as rows: one a point, with what was swept, how it ended and its metrics."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import logging

from qwen_jax import ready_made, regular_files, settings, strict_json
from qwen_jax.errors import UserError
from qwen_jax.experiments.answers.answer import Answer, answer
from qwen_jax.experiments.answers.chosen import Asked
from qwen_jax.experiments.answers.settings import Point, Scored, Setting, grouped, scored
from qwen_jax.experiments.contents import Contents
from qwen_jax.experiments.declaration import label
from qwen_jax.regular_files import MOST_BYTES

STATES = {"finished": "ok", "failed": "failed", None: "missing"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One point of one experiment.

    Attributes:
        run: the workdir's name, as the reader knows it.
        overrides: what the sweep sets, by field; what is fixed in this run but swept or different
            in another is there, too.
        state: "ok", "failed", "skipped" or "missing".
        end: the event that ended it, or nothing.
    """

    run: str
    id: str
    overrides: dict[str, Any]
    state: str
    end: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        return self.end.get("metrics", {})

    @property
    def label(self) -> str:
        return label(self.overrides)


@dataclasses.dataclass(frozen=True)
class Results:
    """Rows of one or several experiments, in the order of their sweeps."""

    contents: tuple[Contents, ...]
    names: tuple[str, ...]
    rows: tuple[Row, ...]
    asked: Asked

    @classmethod
    def read(cls, workdirs: Sequence[Path], asked: Asked | None = None) -> "Results":
        """Of experiments' directories.

        Args:
            asked: what the answer is to be about; where it says nothing, what the sessions asked.
        """
        contents = tuple(Contents.read(path) for path in workdirs)
        for content in contents:
            try:
                content.outputs()
            except UserError as error:  # The table is of what metrics.jsonl has.
                logging.warning("%s", error)
        names = _names(workdirs)
        differing = _differing(contents)
        rows = []
        for name, content in zip(names, contents, strict=True):
            ends, wanted = content.ends, set(content.assigned)
            fixed = {field: _fixed(content, field) for field in differing}
            for point in content.config["points"]:
                if point["id"] in wanted:
                    end = ends.get(point["id"], {})
                    overrides = {
                        name: tuple(value) if isinstance(value, list) else value
                        for name, value in (fixed | point["overrides"]).items()
                    }
                    state = STATES[end.get("event")]
                    if not end and (reason := content.skipped.get(point["id"])):
                        state, end = "skipped", {"reason": reason}
                    rows.append(Row(name, point["id"], overrides, state, end))
        for content in contents:
            asked = (asked or Asked()).over(Asked.of(content.asked))
        return cls(contents, names, tuple(rows), asked or Asked())

    @property
    def title(self) -> str:
        titles = [ready_made.title(c.source, c.config["config_file"]) for c in self.contents]
        title = " / ".join(dict.fromkeys(titles))
        return title if len(self.names) == 1 else f"{' and '.join(self.names)}: {title}"

    @property
    def swept(self) -> list[str]:
        """Fields with more than one value, in the order of the sweeps."""
        values: dict[str, set[str]] = {}
        for row in self.rows:
            for field in row.overrides:
                values.setdefault(field, set())
        for row in self.rows:
            for field, seen in values.items():
                seen.add(json.dumps(row.overrides.get(field)))
        return [field for field, seen in values.items() if len(seen) > 1]

    @property
    def swept_within(self) -> list[str]:
        """Those with more than one value in a run; others differ between runs alone, whose names
        say so already."""
        values: dict[str, dict[str, set[str]]] = {field: {} for field in self.swept}
        for row in self.rows:
            for field, seen in values.items():
                seen.setdefault(row.run, set()).add(json.dumps(row.overrides.get(field)))
        return [field for field, seen in values.items() if any(len(v) > 1 for v in seen.values())]

    @property
    def metrics(self) -> list[str]:
        """Names of metrics without those of errors, in the order of their first appearance."""
        names = dict.fromkeys(name for row in self.rows for name in row.metrics)
        return [name for name in names if not name.endswith("_error")]

    @functools.cached_property
    def settings(self) -> list[Setting]:
        """Finished points, those together that differ in their seed alone."""
        scores = {
            run: scored(content) for run, content in zip(self.names, self.contents, strict=True)
        }
        points = [
            Point(r.run, r.id, r.overrides, r.metrics, scores[r.run].get(r.id, Scored()))
            for r in self.rows
            if r.state == "ok"
        ]
        return grouped(points, self.swept)

    @functools.cached_property
    def answer(self) -> Answer | None:
        """Which setting is better. Raises UserError where what is asked for is not there."""
        return answer(self.settings, self.asked)

    def check_comparable(self) -> None:
        """Raises UserError where experiments that have ended measure nothing in common."""
        measured: dict[str, set[str]] = {}
        for row in self.rows:
            if row.metrics:
                measured.setdefault(row.run, set()).update(row.metrics)
        if measured and not set.intersection(*measured.values()):
            has = "; ".join(f"{run} has {', '.join(sorted(m))}" for run, m in measured.items())
            raise UserError(
                f"These experiments measure nothing in common ({has}); report each by itself."
            )

    def environments(self) -> list[tuple[str, dict[str, Any]]]:
        """Of each run, every environment it ran in."""
        return [
            (run, strict_json.read_object(path, most=MOST_BYTES, allow_nan=True, allow_halves=True))
            for run, content in zip(self.names, self.contents, strict=True)
            for path in content.environments
        ]


def _names(workdirs: Sequence[Path]) -> tuple[str, ...]:
    """The directories' own names where these differ, else their paths."""
    names = [regular_files.resolved(path).name for path in workdirs]
    return tuple(names if len(set(names)) == len(names) else map(str, workdirs))


def _differing(contents: Sequence[Contents]) -> list[str]:
    """Fields of the base configs that are not the same in all experiments."""
    configs = [content.config["config"] for content in contents]
    fields = dict.fromkeys(name for config in configs for name in config)
    swept = {name for c in contents for point in c.config["points"] for name in point["overrides"]}
    return [
        name
        for name in fields
        if name in swept - _always(contents)
        or any(_fixed(content, name) != _fixed(contents[0], name) for content in contents)
    ]


def _fixed(content: Contents, field: str) -> Any:
    """What a run's base config has; of a field that is younger than its records, the default."""
    value = content.config["config"].get(field, settings.default_of(field))
    return list(value) if isinstance(value, tuple) else value


def _always(contents: Sequence[Contents]) -> set[str]:
    """Fields that every point of every experiment sets."""
    points = [set(point["overrides"]) for c in contents for point in c.config["points"]]
    return set.intersection(*points)
