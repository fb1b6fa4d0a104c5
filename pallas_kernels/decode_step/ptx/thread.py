"""Code for single threads, written in Python: what Pallas has no words for.

Pallas speaks of arrays that a warpgroup holds together. The decode step is made of things below
that: words polled one by one, operands that lanes load for themselves, warps with streams of
their own. So its body is emitted as MLIR through `plgpu.inline_mgpu`, with memory and tensor-core
instructions as PTX. Nothing here knows about the step.
"""

from collections.abc import Callable, Sequence
from typing import Any

from pallas_kernels.lazy import lazy

# Their stubs don't know what is added to the generated classes.
utils = lazy("jax.experimental.mosaic.gpu.utils")
plgpu = lazy("jax.experimental.pallas.mosaic_gpu")
ir = lazy("jaxlib.mlir.ir")
arith = lazy("jaxlib.mlir.dialects.arith")
llvm = lazy("jaxlib.mlir.dialects.llvm")
scf = lazy("jaxlib.mlir.dialects.scf")

WARP, WARPGROUP = 32, 128
OURS = 8
"""Of a block's 16 barriers the first that is ours; Mosaic's warpgroups use those from 1 on."""


def emit(code: Callable[..., None], *refs: Any) -> None:
    """Thread code over references, in the middle of Pallas's; `code(context, *refs)`."""
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * len(refs))(code)(*refs)


def i32() -> Any:
    return ir.IntegerType.get_signless(32)


def i64() -> Any:
    return ir.IntegerType.get_signless(64)


def f32() -> Any:
    return ir.F32Type.get()


class V:
    """A number in a thread: int32, int64, float32, or a condition.

    Integers are compared as signed ones; `//`, `%` and `>>` take them as unsigned.
    """

    __slots__ = ("raw",)

    def __init__(self, raw: Any):
        self.raw = raw

    def _with(self, other: Any) -> Any:
        if isinstance(other, V):
            return other.raw
        return arith.constant(self.raw.type, float(other) if self._is_float else int(other))

    @property
    def _is_float(self) -> bool:
        return bool(self.raw.type == f32())

    def __add__(self, other: Any) -> "V":
        make = arith.addf if self._is_float else arith.addi
        return V(make(self.raw, self._with(other)))

    def __radd__(self, other: Any) -> "V":
        return self + other

    def __sub__(self, other: Any) -> "V":
        make = arith.subf if self._is_float else arith.subi
        return V(make(self.raw, self._with(other)))

    def __rsub__(self, other: Any) -> "V":
        return V(self._with(other)) - self

    def __mul__(self, other: Any) -> "V":
        make = arith.mulf if self._is_float else arith.muli
        return V(make(self.raw, self._with(other)))

    def __rmul__(self, other: Any) -> "V":
        return self * other

    def __floordiv__(self, other: Any) -> "V":
        return V(arith.divui(self.raw, self._with(other)))

    def __mod__(self, other: Any) -> "V":
        return V(arith.remui(self.raw, self._with(other)))

    def __and__(self, other: Any) -> "V":
        return V(arith.andi(self.raw, self._with(other)))

    def __or__(self, other: Any) -> "V":
        return V(arith.ori(self.raw, self._with(other)))

    def __xor__(self, other: Any) -> "V":
        return V(arith.xori(self.raw, self._with(other)))

    def __lshift__(self, other: Any) -> "V":
        return V(arith.shli(self.raw, self._with(other)))

    def __rshift__(self, other: Any) -> "V":
        return V(arith.shrui(self.raw, self._with(other)))

    def _compared(self, kind: str, other: Any) -> "V":
        if self._is_float:
            predicate = getattr(arith.CmpFPredicate, "O" + kind.upper())
            return V(arith.cmpf(predicate, self.raw, self._with(other)))
        name = kind if kind in ("eq", "ne") else "s" + kind
        return V(arith.cmpi(getattr(arith.CmpIPredicate, name), self.raw, self._with(other)))

    def __lt__(self, other: Any) -> "V":
        return self._compared("lt", other)

    def __le__(self, other: Any) -> "V":
        return self._compared("le", other)

    def __gt__(self, other: Any) -> "V":
        return self._compared("gt", other)

    def __ge__(self, other: Any) -> "V":
        return self._compared("ge", other)

    def equals(self, other: Any) -> "V":
        return self._compared("eq", other)

    def differs(self, other: Any) -> "V":
        return self._compared("ne", other)

    def bits(self) -> "V":
        """A float's bits, or the float of these bits."""
        return V(arith.bitcast(i32() if self._is_float else f32(), self.raw))

    def wide(self) -> "V":
        """An int32 that isn't negative, as int64."""
        return V(arith.extui(i64(), self.raw))


def integer(value: int | V) -> V:
    return value if isinstance(value, V) else V(arith.constant(i32(), value))


def number(value: float) -> V:
    return V(arith.constant(f32(), float(value)))


def select(condition: V, then: V, other: Any) -> V:
    return V(arith.select(condition.raw, then.raw, then._with(other)))


def smaller(a: V, b: Any) -> V:
    return select(a < b, a, b)


def larger(a: V, b: Any) -> V:
    if a._is_float:
        return V(arith.maximumf(a.raw, a._with(b)))
    return select(a > b, a, b)


def loop(
    count: int | V, carry: Sequence[V], body: Callable[[V, list[V]], Sequence[V]], first: Any = 0
) -> list[V]:
    """`body(i, carry)` for i from `first` to below `count`; the carry after the last."""
    bounds = [integer(x).raw for x in (first, count, 1)]
    op = scf.ForOp(*bounds, [v.raw for v in carry])
    with ir.InsertionPoint(op.body):
        results = body(V(op.induction_variable), [V(a) for a in op.inner_iter_args])
        scf.yield_([v.raw for v in results])
    return [V(r) for r in op.results]


def repeat_while(body: Callable[[], tuple[V, Sequence[V]]], count: int) -> list[V]:
    """Runs `body` until its condition is false; the `count` int32 it returned last."""
    op = scf.WhileOp([i32()] * count, [])
    with ir.InsertionPoint.at_block_begin(op.before.blocks.append()):
        again, values = body()
        scf.condition(again.raw, [v.raw for v in values])
    with ir.InsertionPoint.at_block_begin(op.after.blocks.append(*[i32()] * count)):
        scf.yield_([])
    return [V(r) for r in op.results]


def loop_while(
    again: Callable[[list[V]], V], carry: Sequence[V], body: Callable[[list[V]], Sequence[V]]
) -> list[V]:
    """`carry = body(carry)` as long as `again(carry)`; the carry after the last."""
    types = [v.raw.type for v in carry]
    op = scf.WhileOp(types, [v.raw for v in carry])
    with ir.InsertionPoint.at_block_begin(op.before.blocks.append(*types)):
        values = [V(a) for a in op.before.blocks[0].arguments]
        scf.condition(again(values).raw, [v.raw for v in values])
    with ir.InsertionPoint.at_block_begin(op.after.blocks.append(*types)):
        results = body([V(a) for a in op.after.blocks[0].arguments])
        scf.yield_([v.raw for v in results])
    return [V(r) for r in op.results]


def either(condition: V, then: Callable[[], Sequence[V]], otherwise: Sequence[V]) -> list[V]:
    """What `then` returns, or those values without running it."""
    op = scf.IfOp(condition.raw, [v.raw.type for v in otherwise], has_else=True)
    with ir.InsertionPoint(op.then_block):
        scf.yield_([v.raw for v in then()])
    with ir.InsertionPoint(op.else_block):
        scf.yield_([v.raw for v in otherwise])
    return [V(r) for r in op.results]


def when(condition: V, then: Callable[[], Any]) -> None:
    op = scf.IfOp(condition.raw)
    with ir.InsertionPoint(op.then_block):
        then()
        scf.yield_([])


def asm(text: str, results: Sequence[Any], constraints: str, *operands: V) -> list[V]:
    """A PTX instruction that stays where it is; `$0` and so on are results, then operands."""
    kind = None
    if len(results) == 1:
        kind = results[0]
    elif results:
        kind = llvm.StructType.get_literal(list(results))
    made = llvm.inline_asm(
        kind, [v.raw for v in operands], text, constraints, has_side_effects=True
    )
    if len(results) < 2:
        return [V(made)] if results else []
    return [V(llvm.extractvalue(t, made, [i])) for i, t in enumerate(results)]


def _registers(first: int, count: int) -> str:
    names = ", ".join(f"${first + i}" for i in range(count))
    return names if count == 1 else f"{{{names}}}"


def _width(count: int) -> str:
    return "b32" if count == 1 else f"v{count}.b32"


def thread_id() -> V:
    """The thread's number in its block, asked for anew each time.

    LLVM can't move what depends on it out of loops, which fills the registers with addresses.
    """
    return asm("mov.u32 $0, %tid.x;", [i32()], "=r")[0]


def cta_id() -> V:
    """The block's number in the grid."""
    return asm("mov.u32 $0, %ctaid.x;", [i32()], "=r")[0]


def nanoseconds() -> V:
    """The lower half of a clock that all multiprocessors share."""
    return asm("mov.u32 $0, %globaltimer_lo;", [i32()], "=r")[0]


def block_barrier(threads: int, barrier: int = OURS) -> None:
    """Waits for so many threads of the block, always the same ones."""
    asm(f"bar.sync {barrier}, {threads};", [], "~{memory}")


def block_barrier_arrive(threads: int, barrier: int) -> None:
    """Counts among the threads that others wait for by `block_barrier`, without waiting."""
    asm(f"bar.arrive {barrier}, {threads};", [], "~{memory}")


def warp_barrier() -> None:
    asm("bar.warp.sync 0xffffffff;", [], "~{memory}")


def from_lane(value: V, mask: int) -> V:
    """The value of the lane whose number differs in the bits of `mask`."""
    kind, c = (f32(), "f") if value._is_float else (i32(), "r")
    text = f"shfl.sync.bfly.b32 $0, $1, {mask}, 0x1f, 0xffffffff;"
    return asm(text, [kind], f"={c},{c}", value)[0]


def warp_sum(value: V, masks: Sequence[int] = (16, 8, 4, 2, 1)) -> V:
    for mask in masks:
        value = value + from_lane(value, mask)
    return value


def _load(
    instruction: str, address: V, count: int, where: V | None, otherwise: int | V, offset: int = 0
) -> list[V]:
    """Int32 by one instruction, `offset` bytes from the address; `otherwise` if not `where`."""
    kinds, c = [i32()] * count, "l" if address.raw.type == i64() else "r"
    load = f"{instruction}.{_width(count)} {_registers(0, count)}, [${count} + {offset}];"
    if where is None:
        return asm(load, kinds, ",".join(["=r"] * count) + f",{c}", address)
    clear = " ".join(f"mov.b32 ${i}, ${count + 2};" for i in range(count))
    text = f"{{ .reg .pred p; setp.ne.b32 p, ${count + 1}, 0; {clear} @p {load} }}"
    flag = V(arith.extui(i32(), where.raw))
    outs = ",".join(["=&r"] * count)
    return asm(text, kinds, outs + f",{c},r,r", address, flag, integer(otherwise))


def load_shared(address: V, count: int = 1, where: V | None = None) -> list[V]:
    """Int32 from shared memory, in one instruction; zeroes where `where` is false."""
    return _load("ld.shared", address, count, where, 0)


def load_shared_floats(address: V, count: int = 1) -> list[V]:
    return [v.bits() for v in load_shared(address, count)]


def store_shared(address: V, values: Sequence[V]) -> None:
    """Int32 or float32 to shared memory, in one instruction."""
    count = len(values)
    ins = ",".join("f" if v._is_float else "r" for v in values)
    text = f"st.shared.{_width(count)} [$0], {_registers(1, count)};"
    asm(text, [], "r," + ins, address, *values)


def store_shared_half(address: V, value: V) -> None:
    """The lower 16 bits."""
    asm("{ .reg .b16 h; cvt.u16.u32 h, $1; st.shared.b16 [$0], h; }", [], "r,r", address, value)


LOADS = {
    "nc": "ld.global.nc",
    "block": "ld.global",
    "relaxed.gpu": "ld.relaxed.gpu.global",
    "relaxed.sys": "ld.relaxed.sys.global",
    "acquire.gpu": "ld.acquire.gpu.global",
}


def load_global(
    address: V,
    count: int = 1,
    kind: str = "nc",
    *,
    where: V | None = None,
    otherwise: int | V = 0,
    offset: int = 0,
) -> list[V]:
    """Int32 from global memory, `offset` bytes from the address, in one instruction.

    Args:
        kind: "nc" what nobody writes, "block" what the block itself has written, "relaxed.gpu" what
            others write, "relaxed.sys" what other devices do, "acquire.gpu" what others write after
            something else that is read next.
        where: whether to load, or to take `otherwise`.
    """
    return _load(LOADS[kind], address, count, where, otherwise, offset)


def prefetch(address: V, size: V) -> None:
    """Brings so many bytes of global memory, a multiple of 16, into the L2 cache."""
    asm("cp.async.bulk.prefetch.L2.global [$0], $1;", [], "l,r", address, size)


def store_global(address: V, values: Sequence[V], kind: str = "") -> None:
    """Int32 or float32 to global memory, in one instruction."""
    count = len(values)
    ins = ",".join("f" if v._is_float else "r" for v in values)
    text = f"st.{kind}global.{_width(count)} [$0], {_registers(1, count)};"
    asm(text, [], "l," + ins, address, *values)


def store_global_half(address: V, value: V) -> None:
    """The lower 16 bits."""
    text = "{ .reg .b16 h; cvt.u16.u32 h, $1; st.global.b16 [$0], h; }"
    asm(text, [], "l,r", address, value)


LOG2_E = 1.4426950408889634


def exp2(x: V) -> V:
    return asm("ex2.approx.ftz.f32 $0, $1;", [f32()], "=f,f", x)[0]


def reciprocal(x: V) -> V:
    return asm("rcp.approx.f32 $0, $1;", [f32()], "=f,f", x)[0]


def rsqrt(x: V) -> V:
    return asm("rsqrt.approx.f32 $0, $1;", [f32()], "=f,f", x)[0]


def halves(low: V, high: V, which: int) -> V:
    """The lower (0) or upper (1) 16 bits of two words, in one."""
    selector = ("0x5410", "0x7632")[which]
    return asm(f"prmt.b32 $0, $1, $2, {selector};", [i32()], "=r,r,r", low, high)[0]


def transposed(pair: V) -> V:
    """Of 8 x 8 numbers of 16 bits, of which lane 4 g + t has row g's columns 2 t and 2 t + 1."""
    return asm("movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", [i32()], "=r,r", pair)[0]


def address(ref: Any, shared: bool = False) -> V:
    """Where a reference begins: int64, or int32 in shared memory."""
    return V(llvm.ptrtoint(i32() if shared else i64(), utils.memref_ptr(ref)))


def device(context: Any) -> V:
    """Which of a mesh's devices this is."""
    return V(context.device_id())


def address_on(context: Any, ref: Any, number: int) -> V:
    """Where a reference to an argument or result begins in the memory of a mesh's device."""
    return address(context.to_remote(ref, integer(number).raw))
