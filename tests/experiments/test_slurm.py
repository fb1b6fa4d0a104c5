"""`tools/slurm.sh`, with a stand-in for sbatch that runs jobs at once and loses a task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
        SLURM_ARRAY_TASK_ID=$task SLURM_ARRAY_TASK_COUNT=$array "$@" >> "$OUT" 2>&1
    done
else
    [[ $after == 101 ]] && "$@" >> "$OUT" 2>&1
fi
echo "$SLURM_JOB_ID"
"""


def test_what_a_lost_task_has_left_is_run_by_the_last_job(
    experiment: Callable[..., list[str]], tmp_path: Path
) -> None:
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(SBATCH)
    sbatch.chmod(0o755)
    experiment('axis("sampling.seed", range(4))')
    environment = os.environ | {
        "PATH": f"{sbatch.parent}:{os.environ['PATH']}",
        "QWEN_JAX": f"{sys.executable} -m qwen_jax",
        "SBATCH_OPTIONS": "--partition=gpu --time=2:00:00",
        "CALLS": str(tmp_path / "calls"),
        "OUT": str(tmp_path / "out"),
        "LOST": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    w = tmp_path / "w"
    done = subprocess.run(
        [SCRIPT, tmp_path / "config.py", w, "2"], capture_output=True, env=environment, text=True
    )
    out = (tmp_path / "out").read_text()
    assert (done.returncode, done.stdout) == (0, "102\n"), done.stderr + out
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
