"""Results as texts: the answer and a table for the terminal, CSV and JSON for everything else."""

import csv
import io
import json

from qwen_jax.experiments.report import answer, beside
from qwen_jax.experiments.report.results import Results
from qwen_jax.experiments.report.tables import NO_POINTS, cells, counted, of_settings
from qwen_jax.reporting.table import Table, filled


def terminal_text(results: Results) -> str:
    """The answer, the table in pieces that fit, a line on what failed, and how many points there
    are."""
    if not results.rows:
        return NO_POINTS
    lines = [] if _is_one(results) else [_answer(results), ""]
    for table in beside.tables(results, most=1):
        lines += [_blocks(table, len(results.swept_within)), ""]
    lines += _table(results).split("\n")
    lines += [
        f"failed: {row.label}: {row.end['kind']}: {row.end['reason']}"
        for row in results.rows
        if row.state == "failed"
    ]
    return "\n".join([*lines, counted(results)])


def _is_one(results: Results) -> bool:
    """Whether there is one point alone, which nothing can be compared with."""
    return len(results.rows) == 1


def _answer(results: Results) -> str:
    found = results.answer
    if found is None:
        return filled(answer.sentence(found))
    runs = len(results.names) > 1
    table = answer.table(found, runs=runs)
    given = 1 + runs + len(found.baseline.overrides)
    parts = (filled(answer.sentence(found)), table.fitted(given), filled(answer.explained(found)))
    return "\n\n".join(parts)


def _table(results: Results) -> str:
    """A line a setting where seeds come together in one, else a line a point."""
    runs = len(results.names) > 1
    if any(setting.seeds > 1 for setting in results.settings):
        return _blocks(of_settings(results), runs + len(results.settings[0].overrides))
    return _blocks(cells(results, results.rows), runs + len(results.swept))


def _blocks(table: Table, named: int) -> str:
    caption = filled(table.caption)
    return f"{table.blocks(named)}\n{caption}" if caption else table.blocks(named)


def csv_text(results: Results) -> str:
    """Every point with every override and metric, unrounded, and its setting's answer."""
    fields = list(dict.fromkeys(f for row in results.rows for f in row.overrides))
    metrics = list(dict.fromkeys(m for row in results.rows for m in row.metrics))
    end = ["seconds", "compile_seconds", "peak_bytes", "kind", "reason"]
    of_answer = [f"answer.{name}" for name in answer.FIELDS]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "point", "state", *fields, *metrics, *end, *of_answer])
    for row in results.rows:
        writer.writerow(
            [
                *(row.run, row.id, row.state),
                *(row.overrides.get(field) for field in fields),
                *(row.metrics.get(metric) for metric in metrics),
                *(row.end.get(name) for name in end),
                *answer.of_point(results.answer, row.id),
            ]
        )
    return out.getvalue()


def json_text(results: Results) -> str:
    """The answer, and every point with its overrides and metrics, as JSON."""
    record = {
        "title": results.title,
        "answer": answer.as_json(results.answer),
        "points": [
            {
                "run": row.run,
                "point": row.id,
                "state": row.state,
                "overrides": row.overrides,
                **{name: value for name, value in row.end.items() if name not in _OF_RECORDS},
            }
            for row in results.rows
        ],
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


_OF_RECORDS = ("event", "point", "outputs", "operations")
