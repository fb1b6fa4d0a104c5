"""What blocks of a step of many rows leave for each other: words, and inputs in 16 bits."""

from pallas_kernels.decode_step.common import words as w
from pallas_kernels.decode_step.common.words import Layout
from pallas_kernels.decode_step.many_rows.texts import Texts
from pallas_kernels.decode_step.packed.plan import BAND, DOWN, GATE_UP, HEAD, OUTPUT, QKV, Plan

MOST_ROWS = 64
"""Rows of a step: a lane's sums of three bands of as many texts fill its registers."""

SQUARES, MEETINGS = w.STATS + 1, w.STATS + 2
"""Sections besides those of a step of few rows: of every band of the hidden state each text's sum
of squares, `[bands, 64]`; and a counter of blocks that wait for each other. `ATTENDED`, `FFN` and
`HIDDEN` hold inputs of products here."""
INPUTS = {QKV: w.HIDDEN, OUTPUT: w.ATTENDED, GATE_UP: w.HIDDEN, DOWN: w.FFN, HEAD: w.HIDDEN}
"""The section of each phase's input."""


def layout_of(plan: Plan, texts: Texts, splits: int) -> Layout:
    shape = plan.shape
    few = Layout.of(plan, texts.rows, splits)
    sizes = [*few.sizes, shape.hidden // BAND * MOST_ROWS, 1]
    sizes[w.MIDDLE] = 0
    for phase, section in INPUTS.items():
        sizes[section] = texts.words(shape.matrices[phase][1])
    return Layout.aligned(sizes)
