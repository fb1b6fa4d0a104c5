"""The thread code of `decode_step` on the machine of `simt.py`, function for function."""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.decode_step.few_rows import products
from pallas_kernels.decode_step.packed import blocks, planes, scales
from pallas_kernels.decode_step.ptx import arithmetic, barriers, warpgroup
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import Format
from tests.kernels.simt import BOOL, DTYPES, F32, I32, I64, REGION, Barrier, Lanes, Machine

UNSIGNED = {I32: np.uint32, I64: np.uint64, BOOL: np.bool_}


def _arith() -> Any:
    """What `thread.V` asks of MLIR's dialect."""

    def binary(code: Callable[..., Any]) -> Callable[[Lanes, Lanes], Lanes]:
        def run(a: Lanes, b: Lanes) -> Lanes:
            assert a.type == b.type, f"{a.type} meets {b.type}"
            return Lanes.computed(code(a.data, b.data), a.type)

        return run

    def unsigned(code: Callable[..., Any]) -> Callable[[Lanes, Lanes], Lanes]:
        def run(a: Lanes, b: Lanes) -> Lanes:
            kind = UNSIGNED[a.type]
            x, y = a.data.view(kind), b.data.view(kind)
            return Lanes.computed(code(x, y).view(DTYPES[a.type]), a.type)

        return run

    compare = {
        "eq": np.equal, "ne": np.not_equal, "slt": np.less, "sle": np.less_equal,
        "sgt": np.greater, "sge": np.greater_equal, "OLT": np.less, "OLE": np.less_equal,
        "OGT": np.greater, "OGE": np.greater_equal, "OEQ": np.equal, "ONE": np.not_equal,
    }  # fmt: skip
    names = types.SimpleNamespace(**{name: name for name in compare})

    def compared(name: str, a: Lanes, b: Lanes) -> Lanes:
        return Lanes.computed(compare[name](a.data, b.data), BOOL)

    def bitcast(kind: str, a: Lanes) -> Lanes:
        return Lanes.computed(a.data.view(DTYPES[kind]), kind)

    def constant(kind: str, value: Any) -> Lanes:
        # As a key of a cache 0.0 would be -0.0.
        return whole(kind, value) if type(value) is int else Lanes(value, kind)

    @functools.cache
    def whole(kind: str, value: int) -> Lanes:
        return Lanes(np.asarray(value).astype(DTYPES[kind]), kind)

    return types.SimpleNamespace(
        constant=constant,
        addf=binary(np.add), subf=binary(np.subtract), mulf=binary(np.multiply),
        addi=binary(np.add), subi=binary(np.subtract), muli=binary(np.multiply),
        andi=binary(np.bitwise_and), ori=binary(np.bitwise_or), xori=binary(np.bitwise_xor),
        shli=unsigned(np.left_shift), shrui=unsigned(np.right_shift),
        # A thread that is not at work may divide by zero.
        divui=unsigned(np.floor_divide), remui=unsigned(np.remainder),
        cmpf=compared, cmpi=compared, CmpFPredicate=names, CmpIPredicate=names,
        maximumf=binary(np.maximum), bitcast=bitcast,
        select=lambda c, a, b: Lanes(np.where(c.data, a.data, b.data), a.type),
        extui=lambda kind, a: Lanes(a.data.astype(UNSIGNED[a.type]).astype(DTYPES[kind]), kind),
    )  # fmt: skip


HALVES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def floats(format: Format, words: np.ndarray) -> np.ndarray:
    """The two numbers of each int32, `[..., 2]`."""
    words = np.ascontiguousarray(words)[..., None]
    return words.view(HALVES[format.name]).astype(np.float32)


def install(patch: pytest.MonkeyPatch, machine: Machine) -> None:
    """Makes thread code run at once, on the machine, where it would emit instructions."""
    m = machine

    def v(data: Any, kind: str) -> t.V:
        return t.V(Lanes(data, kind))

    def ints(arrays: Sequence[np.ndarray]) -> list[t.V]:
        return [v(a, I32) for a in arrays]

    def truth(condition: t.V | None) -> np.ndarray:
        return m.mask if condition is None else m.mask & m.lanes(condition)

    def one(value: t.V) -> int:
        """Of the one thread at work."""
        (number,) = set(m.lanes(value)[m.mask].tolist())
        return int(number)

    def loop(count: Any, carry: Any, body: Any, first: Any = 0) -> list[t.V]:
        i, last = m.lanes(t.integer(first)).copy(), m.lanes(t.integer(count))
        state = [c.raw for c in carry]
        while (active := m.mask & (i < last)).any():
            turn = functools.partial(body, v(i, I32), [t.V(s) for s in state])
            state = merged(active, m.masked(active, turn), [t.V(s) for s in state])
            i = i + active.astype(np.int32)
        return [t.V(s) for s in state]

    def repeat_while(body: Any, count: int) -> list[t.V]:
        found = [np.zeros(m.role.count, np.int32) for _ in range(count)]
        active = m.mask
        while True:
            again, values = m.masked(active, body)
            found = [np.where(active, m.lanes(x), f) for x, f in zip(values, found, strict=True)]
            active = active & m.lanes(again)
            if not active.any():
                return ints(found)
            m.give_way()

    def loop_while(again: Any, carry: Any, body: Any) -> list[t.V]:
        state = [c.raw for c in carry]
        while True:
            values = [t.V(s) for s in state]
            active = m.mask & m.lanes(again(values))
            if not active.any():
                return values
            results = m.masked(active, functools.partial(body, values))
            state = merged(active, results, values)

    def merged(active: np.ndarray, then: Any, otherwise: Any) -> list[Lanes]:
        everybody = active.all()
        return [
            a.raw if everybody else Lanes(np.where(active, a.raw.data, b.raw.data), b.raw.type)
            for a, b in zip(then, otherwise, strict=True)
        ]

    def either(condition: t.V, then: Any, otherwise: Any) -> list[t.V]:
        if not (active := truth(condition)).any():
            return list(otherwise)
        return [t.V(x) for x in merged(active, m.masked(active, then), otherwise)]

    def when(condition: t.V, then: Any) -> None:
        if (active := truth(condition)).any():
            m.masked(active, then)

    def from_lane(value: t.V, mask: int) -> t.V:
        at = np.arange(m.role.count) ^ mask
        return v(m.lanes(value)[at], value.raw.type)

    def load_shared(address: t.V, count: int = 1, where: t.V | None = None) -> list[t.V]:
        return ints(m.load_shared(m.lanes(address), count, truth(where)))

    def store_shared(address: t.V, values: Sequence[t.V]) -> None:
        m.store_shared(m.lanes(address), [m.lanes(x) for x in values])

    def store_shared_half(address: t.V, value: t.V) -> None:
        at, half = m.lanes(address), m.lanes(value)
        words = m.shared[m.role.block].words.view(np.uint16)
        words[at[m.mask] // 2] = half[m.mask].astype(np.uint16)
        whole = m.shared[m.role.block].words.view(np.int32)
        aligned = np.where(m.mask, at // 4 * 4, 0)
        m.store_shared(aligned, [whole[aligned // 4]])

    def load_global(
        address: t.V,
        count: int = 1,
        kind: str = "nc",
        *,
        where: t.V | None = None,
        otherwise: Any = 0,
        offset: int = 0,
    ) -> list[t.V]:
        there, other = truth(where), m.lanes(t.integer(otherwise))
        loaded = m.load(m.lanes(address) + offset, count, there)
        return ints([np.where(there, x, other) for x in loaded])

    def store_global(address: t.V, values: Sequence[t.V], kind: str = "") -> None:
        m.store(m.lanes(address), [m.lanes(x) for x in values])

    def store_global_half(address: t.V, value: t.V) -> None:
        at = m.lanes(address)[m.mask]
        array = m.bytes_at(int(at[0])).view(np.uint16)
        array[(at & ((1 << 40) - 1)) // 2] = m.lanes(value)[m.mask].astype(np.uint16)

    def pair(format: Format, low: t.V, high: t.V) -> t.V:
        both = np.stack([m.lanes(low), m.lanes(high)], -1).astype(HALVES[format.name])
        return v(both.view(np.int32)[:, 0], I32)

    def apart(format: Format, pair: t.V) -> tuple[t.V, t.V]:
        both = floats(format, m.lanes(pair))
        return v(both[:, 0], F32), v(both[:, 1], F32)

    def halves(low: t.V, high: t.V, which: int) -> t.V:
        a, b = (m.lanes(x).view(np.uint32) >> (16 * which) & 0xFFFF for x in (low, high))
        return v((a | (b << 16)).astype(np.uint32).view(np.int32), I32)

    def transposed(pair: t.V) -> t.V:
        both = np.ascontiguousarray(m.lanes(pair)).view(np.uint16).reshape(-1, 8, 8)
        return v(np.ascontiguousarray(both.swapaxes(1, 2)).reshape(-1).view(np.int32), I32)

    def multiply(format: Format, a: Any, b: Any, c: Any) -> list[t.V]:
        warps = m.role.count // 32
        work = m.mask.reshape(warps, 32)
        assert (work.all(1) == work.any(1)).all(), "part of a warp multiplies"

        def lanes(values: Any) -> np.ndarray:  # [n, warps, 8, 4]
            return np.stack([m.lanes(x) for x in values]).reshape(-1, warps, 8, 4)

        # Rows g and g + 8 in columns 2 t and 2 t + 8, each of two numbers.
        left = floats(format, lanes(a)).reshape(
            2, 2, warps, 8, 4, 2
        )  # [columns, rows, w, g, t, pair]
        left = left.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, 16)
        right = floats(format, lanes(b)).transpose(1, 0, 3, 4, 2).reshape(warps, 16, 8)
        sums = lanes(c).reshape(2, 2, warps, 8, 4)  # [rows, column, w, g, t]
        sums = sums.transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
        out = left @ right + sums
        out = out.reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        return [v(x, F32) for x in out.astype(np.float32)]

    def warpgroup_multiply(format: Format, a: Any, b: t.V, c: Any) -> list[t.V]:
        """By products of a warp's, whose second operands it loads from where the warpgroup's is."""
        groups = m.mask.reshape(-1, t.WARPGROUP)
        assert (groups.all(1) == groups.any(1)).all(), "part of a warpgroup multiplies"
        lane = np.arange(m.role.count) % t.WARP
        at, made = b + v(lane // 4 * 16 + lane % 4 * 4, I32), []
        for eight in range(len(c) // 4):
            first = at + eight * warpgroup.EIGHT_BYTES
            halves = (first, first + warpgroup.EIGHT_BYTES // 2)
            right = [word for half in halves for word in load_shared(half)]
            made += multiply(format, a, right, c[4 * eight : 4 * eight + 4])
        return made

    def multiply_add(a: t.V, b: t.V, c: t.V) -> t.V:
        exact = [m.lanes(x).astype(np.float64) for x in (a, b, c)]
        return v((exact[0] * exact[1] + exact[2]).astype(np.float32), F32)

    def permuted(a: t.V, b: t.V, selector: Any) -> t.V:
        eight = np.stack([m.lanes(a), m.lanes(b)], axis=-1).view(np.uint8)
        at = m.lanes(t.integer(selector))[:, None] >> np.arange(0, 16, 4) & 15
        assert (at[m.mask] < 8).all(), "a sign is asked for"
        picked = np.take_along_axis(eight, at & 7, axis=1)
        return v(np.ascontiguousarray(picked).view(np.int32)[:, 0], I32)

    def placed(word: t.V, mask: int, bits: Any) -> t.V:
        return word & mask | bits

    def scaled_halves(pair: t.V, factor: float, addend: float) -> t.V:
        both = np.ascontiguousarray(m.lanes(pair))[:, None].view(np.float16).astype(np.float64)
        for constant in (factor, addend):
            assert np.float16(constant) == constant
        rounded = (both * factor + addend).astype(np.float16)
        return v(rounded.view(np.int32)[:, 0], I32)

    def less_halves(pair: t.V, other: t.V) -> t.V:
        return multiplied_halves(pair, v(0x3C003C00, I32), v(0x80008000 - (1 << 32), I32) ^ other)

    def multiplied_halves(pair: t.V, factors: t.V, addends: t.V | None = None) -> t.V:
        given = [pair, factors, *([] if addends is None else [addends])]
        halves = [np.ascontiguousarray(m.lanes(x))[:, None].view(np.float16) for x in given]
        a, b, *c = (each.astype(np.float64) for each in halves)
        return v((a * b + sum(c)).astype(np.float16).view(np.int32)[:, 0], I32)

    def function(code: Callable[[np.ndarray], np.ndarray]) -> Callable[[t.V], t.V]:
        return lambda x: v(code(m.lanes(x)), F32)

    def prefetch(address: t.V, size: t.V) -> None:
        both = (m.lanes(x)[m.mask].tolist() for x in (address, size))
        for at, count in zip(*both, strict=True):
            assert count > 0 and count % 16 == at % 16 == 0, "a prefetch is not aligned"
            offset = at & ((1 << REGION) - 1)
            assert offset + count <= len(m.bytes_at(at)), "a prefetch past its array"

    def each(code: Callable[..., None]) -> Callable[..., None]:
        """For every thread at work, one after the other."""

        def run(address: t.V, *rest: Any) -> None:
            for at in m.lanes(address)[m.mask].tolist():
                code(at, *rest)

        return run

    def copy(shared: t.V, source: t.V, size: Any, barrier: t.V) -> None:
        values = [shared, source, t.integer(size), barrier]
        for each in zip(*(m.lanes(x)[m.mask].tolist() for x in values), strict=True):
            m.copy(*each)

    def count_arrival(counter: t.V) -> None:
        (count,) = m.load(m.lanes(counter), 1, m.mask)
        m.store(m.lanes(counter), [count + 1])

    def make_barrier(address: t.V, arrivals: int) -> None:
        m.shared[m.role.block].barriers[one(address)] = Barrier(arrivals)

    for name, code in {
        "emit": lambda code, *refs: code(None, *refs), "arith": _arith(),
        "i32": lambda: I32, "i64": lambda: I64, "f32": lambda: F32,
        "loop": loop, "loop_while": loop_while, "repeat_while": repeat_while,
        "either": either, "when": when,
        "thread_id": lambda: v(m.role.first + np.arange(m.role.count), I32),
        "cta_id": lambda: v(m.role.block % m.blocks, I32), "block_barrier": m.block_barrier,
        "block_barrier_arrive": lambda threads, barrier: m.arrive_at(barrier),
        "warp_barrier": lambda: None, "from_lane": from_lane,
        "load_shared": load_shared, "store_shared": store_shared,
        "store_shared_half": store_shared_half, "load_global": load_global,
        "store_global": store_global,
        "store_global_half": store_global_half, "prefetch": prefetch,
        "halves": halves, "transposed": transposed,
        "exp2": function(np.exp2), "reciprocal": function(lambda x: 1 / x),
        "rsqrt": function(lambda x: 1 / np.sqrt(x)),
        "address": lambda ref, shared=False: v(ref, I32 if shared else I64),
        "device": lambda context: v(m.device, I32),
        "address_on": lambda context, ref, number: v(m.alike[ref][number], I64),
    }.items():  # fmt: skip
        patch.setattr(t, name, code)
    for module, name, code in [
        (products, "multiply_add", multiply_add), (arithmetic, "multiply_add", multiply_add),
        (arithmetic, "permuted", permuted), (blocks, "permuted", permuted),
        (arithmetic, "scaled_halves", scaled_halves), (blocks, "scaled_halves", scaled_halves),
        (planes, "scaled_halves", scaled_halves), (planes, "placed", placed),
        (blocks, "placed", placed), (scales, "permuted", permuted),
        (scales, "scaled_halves", scaled_halves),
        (blocks, "multiplied_halves", multiplied_halves), (blocks, "less_halves", less_halves),
    ]:  # fmt: skip
        patch.setattr(module, name, code)
    for name, code in {"pair": pair, "floats": apart, "multiply": multiply}.items():
        patch.setattr(Format, name, code)
    for name, code in {
        "make_barrier": make_barrier, "barriers_made": lambda: None, "arrive": each(m.arrive),
        "expect": lambda barrier, size: m.expect(one(barrier), one(size)), "copy": copy,
        "before_copies": lambda: None, "count_arrival": count_arrival,
        "await_turn": lambda barrier, parity: m.await_turn(one(barrier), one(parity)),
    }.items():  # fmt: skip
        patch.setattr(barriers, name, code)
    for name, code in {
        "multiply": warpgroup_multiply, "fence": lambda: None, "commit": lambda: None,
        "wait": lambda operands: None,
    }.items():  # fmt: skip
        patch.setattr(warpgroup, name, code)
