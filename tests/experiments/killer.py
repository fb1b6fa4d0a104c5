"""Runs an experiment again and again, killing it each time, until it gets through.

    python -m tests.experiments.killer OUTPUTS ARGUMENT...

Prints how often it has killed. After each kill, every line that was whole before must still be
where it was. Everything is imported once and children are forked before JAX has
any threads, so that a child starts soon; each is a process of its own, killed by SIGKILL: one in
five while it starts, the others some moment after OUTPUTS has grown.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import qwen_jax.tasks.experiment  # noqa: F401
from qwen_jax import cli

KILLS = 32


def ends(child: int, outputs: Path, rng: random.Random) -> int | None:
    """Kills the child; its exit code where it came to an end before."""
    size = outputs.stat().st_size if outputs.exists() else 0
    starting = rng.random() < 0.2
    moment = rng.uniform(0.0, 0.5 if starting else 0.06)
    deadline = time.monotonic() + moment if starting else None
    while deadline is None or time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is None and outputs.exists() and outputs.stat().st_size > size:
            deadline = time.monotonic() + moment
        time.sleep(0.0002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def whole_lines(path: Path) -> bytes:
    """What a file holds up to the end of its last whole line."""
    data = path.read_bytes() if path.exists() else b""
    return data[: data.rfind(b"\n") + 1]


def main(outputs: Path, argv: list[str]) -> None:
    rng, kills, code = random.Random(7), 0, None
    kept = dict.fromkeys((outputs, outputs.with_name("metrics.jsonl")), b"")
    while kills < KILLS and code is None:
        child = os.fork()
        if child == 0:
            os._exit(cli.main(argv))
        code = ends(child, outputs, rng)
        kills += code is None
        for path, before in kept.items():
            kept[path] = whole_lines(path)
            assert kept[path].startswith(before), f"{path} has lost a line"
    if code is None:
        code = cli.main(argv)
    print(f"{kills} kills, then {code}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
