"""`run.py merge`: the shards of an experiment put together."""

import sys
from pathlib import Path

from qwen_jax.errors import UserError
from qwen_jax.experiments import merge, report
from qwen_jax.settings import Command


def run(command: Command) -> int:
    """Merges the directories named, or the shards in the one named; 1 where points are
    missing or have failed."""
    paths = [Path(argument) for argument in command.arguments]
    if not paths:
        raise UserError("There is nothing to merge; name a workdir, or the shards' directories.")
    if len(paths) > 1 and command.config.workdir is None:
        raise UserError("--workdir=DIRECTORY must say where the merged experiment goes.")
    out = Path(command.config.workdir or paths[0])
    missing = merge.merge(merge.shards_in(paths[0]) if len(paths) == 1 else paths, out)
    results = report.show([out], out)
    if missing:
        print(
            f"Missing points: {len(missing)} ({', '.join(missing)}). The command without --shard, "
            f"with --workdir={out}, runs them.",
            file=sys.stderr,
        )
    return 0 if all(row.state == "ok" for row in results.rows) else 1
