"""What stands in an experiment's directory, read back and checked (see `records`)."""

import collections
import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_jax import regular_files, strict_json
from qwen_jax.errors import UserError
from qwen_jax.experiments import lines
from qwen_jax.experiments.kinds import (
    NAME,
    NATURAL,
    NUMBER,
    OBJECT,
    SETTINGS,
    TEXT,
    VALUES,
    Kind,
    among,
    fault,
    list_of,
    objects,
    optional,
)
from qwen_jax.regular_files import MOST_BYTES
from qwen_jax.settings import program

CONFIG, METRICS, OUTPUTS, LOG = "config.json", "metrics.jsonl", "outputs.jsonl", "log.txt"
SCORES, JUDGEMENTS = "scores.jsonl", "judgements.jsonl"
CONFIG_FILE, ENVIRONMENTS, LOCK = "config.py", "environments", "lock"
SHARD = re.compile(r"shard-\d+-of-\d+")
FORMAT = 1
_NUMBERS = ("seconds", "compile_seconds", "peak_bytes")
_FIELDS = {
    "config_file": TEXT,
    "changed": OBJECT,
    "config": SETTINGS,
    "inputs": OBJECT,
    "points": objects({"id": NAME, "overrides": SETTINGS}),
    "shard": optional(TEXT),
    "assigned": list_of(NAME),
}
_ANSWER = Kind(
    "an object of texts",
    lambda value: isinstance(value, dict) and all(map(TEXT.has, value.values())),
)
OF_UNIT = {
    "of": TEXT,
    "unit": NATURAL,
    "id": Kind("a text or a number", lambda value: TEXT.has(value) or NUMBER.has(value)),
    "scores": VALUES,
}
_OPERATIONS = objects({"operation": TEXT, "seconds": NUMBER, "share": NUMBER, "calls": NATURAL})


@dataclasses.dataclass(frozen=True)
class Contents:
    """What stands in a workdir, for reports and for merging."""

    path: Path
    config: dict[str, Any]
    events: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> "Contents":
        """Raises UserError where the directory holds no experiment, or a damaged one."""
        refuse_others(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is no directory; name an experiment's workdir.")
        file = path / CONFIG
        if not file.exists():
            shards = sorted(p.name for p in path.glob("*") if SHARD.fullmatch(p.name))
            hint = "name the --workdir of one"
            if shards:
                hint = f"{program()} merge {path} puts {', '.join(shards)} together"
            raise UserError(f"{path} holds no experiment: it has no {CONFIG}; {hint}.")
        config = strict_json.read_object(file, most=MOST_BYTES, allow_nan=True, allow_halves=True)
        if config.get("format") != FORMAT:
            raise UserError(f"{file} has a format that this version does not know.")
        if wrong := fault(config, _FIELDS):
            raise UserError(f"{file}: {wrong}; restore the file.")
        ids = frozenset(point["id"] for point in config["points"])
        if strange := sorted(set(config["assigned"]) - ids):
            raise UserError(
                f"{file}: assigned has {strange[0]!r:.60}, which is none of its points; restore "
                "the file."
            )
        found = cls(path, config, [])
        found.events.extend(lines.read(path / METRICS, fault=found._fault_of_event))
        return found

    def _fault_of_event(self, event: dict[str, Any]) -> str:
        point: dict[str, Kind] = {"point": self._point}
        had: dict[str, Kind] = {"outputs": NATURAL} if "outputs" in event else {}
        needed: dict[str, dict[str, Kind]] = {
            "session": {
                "environment": NAME,
                **{name: TEXT for name in ("command", "time") if name in event},
                **({"answer": _ANSWER} if "answer" in event else {}),
            },
            "started": point,
            "finished": {
                **point,
                "metrics": VALUES,
                **{name: NUMBER for name in _NUMBERS if name in event},
                **({"operations": _OPERATIONS} if "operations" in event else {}),
                **had,
            },
            "failed": {**point, "kind": TEXT, "reason": TEXT, **had},
            "interrupted": point,
            "skipped": {**point, "reason": TEXT},
            "scored": {**point, "metrics": VALUES},
        }
        return fault(event, {"event": TEXT}) or fault(event, needed.get(event["event"], {}))

    @functools.cached_property
    def _point(self) -> Kind:
        ids = frozenset(point["id"] for point in self.config["points"])
        return among(ids, f"a point of {self.path / CONFIG}")

    def fault_of_output(self, item: dict[str, Any]) -> str:
        """What is wrong with a line of outputs.jsonl, besides what its task alone knows."""
        return fault(item, {"point": self._point})

    def outputs(self) -> Counter[str]:
        """How many items each point has, whose id is in the count if it has any.

        Raises UserError where a line is damaged, or the file is gone or lacks lines that it had.
        """
        if lost := self.lost:
            raise UserError(f"{lost}.")
        items = lines.read(self.path / OUTPUTS, fault=self.fault_of_output)
        found = collections.Counter(item["point"] for item in items)
        for point, end in self.ends.items():
            if found[point] < (had := end.get("outputs", 0)):  # older records don't say
                raise UserError(
                    f"{self.path / OUTPUTS} has {found[point]} lines of the point {point}, which "
                    f"had {had} when it ended; restore the file."
                )
        return found

    @property
    def asked(self) -> dict[str, str]:
        """What the last session asked of the answer: fields of a config's group `answer`."""
        sessions = [e for e in self.events if e["event"] == "session"]
        return sessions[-1].get("answer", {}) if sessions else {}

    def scores(self) -> Iterator[dict[str, Any]]:
        """What units of the points scored, in the order it was written: of two lines on one unit
        the later one counts."""
        needed = {"point": self._point, **OF_UNIT}
        return lines.read(self.path / SCORES, fault=lambda line: fault(line, needed))

    @property
    def lost(self) -> str:
        """Which file is gone of two that are begun together, in words; else nothing."""
        for gone, left in ((OUTPUTS, METRICS), (METRICS, OUTPUTS)):
            there = self.path / left
            if not (self.path / gone).exists() and there.exists() and there.stat().st_size:
                return f"{self.path / gone} is gone, which {left} goes with; restore it"
        return ""

    @property
    def source(self) -> str:
        """The config file as it was, or nothing where it is gone."""
        path = self.path / CONFIG_FILE
        if not path.exists():
            return ""
        try:
            return regular_files.read(path).decode("utf-8", "replace")
        except OSError as error:
            raise UserError(f"{path} can't be read: {regular_files.why_not(error)}") from error

    @property
    def environments(self) -> list[Path]:
        """The file of every environment that sessions ran in, where it is there."""
        used = dict.fromkeys(e["environment"] for e in self.events if e["event"] == "session")
        files = (self.path / ENVIRONMENTS / f"{name}.json" for name in used)
        return [file for file in files if file.exists()]

    @property
    def ends(self) -> dict[str, dict[str, Any]]:
        """Each point's last `finished` or `failed` event, by its id; with the metrics of scores
        that were computed again since."""
        found: dict[str, dict[str, Any]] = {}
        for event in self.events:
            point = event.get("point", "")
            if event["event"] in ("finished", "failed"):
                found[point] = event
            elif event["event"] == "scored" and "metrics" in found.get(point, {}):
                metrics = found[point]["metrics"] | event["metrics"]
                found[point] = found[point] | {"metrics": metrics}
        return found

    @property
    def skipped(self) -> dict[str, str]:
        """Why points that have not ended were left out, by their ids."""
        found: dict[str, str] = {}
        for event in self.events:
            if event["event"] == "skipped":
                found[event["point"]] = event["reason"]
            elif event["event"] in ("started", "finished", "failed"):
                found.pop(event["point"], None)
        return found

    @property
    def begun(self) -> set[str]:
        """Ids of the points that may have outputs."""
        return {e["point"] for e in self.events if e["event"] == "started"}

    @property
    def assigned(self) -> list[str]:
        """Ids of the points that this directory is to have: all, or a shard's."""
        return self.config["assigned"]


def refuse_others(directory: Path) -> None:
    """Raises UserError where a record's name is that of a pipe or a device, which never ends, or
    leads out of the directory: it may be somebody else's, and would be written to."""
    names = (CONFIG, CONFIG_FILE, LOCK, METRICS, OUTPUTS, SCORES, JUDGEMENTS, LOG, ENVIRONMENTS)
    try:
        paths = [*(directory / name for name in names), *directory.glob(f"{ENVIRONMENTS}/*")]
        found = [path for path in paths if path.is_symlink() or path.exists()]
    except OSError as error:  # as of a name that is too long
        raise UserError(f"{directory} can't be read: {regular_files.why_not(error)}") from error
    for path in found:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is no file; remove it, or choose another directory.")
        if not path.is_symlink():
            continue
        end = regular_files.resolved(path)
        if not path.exists():
            raise UserError(
                f"{path} is a link to nothing ({end}); remove it, or choose another directory."
            )
        if not end.is_relative_to(regular_files.resolved(directory)):
            raise UserError(
                f"{path} is a link to {end}, outside of the directory; put a copy of the file in "
                "its place, or choose another directory."
            )
