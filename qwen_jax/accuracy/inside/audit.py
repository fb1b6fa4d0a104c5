"""The part `inside` of a comparison: steps of several numbers of rows, each recorded and judged."""

from collections.abc import Sequence

from pallas_kernels.decode_step import MOST_ROWS
from pallas_kernels.implementation import device_refusal
from qwen_jax.accuracy.inside.judging import InsideFinding, Progress, judge
from qwen_jax.accuracy.inside.recording import record_step, why_not
from qwen_jax.accuracy.traces.recording import bounds
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.weights import PackedWeights
from qwen_jax.errors import UserError
from qwen_jax.reporting.table import Table, number

LONG = 300
"""Tokens of the first row's text: from 257 on several blocks share a context."""


def texts_of(tokens: Sequence[int], rows: int, context: int) -> list[list[int]]:
    """A text for each row: the tokens over and over from another one on, of other lengths each."""

    def text(row: int) -> list[int]:
        length = LONG if row == 0 else 1 + (len(tokens) + 7 * row) % max(len(tokens), 64)
        return [tokens[(row + i) % len(tokens)] for i in range(min(length, context))]

    return [text(row) for row in range(rows)]


def audit_inside(
    engine: Engine,
    tokens: Sequence[int],
    rows: Sequence[int] = (1, 8, MOST_ROWS),
    layers: str = ":",
    progress: Progress | None = None,
) -> list[InsideFinding]:
    """Every operation of a recorded step of each number of rows.

    Args:
        tokens: a text, from which the rows' are made.
        rows: numbers of rows.
        layers: which, as a slice.
        progress: hears of layers done and in all.

    Raises:
        UserError: the kernel doesn't run here, or not so many rows, the text isn't of this
            vocabulary, or there are none of these layers.
    """
    for count in rows:
        if why := why_not(engine, count):
            raise UserError(_REFUSED.format(why))
    engine.check_ids(tokens, "The text")
    weights, config = engine.weights, engine.config
    assert isinstance(weights, PackedWeights)
    chosen = range(config.num_layers)[bounds(layers)]
    if not chosen:
        raise UserError(
            f"inside.layers is {layers!r:.40}, which is none of {config.num_layers} layers; choose "
            "others, such as 0:4."
        )
    steps = [record_step(engine, texts_of(tokens, n, config.context_length)) for n in rows]
    return judge(steps, weights.packed, weights.plan, config, chosen, progress)


_REFUSED = "The part inside looks into the decode-step kernel, which doesn't run here: {}."


def check_device() -> None:
    """Raises UserError where no model's decode steps could run on the kernel."""
    if why := device_refusal():
        raise UserError(_REFUSED.format(f"it needs a Hopper GPU, and {why}"))


def numbers_of_rows(text: str) -> tuple[int, ...]:
    """Those of `inside.rows`. Raises UserError where they are none."""
    found = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= MOST_ROWS for part in found):
        raise UserError(
            f"inside.rows is {text!r:.40}, but must be numbers from 1 to {MOST_ROWS} with commas "
            "between them, such as 1,8,64."
        )
    return tuple(dict.fromkeys(map(int, found)))


def inside_table(findings: Sequence[InsideFinding]) -> Table:
    """A line for each operation of each step: the layer where it is worst, and all faults."""
    alike: dict[tuple[int, str, str], list[InsideFinding]] = {}
    for finding in findings:
        key = finding.rows, finding.kernel, finding.operation
        alike.setdefault(key, []).append(finding)
    rows = [_row(group) for group in alike.values()]
    wrong = sum(finding.verdict == "fault" for finding in findings)
    said = f"{wrong} FAULTS" if wrong else "all within rounding"
    caption = f"inside the decode step, {len(findings)} operations: {said}"
    names = ("rows", "kernel of", "operation", "of bound", "RMS", "worst at", "")
    return Table(names, rows, (0, 3, 4), caption)


def _row(group: Sequence[InsideFinding]) -> tuple[str, ...]:
    """Of one operation in all layers; a fault is named by its first layer."""
    worst = max(group, key=lambda finding: finding.residual.ratio)
    faults = [finding for finding in group if finding.verdict == "fault"]
    where = "" if worst.layer is None else f"layer {worst.layer}, "
    said = ""
    if faults:
        first = faults[0].layer
        said = "FAULT" if first is None else f"FAULT in {len(faults)} layers, first {first}"
    residual = worst.residual
    return (
        str(worst.rows),
        worst.kernel,
        worst.operation,
        number(residual.ratio),
        f"{residual.relative:.1e}",
        f"{where}row {worst.row}",
        said,
    )
