"""Reports of the laboratory side by side: what is not the same in all of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_jax import regular_files, strict_json
from qwen_jax.accuracy.report.as_json import VERSION
from qwen_jax.errors import UserError
from qwen_jax.reporting import page
from qwen_jax.reporting.page import Page, Section
from qwen_jax.reporting.table import Table, filled

FILE = "report.json"
_WRONG = ("fault", "missing", "FAILED")
_NOT_THERE = "-"


@dataclasses.dataclass(frozen=True)
class Saved:
    """What can be laid side by side of one report, each by name.

    Attributes:
        facts: about the run.
        metrics: as gates know them.
        verdicts: of tensors, weights, texts, ways through the cache and gates.
        causes: and the layers they are in.
    """

    name: str
    facts: Mapping[str, str]
    metrics: Mapping[str, str]
    verdicts: Mapping[str, str]
    causes: Mapping[str, str]

    @classmethod
    def read(cls, directory: Path, name: str) -> "Saved":
        """Raises UserError where there is no report, or one that this version can't read."""
        file = directory / FILE
        held = strict_json.read_object(file, most=regular_files.MOST_BYTES, allow_halves=True)
        if held.get("version") != VERSION:
            raise UserError(f"{file} has a version that this program does not know.")
        try:
            verdicts = dict(_verdicts(held))
            causes = {
                cause["fault"]["name"]: f"layers {', '.join(map(str, cause['layers']))}"
                for cause in (held["diagnosis"] or {}).get("causes", ())
            }
            metrics = {name: f"{float(x):.4g}" for name, x in held["metrics"].items()}
            return cls(name, _facts(held), metrics, verdicts, causes)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{file} is damaged: {error!r:.80}; run compare again.") from None

    @property
    def wrong(self) -> set[str]:
        return {name for name, verdict in self.verdicts.items() if verdict in _WRONG}


def _facts(held: Mapping[str, Any]) -> dict[str, str]:
    # Reports were written without a model and an origin once.
    found = {name: str(value) for name, value in dict(held.get("model") or {}).items()}
    if candidate := held["candidate"]:
        for name in ("implementation", "dtype", "activation_dtype", "device"):
            found[name.replace("_", " ")] = str(candidate[name])
    if planted := ", ".join(held["planted"]):
        found["planted"] = planted
    if origin := held.get("origin"):
        found |= {name: str(origin[name]) for name in ("command", "commit", "date")}
        found |= {name: str(version) for name, version in origin["versions"].items()}
    return found


def _verdicts(held: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {"weights": "tensor", "text": "field", "cache": "scenario"}
    found = [
        (f"{part}: {one[name]}", one["verdict"])
        for part, name in names.items()
        for one in held[part] or ()
    ]
    # Reports were written without it once.
    inside = [
        (f"inside, {one['rows']} rows: {one['name']}", one["verdict"])
        for one in held.get("inside") or ()
    ]
    tensors = [
        (one["name"], "fault" if one["faulty"] else "within rounding")
        for one in (held["diagnosis"] or {}).get("findings", ())
    ]
    gates = [
        (f"gate: {' '.join(map(str, gate['gate'].values()))}", _outcome(gate["failed"]))
        for gate in held["gates"]
    ]
    return [*gates, *tensors, *found, *inside]


def _outcome(failed: bool) -> str:
    return "FAILED" if failed else "passed"


def differences(reports: Sequence[Saved]) -> list[Table]:
    """A table of each kind that has any, a column a report."""
    kinds: dict[str, Callable[[Saved], Mapping[str, str]]] = {
        "verdict": lambda saved: saved.verdicts,
        "cause": lambda saved: saved.causes,
        "metric": lambda saved: saved.metrics,
        "run": lambda saved: saved.facts,
    }
    tables = []
    for kind, held in kinds.items():
        names = dict.fromkeys(name for saved in reports for name in held(saved))
        rows = [(n, *(held(saved).get(n, _NOT_THERE) for saved in reports)) for n in names]
        rows = [row for row in rows if len(set(row[1:])) > 1]
        if rows and kind != "run":
            tables.append(Table((kind, *(saved.name for saved in reports)), rows))
        elif rows:  # Values are long, and want a line each.
            lines = [
                (name, saved.name, value)
                for name, *values in rows
                for saved, value in zip(reports, values, strict=True)
            ]
            tables.append(Table((kind, "report", "value"), lines))
    return tables


def verdict(reports: Sequence[Saved]) -> tuple[str, str]:
    """How the last compares with the first, in a sentence and the page's state."""
    first, last = reports[0], reports[-1]
    begun, ended = last.wrong - first.wrong, first.wrong - last.wrong
    gone = {name for name in ended if name not in last.verdicts}
    counts = {
        f"wrong in {last.name} alone": len(begun),
        f"wrong in {first.name} alone": len(ended - gone),
        f"wrong in {first.name}, not looked at in {last.name}": len(gone),
    }
    of = len({*first.verdicts, *last.verdicts})
    if said := [f"{count} {what}" for what, count in counts.items() if count]:
        state = "bad" if begun else "open" if gone else "good"
        return f"Of {of} verdicts: {'; '.join(said)}.", state
    both = f"{len(last.wrong)} are wrong in both" if last.wrong else "none is wrong in either"
    return f"The same: of {of} verdicts {both}.", "open" if last.wrong else "good"


def text(reports: Sequence[Saved]) -> str:
    """For a terminal."""
    tables = differences(reports) or [Table((), [], caption="They differ in nothing.")]
    return "\n\n".join([filled(verdict(reports)[0]), *(table.text() for table in tables)])


def to_html(reports: Sequence[Saved]) -> str:
    """The page."""
    titles = {"verdict": "Verdicts", "cause": "Causes", "metric": "Metrics", "run": "Runs"}
    sections = [Section(titles[table.header[0]], [table]) for table in differences(reports)]
    facts = [(saved.name, saved.facts.get("command", _NOT_THERE)) for saved in reports]
    title = "Accuracy reports side by side"
    return page.html(Page(title, *verdict(reports), facts, sections))
