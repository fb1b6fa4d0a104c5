"""Copies into shared memory that an mbarrier counts, and waiting: for them, and for all blocks."""

from pallas_kernels.decode_step.ptx import thread as t


def make_barrier(address: t.V, arrivals: int) -> None:
    """An mbarrier in shared memory."""
    t.asm(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", [], "r", address)


def barriers_made() -> None:
    """Makes barriers that were set up visible to copies."""
    t.asm("fence.mbarrier_init.release.cluster;", [], "~{memory}")
    t.asm("fence.proxy.async.shared::cta;", [], "~{memory}")


def arrive(barrier: t.V) -> None:
    t.asm("mbarrier.arrive.shared::cta.b64 _, [$0];", [], "r,~{memory}", barrier)


def expect(barrier: t.V, size: t.V) -> None:
    """The one arrival of a turn that is complete when copies of `size` bytes have landed too."""
    text = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1;"
    t.asm(text, [], "r,r,~{memory}", barrier, size)


def copy(shared: t.V, source: t.V, size: int | t.V, barrier: t.V) -> None:
    """Starts a copy of `size` bytes to shared memory, which the barrier's turn expects."""
    text = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    t.asm(text, [], "r,l,r,r,~{memory}", shared, source, t.integer(size), barrier)


def copy_in(shared: t.V, source: t.V, size: t.V, barrier: t.V) -> None:
    """A copy that is a whole turn of the barrier."""
    expect(barrier, size)
    copy(shared, source, size, barrier)


def await_turn(barrier: t.V, parity: t.V) -> None:
    """Waits until the barrier's turn of this parity is complete."""
    text = (
        "{ .reg .pred p; WAIT: "
        "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra WAIT; }"
    )
    t.asm(text, [], "r,r,~{memory}", barrier, parity)


def before_copies() -> None:
    """Orders this thread's reads and writes of global memory with copies by others."""
    t.asm("fence.proxy.async.global;", [], "~{memory}")


def count_arrival(counter: t.V) -> None:
    """Adds one to a counter in global memory, after what the block has written."""
    t.asm("red.release.gpu.global.add.u32 [$0], 1;", [], "l,~{memory}", counter)


def await_count(counter: t.V, count: t.V) -> None:
    """Waits until the counter has reached `count`."""

    def look() -> tuple[t.V, list[t.V]]:
        found = t.load_global(counter, kind="acquire.gpu")
        return found[0] < count, found

    t.repeat_while(look, 1)
