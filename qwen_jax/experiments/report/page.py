"""`report.html` of experiments: what came out, what was asked, and on what it ran."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from qwen_jax.experiments.report import answer, beside, texts
from qwen_jax.experiments.report.results import Results
from qwen_jax.experiments.report.tables import cells, counted, of_settings
from qwen_jax.reporting import page
from qwen_jax.reporting.page import Block, Folded, Page, Section, Source, Texts
from qwen_jax.reporting.table import Table


def to_html(results: Results, stem: str) -> dict[str, str]:
    """The page, and more with texts where they are many, by file name; needs matplotlib.

    Args:
        stem: of their names.
    """
    found = texts.answers(results, stem)
    pages = found.pages if found else ()
    with page.drawing():
        made = {f"{stem}.html": page.html(contents(results, pages[:1]))}
    for number, block in enumerate(pages[1:], start=2):
        rest = Page(results.title, _verdict(results), "open", [], [Section("Texts", [block])])
        made[f"{stem}-{number}.html"] = page.html(rest)
    return made


def contents(results: Results, answers: Sequence[Texts] = ()) -> Page:
    """What is on it. Make it, and whatever is made of it, within `page.drawing`."""
    states = {row.state for row in results.rows}
    state = "bad" if "failed" in states else "good" if states <= {"ok", "skipped"} else "open"
    sections = list(_sections(results, answers))
    return Page(results.title, _verdict(results), state, _facts(results), sections)


def _verdict(results: Results) -> str:
    ended = counted(results)
    if len(results.rows) < 2:
        return ended
    return f"{answer.sentence(results.answer)}\n{ended}"


def _facts(results: Results) -> list[tuple[str, str]]:
    """Of all experiments together; what differs is told of each below."""
    found: dict[str, dict[str, None]] = {}
    for content in results.contents:
        rows = [("config", content.config["config_file"])]
        rows.append(("model", str(content.config["config"].get("model"))))
        for event in content.events:
            if event["event"] == "session":
                rows += [(name, event[name]) for name in ("command", "time") if name in event]
        for name, value in rows:
            found.setdefault(name, {})[value] = None
    for _, environment in results.environments():
        named = {"versions": "packages", "commit": "commit", "device": "device"}
        for name, field in named.items():
            if value := environment.get(field):
                found.setdefault(name, {})[_line(value)] = None
    dates = list(found.pop("time", {}))
    facts = [(name, "\n".join(values)) for name, values in found.items()]
    return [*facts, *([("date", dates[-1])] if dates else [])]


def _sections(results: Results, answers: Sequence[Texts]) -> Iterator[Section]:
    failures = [
        (row.label, row.end["kind"], row.end["reason"])
        for row in results.rows
        if row.state == "failed"
    ]
    if results.answer is not None:
        runs = len(results.names) > 1
        table = answer.table(results.answer, runs=runs)
        explained = answer.explained(results.answer)
        yield Section("Answer", [table, explained, *_forest(results)])
    if together := list(beside.tables(results, most=1)):
        whole = Folded("All metrics", list(beside.tables(results)))
        yield Section("Side by side", [*together, whole])
    if failures:
        yield Section("Failed", [Table(("point", "kind", "reason"), failures)], bad=True)
    points = cells(results, results.rows)
    if any(setting.seeds > 1 for setting in results.settings):
        each = Folded(f"Each of {len(points.rows)} points", [points])
        yield Section("Results", [of_settings(results), each])
    else:
        yield Section("Results", [points])
    if drawn := list(_pictures(results)):
        yield Section("Pictures", drawn)
    if answers:
        yield Section("Texts", answers)
    slowest: list[Block] = [
        _operations(row.label, row.end["operations"])
        for row in results.rows
        if row.end.get("operations")
    ]
    if slowest:
        yield Section("Slowest operations", slowest)
    yield Section("What was asked", [block for one in _asked(results) for block in one])
    yield Section("On what it ran", list(_ran_on(results)))


def _forest(results: Results) -> Iterator[Block]:
    from qwen_jax.experiments.report.forest import forest

    if results.answer is not None and (picture := forest(results.answer)) is not None:
        yield picture


def _pictures(results: Results) -> Iterator[Block]:
    from qwen_jax.experiments.report.plots import pictures

    yield from pictures(results)


def _asked(results: Results) -> Iterator[list[Block]]:
    for name, content in zip(results.names, results.contents, strict=True):
        changed = [(field, _line(value)) for field, value in content.config["changed"].items()]
        caption = f"{name}: fields that are not the defaults, besides the sweep"
        if not changed:
            caption = f"{name}: the defaults, besides the sweep"
        file = f"The config file, {content.config['config_file']}"
        yield [
            Table(("field", "value"), changed, caption=caption),
            Folded(file, [Source(content.source)]),
        ]


def _ran_on(results: Results) -> Iterator[Block]:
    """A column for each environment; where there are several, what differs stands above."""
    found = [(name, dict(held)) for name, held in results.environments()]
    changes = [(name, held.pop("uncommitted", None)) for name, held in found]
    rows: dict[str, list[str]] = {}
    for field in dict.fromkeys(field for _, held in found for field in held):
        rows[field] = [_line(held[field]) if field in held else "-" for _, held in found]
    same = [(field, values[0]) for field, values in rows.items() if len(set(values)) == 1]
    differs = [(field, *values) for field, values in rows.items() if len(set(values)) > 1]
    if differs:
        numbered = [f"{name}, {i}" for i, (name, _) in enumerate(found, start=1)]
        caption = f"What differs between {len(found)} environments"
        yield Table(("field", *numbered), differs, caption=caption)
        yield Folded("What is the same in all of them", [Table((), same)])
    elif same:
        yield Table((), same)
    for diff in dict.fromkeys(diff for _, diff in changes if diff):
        yield Folded("Uncommitted changes", [Source(diff)])


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_line(held)}" for name, held in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _operations(label: str, found: list[dict[str, Any]]) -> Table:
    rows = [
        (
            entry["operation"],
            f"{1e3 * entry['seconds']:.2f}",
            f"{entry['share']:.1%}",
            f"{entry['calls']:,}",
        )
        for entry in found
    ]
    return Table(("operation", "ms", "share", "of XLA's"), rows, (1, 2, 3), label)
