"""The order of points, what they share, and what they take of memory: all before any of them runs.

Points with the same weights stand together, and among them those with as many slots, so that each
model is loaded once and each program compiled once.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_jax import choices, hosts, opening
from qwen_jax.engine.form import form_of
from qwen_jax.engine.layout import Layout
from qwen_jax.engine.memory import Budget, TooLarge, device, show_bytes
from qwen_jax.errors import UserError
from qwen_jax.experiments.declaration import Point
from qwen_jax.experiments.joined import task_of
from qwen_jax.experiments.models import Choice
from qwen_jax.experiments.task import Task
from qwen_jax.mesh import MeshShape, part
from qwen_jax.model.cache import bytes_per_token
from qwen_jax.task_fields import MODEL, among
from qwen_jax.weights.checkpoint import Checkpoint
from qwen_jax.weights.checksum import hashes_of
from qwen_jax.weights.hub_names import is_hub_name

_OF_ALL = (
    *(*MODEL, "mesh", "batch_invariant", "experiment.task", "experiment.quantization"),
    "experiment.cache_dtype",
    *("runner", "answer", "workdir"),
)
"""Fields, or groups of them, that matter whatever a point's task is."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """A point that is ready to run.

    Attributes:
        group: equal for points that run the same compiled functions.
        memory: bytes of weights, keys and values; None where the model has first to be downloaded.
    """

    point: Point
    task: Task
    group: int
    memory: int | None


def plan(points: tuple[Point, ...]) -> list[Planned]:
    """The points in the order in which they are to run, their tasks checked.

    Raises:
        UserError: a point's config makes no sense for its task, or a model can't be read.
    """
    sizes: dict[tuple[str, ...], Checkpoint | None] = {}
    weights: dict[Choice, int] = {}
    groups: dict[tuple[Any, ...], int] = {}
    planned = []
    meshes = (MeshShape.parse(point.config.mesh) for point in points)
    if hosts.joined is not None and all(mesh.devices == 1 for mesh in meshes):
        raise UserError(hosts.NEEDS_MESH)  # Each host would do all of it by itself.
    for point in points:
        task, choice = _task(point), Choice.of(point.config)
        files = (choice.model, *choice.adapter)
        if files not in sizes:
            sizes[files] = _size(choice)
        size = sizes[files]
        config = size.config if size else None
        programs = (choice.dtype, choice.cache_dtype, choice.weights, choice.implementation)
        dealt = MeshShape.parse(choice.mesh).tp
        key = (config or files, *programs, choice.matmul_precision, point.config.slots, dealt)
        group = groups.setdefault(key, len(groups))
        order = (weights.setdefault(choice, len(weights)), group)
        planned.append((order, Planned(point, task, group + 1, _memory(point, size))))
    found = [item for _, item in sorted(planned, key=lambda pair: pair[0])]
    _check_effect(found)
    return found


def _check_effect(planned: Sequence[Planned]) -> None:
    """Raises UserError where the sweep sets what a point's task doesn't read, or all points share
    what none does."""
    idle = [_idle(item) for item in planned]
    for item, fields in zip(planned, idle, strict=True):
        if swept := [field for field in item.point.overrides if field in fields]:
            raise UserError(
                f"The sweep sets {swept[0]}, which does nothing for the task "
                f"{item.point.config.experiment.task}; sweep what the task reads."
            )
    if shared := frozenset.intersection(*idle):
        tasks = dict.fromkeys(item.point.config.experiment.task for item in planned)
        raise UserError(
            f"{min(shared)} does nothing for an experiment of the task {' or '.join(tasks)}; leave "
            "it out."
        )


def _idle(item: Planned) -> frozenset[str]:
    """Of what is asked for, the fields that the point's task doesn't read."""
    if item.task.reads is None:
        return frozenset()
    read = (*_OF_ALL, *item.task.reads)
    return frozenset(field for field in item.point.asked if not among(field, read))


def part_of(planned: list[Planned], shard: str | None) -> list[Planned]:
    """Shard `i/n`, from 1/n to n/n, as a run of neighbours. Raises UserError for another form."""
    i, n = _parsed(shard)
    return planned[(i - 1) * len(planned) // n : i * len(planned) // n]


def _parsed(shard: str | None) -> tuple[int, int]:
    if shard is None:
        return 1, 1
    parts = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
    if not (parts and 1 <= int(parts[1]) <= int(parts[2])):
        raise UserError(f"--shard is {shard!r:.60}, but it must be i/n, from 1/n to n/n.")
    return int(parts[1]), int(parts[2])


def _task(point: Point) -> Task:
    config = point.config
    try:
        Choice.of(config).check()
        choices.check_slots(config.slots)
        _check_hosts(config.experiment.task)
        if config.sha256 is not None:
            hashes_of(config.sha256)
        return task_of(config)
    except UserError as error:
        raise UserError(f"The point {point.label}: {error}") from error


def _check_hosts(task: str) -> None:
    """Raises UserError where several hosts would not make the same calls."""
    if hosts.joined is not None and task in ("bench", "serve"):
        raise UserError(
            f"the task {task} goes by one host's clock, and there are {hosts.joined.count}; run it "
            "without hosts."
        )


def _size(choice: Choice) -> Checkpoint | None:
    if any(map(is_hub_name, (choice.model, *choice.adapter))):
        return None
    return opening.open_model(choice.model, choice.adapter)


def _memory(point: Point, size: Checkpoint | None) -> int | None:
    if size is None:
        return None
    config = point.config
    dtype, slots = choices.dtype_of(config.dtype), config.slots
    mesh = MeshShape.parse(config.mesh)
    form = form_of(
        config.weights,
        size,
        dtype,
        implementation=config.implementation,
        slots=slots,
        mesh=mesh,
    )
    held, slots = form.held, slots or form.rows
    # Of one device, and what that has.
    own = part(size.config, mesh.tp)
    budget = Budget.of(own, dtype, held, mesh.devices)
    cache = choices.cache_dtype_of(config.experiment.cache_dtype, dtype, config.implementation)
    try:
        layout = Layout.of(
            *(own, dtype, device().platform),
            loaded=False,
            held=held,
            cache=cache,
            slots=slots,
            sharers=mesh.devices,
        )
    except TooLarge:  # The point will fail, and no other with it.
        return budget.weights
    return budget.weights + layout.cache_tokens * bytes_per_token(own, cache.itemsize)


def listed(planned: list[Planned]) -> str:
    """The points as a table: what `--dry_run` shows."""
    lines = [f"{'point':<12}  group  {'memory':<9}  overrides"]
    for item in planned:
        memory = "unknown" if item.memory is None else show_bytes(item.memory)
        point = item.point
        lines.append(f"{point.id}  {item.group:<5}  {memory:<9}  {point.label}")
    groups, models = ({f(p) for p in planned} for f in (_group, _weights))
    lines.append(
        f"points: {len(planned)}, compile groups: {len(groups)}, sets of weights: {len(models)}"
    )
    return "\n".join(lines)


def _group(item: Planned) -> int:
    return item.group


def _weights(item: Planned) -> Choice:
    return Choice.of(item.point.config)


def shard_directory(workdir: Path, shard: str | None) -> Path:
    """A shard's own directory in the workdir, so that two machines never write one file."""
    return workdir if shard is None else workdir / "shard-{}-of-{}".format(*_parsed(shard))
