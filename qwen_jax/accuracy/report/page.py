"""report.html: one file with its pictures inside, from page.html."""

import base64
import importlib.util
import io
from collections.abc import Iterator
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

import jinja2

from qwen_jax.accuracy.report import tables
from qwen_jax.accuracy.report.contents import Report
from qwen_jax.reporting.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Picture(NamedTuple):
    """A picture as SVG in a data URI, with its heading and what to look for in it."""

    title: str
    caption: str
    source: str


def can_be_made() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def to_html(report: Report) -> str:
    """The page; `can_be_made` first."""
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["Table"] = Table
    return environment.from_string(template).render(
        report=report,
        tables=tables,
        layers=tables.layers_of(report),
        pictures=list(pictures(report)),
    )


def pictures(report: Report) -> Iterator[Picture]:
    """Those that the report has data for, in the order of the page."""
    from qwen_jax.accuracy.report import heat_maps, pictures
    from qwen_jax.reporting.style import styled

    with styled():
        if report.findings:
            yield _picture(
                "Calibration: own error against its bound",
                "Each operation again in float64 from the candidate's own inputs; a dot a layer, "
                "the first one highest. Left of the line rounding explains the error. None at all "
                "and infinite ones stand at the ends.",
                pictures.calibration(report.findings),
            )
        if comparison := report.comparison:
            yield _picture(
                "Error by operation",
                "Distance from the reference, with what was inherited; a dot a layer, the first "
                "one highest.",
                pictures.error_by_operation(comparison),
            )
            if drawn := pictures.error_by_layer(comparison):
                yield _picture("Error by layer", "How the distance grows along the stream.", drawn)
            scale = "The scale starts at a quarter of the dtype's unit roundoff: pale is rounding."
            if drawn := heat_maps.by_head(comparison):
                yield _picture("Error by head", f"RMS over all positions. {scale}", drawn)
            yield _picture(
                "Error by position",
                f"The worst layer of each operation. {scale} A dashed line stands where a call of "
                "several tokens ended.",
                heat_maps.by_position(comparison),
            )
        if report.distribution:
            yield _picture(
                "KL divergence, token by token",
                f"Of {report.distribution.candidate} from {report.distribution.base}.",
                pictures.kld_histogram(report.distribution),
            )
        if report.precision and (drawn := pictures.precision_steps(report.precision)):
            yield _picture(
                "Precision search",
                "From the top: what the search kept in float32 step by step, and what that gave.",
                drawn,
            )


def _picture(title: str, caption: str, drawn: "Figure") -> Picture:
    buffer = io.BytesIO()
    # Without a date the same report gives the same file.
    drawn.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(title, caption, f"data:image/svg+xml;base64,{encoded}")
