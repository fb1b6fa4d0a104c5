"""Work of a block dealt out to its threads."""

from collections.abc import Callable

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V


def block_stride_loop(items: int | V, threads: int, body: Callable[[V], None]) -> None:
    """`body(item)` for every item below `items`, each by one of the block's first threads."""

    def turn(i: V, _: list[V]) -> list[V]:
        item = i * threads + t.thread_id()
        t.when(item < items, lambda: body(item))
        return []

    t.loop((t.integer(items) + (threads - 1)) // threads, [], turn)
