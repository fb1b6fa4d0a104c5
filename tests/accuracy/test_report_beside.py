"""Reports of the laboratory side by side: what has changed, and what is no such report."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_jax.accuracy import gates, report
from qwen_jax.accuracy.report import Report, beside
from qwen_jax.accuracy.report.beside import Saved
from qwen_jax.accuracy.text.audit import TextFinding
from qwen_jax.accuracy.weights.audit import WeightFinding
from qwen_jax.cli import main
from qwen_jax.reporting.origin import Origin
from tests.reporting.opened import Opened


def weight(verdict: str) -> WeightFinding:
    return WeightFinding("output.weight", "lm_head", verdict, 1, 1, 0.0)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, **parts: object) -> Path:
        command = f"run.py compare --workdir={name} " + "--prompt=long " * 20
        origin = Origin(command, {"jax": "1"}, "c0ffee", False, "2031-01-01 00:00 +0000")
        found = Report(origin=origin, model={"model": "a.gguf"}, **parts)  # type: ignore[arg-type]
        outcomes = gates.check(gates.parse("weights_faults > 0"), report.values(found))
        (tmp_path / name).mkdir()
        text = report.to_json(Report(**{**vars(found), "gates": outcomes}))
        (tmp_path / name / "report.json").write_text(text)
        return tmp_path / name

    return write


def test_what_differs_is_told(
    written: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right, wrong = (
        written("right", weights=[weight("exact")]),
        written("wrong", weights=[weight("fault")]),
    )
    assert main(["report", str(right), str(wrong)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Of 2 verdicts: 2 wrong in wrong alone.\n")
    rows = [line.split() for line in out.splitlines()]
    assert ["weights:", "output.weight", "exact", "fault"] in rows
    assert ["weights_faults", "0", "1"] in rows
    assert max(map(len, out.splitlines())) <= 100
    assert "a.gguf" not in out and "c0ffee" not in out  # which are the same
    made = Opened((tmp_path / "right+wrong.html").read_text())
    assert made.state == "bad" and made.unresolved == [] and made.addresses == []
    assert ["verdict", "right", "wrong"] in made.headers and made.tags["pre"] == 0
    assert main(["report", str(wrong), str(right), f"--workdir={tmp_path / 'new'}"]) == 0
    made = Opened((tmp_path / "new" / "wrong+right.html").read_text())
    assert made.banner == "Of 2 verdicts: 2 wrong in wrong alone." and made.state == "good"


def test_what_was_not_looked_at_is_not_called_right(written: Callable[..., Path]) -> None:
    one = Saved.read(written("a", weights=[weight("fault")]), "a")
    other = Saved.read(written("b", weights=[], text=[TextFinding("chat", "same")]), "b")
    sentence, state = beside.verdict([one, other])
    assert "1 wrong in a, not looked at in b" in sentence and state == "open"


def test_the_same(written: Callable[..., Path]) -> None:
    saved = Saved.read(written("a", weights=[weight("exact")]), "a")
    assert beside.verdict([saved, saved]) == (
        "The same: of 2 verdicts none is wrong in either.",
        "good",
    )
    assert beside.text([saved, saved]).endswith("They differ in nothing.")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 99}, "has a version that this program does not know"),
        ({"metrics": 3}, "is damaged"),
        ({"weights": [{"tensor": "a"}]}, "is damaged: KeyError('verdict')"),
        ({"gates": None}, "is damaged"),
    ],
)
def test_what_is_no_report(
    written: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    words: str,
) -> None:
    right, file = written("a", weights=[]), written("b", weights=[]) / "report.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert main(["report", str(right), str(file.parent)]) == 2
    assert words in capsys.readouterr().err


def test_like_is_laid_beside_like(
    written: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right = written("a", weights=[])
    assert main(["report", str(right)]) == 2
    assert "name another one to lay beside it" in capsys.readouterr().err
    assert main(["report", str(right), str(tmp_path)]) == 2
    assert "holds no report.json, as the others do" in capsys.readouterr().err
