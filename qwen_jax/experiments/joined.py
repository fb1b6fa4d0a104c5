"""Several tasks at one point, one after another, as `compare+generate` names them: what one setting
costs and what it is good for, in one row."""

import copy
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from qwen_jax.api import Model
from qwen_jax.errors import UserError
from qwen_jax.experiments.scores import JUDGE
from qwen_jax.experiments.task import Metrics, Task, Work, made, task_names
from qwen_jax.prompts import Item
from qwen_jax.requests import Request


def task_of(config: ConfigDict) -> Task:
    """The task of a point's config, or all that it names. Raises UserError where one makes no sense
    for the config, or they don't go together."""
    names = task_names(config)
    return made(names[0], config) if len(names) == 1 else Joined(config, names)


class Joined(Task):
    """Each item and metric is that of one of the tasks; an item says of which."""

    def __init__(self, config: ConfigDict, names: Collection[str]):
        super().__init__(config)
        said = f"experiment.task is {config.experiment.task!r:.80}"
        if len(set(names)) < len(names):
            raise UserError(f"{said}, but a task can be named once.")
        if JUDGE in config.experiment.scores:
            raise UserError(f"{said}, but the score judge needs the task generate by itself.")
        self._parts = {name: _made(config, name) for name in names}
        # What each reads is read; a class has its own attribute, and this is of the parts.
        known = [part.reads for part in self._parts.values()]
        groups = [() if reads is None else reads for reads in known]
        self.reads = None if None in known else tuple(f for reads in groups for f in reads)  # type: ignore[misc]
        measured = Counter(
            name for part in self._parts.values() for name in set(part.known_metrics() or ())
        )
        if twice := [name for name, count in measured.items() if count > 1]:
            raise UserError(f"{said}, but more than one of them measures {min(twice)}.")

    def known_metrics(self) -> Collection[str] | None:
        known = [part.known_metrics() for part in self._parts.values()]
        found = [name for names in known if names is not None for name in names]
        return found if None not in known else None

    def fault_of(self, item: dict[str, Any]) -> str:
        part = self._parts.get(str(item.get("task")))
        if part is None:
            return f"its 'task' is {item.get('task')!r:.60}, but it must be one of {self._said}"
        return part.fault_of(item)

    @property
    def _said(self) -> str:
        return ", ".join(self._parts)

    def run(self, work: Work) -> Metrics:
        metrics: Metrics = {}
        for name, part in self._parts.items():
            metrics |= part.run(_Part(work, name, part.config))
        return metrics


def _made(config: ConfigDict, name: str) -> Task:
    own = copy.deepcopy(config)
    own.experiment.task = name
    return made(name, own)


class _Part(Work):
    """What one of the tasks gets of the point's work."""

    def __init__(self, whole: Work, name: str, config: ConfigDict):
        self.config, self.asked, self.directory = config, whole.asked, whole.directory
        self._whole, self._name = whole, name

    def model(self, config: ConfigDict | None = None) -> Model:
        return self._whole.model(config)

    def request(self, item: Item) -> Request:
        return self._whole.request(item)

    def recorded(self) -> Iterator[dict[str, Any]]:
        return (item for item in self._whole.recorded() if item["task"] == self._name)

    def record(self, **item: Any) -> None:
        self._whole.record(task=self._name, **item)

    def score(self, of: str, unit: int, name: str | int, scores: Mapping[str, float]) -> None:
        self._whole.score(of, unit, name, scores)

    def progress(self, done: int, total: int) -> None:
        self._whole.progress(done, total)
