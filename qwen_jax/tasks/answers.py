"""The file of a run's answers: begun, or gone on with where a run was cut short.

Beside it lies a file of the settings it was made with, so that nobody goes on with others.
"""

import contextlib
import dataclasses
import fcntl
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ml_collections import ConfigDict

from qwen_jax import settings, strict_json, task_fields
from qwen_jax.api import Model
from qwen_jax.errors import UserError
from qwen_jax.experiments import inputs, lines
from qwen_jax.prompt_lines import Item, Wrong

Key = tuple[str | int, int | None]
"""A prompt's id and the sample, or None where the prompt was refused."""

_NO_MATTER = ("prompt", "prompt_file", "output", "ordered", "strict", "resume", "slots", "trace")
"""Fields that decide which prompts are answered and where answers go, but no answer."""


@dataclasses.dataclass
class Answers:
    """Where answers go.

    Attributes:
        out: the open file.
        path: its name; None where it is stdout.
        resumed: whether it was there before.
        done: what has a line already.
    """

    out: IO[str]
    path: Path | None = None
    resumed: bool = False
    done: frozenset[Key] = frozenset()

    def refused(self, item: Item | Wrong) -> bool:
        """Whether a line says why the prompt was not answered."""
        return (item.id, None) in self.done

    def left(self, items: Sequence[Item | Wrong], n: int) -> list[Item | Wrong]:
        """Those of which a sample has no line yet, where n are asked for."""
        return [
            item
            for item in items
            if not self.refused(item)
            and (
                isinstance(item, Wrong)
                or any((item.id, sample) not in self.done for sample in range(item.samples(n)))
            )
        ]

    def settle(self, made_with: Mapping[str, Any]) -> None:
        """Notes what the answers are made with, or holds it against what was noted.

        Raises UserError where they differ: half of the answers would be others.
        """
        if self.path is None:
            return
        beside = _settings_file(self.path)
        if not (self.resumed and beside.exists()):
            lines.write_atomically(beside, json.dumps(made_with, indent=1) + "\n")
            return
        noted = strict_json.read_object(beside)
        for field, value in json.loads(json.dumps(made_with)).items():
            if noted.get(field, value) != value:
                raise UserError(
                    f"--output={self.path} was begun with {field} {noted[field]!r:.60}, which is "
                    f"{value!r:.60} now; go on with the same settings, or choose another name."
                )


def made_with(config: ConfigDict, model: Model) -> dict[str, Any]:
    """What decides the answers, by field: what it was, where the config leaves it open, and of
    files their contents."""
    return {
        field: value
        for field, value in settings.flatten(config)
        if task_fields.reads("generate", field) and field.partition(".")[0] not in _NO_MATTER
    } | {
        "dtype": str(model.engine.spec.weights),
        "contents": inputs.of_answers(config),
    }


@contextlib.contextmanager
def opened(config: ConfigDict) -> Iterator[Answers]:
    """stdout, a new file, or with `resume` one that is there; kept if anything is in it.

    Raises:
        UserError: it is there already, can't be written or is not what a run wrote.
    """
    if config.output is None:
        if config.resume:
            raise UserError("--resume needs --output, the file to go on with.")
        yield Answers(sys.stdout)
        return
    if config.prompt_file is None:
        raise UserError("--output needs --prompt_file; a single prompt's text goes to stdout.")
    path = Path(config.output)
    resumed = config.resume and path.exists()
    if resumed and not path.is_file():
        raise UserError(f"--output={path} is no file, which --resume could go on with.")
    try:
        # As in stdout, half of a surrogate pair in a prompt's id becomes its JSON escape.
        mode = "a" if resumed else "x"
        file = path.open(mode, -1, "utf-8", errors="backslashreplace", newline="\n")
    except FileExistsError:
        raise UserError(
            f"--output={path} exists already; go on with it by --resume, or choose another name."
        ) from None
    except OSError as error:
        raise UserError(f"--output={path} can't be written: {error.strerror}.") from error
    try:
        with file:
            _hold(file, path)
            yield Answers(file, path, resumed, _written(path) if resumed else frozenset())
    finally:
        if path.stat().st_size == 0:
            path.unlink()
            _settings_file(path).unlink(missing_ok=True)


def check_ids(items: Sequence[Item | Wrong], prompt_file: str) -> None:
    """Raises UserError where two prompts have one id, by which `resume` goes."""
    seen: set[str | int] = set()
    for item in items:
        if item.id in seen:
            raise UserError(
                f"--prompt_file={prompt_file} has two prompts with the id {item.id!r:.60}, and "
                "--resume goes by ids; give each one of its own."
            )
        seen.add(item.id)


def _hold(file: IO[str], path: Path) -> None:
    """Keeps other runs out for as long as the file is open: two would answer each prompt twice."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"--output={path} can't be held for this run ({error.strerror}); wait until no other "
            "run writes it, or choose another name."
        ) from error


def _settings_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


def _written(path: Path) -> frozenset[Key]:
    """What a file has lines of; a last line that was cut off is removed."""
    if path.stat().st_size and not _settings_file(path).exists():
        raise UserError(
            f"--output={path} has no {_settings_file(path).name} beside it, which says what it was "
            "made with, so that --resume can't go on with it; choose another name."
        )
    done: set[Key] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                done.add((record["id"], None if "error" in record else record["sample"]))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(
                    f"--output={path}, line {number} is no answer of a run, so that --resume can't "
                    "go on with it; choose another name."
                ) from error
    lines.Lines(path).close()  # which cuts off what a killed process left of a line
    return frozenset(done)
