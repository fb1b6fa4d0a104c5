"""`run.py experiment`: a sweep of settings, begun or gone on with."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from qwen_jax import in_force, prompts, ready_made
from qwen_jax.errors import UserError
from qwen_jax.experiments import declaration, plan, records, report
from qwen_jax.experiments.runner import Runner, devices_line
from qwen_jax.settings import Command
from qwen_jax.terminal import visible


def run(command: Command) -> int:
    """Runs what the workdir does not have yet; returns 1 where a point has failed, else 0."""
    config = command.config
    if "" not in sys.path:
        sys.path.append("")  # The working directory, where scores and tasks of one's own may be.
    declared = declaration.declare(command)
    planned = plan.part_of(plan.plan(declared.points), config.runner.shard)
    _warn_of_idle(declared.points)
    if config.runner.dry_run:
        print(visible(plan.listed(planned)))
        return 0
    if config.workdir is None:
        raise UserError("An experiment needs --workdir=DIRECTORY for its records.")
    workdir = plan.shard_directory(Path(config.workdir), config.runner.shard)
    assigned = [item.point for item in planned]
    description = records.described(declared, assigned, config.runner.shard)
    opened = records.Records(workdir, description, declared.source)
    try:
        _announce(declared, opened, len(planned))
        runner = Runner(
            opened, retry_failed=config.runner.retry_failed, profile=config.runner.profile
        )
        failed = runner.run(planned)
    except KeyboardInterrupt:
        done = sum(item.point.id in opened.ends for item in planned)
        print(
            f"\n{workdir} has {done} of {len(planned)} points; the same command goes on.",
            file=sys.stderr,
        )
        raise
    finally:
        opened.close()
    report.show([workdir], workdir)
    return 1 if failed else 0


def _warn_of_idle(points: Sequence[declaration.Point]) -> None:
    """Warns once of a seed or a filter that does nothing in any point, since all are greedy."""
    if any(_may_draw(point.config) for point in points):
        return
    idle = {field.removeprefix("sampling.") for point in points for field in point.asked}
    files: dict[tuple[str | None, str | None], list[Mapping[str, Any]]] = {}
    samples = 1
    for config in (point.config for point in points):
        key = config.prompt_file, config.experiment.template
        if key not in files:
            files[key] = _settings_in(config)
        if any(own.get("temperature", 0) > 0 for own in files[key]):
            return
        idle |= {name for own in files[key] for name in own}
        samples = max([samples, *(own.get("n", config.n) for own in files[key])])
    in_force.warn_of_greedy(idle, samples)


def _may_draw(config: ConfigDict) -> bool:
    """Whether answers may be drawn whatever a line says, or the task has another use for the
    seed."""
    task = config.experiment.task
    return (
        task != "generate" or config.generation_config != "none" or config.sampling.temperature > 0
    )


def _settings_in(config: ConfigDict) -> list[Mapping[str, Any]]:
    """Those of its own that a line has for a file's prompts, each combination once."""
    if config.prompt_file is None:
        return [{}]
    names = ("temperature", "n", *in_force.DRAWS)
    items = prompts.stream(config, prompts.options_of(config))
    found = {tuple((name, item.own.get(name)) for name in names) for item in items}
    return [{name: value for name, value in own if value is not None} for own in found]


def _announce(declared: declaration.Declaration, opened: records.Records, count: int) -> None:
    """Says on stderr what is about to run, and where."""
    print(ready_made.title(declared.source, declared.name), file=sys.stderr)
    for name, value in declared.changed.items():
        print(f"  {name} = {value!r}", file=sys.stderr)
    state = f"{len(opened.ends)} of {count} points have been run" if opened.resumed else "a new one"
    print(f"{opened.directory}: {state}; {devices_line()}", file=sys.stderr)
