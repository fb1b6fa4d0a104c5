"""kill -9 at random moments: no record is lost, doubled or torn."""

import collections
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import REPOSITORY
from tests.experiments.conftest import lines
from tests.experiments.fake import DONE, ITEMS

POINTS = 150


@pytest.mark.long
def test_killed_and_resumed(experiment: Callable[..., list[str]], tmp_path: Path) -> None:
    argv = experiment(f'axis("sampling.seed", range({POINTS}))')
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.experiments.killer",
            str(tmp_path / "w" / "outputs.jsonl"),
            *argv,
        ],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {DONE: str(tmp_path / "done")},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    kills, _, code = done.stdout.splitlines()[-1].partition(" kills, then ")
    assert int(kills) >= 30 and code == "0"
    # A kill loses the item in progress at most, which is then done once more.
    again = (tmp_path / "done").stat().st_size - POINTS * ITEMS
    assert 0 <= again <= int(kills)

    workdir = tmp_path / "w"
    outputs = lines(workdir / "outputs.jsonl")  # Every line is whole, or this fails.
    points = collections.defaultdict(list)
    for line in outputs:
        points[line["point"]].append(line)
    assert len(points) == POINTS and len(outputs) == POINTS * ITEMS
    for items in points.values():
        assert [item["index"] for item in items] == list(range(ITEMS))
        assert [item["value"] - items[0]["value"] for item in items] == list(range(ITEMS))

    events = lines(workdir / "metrics.jsonl")
    finished = [event for event in events if event["event"] == "finished"]
    assert collections.Counter(e["point"] for e in finished) == dict.fromkeys(points, 1)
    for event in finished:
        values = [item["value"] for item in points[event["point"]]]
        assert event["metrics"] == {"total": sum(values), "count": ITEMS}
    scored: dict[str, dict[int, float]] = collections.defaultdict(dict)
    for line in lines(workdir / "scores.jsonl"):
        scored[line["point"]][line["unit"]] = line["scores"]["value"]
    found = {point: {item["index"]: item["value"] for item in points[point]} for point in points}
    assert {p: {**dict.fromkeys(found[p]), **scored[p]} for p in found} == found
    # Many were killed at work: points were begun more often than they were finished.
    assert sum(event["event"] == "started" for event in events) >= POINTS + 15
