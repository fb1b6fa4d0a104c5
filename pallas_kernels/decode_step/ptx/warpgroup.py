"""Products of a warpgroup, which run while its warps go on: Hopper's `wgmma`.

Each of four warps has 16 rows of the first operand in registers, as `Format.multiply` takes them;
all share the second, in shared memory.
"""

from collections.abc import Sequence

from pallas_kernels.decode_step.ptx.formats import Format
from pallas_kernels.decode_step.ptx.thread import V, asm, f32

EIGHT_BYTES = 256
"""Of the second operand's 16 rows in eight columns, two matrices one after the other: of the first
eight rows, then of the others, in each a column's eight numbers after the other's."""


def fence() -> None:
    """Registers written before it may be read by products after it."""
    asm("wgmma.fence.sync.aligned;", [], "~{memory}")


def multiply(format: Format, a: Sequence[V], b: V, c: Sequence[V]) -> list[V]:
    """c + a b: of a warp `[16, 16]` by `[16, n]`, float32 sums, for all four warps.

    Neither may a's registers change nor may c be looked at before `wait`.

    Args:
        b: address in shared memory of n / 8 times eight columns.
        c: as `Format.multiply` has them, of every eight columns in turn.
    """
    # Addresses and distances are counted in 16 bytes.
    low = (b >> 4) | ((EIGHT_BYTES // 2 >> 4) << 16)
    described = low.wide() | ((EIGHT_BYTES >> 4) << 32)
    count, n = len(c), 2 * len(c)
    sums, first = ", ".join(f"${i}" for i in range(count)), count
    operand = ", ".join(f"${first + i}" for i in range(4))
    text = (
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{format.name}.{format.name} "
        f"{{{sums}}}, {{{operand}}}, ${first + 4}, 1, 1, 1, 0;"
    )
    tied = ",".join(map(str, range(count)))
    constraints = ",".join(["=f"] * count) + ",r,r,r,r,l," + tied
    return asm(text, [f32()] * count, constraints, *a, described, *c)


def commit() -> None:
    """Ends what `wait` waits for."""
    asm("wgmma.commit_group.sync.aligned;", [], "~{memory}")


def wait(operands: Sequence[V]) -> None:
    """Waits for all products; these are the first operands of some of them."""
    kept = ",".join(["r"] * len(operands))
    text = "wgmma.wait_group.sync.aligned 0;"
    asm(text, [], f"{kept},~{{memory}}" if operands else "~{memory}", *operands)
