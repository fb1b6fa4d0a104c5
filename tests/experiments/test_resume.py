"""Going on, refusing to, failing, and working in parts."""

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.experiments import merge
from tests.experiments.conftest import lines
from tests.experiments.fake import ITEMS, Count

Experiment = Callable[..., list[str]]


def part(run: Callable, argv: list[str], workdir: Path, shard: str) -> Path:
    """Runs a shard; the directory it goes to."""
    run(*argv, f"--shard={shard}")
    i, n = map(int, shard.split("/"))
    return workdir / f"shard-{i}-of-{n}"


def finished(workdir: Path) -> list[dict]:
    return [e for e in lines(workdir / "metrics.jsonl") if e["event"] == "finished"]


def test_a_directory_that_explains_itself(
    experiment: Experiment, run: Callable, tmp_path: Path
) -> None:
    result = run(*experiment(), "--max_tokens=7")
    assert result.code == 0 and "8 finished." in result.out
    w = tmp_path / "w"
    config = json.loads((w / "config.json").read_text())
    assert config["changed"] == {"experiment.task": "tests.experiments.fake:Count", "max_tokens": 7}
    assert config["config"]["max_tokens"] == 7 and len(config["points"]) == 8
    assert '"""What this is about."""' in (w / "config.py").read_text()
    (session,) = (e for e in lines(w / "metrics.jsonl") if e["event"] == "session")
    environment = json.loads((w / "environments" / f"{session['environment']}.json").read_text())
    assert environment["packages"]["jax"] and environment["device"] == "cpu"
    assert {"commit", "uncommitted", "driver", "variables"} <= environment.keys()
    assert {e["metrics"]["total"] for e in finished(w)} == {
        float(seed * 1200 + 66) for seed in range(4)
    }
    assert "finished" in (w / "log.txt").read_text()


def test_finished_points_are_skipped(experiment: Experiment, run: Callable, tmp_path: Path) -> None:
    argv = experiment()
    run(*argv)
    before = finished(tmp_path / "w")
    result = run(*argv)
    assert result.code == 0 and "8 of 8 points have been run" in result.err
    assert finished(tmp_path / "w") == before


def test_a_changed_config_is_refused(
    experiment: Experiment, run: Callable, refuses: Callable, tmp_path: Path
) -> None:
    run(*experiment())
    before = (tmp_path / "w" / "metrics.jsonl").read_bytes()
    for argv, difference in (
        ([*experiment(), "--max_tokens=9"], '+  "max_tokens": 9'),
        (experiment('axis("sampling.seed", range(9))'), '+  "seed=8"'),
        (experiment('axis("sampling.seed", range(99))'), "more lines"),
    ):
        result = run(*argv)
        assert result.code == 2 and "holds an experiment with another config" in result.err
        assert difference in result.err and len(result.err.splitlines()) < 50
    assert (tmp_path / "w" / "metrics.jsonl").read_bytes() == before


def test_changed_inputs_are_refused(experiment: Experiment, run: Callable, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\n")
    argv = experiment('axis("sampling.seed", [1])', f"config.prompt_file = {str(prompts)!r}")
    assert run(*argv).code == 0
    prompts.write_text("b\n")
    result = run(*argv)
    assert result.code == 2 and "prompts.txt" in result.err


def test_one_process_at_a_time(
    experiment: Experiment, refuses: Callable, run: Callable, tmp_path: Path
) -> None:
    argv = experiment()
    run(*argv)
    with (tmp_path / "w" / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refuses(argv, "is in use by another process")


FAILURES = {
    2: ("out of memory", "RESOURCE_EXHAUSTED"),
    3: ("bad input", "line 7 is no prompt."),
    4: ("error", "ZeroDivisionError: by accident"),
    5: ("not finite", "{'total': nan}"),
}


def test_failures_are_recorded_and_stop_nothing(
    experiment: Experiment, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = experiment('axis("max_tokens", [2, 3, 4, 5, 6])')
    result = run(*argv)
    assert result.code == 1 and "1 finished, 4 failed." in result.out
    events = [e for e in lines(tmp_path / "w" / "metrics.jsonl") if e["event"] == "failed"]
    for event, (kind, reason) in zip(events, FAILURES.values(), strict=True):
        assert event["kind"] == kind and reason in event["reason"]
    assert "Traceback" in (tmp_path / "w" / "log.txt").read_text()

    assert run(*argv).code == 1  # They stay failed, and are not tried again,
    assert sum(e["event"] == "failed" for e in lines(tmp_path / "w" / "metrics.jsonl")) == 4
    monkeypatch.setattr("tests.experiments.fake.Count._fail", lambda self: None)
    result = run(*argv, "--retry_failed")  # unless this is asked for.
    assert result.code == 1 and "4 finished, 1 failed." in result.out
    # What they had recorded before they failed is there once.
    outputs = lines(tmp_path / "w" / "outputs.jsonl")
    assert len({(o["point"], o["index"]) for o in outputs}) == len(outputs) == 5 * 12


def test_shards_and_merge(experiment: Experiment, run: Callable, tmp_path: Path) -> None:
    argv = experiment()
    w = tmp_path / "w"
    for shard in ("1/3", "2/3", "3/3"):
        assert run(*argv, f"--shard={shard}").code == 0
    shards = sorted(w.glob("shard-*-of-3"))
    assert [len(finished(path)) for path in shards] == [2, 3, 3]
    assert run("merge", str(w)).code == 0
    assert len(finished(w)) == 8
    whole = experiment(workdir="whole")
    run(*whole)
    results = [
        {e["point"]: e["metrics"] for e in finished(directory)}
        for directory in (w, tmp_path / "whole")
    ]
    assert results[0] == results[1]
    assert run(*argv).code == 0  # The merged directory is an experiment as any other.
    assert len(finished(w)) == 8


def test_merge_notices_missing_and_doubled_points(
    experiment: Experiment, run: Callable, refuses: Callable, tmp_path: Path
) -> None:
    argv = experiment()
    w, out = tmp_path / "w", tmp_path / "out"
    for shard in ("1/3", "3/3"):
        run(*argv, f"--shard={shard}")
    a, b = sorted(map(str, w.glob("shard-*")))
    refuses(["merge", a, b], "--workdir=DIRECTORY must say")
    refuses(["merge", a, a, f"--workdir={out}"], "is named twice; leave one of them out")
    result = run("merge", a, b, f"--workdir={out}")
    assert result.code == 1 and "Missing points: 3 (" in result.err
    refuses(["merge", a, b, f"--workdir={out}"], "holds an experiment already")
    assert run(*argv[:2], f"--workdir={out}").code == 0
    assert len(finished(out)) == 8
    result = run("merge", a, str(part(run, argv, w, "1/2")), f"--workdir={tmp_path / 'x'}")
    assert result.code == 2 and "each point may be in one shard only" in result.err
    other = experiment('axis("sampling.seed", range(5))', workdir="v")
    run(*other, "--shard=1/2")
    result = run("merge", a, str(tmp_path / "v" / "shard-1-of-2"), f"--workdir={tmp_path / 'x'}")
    assert result.code == 2 and "different experiments" in result.err


@pytest.mark.parametrize("task", ["merge", "report"])
def test_directories_without_an_experiment(refuses: Callable, tmp_path: Path, task: str) -> None:
    refuses([task], "There is nothing to")
    refuses(["report", str(tmp_path)], "holds no experiment")
    refuses([task, "x" * 5000], "can't be read: File name too long; check the path.")
    refuses(["merge", str(tmp_path)], "holds no experiment: it has no config.json; name the")


def test_points_that_two_shards_have_begun_are_not_merged(
    experiment: Experiment, run: Callable, refuses: Callable, tmp_path: Path
) -> None:
    """Neither has finished, but both have outputs, which would be there twice."""
    argv, w = experiment(), tmp_path / "w"
    shards = [part(run, argv, w, shard) for shard in ("1/8", "1/4")]
    for shard in shards:
        events = (shard / "metrics.jsonl").read_text().splitlines(True)
        (shard / "metrics.jsonl").write_text("".join(e for e in events if "finished" not in e))
    refuses(["merge", *map(str, shards), f"--workdir={tmp_path / 'out'}"], "in one shard only")
    assert not (tmp_path / "out").exists()


def test_merge_tells_of_failures_and_keeps_their_tracebacks(
    experiment: Experiment, run: Callable, refuses: Callable, tmp_path: Path
) -> None:
    argv, w = experiment('axis("max_tokens", [4, 6])'), tmp_path / "w"
    shards = [part(run, argv, w, shard) for shard in ("1/2", "2/2")]
    with (shards[1] / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refuses(["merge", str(w)], "shard-2-of-2 is in use by another process")
    result = run("merge", str(w))
    assert result.code == 1 and "1 finished, 1 failed." in result.out
    log = (w / "log.txt").read_text()
    assert "ZeroDivisionError" in log and "finished" in log


def test_shards_and_the_whole_do_not_share_a_directory(
    experiment: Experiment, run: Callable, refuses: Callable, tmp_path: Path
) -> None:
    argv, w = experiment(), tmp_path / "w"
    part(run, argv, w, "1/2")
    refuses(argv, "holds shard-1-of-2; run.py merge")
    refuses(["report", str(w)], f"config.json; run.py merge {w} puts shard-1-of-2 together.")
    part(run, argv, w, "2/2")
    assert run("merge", str(w)).code == 0
    refuses([*argv, "--shard=1/3"], "holds the whole experiment")
    assert run(*argv, "--shard=1/2").code == 0  # It had been run: there is nothing to do.


@pytest.mark.parametrize("name", ["thesis.txt", "config.py"])
def test_a_strange_directory_stays_as_it_is(
    experiment: Experiment, run: Callable, refuses: Callable, tmp_path: Path, name: str
) -> None:
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / name).write_text("all of it")
    argv = experiment()
    refuses([*argv[:2], f"--workdir={strange}"], f"holds {name} and no experiment")
    shards = [str(part(run, argv, tmp_path / "w", shard)) for shard in ("1/2", "02/2")]
    refuses(["merge", *shards, f"--workdir={strange}"], f"holds {name} and no experiment")
    assert [path.name for path in strange.iterdir()] == [name]


def test_a_merge_that_was_cut_short_can_be_repeated(
    experiment: Experiment, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv, w = experiment(), tmp_path / "w"
    for shard in ("1/2", "2/2"):
        part(run, argv, w, shard)
    with monkeypatch.context() as patch:
        patch.setattr(merge.lines, "write_atomically", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("merge", str(w))
    assert (w / "metrics.jsonl").exists() and not (w / "config.json").exists()
    assert run("merge", str(w)).code == 0
    assert len(finished(w)) == 8


def test_a_directory_that_goes_while_it_is_written(
    experiment: Experiment, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete(task: Count) -> None:
        shutil.rmtree(tmp_path / "w", ignore_errors=True)

    monkeypatch.setattr(Count, "_fail", delete)
    result = run(*experiment())
    assert result.code == 2 and "metrics.jsonl was deleted or replaced" in result.err
    assert not (tmp_path / "w").exists()


def test_files_that_cannot_be_written(
    experiment: Experiment, run: Callable, refuses: Callable, tmp_path: Path
) -> None:
    argv, w, file = experiment(), tmp_path / "w", tmp_path / "file"
    file.touch()
    refuses([*argv[:2], f"--workdir={file}"], f"--workdir={file} can't be written")
    run(*argv)
    refuses(["report", str(w), f"--workdir={file}"], f"--workdir={file} can't be written")
    (w / "results.csv").unlink()
    (w / "results.csv").mkdir()
    result = run("report", str(w))
    assert result.code == 2 and "results.csv can't be written: Is a directory" in result.err
    assert not list(w.glob(".*"))
    (w / "outputs.jsonl").unlink()
    (w / "outputs.jsonl").mkdir()
    refuses(argv, "outputs.jsonl can't be read: Is a directory")


def test_ctrl_c_says_how_to_go_on(
    experiment: Experiment, run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(task: Count) -> None:
        if task.config.sampling.seed == 2:
            raise KeyboardInterrupt

    argv = experiment('axis("sampling.seed", range(4))')
    with monkeypatch.context() as patch:
        patch.setattr(Count, "_fail", interrupt)
        result = run(*argv)
    assert result.code == 130 and "has 2 of 4 points; the same command goes on" in result.err
    assert lines(tmp_path / "w" / "metrics.jsonl")[-1]["event"] == "interrupted"
    assert run(*argv).code == 0
    outputs = lines(tmp_path / "w" / "outputs.jsonl")
    assert len({(o["point"], o["index"]) for o in outputs}) == len(outputs) == 4 * ITEMS


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        (np.float32(2.5), "finished"),
        (jnp.int32(3), "finished"),
        (np.float32("nan"), "not finite"),
        ("many", "not finite"),
    ],
)
def test_metrics_of_other_types(
    experiment: Experiment,
    run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: Any,
    outcome: str,
) -> None:
    monkeypatch.setattr(Count, "run", lambda task, work: {"value": value})
    run(*experiment('axis("n", [1])'))
    event = lines(tmp_path / "w" / "metrics.jsonl")[-1]
    assert event.get("kind", event["event"]) == outcome
    if outcome == "finished":
        assert event["metrics"]["value"] == float(value)
