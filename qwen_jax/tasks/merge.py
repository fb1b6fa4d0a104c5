"""`run.py merge`: the shards of an experiment put together."""

import sys
from pathlib import Path

from qwen_jax.errors import UserError
from qwen_jax.experiments import merge, report
from qwen_jax.experiments.answers.chosen import Asked
from qwen_jax.settings import Command


def run(command: Command) -> int:
    """Merges the directories named, or the shards in the one named; 1 where points are
    missing or have failed."""
    paths = [Path(argument) for argument in command.arguments]
    if not paths:
        raise UserError("There is nothing to merge; name a workdir, or the shards' directories.")
    out = None if command.config.workdir is None else Path(command.config.workdir)
    missing = merge.merge(paths, out)
    out = out or paths[0]
    results = report.show([out], out, asked=Asked.of(command.config.answer))
    if missing.shards:
        print(f"Missing shards: {', '.join(missing.shards)}.", file=sys.stderr)
    if missing.points:
        print(
            f"Missing points: {len(missing.points)} ({', '.join(missing.points)}). The command "
            f"without --shard, with --workdir={out}, runs them.",
            file=sys.stderr,
        )
    return 0 if all(row.state in ("ok", "skipped") for row in results.rows) else 1
