"""How M-tiles are cut into stages: what is fetched at once, and waited for."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pallas_kernels.decode_step.packed.plan import Phase, StepPlan
from pallas_kernels.decode_step.ptx import thread as t

NUMBERS_BYTES = 16 * 1024
"""Of a stage of weights that are numbers, at most."""
BLOCKS_BYTES = (40 * 1024, 26 * 1024)
"""Of one of blocks, which take longer to multiply than to fetch, so that fewer waits count for
more: the first as long as `MANY` of them fit into the ring."""
MANY = 4


@dataclasses.dataclass(frozen=True)
class Stages:
    """Those of a phase's M-tiles.

    Attributes:
        unit: tiles that all have a multiple of, but for the last one.
        number: of an M-tile's.
        tiles: in the longest.
        bytes: of the longest.
    """

    unit: int
    number: int
    tiles: int
    bytes: int

    @classmethod
    def of(cls, phase: Phase, most_bytes: int) -> "Stages":
        unit, tile_bytes = phase.unit, max(storage.tile_bytes for storage in phase.storages)
        units, most = -(-phase.longest // unit), most_bytes // tile_bytes // unit
        fewest = -(-units // most)

        def cost(number: int) -> float:
            """In units, of which all stages take as many; to wait for one takes half of one."""
            return number * (-(-units // number) + 0.5)

        number = fewest if unit == 1 else min(range(fewest, units + 1), key=cost)
        tiles = unit * -(-phase.longest // (unit * number))
        return cls(unit, number, tiles, tiles * tile_bytes)

    def begin(self, tiles: Any, number: Any) -> Any:
        """The first tile of a stage, of so many in an M-tile; a number where both are known."""
        if self.unit == 1:
            return (number * tiles) // self.number
        units = (tiles + (self.unit - 1)) // self.unit
        smaller = min if isinstance(tiles, int) and isinstance(number, int) else t.smaller
        return smaller((number * units) // self.number * self.unit, tiles)


def cut(plan: StepPlan, ring_bytes: int) -> list[Stages]:
    """Each phase's, for a ring of so many bytes and of what its barriers take."""
    if all(storage.spread == 1 for storage in plan.storages):
        return [Stages.of(phase, NUMBERS_BYTES) for phase in plan.phases]
    for most in BLOCKS_BYTES:
        found = [Stages.of(phase, most) for phase in plan.phases]
        if ring_bytes // longest(found) >= MANY:
            break
    return found


def longest(stages: Sequence[Stages]) -> int:
    """Bytes of the longest stage."""
    return max(each.bytes for each in stages)
