"""What the answer is to be about, checked before hours go into points that can't give it."""

import json
from collections.abc import Mapping, Sequence

from qwen_jax.experiments.answers import chosen
from qwen_jax.experiments.answers.chosen import Asked
from qwen_jax.experiments.answers.settings import Point, Scored, grouped, named
from qwen_jax.experiments.plan import Planned
from qwen_jax.experiments.scores import JUDGE


def check(planned: Sequence[Planned], asked: Asked) -> None:
    """Raises UserError where no point has the metric that is asked for, as far as tasks know what
    they measure, or no setting is the baseline."""
    known = [item.task.known_metrics() for item in planned]
    if None not in known:
        there = (name for names in known if names is not None for name in names)
        chosen.check(asked, list(dict.fromkeys(there)))
    if asked.baseline is not None:
        overrides = [item.point.overrides for item in planned]
        values: dict[str, set[str]] = {field: set() for of in overrides for field in of}
        for field, seen in values.items():
            seen.update(json.dumps(of.get(field)) for of in overrides)
        points = [Point("", i.point.id, i.point.overrides, {}, Scored()) for i in planned]
        varying = [field for field, seen in values.items() if len(seen) > 1]
        named(grouped(points, varying), asked.baseline)


def check_ended(
    item: Planned, planned: Sequence[Planned], metrics: Mapping[str, float], asked: Asked
) -> None:
    """The same once a point has ended, of a task that doesn't know before what it measures."""
    alike = all(type(other.task) is type(item.task) for other in planned)
    if alike and item.task.known_metrics() is None:
        judged = [JUDGE] if JUDGE in item.point.config.experiment.scores else []
        chosen.check(asked, [name for name in metrics if not name.endswith("_error")] + judged)
