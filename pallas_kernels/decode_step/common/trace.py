"""When a block ended each phase of a step, for `benchmarks.gpu_decode_step --phases`."""

import dataclasses

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V

PHASES = (
    "load_embeddings",
    "qkv",
    "attend",
    "combine",
    "o_proj",
    "gate_up",
    "down",
    "add_parts",
    "head",
)
"""What a trace tells the end of, in order: of the last layer, and of the head."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """A block's; `times` is the address of an int32 for every phase, or None in a kernel without.

    A later layer overwrites an earlier one's times.
    """

    times: V | None

    def ended(self, phase: str) -> None:
        if self.times is not None:
            at = self.times + 4 * PHASES.index(phase)
            t.when(t.thread_id().equals(0), lambda: t.store_global(at, [t.nanoseconds()]))
