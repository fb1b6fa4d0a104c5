"""The directory of an experiment: what was asked, on what it ran, what came out.

config.json      the config, its Hub models at commits; the points; fingerprints of what they read
config.py        the config file as it was
environments/    commit, uncommitted changes, versions, device: one file for each that differs
metrics.jsonl    one line an event: session, started, finished, failed, interrupted
outputs.jsonl    one line an item of a point: an answer, a window of a text, a repetition
scores.jsonl     one line a unit of a point, such as a prompt: what it scored
judgements.jsonl one line an answer that a model judged: what it was asked, and what it said
log.txt          what happened, with tracebacks
"""

import contextlib
import difflib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qwen_jax.errors import UserError
from qwen_jax.experiments import lines
from qwen_jax.experiments.contents import (
    CONFIG,
    CONFIG_FILE,
    FORMAT,
    JUDGEMENTS,
    LOCK,
    METRICS,
    OUTPUTS,
    SCORES,
    SHARD,
    Contents,
    refuse_others,
)
from qwen_jax.experiments.declaration import Declaration, Point, label
from qwen_jax.experiments.lines import Lines
from qwen_jax.experiments.moved import moved
from qwen_jax.regular_files import why_not_written
from qwen_jax.settings import program

_SHOWN = 40
"""Lines of a difference that are shown."""


def described(declaration: Declaration, assigned: list[Point], shard: str | None) -> dict[str, Any]:
    """What config.json says."""
    return {
        "format": FORMAT,
        "config_file": declaration.name,
        "changed": _plain(declaration.changed),
        "config": declaration.base,
        "inputs": declaration.inputs,
        "points": [{"id": p.id, "overrides": _plain(p.overrides)} for p in declaration.points],
        "shard": shard,
        "assigned": [p.id for p in declaration.points if p in assigned],
    }


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The lines in which two descriptions differ, or nothing."""
    return _difference(_asked(old), _asked(new)) or _difference(old, new)


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    before, after = (json.dumps(d, indent=1, sort_keys=True).splitlines() for d in (old, new))
    names = ("in the workdir", "asked for now")
    found = difflib.unified_diff(before, after, *names, n=0, lineterm="")
    changes = [line for line in found if not line.startswith("@@")]
    if (more := len(changes) - _SHOWN) > 0:
        changes[_SHOWN:] = [f"... and {more} more lines"]
    return "\n".join(changes)


def _asked(description: dict[str, Any]) -> dict[str, Any]:
    """Without what follows from the rest, as the points' ids do: all change with anything."""
    points = [label(point["overrides"]) for point in description["points"]]
    rest = {name: value for name, value in description.items() if name != "changed"}
    return rest | {"points": points, "assigned": len(description["assigned"])}


def _lock(file: int, directory: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"--workdir={directory} is in use by another process; wait for it, or end it."
        ) from None
    except OSError as error:  # as of a file system that knows no locks
        raise UserError(
            f"{directory / LOCK} can't be locked: {error.strerror}; choose a --workdir on another "
            "file system."
        ) from error


@contextlib.contextmanager
def _written(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--workdir={directory} can't be written: {why_not_written(error)}"
        ) from error


def make(directory: Path) -> None:
    """Makes a directory, if need be. Raises UserError where that can't be."""
    with _written(directory):
        directory.mkdir(parents=True, exist_ok=True)


def hold(directory: Path) -> int:
    """Makes a directory, if need be, and keeps others from writing into it while the file that is
    returned is open. Raises UserError where that can't be."""
    make(directory)
    refuse_others(directory)
    with _written(directory):
        file = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(file, directory)
    except BaseException:
        os.close(file)
        raise
    return file


@contextlib.contextmanager
def unused(directory: Path) -> Iterator[None]:
    """Nobody writes into an experiment's directory meanwhile. Raises UserError where one does."""
    refuse_others(directory)
    if not (directory / LOCK).exists():  # A copy may lack it.
        yield
        return
    with (directory / LOCK).open("rb") as file:
        _lock(file.fileno(), directory)
        yield


def foreign_in(directory: Path, ours: set[str]) -> set[str]:
    """Names in a directory without an experiment that did not come from here."""
    if not directory.is_dir() or (directory / CONFIG).exists():
        return set()
    names = {path.name for path in directory.iterdir() if not path.name.startswith(".")}
    # Whatever we write into a directory, the lock is first.
    return names - ours if LOCK in names else names


def refuse_foreign(directory: Path, foreign: set[str]) -> None:
    """Raises UserError where there is anything foreign."""
    if foreign:
        raise UserError(
            f"--workdir={directory} holds {min(foreign)} and no experiment; choose an empty "
            "directory."
        )


class Records:
    """An experiment's directory, open for writing by this process alone.

    Raises:
        UserError: the directory can't be written, is in use, holds something else, or an
            experiment that differs from the one asked for.
    """

    def __init__(self, directory: Path, description: dict[str, Any], source: str):
        self.directory = directory
        self._refuse_foreign()
        self._lock = hold(directory)
        try:
            self.resumed = self._claim(description, source)
            contents = Contents.read(directory)
            self._items = contents.outputs()
            self._metrics = Lines(directory / METRICS)
            self._outputs = Lines(directory / OUTPUTS)
            self._scores = Lines(directory / SCORES)
            self.ends = contents.ends
            self._disk = ThreadPoolExecutor(1, thread_name_prefix="sync")
            self._syncing: Future[None] | None = None
        except BaseException:
            os.close(self._lock)
            raise

    def _refuse_foreign(self) -> None:
        """Looks before anything is written whether the directory is an experiment's, or empty."""
        directory, whole = self.directory, self.directory.parent / CONFIG
        if directory.name.startswith("shard-") and whole.exists() and not directory.exists():
            raise UserError(
                f"--workdir={directory.parent} holds the whole experiment; choose another "
                "directory for its shards, or drop --shard."
            )
        # A process killed before it wrote the config leaves a lock and temporary files.
        foreign = foreign_in(directory, {LOCK, CONFIG_FILE})
        if shards := sorted(name for name in foreign if SHARD.fullmatch(name)):
            raise UserError(
                f"--workdir={directory} holds {shards[0]}; {program()} merge {directory} puts "
                "shards together, and then the command without --shard goes on."
            )
        refuse_foreign(directory, foreign)

    def _claim(self, description: dict[str, Any], source: str) -> bool:
        """Writes the description, or compares it with the one that is there."""
        if (self.directory / CONFIG).exists():
            old = Contents.read(self.directory).config
            # Where the config file lies changes nothing.
            if changes := difference(
                old | {"config_file": description["config_file"]}, description
            ):
                hints = [
                    f"{m.name} is asked for at commit {m.new}, and had {m.old}; {m.pinned} goes on."
                    for m in moved(old, description)
                ]
                lines_of = "\n".join([*hints, changes])
                raise UserError(
                    f"--workdir={self.directory} holds an experiment with another config; choose "
                    f"another directory, or undo the difference:\n{lines_of}"
                )
            return True
        lines.write_atomically(self.directory / CONFIG_FILE, source)
        text = json.dumps(description, indent=1, ensure_ascii=False)
        lines.write_atomically(self.directory / CONFIG, text)
        return False

    def event(self, event: str, **fields: Any) -> None:
        record = {"event": event, **fields}
        if event in ("finished", "failed"):  # A file cut at a line's end would look whole.
            record["outputs"] = self._items[fields["point"]]
        for file in (self._metrics, self._outputs, self._scores):
            file.check_in_place()
        self._metrics.append(record)
        if event in ("finished", "failed", "scored"):
            self._wait_for_disk()
            self._syncing = self._disk.submit(self._sync)  # The next point needn't wait for it.
        if event in ("finished", "failed"):
            self.ends[fields["point"]] = record
        elif event == "scored":
            metrics = self.ends[fields["point"]]["metrics"]
            self.ends[fields["point"]]["metrics"] = metrics | fields["metrics"]

    def _sync(self) -> None:
        for file in (self._outputs, self._scores, self._metrics):
            file.sync()

    def _wait_for_disk(self) -> None:
        """Until it has what it was last given. Raises NotWritten where that failed."""
        if self._syncing is not None:
            syncing, self._syncing = self._syncing, None
            syncing.result()

    def output(self, point: Point, item: dict[str, Any]) -> None:
        self._outputs.append({"point": point.id, **item})
        self._items[point.id] += 1

    def scored(self, point: Point, line: dict[str, Any]) -> None:
        self._scores.append({"point": point.id, **line})

    def outputs(
        self, point: Point, fault: Callable[[dict[str, Any]], str]
    ) -> Iterator[dict[str, Any]]:
        """The items of a point that earlier sessions recorded, without a fault."""
        if point.id in self._items:
            start = f'{{"point": "{point.id}"'.encode()
            yield from lines.read(self.directory / OUTPUTS, start, fault=fault)

    def judgements(self) -> Lines:
        """The file to which judgements are added; whoever asks for it closes it."""
        return Lines(self.directory / JUDGEMENTS)

    def judged(self, point: Point, fault: Callable[[dict[str, Any]], str]) -> dict[int, Any]:
        """What earlier sessions have recorded of a point, by row."""
        start = f'{{"point": "{point.id}"'.encode()
        found = lines.read(self.directory / JUDGEMENTS, start, fault=fault)
        return {line["row"]: line for line in found}

    def close(self) -> None:
        """Raises NotWritten where the disk refuses what is left."""
        try:
            self._wait_for_disk()
        finally:
            self._disk.shutdown()
            for file in (self._metrics, self._outputs, self._scores):
                file.close()
            os.close(self._lock)
