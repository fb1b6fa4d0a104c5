"""Pictures of results: metrics against what was swept, and what it costs."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes

from qwen_jax.experiments.answers.answer import value_of
from qwen_jax.experiments.answers.settings import SEED, Setting
from qwen_jax.experiments.declaration import clipped, short
from qwen_jax.experiments.report.pareto import KLD, pareto
from qwen_jax.experiments.report.results import Results
from qwen_jax.experiments.report.scales import scale_metric, scale_values
from qwen_jax.experiments.report.tables import differing_metrics, number, shown
from qwen_jax.reporting.drawing import Drawing
from qwen_jax.reporting.page import Picture
from qwen_jax.reporting.style import literal, series

LABELS = {
    "kld": KLD,
    "kld_p99": "KL divergence, 99th percentile (nats)",
    "kld_max": "largest KL divergence (nats)",
    "same_top": "same likeliest token (share)",
    "haiku": "good haiku (share)",
    "tokens_per_s": "generation (tokens/s)",
    "prefill_tokens_per_s": "prefill (tokens/s)",
    "decode_tokens_per_s": "decoding (tokens/s)",
    "ms_per_step": "decode step (ms)",
    "joules_per_token": "energy (J/token)",
    "distinct_1": "different words (share)",
    "distinct_2": "different word pairs (share)",
    "different_texts": "different texts (share)",
    "good_per_s": "goodput (requests/s)",
    "good_share": "good requests (share)",
    "requests_per_s": "requests/s",
    "ttft_p50_ms": "time to first token, median (ms)",
    "ttft_p99_ms": "time to first token, 99th percentile (ms)",
    "tpot_p50_ms": "time per token, median (ms)",
    "tpot_p99_ms": "time per token, 99th percentile (ms)",
}
NOT_PLOTTED = (
    "weight_bytes",
    "device_bytes",
    "prompts",
    "scored_tokens",
    "windows",
    "prompt_tokens_per_s",
    "model_seconds",
    "number_given",
    "choice_given",
    *("ttft_p90_ms", "tpot_p90_ms", *(f"latency_p{q}_ms" for q in (50, 90, 99))),
)


LEAST = 3
"""Values of an axis that make a picture; two say no more than the table."""

_PANELS = 6


def pictures(results: Results) -> Iterator[Picture]:
    """All that the results can show; draw within `page.drawing`."""
    yield from _against_axes(results)
    if (front := pareto(results)) is not None:
        yield front


def _against_axes(results: Results) -> Iterator[Picture]:
    """One figure an axis, one panel a metric; other axes are lines."""
    swept = [field for field in results.swept_within if field != SEED]
    metrics = _metrics(results)
    done: set[str] = set()
    for axis in swept:
        if axis in done:
            continue
        together = [field for field in swept if _go_together(results, axis, field)]
        done |= set(together)
        others = [field for field in swept if field not in together]
        lines = _lines(results, axis, others)
        # Where lines meet the axis more than once, single points beside them show no trend.
        lines = {key: points for key, points in lines.items() if len(points) >= LEAST}
        drawn = [setting for line in lines.values() for setting in line.values()]
        present = _telling(drawn, metrics)[:_PANELS]
        if not present:
            continue
        columns = min(3, len(present))
        rows = -(-len(present) // columns)
        # Names go down the side, and want a line each.
        numeric = all(_is_number(value) for points in lines.values() for value in points)
        names = 0 if numeric else len({value for points in lines.values() for value in points})
        figure = Drawing(max(2.9, 0.22 * names + 1) * rows + 0.5, max(3.7 * columns, 5))
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, metric in zip(panels, present, strict=False):
            _draw(figure, panel, lines, axis, metric)
        for panel in panels[len(present) :]:
            panel.set_visible(False)
        if len(lines) > 1:
            handles, labels = panels[0].get_legend_handles_labels()
            # A legend of 10 point letters: some 12 of them an inch, and a line before each.
            fitting = int(12 * figure.get_figwidth() / (max(map(len, labels)) + 7))
            fitting = max(1, min(fitting, len(lines)))
            figure.legend(handles, labels, loc="outside lower center", ncols=fitting)
        with_it = [short(field) for field in together if field != axis]
        said = f", and {', '.join(with_it)} with it" if with_it else ""
        yield Picture(f"By {short(axis)}{said}", "Bars are standard errors.", figure)


def _go_together(results: Results, axis: str, other: str) -> bool:
    """Whether each value of one axis stands with one of the other alone, as in a zipped sweep."""
    of = [(s.overrides.get(axis), s.overrides.get(other)) for s in results.settings]
    return len(set(of)) == len({one for one, _ in of}) == len({one for _, one in of})


def _metrics(results: Results) -> list[str]:
    """Those that differ by more than rounding; the one that the answer is about is first."""
    names = [name for name in differing_metrics(results) if name not in NOT_PLOTTED]
    return [name for name in names if not _is_rounding(_means(results.settings, name))]


def _telling(settings: Sequence[Setting], metrics: Sequence[str]) -> list[str]:
    """Metrics that differ between settings, each unless an earlier one says the same."""
    found: dict[tuple[float | None, ...], str] = {}
    for name in metrics:
        if len(_means(settings, name)) > 1:
            values = [value_of(setting, name) for setting in settings]
            found.setdefault(tuple(v.mean.value if v else None for v in values), name)
    return list(found.values())


def _means(settings: Sequence[Setting], metric: str) -> set[float]:
    values = (value_of(setting, metric) for setting in settings)
    return {value.mean.value for value in values if value is not None}


def _is_rounding(values: set[float]) -> bool:
    return not values or max(values) - min(values) <= 1e-9 * max(map(abs, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


Lines = dict[tuple[str, ...], dict[Any, Setting]]


def _lines(results: Results, axis: str, others: Sequence[str]) -> Lines:
    """Settings by line (run and other axes) and by value of the axis."""
    lines: Lines = {}
    for setting in results.settings:
        key = [setting.run] if len(results.names) > 1 else []
        key += [f"{short(o)} {shown(setting.overrides.get(o))}" for o in others]
        lines.setdefault(tuple(key), {})[setting.overrides.get(axis)] = setting
    return lines


def _draw(figure: Drawing, panel: Axes, lines: Lines, axis: str, metric: str) -> None:
    """Numbers go along the bottom; names down the side, where they can be read."""
    values = list(dict.fromkeys(value for points in lines.values() for value in points))
    numeric = all(map(_is_number, values))
    seen = [
        value.mean.value
        for setting in itertools.chain.from_iterable(points.values() for points in lines.values())
        if (value := value_of(setting, metric)) is not None
    ]
    least, most = (
        (0.0 if min(seen) >= 0 else None),
        (1.0 if 0 <= min(seen) <= max(seen) <= 1 else None),
    )
    for index, (key, points) in enumerate(lines.items()):
        there = [
            (at, *found)
            for at, setting in points.items()
            if (found := _mean(setting, metric)) is not None
        ]
        if not there:
            continue
        if numeric:
            there.sort(key=lambda point: point[0])
        at = [value if numeric else values.index(value) for value, _, _ in there]
        means, errors = [mean for _, mean, _ in there], [error for _, _, error in there]
        bars = [
            [m - max(m - e, m - e if least is None else least) for _, m, e in there],
            [min(m + e, m + e if most is None else most) - m for _, m, e in there],
        ]
        look = series(index)
        if not numeric:  # Between names there is nothing for a line to pass through.
            look["linestyle"] = "none"
        # Lines that coincide are both seen: the later is the thinner, and lies on top.
        wider = max(0, min(len(lines), 4) - 1 - index)
        panel.errorbar(
            at if numeric else means,
            means if numeric else at,
            yerr=bars if numeric and any(errors) else None,
            xerr=bars if not numeric and any(errors) else None,
            markersize=5 + 2 * wider,
            linewidth=1.5 + 1.5 * wider,
            elinewidth=1.2,
            capsize=3,
            label=literal(", ".join(map(clipped, key))),
            **look,  # type: ignore[arg-type]
        )
        for where, (value, mean, error) in zip(at, there, strict=True):
            x, y = (where, mean) if numeric else (mean, where)
            of = ", ".join([*map(clipped, key), f"{short(axis)} {clipped(shown(value))}"])
            figure.point(panel, x, y, f"{of}: {metric} {number(mean, error)}")
    panel.grid(True)
    panel.set_title(LABELS.get(metric, metric.replace("_", " ")), loc="left", fontsize=10)
    if numeric:
        panel.set_xlabel(short(axis).replace("_", " "))
        scale_values(panel, values)
    else:
        panel.set_yticks(range(len(values)), [literal(clipped(shown(value))) for value in values])
        panel.set_ylim(len(values) - 0.5, -0.5)
    scale_metric(panel, seen, "y" if numeric else "x")


def _mean(setting: Setting, metric: str) -> tuple[float, float] | None:
    """The mean, and its standard error or, of one value alone, the metric's own."""
    value = value_of(setting, metric)
    if value is None:
        return None
    if value.mean.error is not None:
        return value.mean.value, value.mean.error
    return value.mean.value, setting.points[0].metrics.get(f"{metric}_error", 0.0)
