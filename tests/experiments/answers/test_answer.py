"""From records to an answer: which settings, on which metric, against what."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from qwen_jax.errors import UserError
from qwen_jax.experiments.answers import chosen
from qwen_jax.experiments.answers.chosen import Asked
from qwen_jax.experiments.report.results import Results
from qwen_jax.experiments.task import Work
from tests.experiments.conftest import lines
from tests.experiments.fake import Count

UNITS = 60
SWEEP = 'product(axis("max_tokens", [6, 7, 8]), axis("sampling.seed", [0, 1]))'


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the fake task score units of a kind: 7 is as good as 6, and 8 worse, on what is hard
    for all alike."""

    def judged(of: str) -> None:
        def metrics(task: Count, work: Work) -> dict[str, float]:
            tokens, seed = task.config.max_tokens, task.config.sampling.seed
            hard = np.random.default_rng(0).normal(size=UNITS)
            own = np.random.default_rng([tokens, seed]).normal(size=UNITS)
            values = (3 * hard + own + 3 * (tokens == 8) < 2).astype(float)
            for unit, value in enumerate(values):
                work.score(of, unit, f"u{unit}", {"right": float(value)})
            return {"right": float(values.mean()), "tokens_per_s": 100.0 + tokens}

        monkeypatch.setattr(Count, "run", metrics)

    return judged


def test_the_answer_of_an_experiment(
    judged: Callable, experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    judged("prompt")
    result = run(*experiment(SWEEP))
    assert result.code == 0
    found = Results.read([tmp_path / "w"]).answer
    assert found is not None and (found.metric, found.lower, found.of) == ("right", False, "prompt")
    assert found.comparisons == 3 and not found.given
    *first, last = found.entries
    assert last.verdict == "worse" and last.setting.overrides == {"max_tokens": 8}
    assert {entry.verdict for entry in first} == {"baseline", "not told apart"}
    assert (last.units, last.seeds) == (UNITS, 2)
    # The same from scores.jsonl, by hand: a unit's mean over seeds, one pair a unit.
    values: dict[int, dict[str, list[float]]] = {}
    tokens = {
        p["id"]: p["overrides"]["max_tokens"]
        for p in json.loads((tmp_path / "w" / "config.json").read_text())["points"]
    }
    for line in lines(tmp_path / "w" / "scores.jsonl"):
        units = values.setdefault(tokens[line["point"]], {})
        units.setdefault(line["id"], []).append(line["scores"]["right"])
    best = found.baseline.overrides["max_tokens"]
    differences = [np.mean(values[8][u]) - np.mean(values[best][u]) for u in values[8]]
    assert last.difference == pytest.approx(np.mean(differences))
    assert last.error == pytest.approx(stats.sem([np.mean(values[8][u]) for u in values[8]]))
    assert last.low is not None and last.high is not None
    assert last.low < np.mean(differences) < last.high < 0
    text = result.out
    assert text.startswith(f"On right max_tokens={best} has the best mean, ")
    assert "1 worse (max_tokens=8)" in text.replace("\n", " ")
    assert "paired by prompt" in text


def test_a_named_baseline(
    judged: Callable, experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    """It stands in the config, where it changes no point's id, or is given by a flag."""
    judged("prompt")
    run(*experiment(SWEEP))
    before = (tmp_path / "w" / "config.json").read_bytes()
    argv = experiment(SWEEP, 'config.answer.baseline = "max_tokens=8"')
    assert run(*argv).code == 0
    assert (tmp_path / "w" / "config.json").read_bytes() == before
    with (tmp_path / "w" / "results.csv").open() as file:
        rows = {row["max_tokens"]: row for row in csv.DictReader(file)}
    assert [rows[n]["answer.verdict"] for n in "678"] == ["better", "better", "baseline"]
    found = json.loads((tmp_path / "w" / "results.json").read_text())["answer"]
    assert found["comparisons"] == 2 and found["baseline"]["max_tokens"] == 8
    # The flag wins over what the session asked.
    result = run("report", str(tmp_path / "w"), "--baseline=max_tokens=6")
    assert "On right max_tokens=6 is" in result.out
    result = run("report", str(tmp_path / "w"), "--metric=right", "--better=lower")
    assert "lower is better" in result.out and result.out.split("\n1  ")[1].startswith("         8")


def test_pairs_see_what_an_unpaired_test_does_not(
    judged: Callable, experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    found = {}
    for of in ("prompt", "repeat"):
        judged(of)
        run(*experiment('axis("max_tokens", [6, 8])', workdir=of))
        answer = Results.read([tmp_path / of]).answer
        assert answer is not None
        found[of] = answer.entries[1]
    assert (found["prompt"].test, found["repeat"].test) == ("McNemar, exact", "Welch")
    paired, unpaired = found["prompt"].p, found["repeat"].p
    assert paired is not None and unpaired is not None and 10 * paired < unpaired


def test_what_is_known_of_points_alone_is_compared_seed_by_seed(
    judged: Callable, experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    judged("prompt")
    run(*experiment(SWEEP), "--metric=tokens_per_s")
    found = Results.read([tmp_path / "w"]).answer
    assert found is not None and found.of == "seed"
    # 108 twice against 107 twice: two equal signs, and no spread to judge them by.
    assert [entry.p for entry in found.entries[1:]] == [1, 1]


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--metric=rihgt", "--metric=rihgt is no metric of these points; did you mean right?"),
        ("--baseline=max_tokens=9", "'max_tokens=9' is none of the settings. There are max_tokens"),
        ("--baseline=max_tokens", "must say what it sets, as in temperature=0"),
        ("--better=more", "answer.better is 'more', but it must be one of auto, higher, lower"),
    ],
)
def test_what_is_not_there(
    judged: Callable,
    experiment: Callable[..., list[str]],
    run: Callable,
    refuses: Callable[..., None],
    tmp_path: Path,
    flag: str,
    words: str,
) -> None:
    judged("prompt")
    run(*experiment('axis("max_tokens", [6, 7])'))
    refuses(["report", str(tmp_path / "w"), flag], words)


def test_points_without_a_score_have_no_answer(
    experiment: Callable[..., list[str]], run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Count, "run", lambda task, work: {"tokens_per_answer": 3.0})
    out = run(*experiment('axis("max_tokens", [6, 7])')).out
    assert out.startswith("No answer: there are no two settings with a score")


def test_where_all_has_failed_the_report_says_so(
    experiment: Callable[..., list[str]], run: Callable
) -> None:
    result = run(*experiment('axis("max_tokens", [2, 3])', 'config.answer.metric = "right"'))
    assert result.code == 1 and result.out.startswith("No answer: ")
    assert "failed: max_tokens=2: out of memory" in result.out


def test_damaged_scores_are_told_of(
    judged: Callable, experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    judged("prompt")
    argv = experiment('axis("max_tokens", [6, 7])')
    run(*argv)
    path = tmp_path / "w" / "scores.jsonl"
    whole = path.read_text()
    path.write_text(whole.replace('"right": 1.0', '"right": "x"', 1))
    assert "scores.jsonl, line" in run("report", str(tmp_path / "w")).err
    # What a killed process left of a line is cut off, and a later line on a unit counts.
    last = whole.splitlines()[-1]
    path.write_text(whole + last.replace('"right": 0.0', '"right": 1.0') + "\n" + last[:20])
    result = Results.read([tmp_path / "w"])
    units = result.settings[-1].points[0].scored.values["right"]
    assert len(units) == UNITS and units['"u59"'] == 1.0


def test_differences_of_many_sizes_all_have_room(
    experiment: Callable[..., list[str]],
    run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = pytest.importorskip("qwen_jax.experiments.report.forest")

    def metrics(task: Count, work: Work) -> dict[str, float]:
        size = {6: 0.0, 7: 1e-6, 8: 1.0}[task.config.max_tokens]
        noise = 1 + 0.1 * np.random.default_rng(0).normal(size=20)
        for unit, value in enumerate(size * noise):
            work.score("prompt", unit, unit, {"kld": float(value)})
        return {"kld": float(size * noise.mean())}

    monkeypatch.setattr(Count, "run", metrics)
    run(*experiment('axis("max_tokens", [6, 7, 8])'))
    found = Results.read([tmp_path / "w"]).answer
    assert found is not None
    (panel,) = drawn.forest(found).figure.axes
    at = panel.transData.transform([(e.difference or 0.0, 0) for e in found.entries])[:, 0]
    assert panel.get_xscale() == "symlog" and np.diff(at).min() > 30
    assert {entry.verdict for entry in found.entries[1:]} == {"worse"}


def test_which_end_is_better() -> None:
    for name, lower in (
        ("kld", True),
        ("haiku", False),
        ("lambada.perplexity", True),
        ("arc_easy.acc", False),
        ("gsm8k.exact_match.strict", False),
    ):
        assert chosen.lower_is_better(Asked(), name) == lower
    assert chosen.metric(Asked(), ["has_word", "haiku", "prompts"], ["haiku"]) == "haiku"
    assert chosen.metric(Asked(metric="perplexity"), ["perplexity", "nll"], []) == "nll"
    assert chosen.metric(Asked(), ["tokens_per_answer", "tokens_per_s"], []) == "tokens_per_s"
    with pytest.raises(UserError, match="there are kld"):
        chosen.metric(Asked(metric="zzz"), ["kld"], [])
