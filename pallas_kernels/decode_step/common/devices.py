"""Several devices of a host that have a model together: each runs a kernel of its own beside the
others', which stores into their memory as into its own."""

import dataclasses
from typing import Any

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices, in the mesh's order.

    Attributes:
        mine: this one's number.
        exchanges, logits: addresses of every device's exchange and logits.
    """

    mine: V
    exchanges: list[V]
    logits: list[V]

    @classmethod
    def of(cls, context: Any, exchange: Any, logits: Any, count: int) -> "Devices | None":
        """From references to this device's; None if it is the only one."""
        if count == 1:
            return None
        exchanges, scores = (
            [t.address_on(context, ref, number) for number in range(count)]
            for ref in (exchange, logits)
        )
        return cls(t.device(context), exchanges, scores)
