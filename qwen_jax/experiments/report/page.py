"""`report.html`: one file that needs nothing else, readable a year later."""

import base64
import io
import json
import time
from typing import Any

import jinja2
from matplotlib.figure import Figure

from qwen_jax.experiments.report.plots import pictures
from qwen_jax.experiments.report.results import Results
from qwen_jax.experiments.report.tables import cells, terminal_table

_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2.5em auto;
  padding: 0 1.5em; }
h1 { font-size: 1.6em; line-height: 1.25; } h2 { font-size: 1.15em; margin-top: 2.2em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 12px 4px 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid #e5e5e5; }
th { font-weight: 600; border-bottom: 1px solid #888; }
td.text, th.text { text-align: left; white-space: normal; }
figure { margin: 1em 0 2em; } figure img { max-width: 100%; }
figcaption, .quiet { color: #666; font-size: 13px; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; font-size: 12.5px; }
.failed { color: #b00020; }
</style></head><body>
<h1>{{ title }}</h1>
<p class="quiet">{{ summary }} Written {{ now }}.</p>
{% macro table(rows, text=[]) %}<div class="scroll"><table>
<tr>{% for c in rows[0] %}<th{% if loop.index0 in text %} class="text"{% endif %}>{{ c }}</th>
{% endfor %}</tr>
{% for row in rows[1:] %}<tr>{% for c in row %}<td{% if loop.index0 in text %} class="text"
{% elif c == "failed" %} class="failed"{% endif %}>{{ c }}</td>{% endfor %}</tr>
{% endfor %}</table></div>{% endmacro %}
{% if failures %}<h2>Failed</h2>
{{ table([["point", "kind", "reason"]] + failures, [0, 1, 2]) }}{% endif %}
{% for picture in pictures %}<figure><img alt="{{ picture.caption }}"
src="data:image/svg+xml;base64,{{ picture.data }}">
<figcaption>{{ picture.caption }}</figcaption></figure>
{% endfor %}
<h2>Results</h2>
{{ table(results) }}
{% for label, rows in operations %}<h2>Slowest operations: {{ label }}</h2>
{{ table(rows, [0]) }}{% endfor %}
<h2>What was asked</h2>
{% for name, changed, source in configs %}<h3>{{ name }}</h3>
<p>Fields that are not the defaults, besides the sweep:</p><pre>{{ changed }}</pre>
<details><summary>The config file</summary><pre>{{ source }}</pre></details>{% endfor %}
<h2>On what it ran</h2>
{% for name, text, diff in environments %}<h3>{{ name }}</h3><pre>{{ text }}</pre>
{% if diff %}<details><summary>Uncommitted changes</summary><pre>{{ diff }}</pre></details>
{% endif %}{% endfor %}
</body></html>
"""


def html(results: Results) -> str:
    """The page. Needs matplotlib."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(_TEMPLATE).render(
        title=results.title,
        summary=terminal_table(results).splitlines()[-1],
        now=time.strftime("%Y-%m-%d %H:%M"),
        failures=[
            [row.label, row.end["kind"], row.end["reason"]]
            for row in results.rows
            if row.state == "failed"
        ],
        pictures=[
            {"caption": picture.caption, "data": _svg(picture.figure)}
            for picture in pictures(results)
        ],
        results=[cells(results, results.rows).header, *cells(results, results.rows).rows],
        operations=[
            (row.label, _operations(row.end["operations"]))
            for row in results.rows
            if row.end.get("operations")
        ],
        configs=[
            (
                f"{name} ({content.config['config_file']})",
                json.dumps(content.config["changed"], indent=1),
                content.source,
            )
            for name, content in zip(results.names, results.contents, strict=True)
        ],
        environments=[
            (name, json.dumps(_without_diff(found), indent=1), found.get("uncommitted"))
            for name, found in results.environments()
        ],
    )


def _without_diff(environment: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in environment.items() if name != "uncommitted"}


def _operations(found: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["operation", "ms", "share", "calls"]]
    for entry in found:
        name, share = entry["operation"], f"{entry['share']:.1%}"
        rows.append([name, f"{1e3 * entry['seconds']:.2f}", share, f"{entry['calls']:,}"])
    return rows


def _svg(figure: Figure) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return base64.b64encode(out.getvalue()).decode()
