"""`sample_tokens` on the machine of `simt.py`: clusters of blocks, and what a row's threads use."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.sample_tokens import Choice, Counts, Logprobs, Settings, mosaic_gpu
from pallas_kernels.sample_tokens import instructions as i
from pallas_kernels.sample_tokens.meeting import WARPS
from pallas_kernels.sample_tokens.row import BANNED, NOT_FINITE
from pallas_kernels.sample_tokens.scores import THREADS
from tests.kernels.simt import F32, I32, I64, Lanes, Machine, Role
from tests.kernels.simt_thread import install

RANK = 24
"""Bits of an address in shared memory; those above say which block of the cluster."""


def upper_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide = a.view(np.uint64).astype(object) * b.view(np.uint64).astype(object)
    return np.asarray(wide >> 64, np.uint64).view(np.int64)


def install_cluster(patch: pytest.MonkeyPatch, m: Machine, blocks: int) -> None:
    """Makes `instructions` run on the machine, in clusters of so many blocks."""

    def v(data: Any, kind: str) -> t.V:
        return t.V(Lanes(data, kind))

    def cluster_barrier() -> None:
        m.shared[m.role.block].epoch += 1
        key = (-1 - m.role.block // blocks, 0)
        m.arrived[key] += 1
        m.progress += 1
        come = m.arrived[key]
        while m.arrived[key] // blocks < -(-come // blocks):
            m.give_way()

    def places(address: t.V) -> tuple[np.ndarray, np.ndarray]:
        """Block and word of each thread's address."""
        at = m.lanes(address)
        first = m.role.block // blocks * blocks
        return first + (at >> RANK), (at & ((1 << RANK) - 1)) // 4

    def load_remote(address: t.V, count: int = 1) -> list[t.V]:
        block, word = places(address)
        found = np.zeros((count, m.role.count), np.uint32)
        for lane in np.flatnonzero(m.mask):
            found[:, lane] = m.shared[block[lane]].words[word[lane] : word[lane] + count]
        return [v(x.view(np.int32), I32) for x in found]

    def add_shared(address: t.V, value: t.V) -> None:
        words = m.shared[m.role.block].words
        np.add.at(words, m.lanes(address)[m.mask] // 4, m.lanes(value)[m.mask].view(np.uint32))

    def store_remote(address: t.V, value: t.V) -> None:
        block, word = places(address)
        values = m.lanes(value).view(np.uint32)
        for lane in np.flatnonzero(m.mask):
            m.shared[block[lane]].words[word[lane]] = values[lane]

    def count_remote(address: t.V) -> t.V:
        block, word = places(address)
        before = np.zeros(m.role.count, np.int32)
        for lane in np.flatnonzero(m.mask):
            before[lane] = m.shared[block[lane]].words[word[lane]]
            m.shared[block[lane]].words[word[lane]] += 1
        m.progress += 1
        return v(before, I32)

    def apart(value: t.V) -> tuple[t.V, t.V]:
        halves = np.ascontiguousarray(m.lanes(value)).view(np.int32).reshape(-1, 2)
        return v(halves[:, 0], I32), v(halves[:, 1], I32)

    def pair(low: t.V, high: t.V) -> t.V:
        both = np.stack([m.lanes(low), m.lanes(high)], -1)
        return v(np.ascontiguousarray(both).view(np.int64)[:, 0], I64)

    def counted(value: t.V) -> t.V:
        sums = m.lanes(value).reshape(-1, 32).sum(1, dtype=np.int32)
        return v(np.repeat(sums, 32), I32)

    def function(kind: str, code: Callable[..., Any]) -> Callable[..., t.V]:
        def run(*values: t.V) -> t.V:
            return v(code(*(m.lanes(x) for x in values)), kind)

        return run

    def fused(a: t.V, b: float, c: t.V) -> t.V:
        x, y = m.lanes(a).astype(np.float64), m.lanes(c).astype(np.float64)
        return v((x * np.float64(np.float32(b)) + y).astype(np.float32), F32)

    patch.setattr(i, "rank", lambda: v(m.role.block % blocks, I32))
    patch.setattr(i, "remote", lambda address, rank: address + (rank << RANK))
    for name, code in {
        "cluster_barrier": cluster_barrier, "fused": fused,
        "store_remote": store_remote, "count_remote": count_remote, "pair": pair, "apart": apart,
        "counted": counted, "load_remote": load_remote, "add_shared": add_shared,
        "quotient": function(F32, np.divide), "product": function(F32, np.multiply),
        "whole": function(F32, np.rint), "log2": function(F32, np.log2),
        "to_integer": function(I32, lambda x: x.astype(np.int32)),
        "to_number": function(F32, lambda x: x.view(np.uint32).astype(np.float32)),
        "signed_number": function(F32, lambda x: x.astype(np.float32)),
        "to_wide": function(I64, lambda x: np.rint(x).astype(np.uint64).view(np.int64)),
        "wide_number": function(F32, lambda x: x.view(np.uint64).astype(np.float32)),
        "upper_product": function(I64, upper_product),
    }.items():  # fmt: skip
        patch.setattr(i, name, code)


def run(
    patch: pytest.MonkeyPatch,
    logits: np.ndarray,
    settings: Settings,
    step: np.ndarray,
    *,
    valid_tokens: int,
    bias: np.ndarray | None = None,
    counts: Counts | None = None,
    allowed: np.ndarray | None = None,
    top_logprobs: int = 20,
    blocks: int = 2,
    seed: int = 0,
) -> Choice:
    """What the kernel chooses, with so many blocks a row."""
    rows, vocab = logits.shape
    machine = Machine(rows * blocks, mosaic_gpu.shared_bytes(), (0, 0), seed, WARPS)
    nothing = np.zeros(4, np.int32)
    inputs: Sequence[Any] = [
        *settings, step, logits,
        nothing if bias is None else bias,
        *((nothing, nothing) if counts is None else counts),
        nothing if allowed is None else allowed,
    ]  # fmt: skip
    refs = [machine.array(np.asarray(x)) for x in inputs]
    made: list[Any] = []
    rng = np.random.default_rng(seed)
    with patch.context() as inner:
        inner.setattr(mosaic_gpu, "blocks_a_row", lambda rows: blocks)
        inner.setattr(mosaic_gpu.compat, "kernel", lambda body, **how: made.append((body, how)))
        present = (bias is not None, counts is not None, allowed is not None)
        mosaic_gpu.build.__wrapped__(rows, vocab, valid_tokens, top_logprobs, present)
        ((body, how),) = made
        for out in how["out_type"]:
            size = int(np.prod(out.shape)) * 4
            refs.append(machine.array(rng.integers(0, 256, size, np.uint8)))
        install(inner, machine)
        install_cluster(inner, machine, blocks)
        workers = [
            (Role(block, 0, THREADS), lambda: body(*refs, 0)) for block in range(rows * blocks)
        ]
        machine.run(workers)
    outs = [
        machine.bytes_at(ref).view(out.dtype).reshape(out.shape)
        for ref, out in zip(refs[len(inputs) :], how["out_type"], strict=True)
    ]
    token, status, chosen, top_ids, top = outs
    return Choice(token, status == BANNED, status != NOT_FINITE, Logprobs(chosen, top_ids, top))
