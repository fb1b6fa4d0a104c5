"""The interface of a task, and the table of tasks.

A task of your own is a subclass of `Task` in any module that Python finds; its name in the config
is `module:Class`.
"""

import abc
import importlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from ml_collections import ConfigDict

from qwen_jax.api import Model
from qwen_jax.errors import UserError
from qwen_jax.prompts import Item
from qwen_jax.requests import Request

Metrics = dict[str, float]

TASKS = {
    "generate": "qwen_jax.experiments.tasks.generate:Generate",
    "perplexity": "qwen_jax.experiments.tasks.perplexity:Perplexity",
    "likelihood": "qwen_jax.experiments.tasks.likelihood:Likelihood",
    "compare": "qwen_jax.experiments.tasks.compare:Compare",
    "bench": "qwen_jax.experiments.tasks.bench:Bench",
    "serve": "qwen_jax.experiments.tasks.serve:Serve",
    "eval": "qwen_jax.experiments.tasks.evaluate:Evaluate",
}


class Work(abc.ABC):
    """What the runner gives a task for one point.

    Attributes:
        config: everything resolved.
        asked: fields of it that the sweep or a flag sets, or that are not the defaults.
        directory: the workdir.
    """

    config: ConfigDict
    asked: frozenset[str]
    directory: Path

    @abc.abstractmethod
    def model(self, config: ConfigDict | None = None) -> Model:
        """The model of the point's config, or of another one; loaded if it isn't there yet."""

    @abc.abstractmethod
    def request(self, item: Item) -> Request:
        """A prompt's work for the point's model; what another point has tokenised is reused."""

    @abc.abstractmethod
    def recorded(self) -> Iterator[dict[str, Any]]:
        """Items of this point that an interrupted session left, in the order they were made."""

    @abc.abstractmethod
    def record(self, **item: Any) -> None:
        """Writes an item to outputs.jsonl, at once."""

    @abc.abstractmethod
    def score(self, of: str, unit: int, name: str | int, scores: Mapping[str, float]) -> None:
        """Writes to scores.jsonl what a unit scored, by which points are compared in pairs.

        Args:
            of: the kind of unit: a prompt, a document, a window; a repeat has nothing to do with
                another point's.
            unit: its number in this point; of two calls for one the later counts.
            name: what it is called in every point.
        """

    @abc.abstractmethod
    def progress(self, done: int, total: int) -> None:
        """Tells how many items there are by now. What it raises is to be let through: the time may
        be up."""


class Task(abc.ABC):
    """What a point does. Made from the point's config before anything runs.

    Attributes:
        reads: fields of the config, or groups of them, that it reads besides the model's; None
            where it may read any.

    Raises:
        UserError: (when made) the config asks for what can't be done.
    """

    reads: ClassVar[tuple[str, ...] | None] = None

    def __init__(self, config: ConfigDict):
        self.config = config

    def fault_of(self, item: dict[str, Any]) -> str:
        """What is wrong with an item that `work.recorded()` reads, in words; nothing by default."""
        return ""

    def known_metrics(self) -> Collection[str] | None:
        """Names of what `run` may return, but for errors; None, by default, where nobody knows.

        A metric that is asked for and is none of them is refused before anything runs.
        """
        return None

    @abc.abstractmethod
    def run(self, work: Work) -> Metrics:
        """Does the work, records its items and returns the point's metrics.

        What `work.recorded()` yields is not to be done or recorded again.
        """


def task_names(config: ConfigDict) -> list[str]:
    """The tasks of a point, of which `compare+generate` are two."""
    return config.experiment.task.split("+")


def task_class(name: str) -> type[Task]:
    """The class of a task by its name in the table, or by `module:Class`."""
    found = imported(TASKS.get(name, name), "experiment.task", TASKS)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UserError(f"experiment.task names {name!r}, but that is no subclass of Task.")
    return found


def made(name: str, config: ConfigDict) -> Task:
    """The task of that name for a point's config. Raises UserError where it can't be made."""
    kind = task_class(name)
    try:
        return kind(config)
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # It is the user's class and may fail in any way.
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"experiment.task names {name!r}, which can't be made: {why}.") from error


def imported(where: str, field: str, known: dict[str, Any]) -> Any:
    """What `module:name` names. Raises UserError where there is nothing of that name."""
    module, _, name = where.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        # It is the user's module and may fail in any way.
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{field} names {where!r}, which is none of {', '.join(known)} and can't be imported "
            f"as module:name: {why}."
        ) from error
