"""What `merge` says of directories that it can't put together leads to a command that works."""

from collections.abc import Callable
from pathlib import Path

import pytest

Experiment = Callable[..., list[str]]
SWEEP = 'axis("sampling.seed", range(2))'


def test_whole_experiments_are_laid_side_by_side(
    experiment: Experiment, run: Callable, refuses: Callable, tmp_path: Path
) -> None:
    a, b, c = (str(tmp_path / name) for name in "abc")
    run(*experiment(SWEEP, workdir="a"))
    run(*experiment(SWEEP, workdir="b"))
    run(*experiment(SWEEP, workdir="c"), "--max_tokens=9")
    refuses(["merge", a], "is a whole experiment, with nothing to merge", f"run.py report {a} ")
    for more in ([], [f"--workdir={tmp_path / 'out'}"]):
        refuses(["merge", a, b, *more], "are no shards", f"run.py report {a} {b} lays side by")
        result = run("merge", a, c, *more)
        assert result.code == 2 and f"run.py report {a} {c} lays side by side:" in result.err
    assert run("report", a, c).code == 0
    assert not (tmp_path / "out").exists()


def test_workdirs_stand_for_the_shards_in_them(
    experiment: Experiment, run: Callable, refuses: Callable, tmp_path: Path
) -> None:
    """As where two machines have had the same command, but for their --shard."""
    v, w = tmp_path / "v", tmp_path / "w"
    run(*experiment(SWEEP, workdir="v"), "--shard=1/2")
    run(*experiment(SWEEP, workdir="w"), "--shard=2/2")
    refuses(["merge", str(v), str(w)], "--workdir=DIRECTORY must say")
    refuses(["merge", str(v), str(v / "shard-1-of-2"), f"--workdir={w}"], "is named twice")
    result = run("merge", str(v), str(w), f"--workdir={tmp_path / 'out'}")
    assert result.code == 0 and "2 finished." in result.out


def test_one_shard_alone(
    experiment: Experiment, run: Callable, refuses: Callable, tmp_path: Path
) -> None:
    argv, w = experiment(SWEEP), tmp_path / "w"
    run(*argv, "--shard=1/2")
    refuses(["merge", str(w / "shard-1-of-2")], "is the shard 1/2 by itself", f"merge {w}, or all")
    # The command without --shard says to merge, and that it goes on then.
    refuses(argv, f"run.py merge {w} puts shards together")
    result = run("merge", str(w))
    assert result.code == 1 and "Missing points: 1" in result.err
    assert run(*argv).code == 0
    refuses(["merge", str(w)], f"run.py report {w} shows", "give --workdir=DIRECTORY, a new one")


@pytest.mark.parametrize("prompt", ["x", "x" * 60])
def test_a_wide_table_is_cut_into_some_that_fit(
    experiment: Experiment, run: Callable, tmp_path: Path, prompt: str
) -> None:
    """Every metric is shown, whatever settings differ."""
    sweep = 'axis("max_tokens", [6, 7])'
    settings = "; ".join(f"config.{name} = {prompt!r}" for name in ("system", "prompt", "suffix"))
    run(*experiment(sweep, workdir="a"))
    run(*experiment(sweep, settings, workdir="b"))
    shown = run("report", str(tmp_path / "a"), str(tmp_path / "b")).out.splitlines()
    assert all(len(line) <= 100 for line in shown[:-1])  # The last one names files.
    assert {"max_tokens", "system", "suffix", "run"} <= {*" ".join(shown).split()}
    # What all points have alike needs no column.
    assert "The same everywhere: total 66, count 12." in shown
