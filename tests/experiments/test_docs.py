"""What docs/experiments.md shows as whole programs works as they stand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_jax.experiments.report.results import Results
from tests.cli.conftest import REPOSITORY
from tests.experiments.conftest import lines

PAGE = (REPOSITORY / "docs" / "experiments.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def program(words: str) -> str:
    """The one in which these words stand."""
    (found,) = (text for text in PROGRAMS if words in text)
    return found


@pytest.mark.usefixtures("loaded")
def test_a_score_and_a_task_of_ones_own(
    experiment: Callable[..., list[str]],
    run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rhymes.py").write_text(program("def score("))
    (tmp_path / "fertility.py").write_text(program("class Fertility("))
    words = tmp_path / "words.jsonl"
    words.write_text('{"id": "a", "word": "snow"}\n{"id": "b", "word": "algorithm"}\n')
    shared = (
        f"config.prompt_file = {str(words)!r}; config.max_tokens = 6; "
        "config.batch_invariant = False; "
    )
    templates = 'axis("experiment.template", ["{word}", "a haiku on {word}"])'
    assert run(*experiment(templates, shared + "config.experiment.task = 'generate'")).code == 0
    assert run("score", str(tmp_path / "w"), "--scores=rhymes:score").code == 0
    assert {"rhymes"} == lines(tmp_path / "w" / "scores.jsonl")[0]["scores"].keys()
    own = f"config.prompt_file = {str(words)!r}; config.experiment.task = 'fertility:Fertility'"
    assert run(*experiment(templates, own, workdir="own")).code == 0
    found = Results.read([tmp_path / "own"]).answer
    assert found is not None and (found.metric, found.of) == ("tokens_per_word", "prompt")


@pytest.mark.usefixtures("loaded")
def test_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "configs" / "experiments" / "words.jsonl"
    words.parent.mkdir(parents=True)
    words.write_text('{"id": "a", "word": "snow"}\n{"id": "b", "word": "algorithm"}\n')
    monkeypatch.chdir(tmp_path)
    exec(program("experiments.run("), {})
    *rows, compared = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [
        [temperature, seed] for temperature in ("0.5", "1.6") for seed in ("0", "1000")
    ]
    assert compared.startswith("haiku: temperature=1.6 ") and "temperature=0.5" in compared
    pytest.importorskip("pandas")
    exec(program("import pandas"), {})
    assert capsys.readouterr().out.split()[:2] == ["haiku", "tokens_per_answer"]


def test_a_conditional_sweep() -> None:
    space: dict = {}
    exec("from qwen_jax.experiments import axis, when\n" + program("def get_sweep():"), space)
    points = space["get_sweep"]()
    assert len(points) == 7 and points[0] == {"sampling.temperature": 0.0}
