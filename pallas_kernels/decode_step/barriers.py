"""Copies into shared memory that an mbarrier counts, and waiting for them."""

from pallas_kernels.decode_step import thread as t


def make_barrier(address: t.V, arrivals: int) -> None:
    """An mbarrier in shared memory."""
    t.asm(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", [], "r", address)


def barriers_made() -> None:
    """Makes barriers that were set up visible to copies."""
    t.asm("fence.mbarrier_init.release.cluster;", [], "~{memory}")
    t.asm("fence.proxy.async.shared::cta;", [], "~{memory}")


def arrive(barrier: t.V) -> None:
    t.asm("mbarrier.arrive.shared::cta.b64 _, [$0];", [], "r,~{memory}", barrier)


def copy_in(shared: t.V, source: t.V, size: t.V, barrier: t.V) -> None:
    """Starts a copy of `size` bytes to shared memory that completes the barrier's turn."""
    expect = "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$3], $2;"
    copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
    t.asm(f"{expect} {copy}", [], "r,l,r,r,~{memory}", shared, source, size, barrier)


def await_turn(barrier: t.V, parity: t.V) -> None:
    """Waits until the barrier's turn of this parity is complete."""
    text = (
        "{ .reg .pred p; WAIT: "
        "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra WAIT; }"
    )
    t.asm(text, [], "r,r,~{memory}", barrier, parity)
