"""The configs that ship with the package, from any directory and from a wheel."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_jax import cli, config_program, ready_made
from tests.cli.conftest import REPOSITORY, Run, answers_in

NAMES = ["haiku", "qwen25_instruct"]


def test_they_are_listed(run: Run) -> None:
    found = {line.split()[0]: line.split(maxsplit=1)[1] for line in run("configs").out.splitlines()}
    there = [p.relative_to(ready_made.HOME) for p in (REPOSITORY / "configs").rglob("*.py")]
    assert found.keys() == {str(p.with_suffix("")) for p in there if p.stem != "haiku_word"}
    assert found["haiku"] == "The bundled model writes three different haiku on one word."


@pytest.mark.parametrize("name", NAMES)
def test_from_any_directory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = config_program.load(str(REPOSITORY / "configs" / f"{name}.py")).to_json()
    for given in (name, f"configs/{name}.py"):
        assert cli.parse(["run.py", f"--config={given}"]).config.to_json() == wanted


def test_variants_and_what_is_not_there(refuses: Callable[..., None]) -> None:
    assert cli.parse(["run.py", "--config=haiku:greedy"]).config.sampling.temperature == 0
    refuses(["--config=haiku:hot"], "no variant 'hot', only 'greedy'")
    refuses(
        ["--config=haikus"], "--config=haikus can't be read: No such file", "did you mean haiku?"
    )
    refuses(["--config=configs/../pyproject.py"], "can't be read: No such file")


def test_a_file_of_the_working_directory_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "haiku.py").write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n  return ConfigDict({'prompt': 'mine'})"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.parse(["run.py", "--config=configs/haiku.py"]).config.prompt == "mine"
    assert cli.parse(["run.py", "--config=haiku"]).config.prompt != "mine"


def test_a_wheel_has_them(tmp_path: Path) -> None:
    """And all else that the package reads."""
    pytest.importorskip("hatchling", reason="hatchling builds the wheel: pip install '.[test]'")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    package = REPOSITORY / "qwen_jax"
    missing = {
        path.relative_to(REPOSITORY)
        for path in package.rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not (installed / path.relative_to(REPOSITORY)).exists()
    }
    assert not missing
    listing = [sys.executable, "-m", "qwen_jax", "configs"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(listing, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and str(installed / "qwen_jax" / "configs") in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ready_made.names()


@pytest.mark.usefixtures("loaded")
def test_a_flag_wins_over_what_a_config_names_in_its_place(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("rain\n")
    result = run("--config=haiku", f"--prompt_file={path}", "--max_tokens=2", "--n=1")
    assert result.code == 0 and len(answers_in(result.out)) == 1
