"""The machine that the kernels are written for: what they need to know of it, stated once."""

import dataclasses

REGISTERS_STEP = 8
"""A thread's registers are a multiple of it."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU.

    Attributes:
        compute_capability: whose instructions the kernels use.
        multiprocessors: of it, where no GPU is there to ask.
        shared_bytes: shared memory that a block may have, or several on one multiprocessor.
        reserved_bytes: of a block's, for what Pallas puts there itself, and alignment.
        registers: of 32 bits, of a multiprocessor.
    """

    compute_capability: str
    multiprocessors: int
    shared_bytes: int
    reserved_bytes: int
    registers: int

    def registers_beside(self, computing: int, others: int, each: int) -> int:
        """Registers of each thread that computes, on a multiprocessor with others of `each`.

        A block starts with the same number for all its threads, and these can't have more than
        the others give back: it would wait for them forever.
        """
        threads = computing + others
        alike = self.registers // threads // REGISTERS_STEP * REGISTERS_STEP
        left = alike * threads - each * others
        return left // computing // REGISTERS_STEP * REGISTERS_STEP


HOPPER = Target(
    compute_capability="9.0",
    multiprocessors=132,
    shared_bytes=227 * 1024,
    reserved_bytes=2048,
    registers=65_536,
)
"""An H100 or H200: the kernels use its wgmma instructions and its bulk copies."""
