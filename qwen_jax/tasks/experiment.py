"""`run.py experiment`: a sweep of settings, begun or gone on with."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from qwen_jax import in_force, ready_made
from qwen_jax.errors import UserError
from qwen_jax.experiments import ahead, declaration, plan, records, report
from qwen_jax.experiments.answers.chosen import Asked
from qwen_jax.experiments.runner import Runner, devices_line
from qwen_jax.experiments.tasks.generate import Generate
from qwen_jax.reporting import page
from qwen_jax.settings import Command
from qwen_jax.terminal import visible


def run(command: Command) -> int:
    """Runs what the workdir does not have yet; returns 1 where a point has failed, else 0."""
    config = command.config
    if "" not in sys.path:
        sys.path.append("")  # The working directory, where scores and tasks of one's own may be.
    declared = declaration.declare(command)
    whole = plan.plan(declared.points)
    asked = Asked.of(config.answer)
    if config.runner.max_time is not None and not config.runner.max_time > 0:
        raise UserError(
            f"--max_time is {config.runner.max_time:g}, but it must be a number of seconds above 0."
        )
    ahead.check(whole, asked)
    planned = plan.part_of(whole, config.runner.shard)
    _warn_of_idle(whole)
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
        if page.can_be_made():
            page.prepare()
        runner = Runner(
            opened,
            command=shlex.join(command.typed),
            retry_failed=config.runner.retry_failed,
            profile=config.runner.profile,
            asked=asked,
            max_time=config.runner.max_time,
            stop_worse=config.runner.stop_worse,
        )
        failed = runner.run(planned)
    except KeyboardInterrupt:
        _tell_of_left(workdir, planned, opened, "\n")
        raise
    finally:
        opened.close()
    report.show([workdir], workdir, asked=asked)
    if runner.out_of_time:
        _tell_of_left(
            workdir, planned, opened, f"--max_time={config.runner.max_time:g} is over and "
        )
    return 1 if failed or runner.out_of_time else 0


def _tell_of_left(
    workdir: Path, planned: Sequence[plan.Planned], opened: records.Records, why: str = ""
) -> None:
    done = sum(item.point.id in opened.ends for item in planned)
    print(
        f"{why}{workdir} has {done} of {len(planned)} points; the same command goes on.",
        file=sys.stderr,
    )


def _warn_of_idle(planned: Sequence[plan.Planned]) -> None:
    """Warns once of a seed or a filter that does nothing in any point, since all are greedy."""
    idle: set[str] = set()
    samples = 1
    for point, task in ((item.point, item.task) for item in planned):
        config = point.config
        if type(task) is not Generate or config.generation_config != "none":
            return  # Answers may be drawn, or the seed is of another use.
        for own in task.own:
            if own.get("temperature", config.sampling.temperature) > 0:
                return
            idle |= own.keys()
            samples = max(samples, own.get("n", config.n))
        idle |= {field.removeprefix("sampling.") for field in point.asked}
    in_force.warn_of_greedy(idle, samples)


def _announce(declared: declaration.Declaration, opened: records.Records, count: int) -> None:
    """Says on stderr what is about to run, and where."""
    print(ready_made.title(declared.source, declared.name), file=sys.stderr)
    for name, value in declared.changed.items():
        print(f"  {name} = {value!r}", file=sys.stderr)
    state = f"{len(opened.ends)} of {count} points have been run" if opened.resumed else "a new one"
    print(f"{opened.directory}: {state}; {devices_line()}", file=sys.stderr)
