"""What blocks of a step of many rows exchange: flagged words, and inputs in 16 bits."""

from pallas_kernels.decode_step.common.exchange import Layout, Section
from pallas_kernels.decode_step.common.record import RecordLayout
from pallas_kernels.decode_step.many_rows.inputs import InputLayout
from pallas_kernels.decode_step.packed.plan import DOWN, GATE_UP, HEAD, O_PROJ, QKV, StepPlan
from pallas_kernels.decode_step.packed.tile import M_TILE

MOST_ROWS = 64
"""Rows of a step: a lane's sums of three M-tiles of as many rows fill its registers."""

SQUARES, GRID_BARRIER = len(Section), len(Section) + 1
"""Sections besides those of a step of few rows: of every M-tile of the hidden state each row's sum
of squares, `[m_tiles, 64]`; and the counter of blocks that have come to the grid barrier.
`ATTN_OUT`, `FFN_ACT` and `HIDDEN` hold inputs of products here."""
FLAGGED = (
    Section.QKV,
    Section.DOWN_PARTS,
    Section.SPLITS,
    Section.STATS,
    Section.O_PARTS,
)
"""Sections of words with flags."""
SECTIONS = {
    QKV: Section.HIDDEN,
    O_PROJ: Section.ATTN_OUT,
    GATE_UP: Section.HIDDEN,
    DOWN: Section.FFN_ACT,
    HEAD: Section.HIDDEN,
}
"""The section of each phase's input."""


def layout_of(plan: StepPlan, inputs: InputLayout, splits: int, devices: int = 1) -> Layout:
    shape = plan.shape
    of_few = Layout.of(plan, inputs.rows, splits, devices)
    sizes = [*of_few.sizes, shape.hidden // M_TILE * MOST_ROWS, 1]
    sizes[Section.ATTN_RESIDUAL] = 0
    for phase, section in SECTIONS.items():
        sizes[section] = inputs.words(plan.phases[phase].columns)
    return Layout.aligned(sizes)


def record_layout(plan: StepPlan, inputs: InputLayout) -> RecordLayout:
    """What a step that records keeps: inputs of products as they are exchanged."""
    shape = plan.shape
    words = {
        "attn_out": inputs.words(shape.heads * shape.head_dim),
        "ffn_act": inputs.words(shape.packed_ffn),
        "normed": inputs.words(shape.hidden),
        "scales": MOST_ROWS,
    }
    return RecordLayout.of(plan, inputs.rows, **words)
