"""What a device and its compiler do to numbers: repeats, sums, products, rounding, functions.

Every check has inputs whose exact result is known, however they are added up: whole numbers, powers
of two, numbers with one far bit. A `fault` is less than the arithmetic that is declared promises;
what is a device's own affair (numbers below the smallest normal one, products fused with sums) is
told, since another engine may do otherwise; so is what a text's neighbours change in it, unless the
engine was asked to be batch-invariant.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from qwen_jax.accuracy.companions import companions
from qwen_jax.accuracy.compiler import Reduction, judged, reductions
from qwen_jax.engine.engine import Engine
from qwen_jax.reporting.table import Table

REPEATS, TOKENS = 3, 48
EXACT, WITHIN, FAULT, TOLD = "exact", "within rounding", "fault", "told"

TF32_BITS = 10
SUM_BITS = 20
"""That sums in float32 keep at least: 2^20 + 1 has a bit to spare in its 24."""
FUNCTION_UNITS = 4.0
"""Units in the last place that functions may be off by: what CUDA states of its least exact one of
those in use (C++ Programming Guide, mathematical functions)."""


@dataclasses.dataclass(frozen=True)
class MachineFinding:
    """One check.

    Attributes:
        check: what was done.
        verdict: "exact", "within rounding", "fault" or "told".
        evidence: with its numbers, in words.
    """

    check: str
    verdict: str
    evidence: str


def audit_machine(
    engine: Engine, progress: Callable[[int, int], None] | None = None
) -> list[MachineFinding]:
    """All checks, in the engine's dtype and precision and on its device; some seconds.

    Args:
        progress: hears of checks done and in all.
    """
    dtype, precision = engine.spec.activations, engine.spec.precision
    checks = [
        lambda: _repeats(engine),
        *((lambda one=one: _reduction(one)) for one in reductions()),
        *(
            (lambda check=check, rows=rows: check(dtype, precision, rows))
            for rows in (1, 64)
            for check in (kept_bits, sum_bits, whole_numbers)
        ),
        *((lambda name=name: function_units(name)) for name in FUNCTIONS),
        denormals,
        fused,
    ]
    found = []
    for done, check in enumerate(checks, 1):
        found.append(check())
        if progress:
            progress(done, len(checks) + 1)
    found += _companions(engine)
    if progress:
        progress(len(checks) + 1, len(checks) + 1)
    return found


def _companions(engine: Engine) -> Iterator[MachineFinding]:
    promised = engine.shapes.batch_invariant
    for name, of in companions(engine).items():
        verdict = EXACT if of.invariant else FAULT if promised else TOLD
        yield MachineFinding(f"texts {name}, beside alone", verdict, str(of))


def _repeats(engine: Engine) -> MachineFinding:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, engine.config.vocab_size, TOKENS).tolist()
    first, *others = (engine.logits(tokens) for _ in range(REPEATS))
    return repeats(f"logits of {TOKENS} tokens, {REPEATS} times", first, others)


def repeats(
    check: str, first: Float[np.ndarray, "..."], others: list[Float[np.ndarray, "..."]]
) -> MachineFinding:
    """Whether the same program on the same numbers gives the same bits."""
    off = max(int((first.view(np.uint32) != other.view(np.uint32)).sum()) for other in others)
    if not off:
        return MachineFinding(check, EXACT, "the same bits")
    most = max(float(np.abs(first - other).max()) for other in others)
    return MachineFinding(
        check, FAULT, f"{off} of {first.size} numbers differ, by {most:.2g} at most"
    )


def _reduction(one: Reduction) -> MachineFinding:
    said = judged(one)
    return MachineFinding(one.name, FAULT if said else EXACT, said or f"all {one.right.size}")


def _product(
    x: Float[np.ndarray, "rows in"],
    w: Float[np.ndarray, "out in"],
    dtype: jnp.dtype,
    precision: lax.Precision,
) -> Float[np.ndarray, "rows out"]:
    """As the decoder multiplies, in float64."""
    multiply = jax.jit(lambda x, w: jnp.matmul(x, w.T, precision=precision))
    return np.asarray(multiply(jnp.asarray(x, dtype), jnp.asarray(w, dtype)), np.float64)


def _how(dtype: jnp.dtype, rows: int) -> str:
    return f"products of {rows} row{'s' if rows > 1 else ''} in {dtype.name}"


def kept_bits(
    dtype: jnp.dtype,
    precision: lax.Precision,
    rows: int,
    product: Callable[..., np.ndarray] = _product,
) -> MachineFinding:
    """How many bits of an input enter a product: 1 + 2^-p times one, nothing else."""
    bits = jnp.finfo(dtype).nmant
    places = np.arange(bits) + 1
    x = np.tile(1 + 2.0**-places, (rows, 1))
    exact = (product(x, np.eye(bits), dtype, precision) == x).all(axis=0)
    kept = bits if exact.all() else int(np.argmin(exact))
    check = f"{_how(dtype, rows)}: bits of an input"
    if kept == bits:
        return MachineFinding(check, EXACT, f"all {bits} after the first")
    name = {TF32_BITS: ", as TF32 has", jnp.finfo(jnp.bfloat16).nmant: ", as bfloat16 has"}.get(
        kept, ""
    )
    declared = precision == lax.Precision.HIGHEST
    return MachineFinding(
        check,
        FAULT if declared else TOLD,
        f"{kept} of {bits} after the first{name}"
        + ("" if declared else f"; the precision asked for is {precision.name.lower()}"),
    )


def sum_bits(
    dtype: jnp.dtype,
    precision: lax.Precision,
    rows: int,
    product: Callable[..., np.ndarray] = _product,
) -> MachineFinding:
    """How wide a sum is: 2^p + 1 - 2^p, with the three far apart in any order."""
    width, rng = 2048, np.random.default_rng(1)
    # float16 ends at 65504.
    most = 15 if dtype == jnp.float16 else jnp.finfo(jnp.float32).nmant
    kept = 0
    for p in range(1, most + 1):
        w = np.zeros((32, width))
        for row in w:
            row[rng.choice(width, 3, replace=False)] = 2.0**p, 1, -(2.0**p)
        if (product(np.ones((rows, width)), w, dtype, precision) != 1).any():
            break
        kept = p
    said = f"2^{kept} + 1 - 2^{kept} is 1 in any order" + (
        f", with 2^{kept + 1} not" if kept < most else ""
    )
    wide = kept >= min(SUM_BITS, most)
    return MachineFinding(f"{_how(dtype, rows)}: width of sums", EXACT if wide else FAULT, said)


def whole_numbers(
    dtype: jnp.dtype,
    precision: lax.Precision,
    rows: int,
    product: Callable[..., np.ndarray] = _product,
) -> MachineFinding:
    """Products of small whole numbers, whose sums are exact in float32."""
    rng = np.random.default_rng(2)
    x, w = rng.integers(-8, 9, (rows, 896)), rng.integers(-8, 9, (256, 896))
    right = (x @ w.T).astype(np.float32).astype(dtype).astype(np.float64)
    found = product(x.astype(np.float64), w.astype(np.float64), dtype, precision)
    check = f"{_how(dtype, rows)}: whole numbers"
    if not (off := np.argwhere(found != right)).size:
        return MachineFinding(check, EXACT, f"all {right.size} are exact")
    row, out = map(int, off[0])
    return MachineFinding(
        check,
        FAULT,
        f"{found[row, out]:.10g} at [{row}, {out}], but exactly {right[row, out]:.10g} "
        f"({len(off)} of {right.size} are wrong)",
    )


def _spread(low: float, high: float) -> Float[np.ndarray, "n"]:
    return np.geomspace(low, high, 20_001).astype(np.float32)


FUNCTIONS: dict[str, tuple[Callable[..., jax.Array], Callable[..., np.ndarray], np.ndarray]] = {
    "exp": (jnp.exp, np.exp, -_spread(1e-6, 80)),
    "rsqrt": (lax.rsqrt, lambda x: 1 / np.sqrt(x), _spread(1e-12, 1e9)),
    "cos": (jnp.cos, np.cos, np.linspace(0, 32_768, 20_001, dtype=np.float32)),
    "sin": (jnp.sin, np.sin, np.linspace(0, 32_768, 20_001, dtype=np.float32)),
}
"""Functions of float32 that the model takes, beside NumPy's in float64, where it takes them: scores
less the largest, mean squares, and angles of 32,768 positions."""


def function_units(name: str, function: Callable[..., jax.Array] | None = None) -> MachineFinding:
    """The largest error of a function, in units in the last place; of cosines and sines in those of
    1, since what a rotation multiplies with is what counts.
    """
    ours, theirs, x = FUNCTIONS[name]
    found = np.asarray(jax.jit(function or ours)(x), np.float64)
    right = theirs(x.astype(np.float64))
    unit = np.float64(2.0**-24) if name in ("cos", "sin") else np.spacing(right.astype(np.float32))
    off = np.abs(found - right) / np.abs(unit).astype(np.float64)
    at = int(off.argmax())
    return MachineFinding(
        f"{name} of float32",
        WITHIN if off[at] <= FUNCTION_UNITS else FAULT,
        f"off by {off[at]:.2g} units at most, at {x[at]:.7g}",
    )


def denormals() -> MachineFinding:
    """Whether numbers below the smallest normal one are kept."""
    tiny = np.float32(2.0**-130)
    kept = float(jax.jit(lambda x: x * np.float32(1.5))(tiny)) == 1.5 * 2.0**-130
    return MachineFinding(
        "numbers below 2^-126 of float32", TOLD, "are kept" if kept else "become zero"
    )


def fused() -> MachineFinding:
    """Whether a b - c is rounded once: then it is what rounding has left of a b."""
    a = np.float32(1 + 2.0**-12)
    c = np.float32(a * a)
    left = float(jax.jit(lambda a, b, c: a * b - c)(a, a, c))
    said = {0.0: "is rounded twice", 2.0**-24: "is rounded once (fused)"}
    return MachineFinding("a b - c of float32", TOLD, said.get(left, f"is {left!r}, neither way"))


def machine_table(findings: Sequence[MachineFinding]) -> Table:
    """The checks in order."""
    wrong = sum(finding.verdict == FAULT for finding in findings)
    said = f"{wrong} FAULTS" if wrong else "nothing less than declared"
    rows = [(finding.check, finding.verdict, finding.evidence) for finding in findings]
    caption = f"machine, {len(findings)} checks: {said}"
    return Table(("check", "verdict", "evidence"), rows, caption=caption)
