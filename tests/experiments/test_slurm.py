"""`tools/slurm.sh`, with a stand-in for sbatch that runs jobs at once and loses a task."""

from __future__ import annotations

import json
import os
import select
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import REPOSITORY
from tests.experiments.conftest import lines
from tests.experiments.fake import ITEMS

SCRIPT = REPOSITORY / "tools" / "slurm.sh"
SBATCH = """#!/bin/bash
echo "$@" >> "$CALLS"
array= after=
while [[ $1 == --* ]]; do
    case $1 in
        --array=1-*) array=${1#--array=1-} ;;
        --dependency=afterany:*) after=${1#--dependency=afterany:} ;;
    esac
    shift
done
export SLURM_JOB_ID=$((100 + $(wc -l < "$CALLS")))
if [[ -n $array ]]; then
    for task in $(seq 1 "$array"); do
        [[ $task == "$LOST" ]] && continue
        SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT=$array "$@"
    done
else
    [[ $after == 101 ]] && "$@"
fi
echo "$SLURM_JOB_ID"
"""


CLIENT = """#!/bin/bash
printf '%q ' "$@" > "$ASKED"; echo > "$ASKED"
read -r code < "$ENDED"
exit "$code"
"""
"""Stands for the command: has this process run it, where JAX has started."""


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def served(process: subprocess.Popen, asked: Path, ended: Path, run: Callable) -> str:
    """Runs what the client is called with until the process ends; what came on stderr."""
    said, left = "", b""
    pipe, answer = (os.open(fifo, os.O_RDWR) for fifo in (asked, ended))
    while process.poll() is None:
        if not select.select([pipe], [], [], 0.05)[0]:
            continue
        left += os.read(pipe, 65536)
        while b"\n" in left:
            line, _, left = left.partition(b"\n")
            result = run(*shlex.split(line.decode()))
            said += result.out + result.err
            os.write(answer, f"{result.code}\n".encode())
    os.close(pipe)
    os.close(answer)
    return said


def test_what_a_lost_task_has_left_is_run_by_the_last_job(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin" / "sbatch", SBATCH)
    asked, ended = tmp_path / "asked", tmp_path / "ended"
    os.mkfifo(asked)
    os.mkfifo(ended)
    experiment('axis("sampling.seed", range(4))')
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "QWEN_JAX": str(program(tmp_path / "client", CLIENT)),
        "SBATCH_OPTIONS": "--partition=gpu --time=2:00:00",
        "CALLS": str(tmp_path / "calls"),
        "ASKED": str(asked),
        "ENDED": str(ended),
        "LOST": "1",
    }
    w = tmp_path / "w"
    with subprocess.Popen(
        [SCRIPT, tmp_path / "config.py", w, "2"], stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        out = served(process, asked, ended, run)
        assert process.stdout is not None
        assert (process.wait(), process.stdout.read()) == (0, "102\n"), out
    array, last = (tmp_path / "calls").read_text().splitlines()
    options = "--parsable --partition=gpu --time=2:00:00"
    assert array.startswith(f"{options} --requeue --array=1-2 {SCRIPT}")
    assert last.startswith(f"{options} --dependency=afterany:101 {SCRIPT}")
    # The second task ran its two points; the first was lost, found, and made up for.
    assert "Missing shards: 1/2.\nMissing points: 2 (" in out and "4 finished." in out
    assert len(lines(w / "outputs.jsonl")) == 4 * ITEMS
    sessions = [e for e in lines(w / "metrics.jsonl") if e["event"] == "session"]
    assert [session["points"] for session in sessions] == [2, 2]
    assert json.loads((w / "config.json").read_text())["shard"] is None


def test_it_says_how_it_is_called() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2 and "tools/slurm.sh CONFIG WORKDIR SHARDS" in done.stderr
