"""Tables, pictures and pages of results."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.experiments.report import pareto, plots, scales, tables
from qwen_jax.experiments.report.results import Results
from qwen_jax.experiments.task import Work
from qwen_jax.reporting.table import WIDTH
from tests.experiments.conftest import lines
from tests.experiments.fake import Count
from tests.reporting.opened import Opened

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure


def test_csv_and_page_hold_every_point(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    sweep = 'product(axis("sampling.seed", [1, 2, 3]), axis("max_tokens", [6, 7, 4]))'
    result = run(*experiment(sweep, 'config.system = "</pre><script>"'))
    assert result.code == 1
    w = tmp_path / "w"
    with (w / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and sum(row["state"] == "failed" for row in rows) == 3
    assert {float(r["total"]) for r in rows if r["total"]} == {1266.0, 2466.0, 3666.0}
    text = (w / "report.html").read_text("utf-8")
    page = Opened(text)
    assert page.pictures == ["Differences"] and page.values[0] and page.addresses == []
    assert page.links and page.unresolved == [] and page.repeated == []
    assert page.full["2466.0"] == "2,466"
    assert page.banner == (
        "On total both settings have the same mean, 2,466 ± 693.\n6 finished, 3 failed."
    )
    assert page.state == "bad"
    assert page.headers[0] == [
        "#",
        "max_tokens",
        "total",
        "n",
        "difference",
        "interval",
        "p",
        "verdict",
    ]
    for words in ("What this is about.", "ZeroDivisionError: by accident", "run.py experiment"):
        assert words in page.text
    assert "<script>" not in text  # What users write is text and nothing else.
    # The terminal's table fits.
    assert max(map(len, result.out.splitlines()[:11])) <= WIDTH
    answer = json.loads((w / "results.json").read_text())["answer"]
    assert result.out.startswith(answer["sentence"]) and answer["sentence"] in page.banner
    assert [setting["mean"] for setting in answer["settings"]] == [2466, 2466]
    found = {row["answer.mean"] for row in rows if row["state"] == "ok"}
    assert found == {"2466.0"} and {row["answer.rank"] for row in rows} == {"1", "2", ""}


def test_side_by_side(experiment: Callable[..., list[str]], run: Callable, tmp_path: Path) -> None:
    run(*experiment(workdir="a"))
    run(*experiment(workdir="b"), "--max_tokens=9")
    result = run("report", str(tmp_path / "a"), str(tmp_path / "b"))
    assert result.code == 0 and "16 finished." in result.out
    headers = [line.split() for line in result.out.splitlines()]
    # What differs between the two is a column, as if it had been swept.
    assert ["run", "max_tokens", "dtype", "seeds", "total"] in headers
    with (tmp_path / "a+b.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["run"], row["max_tokens"]) for row in rows} == {("a", "256"), ("b", "9")}
    assert (tmp_path / "a+b.html").exists()
    # An older one goes, but not in silence.
    (tmp_path / "a+b.csv").write_text("old")
    again = run("report", str(tmp_path / "a"), str(tmp_path / "b"))
    assert f"{tmp_path / 'a+b.csv'} is replaced by a newer one\n" in again.err
    assert "a+b.html is" not in again.err


def test_of_different_experiments(
    experiment: Callable[..., list[str]],
    run: Callable,
    refuses: Callable[..., None],
    tmp_path: Path,
) -> None:
    """Those that measure nothing in common are refused; else each is drawn where it has values."""
    for name, measured in (("a", ("x", "y")), ("b", ("z",)), ("c", ("y", "w"))):
        run(*experiment('axis("max_tokens", [6, 7])', workdir=name))
        metrics = tmp_path / name / "metrics.jsonl"
        events = lines(metrics)
        for event in events:
            if event["event"] == "finished":
                event["metrics"] = {
                    metric: float(len(event["point"]) + len(name)) for metric in measured
                }
        metrics.write_text("".join(json.dumps(event) + "\n" for event in events))
    a, b, c = (str(tmp_path / name) for name in "abc")
    refuses(["report", a, b], "nothing in common (a has x, y; b has z); report each by itself.")
    assert not (tmp_path / "a+b.csv").exists()
    refuses(["report", a, b, f"--workdir={tmp_path / 'out'}"], "nothing in common")
    refuses(["report", str(tmp_path), f"--workdir={tmp_path / 'out'}"], "holds no experiment")
    assert not (tmp_path / "out").exists()  # What fails leaves nothing behind.
    assert run("report", a, c).code == 0 and (tmp_path / "a+c.html").exists()


def test_error_bars_are_standard_errors_over_seeds(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    sweep = 'product(axis("sampling.seed", [1, 3]), axis("max_tokens", [6, 7, 8]))'
    run(*experiment(sweep), "--config.experiment.task=tests.experiments.test_report:Odd")
    results = Results.read([tmp_path / "w"])
    pictures = list(plots.pictures(results))
    assert [picture.title for picture in pictures] == ["By max_tokens"]
    (panel,) = (axes for axes in pictures[0].figure.axes if axes.get_visible())
    (container,) = panel.containers
    line, _, (bars,) = container.lines
    # 1 and 3 times the number of tokens: the standard error is half of their distance.
    assert list(line.get_ydata()) == [12, 14, 16]
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(6)


class Odd(Count):
    """Its only metric is the seed times the tokens."""

    def run(self, work: Work) -> dict[str, float]:
        return {"product": float(self.config.sampling.seed * self.config.max_tokens)}


def test_points_without_a_cost_are_not_on_its_front(
    experiment: Callable[..., list[str]],
    run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def metrics(task: Count, work: Work) -> dict[str, float]:
        seed = task.config.sampling.seed
        timed = {"tokens_per_s": 100.0 * seed} if seed else {}  # the first one compiles
        return {"kld": 1 / (1 + seed), "weight_bytes": 1e6, **timed}

    monkeypatch.setattr(Count, "run", metrics)
    assert run(*experiment('axis("sampling.seed", range(4))')).code == 0
    *_, picture = plots.pictures(Results.read([tmp_path / "w"]))
    (panel,) = picture.figure.axes
    front, *points = panel.get_lines()
    assert picture.title == "What it costs to be near" and len(points) == 3
    assert list(front.get_xdata()) == [300]  # the fastest is the nearest, too


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([-4e-11, 2.8e-7, 8.2], "symlog"),  # what is less than 0 is rounding
        ([0.0, 1e-6, 2.0], "symlog"),
        ([1e-6, 1e-3, 2.0], "log"),
        ([-3.0, 0.5, 400.0], "linear"),
        ([0.0, 0.0, 0.0], "linear"),
        ([5.0, 6.0, 7.0], "linear"),
    ],
)
def test_scales(values: list[float], scale: str) -> None:
    panel = Figure().subplots()
    panel.plot(range(3), values)
    scales.scale_metric(panel, values, "y")
    low, high = panel.get_ylim()
    assert panel.get_yscale() == scale and low <= min(values) and max(values) <= high


def test_a_share_has_no_bar_beyond_1(
    experiment: Callable[..., list[str]],
    run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def metrics(task: Count, work: Work) -> dict[str, float]:
        return {"share": 1.0 - 0.4 * (task.config.max_tokens == 8) * task.config.sampling.seed}

    monkeypatch.setattr(Count, "run", metrics)
    run(*experiment('product(axis("sampling.seed", [0, 1]), axis("max_tokens", [6, 7, 8]))'))
    *_, picture = plots.pictures(Results.read([tmp_path / "w"]))
    (panel,) = (axes for axes in picture.figure.axes if axes.get_visible())
    ((line, _, (bars,)),) = (container.lines for container in panel.containers)
    assert list(line.get_ydata()) == [1, 1, 0.8]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()][2] == pytest.approx([0.6, 1])


def test_axes_that_go_together_are_one(
    experiment: Callable[..., list[str]],
    run: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And of metrics that say the same, one has a panel."""

    def metrics(task: Count, work: Work) -> dict[str, float]:
        slots = float(task.config.slots)
        return {"speed": 100 * slots, "again": 100 * slots, "wait": slots**2}

    monkeypatch.setattr(Count, "run", metrics)
    run(*experiment('zipped(axis("slots", [1, 2, 4]), axis("n", [4, 3, 2]))'))
    (picture,) = plots.pictures(Results.read([tmp_path / "w"]))
    assert picture.title == "By slots, and n with it"
    panels = [axes for axes in picture.figure.axes if axes.get_visible()]
    assert [panel.get_title(loc="left") for panel in panels] == ["speed", "wait"]


def test_ticks_are_plain_numbers() -> None:
    ticks = [200.0, 400.0, 600.0, 1000.0]
    assert [scales.plain(x, ticks) for x in ticks] == ["200", "400", "600", "1000"]
    ticks = [0.0, 2.5, 5.0, 7.5, 10.0, 12.5, 15.0, 17.5]
    assert [scales.plain(x, ticks) for x in ticks[4:]] == ["10", "12.5", "15", "17.5"]
    assert scales.plain(0.1 + 0.2, [0, 0.1, 0.2, 0.3]) == "0.3"


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e3))
def test_ticks_are_told_apart(low: float, step: float) -> None:
    ticks = [low + i * step for i in range(5)]
    assert len({scales.plain(tick, ticks) for tick in ticks}) == 5


POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


@given(POINTS, st.booleans())
def test_the_pareto_front_is_what_nothing_beats(points: list[tuple[int, int]], more: bool) -> None:
    sign = -1 if more else 1

    def beaten(p: tuple[int, int]) -> bool:
        return any(sign * q[0] <= sign * p[0] and q[1] <= p[1] and q != p for q in points)

    expected = sorted({p for p in points if not beaten(p)})
    assert pareto.front([(x, y, "") for x, y in points], more) == expected


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.97512, 0.0251, "0.975 ± 0.025"),
        (451.2, 44.3, "451 ± 44"),
        (1.6e-11, 3e-10, "1.6e-11 ± 3e-10"),
        (21.0, None, "21"),
        (12345.6, None, "12,346"),
        (0.00123456, None, "0.001235"),
    ],
)
def test_numbers(value: float, error: float | None, text: str) -> None:
    assert tables.number(value, error) == text


def test_csv_quotes_what_it_must(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    run(*experiment("axis(\"prompt\", ['a,b', 'say \"x\"\\nand y'])"))
    text = (tmp_path / "w" / "results.csv").read_text()
    assert [row["prompt"] for row in csv.DictReader(io.StringIO(text))] == [
        "a,b",
        'say "x"\nand y',
    ]


def test_long_texts_fit_and_stay_apart(
    experiment: Callable[..., list[str]], run: Callable, tmp_path: Path
) -> None:
    """Prompts that differ in their middle alone: one look, two lines, and no bars of seeds."""
    prompts = ["a\n" + "x" * 60 + middle + "y" * 60 for middle in "mn"]
    sweep = f'product(axis("prompt", {prompts!r}), axis("max_tokens", [6, 7]))'
    argv = experiment(sweep)
    listed = run(*argv, "--dry_run").out.splitlines()
    table = run(*argv).out.splitlines()[:-1]
    assert all(len(line) <= WIDTH for line in (*listed, *table))
    assert sum(line.lstrip().startswith("a\\nx") for line in table) == 4
    lines = plots._lines(Results.read([tmp_path / "w"]), "max_tokens", ["prompt"])
    assert [len(points) for points in lines.values()] == [2, 2]


def test_a_shard_without_points(experiment: Callable[..., list[str]], run: Callable) -> None:
    result = run(*experiment('axis("n", [1, 2])'), "--shard=1/9")
    assert result.code == 0 and result.out.startswith("No points.")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "config.json: it is [], but it must be a JSON object"),
        ("{", "config.json: it is not JSON"),
        ('{"format": 99}', "has a format"),
        ('{"format": 1}', "it has no 'config_file'; restore the file"),
    ],
)
def test_damaged_configs(
    refuses: Callable[..., None], tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    refuses(["report", str(tmp_path)], words)
    refuses(["report", str(tmp_path / "config.json")], "is no directory")


def test_what_a_page_can_do_without(
    experiment: Callable[..., list[str]], run: Callable, refuses: Callable, tmp_path: Path
) -> None:
    run(*experiment())
    w = tmp_path / "w"
    for text in ("def (", None):
        (w / "config.py").unlink() if text is None else (w / "config.py").write_text(text)
        assert run("report", str(w)).code == 0
        assert f"<title>{tmp_path / 'config.py'}</title>" in (w / "report.html").read_text()
    refuses(["report", str(w), str(w)], "is named twice")
    (environment,) = (w / "environments").iterdir()
    environment.write_text("{")
    result = run("report", str(w))
    assert result.code == 2 and f"{environment.name}: it is not JSON" in result.err
