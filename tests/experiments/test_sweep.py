"""How sweeps combine, and how a config file's declaration is checked."""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen_jax.errors import UserError
from qwen_jax.experiments import axis, chain, product, zipped
from tests.cli.conftest import REPOSITORY


def test_combinations() -> None:
    a, b = axis("a", [1, 2]), axis("b", "xyz")
    pairs = [(p["a"], p["b"]) for p in product(a, b)]
    assert pairs == list(itertools.product([1, 2], "xyz"))
    assert zipped(a, axis("b", "xy")) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert chain(a, b) == [*a, *b]
    assert product() == [{}]


def test_values_of_numpy_become_pythons() -> None:
    values = [point["a"] for point in axis("a", np.linspace(0, 1, 3))]
    assert values == [0.0, 0.5, 1.0] and {type(v) for v in values} == {float}


def test_sweeps_that_make_no_sense() -> None:
    with pytest.raises(UserError, match=r"sweeps of \[2, 3\] points"):
        zipped(axis("a", [1, 2]), axis("b", "xyz"))
    with pytest.raises(UserError, match="sets a twice"):
        product(axis("a", [1]), axis("a", [2]))


@pytest.mark.parametrize(
    ("sweep", "config", "words"),
    [
        ('axis("sampling.temprature", [1.0])', "", "did you mean sampling.temperature?"),
        ('axis("max_tokens", [1.5])', "", "sets max_tokens to 1.5, but it must be a whole number"),
        ('axis("experiment.scores", [(1,)])', "", "must be a tuple of texts"),
        ('axis("workdir", ["x"])', "", "a sweep can't set workdir"),
        ("[{1: 2}]", "", "point 1 of the sweep sets 1, which is no field"),
        ('axis("n", [1, 1])', "", "has the point n=1 twice"),
        ('axis("n", [])', "", "the sweep has no points"),
        ("3", "", "get_sweep() must return a sweep"),
        ("1 / 0", "", "ZeroDivisionError"),
        ('axis("max_tokens", [9, 1])', "", "The point max_tokens=1: this point makes no sense"),
        ('axis("dtype", ["float8"])', "", "The point dtype=float8: dtype is 'float8'"),
        ('axis("sha256", ["x"])', "", "The point sha256=x: sha256: 'x' is not 64 hexadecimal"),
        ('axis("n", [2])', "config.experiment.task = 'dance'", "is none of generate, perplexity"),
        ('axis("n", [2])', "config.experiment.task = 'nowhere:X'", "No module named 'nowhere'"),
        ('axis("n", [2])', "config.experiment.quantization = 'Q9'", "must be one of F32, BF16"),
        ('axis("model", ["no.gguf"])', "", "no.gguf: there is no such file"),
    ],
)
def test_refused_before_anything_runs(
    experiment: Callable[..., list[str]],
    refuses: Callable[..., None],
    tmp_path: Path,
    sweep: str,
    config: str,
    words: str,
) -> None:
    refuses(experiment(sweep, config), words)
    assert not (tmp_path / "w").exists()


def test_what_a_command_must_have(
    experiment: Callable[..., list[str]], refuses: Callable[..., None], tmp_path: Path
) -> None:
    argv = experiment()
    refuses(["experiment"], "needs --config=FILE.py")
    refuses(argv[:2], "needs --workdir")
    refuses([*argv, "--seed=3"], "sampling.seed is given by a flag", "sweeps it")
    for shard in ("0/2", "1/", "\u0661/\u0662"):
        refuses([*argv, f"--shard={shard}"], f"--shard is '{shard}', but it must be i/n")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "thesis.txt").write_text("all of it")
    refuses(argv, "holds thesis.txt and no experiment")


def test_a_config_in_another_encoding(
    experiment: Callable[..., list[str]], refuses: Callable[..., None], tmp_path: Path
) -> None:
    argv, config = experiment(), tmp_path / "config.py"
    config.write_bytes(f"# coding: latin-1\n# caf\u00e9\n{config.read_text()}".encode("latin-1"))
    refuses(argv, "config.py is not UTF-8 at byte 23; convert it")


def test_a_config_file_is_kept_to_the_byte(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    argv, config = experiment('axis("n", [1])'), tmp_path / "config.py"
    config.write_bytes(config.read_bytes().replace(b"\n", b"\r\n"))
    assert run(*argv).code == 0
    assert (tmp_path / "w" / "config.py").read_bytes() == config.read_bytes()


def test_a_prompt_that_is_no_unicode_fails_its_point(
    experiment: Callable[..., list[str]], run: Callable, loaded: object, tmp_path: Path
) -> None:
    """As an argument of a command that is no UTF-8 becomes one."""
    config = 'config.experiment.task, config.prompt = "generate", "a\\udcff"'
    result = run(*experiment('axis("n", [1])', config))
    assert result.code == 1 and "1 failed" in result.out
    assert "Traceback" not in result.err


def test_dry_run_lists_points_groups_and_memory(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    result = run(*experiment(), "--dry_run")
    listed = result.out.splitlines()
    assert result.code == 0 and not (tmp_path / "w").exists()
    assert listed[-1] == "points: 8, compile groups: 2, sets of weights: 2"
    # Points of one dtype stand together: its weights are loaded once.
    assert ["float32" in line for line in listed[1:-1]] == [True] * 4 + [False] * 4
    # 3,478,784 parameters; keys and values of 128 in 5 layers for 8 slots of 512 tokens.
    cache = 4 * 2 * 5 * 128 * 512 * 8
    megabytes = (4 * 3_478_784 + cache) / 1e6
    assert f"{megabytes:.1f} MB" in listed[1] and f"{megabytes / 2:.1f} MB" in listed[-2]
    more = run(*experiment(), "--dry_run", "--slots=16").out.splitlines()
    assert f"{megabytes + cache / 1e6:.1f} MB" in more[1]


def test_points_of_other_meshes_run_other_programs(
    experiment: Callable[..., list[str]], run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part's are those of as many devices, however many models there are."""
    monkeypatch.setattr("qwen_jax.experiments.models.splits_of", lambda shape: [])
    meshes = 'axis("mesh", ["tp=1", "dp=2", "tp=2", "dp=2,tp=2"])'
    listed = run(*experiment(meshes), "--dry_run").out.splitlines()
    assert listed[-1] == "points: 4, compile groups: 2, sets of weights: 4"


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/experiments").glob("*.py")), ids=str)
def test_shipped(
    run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: Path
) -> None:
    """The same points wherever they are asked for, so that machines may share an experiment."""
    # Whether lm-evaluation-harness is here or not.
    monkeypatch.setattr("qwen_jax.experiments.harness_settings.check_installed", lambda: None)
    monkeypatch.setattr("qwen_jax.experiments.tasks.evaluate._manager", lambda *where: None)
    monkeypatch.chdir(REPOSITORY)
    name = path.relative_to(REPOSITORY)
    result = run("experiment", f"--config={name}", "--dry_run")
    assert result.code == 0, result.err
    # The docstring gives the command that runs it.
    assert f"run.py experiment --config={name}" in path.read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    for elsewhere in (name, f"experiments/{path.stem}"):
        assert run("experiment", f"--config={elsewhere}", "--dry_run").out == result.out


def test_scores_and_tasks_of_the_working_directory(
    experiment: Callable[..., list[str]],
    run: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The installed command has no such place among Python's."""
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_scores_of_cwd.py").write_text("def score(item, samples): return {}")
    fields = "config.prompt, config.experiment.task = 'x', 'generate'; config.experiment.scores = "
    asked = experiment('axis("n", [1])', f"{fields}('my_scores_of_cwd:score',)")
    assert run(*asked, "--dry_run").code == 0
    asked = experiment('axis("n", [1])', f"{fields}('my_scores_of_nowhere:score',)")
    assert "No module named 'my_scores_of_nowhere'" in run(*asked, "--dry_run").err


def test_a_sweep_of_what_is_another_tasks(
    experiment: Callable[..., list[str]], refuses: Callable[..., None], tmp_path: Path
) -> None:
    words = f"output, which {tmp_path}/config.py sweeps, does nothing for experiment; it belongs"
    refuses(experiment('axis("output", ["a", "b"])'), words)
