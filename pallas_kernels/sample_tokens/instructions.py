"""What single threads need beside `decode_step/ptx/thread.py`: other blocks of a cluster, exact
quotients, sums that don't depend on their order."""

from collections.abc import Callable, Sequence

from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.thread import V

UNIT = 45
"""A weight is a whole number of 2^-45: fewer than 2^18 of them up to 1 have a sum in 64 bits, the
same in every order, so that a row's draw doesn't depend on how many blocks share it."""


def rank() -> V:
    """The block's number in its cluster."""
    return t.asm("mov.u32 $0, %cluster_ctarank;", [t.i32()], "=r")[0]


def cluster_barrier() -> None:
    """Waits for all threads of the cluster, and makes what each has written visible to all."""
    text = "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;"
    t.asm(text, [], "~{memory}")


def remote(address: V, rank: V) -> V:
    """The same place in the shared memory of a block of the cluster."""
    return t.asm("mapa.shared::cluster.u32 $0, $1, $2;", [t.i32()], "=r,r,r", address, rank)[0]


def load_remote(address: V, count: int = 1) -> list[V]:
    """Int32 from another block's shared memory, in one instruction."""
    return t._load("ld.shared::cluster", address, count, None, 0)


def store_remote(address: V, value: V) -> None:
    t.asm("st.shared::cluster.b32 [$0], $1;", [], "r,r,~{memory}", address, value)


def count_remote(address: V) -> V:
    """Adds one to a counter in a block's shared memory; what it was before."""
    text = "atom.relaxed.cluster.shared::cluster.add.u32 $0, [$1], 1;"
    return t.asm(text, [t.i32()], "=r,r,~{memory}", address)[0]


def add_shared(address: V, value: V) -> None:
    """Adds an int32 to one in shared memory, whoever else does."""
    t.asm("red.shared.add.u32 [$0], $1;", [], "r,r,~{memory}", address, value)


def pair(low: V, high: V) -> V:
    """Two int32 as an int64."""
    return t.asm("mov.b64 $0, {$1, $2};", [t.i64()], "=l,r,r", low, high)[0]


def apart(value: V) -> tuple[V, V]:
    """An int64 as two int32, the lower first."""
    low, high = t.asm("mov.b64 {$0, $1}, $2;", [t.i32(), t.i32()], "=r,=r,l", value)
    return low, high


def wide(value: int) -> V:
    return V(t.arith.constant(t.i64(), value))


def counted(values: V) -> V:
    """The sum over a warp of int32."""
    return t.asm("redux.sync.add.s32 $0, $1, 0xffffffff;", [t.i32()], "=r,r", values)[0]


def quotient(a: V, b: V) -> V:
    """As IEEE rounds it, which XLA does on a CPU."""
    return t.asm("div.rn.f32 $0, $1, $2;", [t.f32()], "=f,f,f", a, b)[0]


def product(a: V, b: V) -> V:
    """Rounded, never part of a multiply-add."""
    return t.asm("mul.rn.f32 $0, $1, $2;", [t.f32()], "=f,f,f", a, b)[0]


def fused(a: V, b: float, c: V) -> V:
    """a b + c, rounded once."""
    return t.asm("fma.rn.f32 $0, $1, $2, $3;", [t.f32()], "=f,f,f,f", a, t.number(b), c)[0]


def whole(x: V) -> V:
    """The nearest whole number, a float32."""
    return t.asm("cvt.rni.f32.f32 $0, $1;", [t.f32()], "=f,f", x)[0]


def to_integer(x: V) -> V:
    return t.asm("cvt.rzi.s32.f32 $0, $1;", [t.i32()], "=r,f", x)[0]


def to_number(x: V) -> V:
    """An int32 taken as unsigned, rounded to float32."""
    return t.asm("cvt.rn.f32.u32 $0, $1;", [t.f32()], "=f,r", x)[0]


def signed_number(x: V) -> V:
    return t.asm("cvt.rn.f32.s32 $0, $1;", [t.f32()], "=f,r", x)[0]


def to_wide(x: V) -> V:
    """The whole number nearest to a float32 that isn't negative, as int64."""
    return t.asm("cvt.rni.u64.f32 $0, $1;", [t.i64()], "=l,f", x)[0]


def wide_number(x: V) -> V:
    return t.asm("cvt.rn.f32.u64 $0, $1;", [t.f32()], "=f,l", x)[0]


def upper_product(a: V, b: V) -> V:
    """The upper half of the product of two int64, taken as unsigned."""
    return t.asm("mul.hi.u64 $0, $1, $2;", [t.i64()], "=l,l,l", a, b)[0]


def log2(x: V) -> V:
    """Its error is at most 2^-22, of the result or, between 1/2 and 2, absolute."""
    return t.asm("lg2.approx.ftz.f32 $0, $1;", [t.f32()], "=f,f", x)[0]


def from_lane(value: V, mask: int) -> V:
    """`thread.from_lane`, of an int64 too."""
    if value.raw.type != t.i64():
        return t.from_lane(value, mask)
    low, high = (t.from_lane(half, mask) for half in apart(value))
    return pair(low, high)


def butterfly(
    values: Sequence[V], combine: Callable[[list[V], list[V]], list[V]], masks: Sequence[int]
) -> list[V]:
    """What all lanes' values come to, in every lane; `combine` knows no order."""
    mine = list(values)
    for mask in masks:
        mine = combine(mine, [from_lane(v, mask) for v in mine])
    return mine


LOG2_E_HIGH = 1.44269502162933349609375
LOG2_E_LOW = 1.92596299112661746887e-8
LEAST = -64.0
"""exp of it weighs nothing."""
LN_2 = 0.6931471805599453


def weight(below: V) -> V:
    """exp of a number that isn't positive, an int64 in units of 2^-45."""
    below = t.larger(below, LEAST)
    turns = whole(below * LOG2_E_HIGH)
    rest = fused(below, LOG2_E_LOW, fused(below, LOG2_E_HIGH, t.number(0) - turns))
    scale = (to_integer(turns) + (UNIT + 127)) << 23
    return to_wide(t.exp2(rest) * scale.bits())


def log_weight(total: V) -> V:
    """The logarithm of a sum of weights that isn't 0."""
    return (log2(wide_number(total)) - float(UNIT)) * LN_2


SERIES = tuple(1 / n for n in range(8, 0, -1))
"""-log(1 - v) = v (1 + v / 2 + v^2 / 3 ...), to 1e-7 of it up to v = 1/8."""


def gumbel(bits: V) -> V:
    """A draw from the Gumbel distribution, from 32 random bits, as the reference takes it."""
    uniform = to_number(bits) * 2.0**-32 + 2.0**-33
    uniform = t.select(uniform < 1.0 - 2.0**-24, uniform, 1.0 - 2.0**-24)
    near = t.number(SERIES[0])
    for factor in SERIES[1:]:
        near = near * uniform + factor
    far = log2(1.0 - uniform) * -LN_2
    exponential = t.select(uniform < 0.125, near * uniform, far)
    return log2(exponential) * -LN_2
