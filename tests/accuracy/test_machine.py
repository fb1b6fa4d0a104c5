"""The machine under us: sound ones raise no alarm, and what is less than declared is found."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from qwen_jax import api
from qwen_jax.accuracy import companions, machine
from qwen_jax.engine.engine import Engine

FLOAT32, HIGHEST = jnp.dtype(jnp.float32), lax.Precision.HIGHEST


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few texts of few tokens."""
    monkeypatch.setattr(companions, "TEXTS", 3)
    monkeypatch.setattr(companions, "STEPS", 5)


@pytest.mark.usefixtures("few")
def test_no_alarm_here() -> None:
    heard = []
    found = machine.audit_machine(api.load().engine, lambda *counts: heard.append(counts))
    assert [f for f in found if f.verdict == machine.FAULT] == []
    assert len(found) == 21 and heard[-1] == (20, 20)
    by_check = {f.check: f.evidence for f in found}
    assert by_check["products of 64 rows in float32: bits of an input"] == "all 23 after the first"
    assert "texts among others, beside alone" in by_check


@pytest.mark.parametrize(("dtype", "bits", "width"), [("bfloat16", 7, 23), ("float16", 10, 15)])
def test_no_alarm_in_16_bits(dtype: str, bits: int, width: int) -> None:
    how = (jnp.dtype(dtype), HIGHEST, 64)
    checks = (machine.kept_bits, machine.sum_bits, machine.whole_numbers)
    found = [check(*how) for check in checks]
    assert [f.verdict for f in found] == ["exact"] * 3
    assert found[0].evidence == f"all {bits} after the first"
    assert found[1].evidence == f"2^{width} + 1 - 2^{width} is 1 in any order"


def rounded_inputs(bits: int) -> Callable[..., np.ndarray]:
    """Products whose inputs keep so many bits after the first."""

    def product(x: np.ndarray, w: np.ndarray, *_: object) -> np.ndarray:
        mantissa, exponent = np.frexp(x)
        scale = 2.0 ** (bits + 1)
        return np.ldexp(np.round(mantissa * scale) / scale, exponent) @ w.T

    return product


def narrow_sums(x: np.ndarray, w: np.ndarray, *_: object) -> np.ndarray:
    """Sums in bfloat16, term by term."""
    total = np.zeros((len(x), len(w)), ml_dtypes.bfloat16)
    for column in range(x.shape[1]):
        total = (total + np.outer(x[:, column], w[:, column])).astype(ml_dtypes.bfloat16)
    return total.astype(np.float64)


def test_inputs_that_lose_bits() -> None:
    tf32, half = rounded_inputs(10), rounded_inputs(7)
    found = machine.kept_bits(FLOAT32, HIGHEST, 1, tf32)
    assert (found.verdict, found.evidence) == ("fault", "10 of 23 after the first, as TF32 has")
    found = machine.kept_bits(FLOAT32, HIGHEST, 64, half)
    assert (found.verdict, found.evidence) == ("fault", "7 of 23 after the first, as bfloat16 has")
    # Who asks for less gets it.
    found = machine.kept_bits(FLOAT32, lax.Precision.DEFAULT, 1, tf32)
    assert found.verdict == "told" and found.evidence.endswith("asked for is default")


def test_narrow_sums() -> None:
    found = machine.sum_bits(FLOAT32, HIGHEST, 1, narrow_sums)
    assert found.verdict == "fault"
    assert found.evidence == "2^7 + 1 - 2^7 is 1 in any order, with 2^8 not"
    found = machine.whole_numbers(FLOAT32, HIGHEST, 1, narrow_sums)
    assert found.verdict == "fault" and "but exactly" in found.evidence


def test_other_bits_the_second_time() -> None:
    first = np.arange(6, dtype=np.float32)
    again = first.copy()
    again[4] += 0.5
    found = machine.repeats("a program", first, [first, again])
    assert (found.verdict, found.evidence) == ("fault", "1 of 6 numbers differ, by 0.5 at most")
    # Of zeroes only the bits differ.
    assert machine.repeats("a program", first, [-first * 0 + first]).verdict == "exact"


def test_functions_in_fewer_bits() -> None:
    def of_float16(x: jax.Array) -> jax.Array:
        return jnp.exp(x.astype(jnp.float16)).astype(jnp.float32)

    assert machine.function_units("exp", of_float16).verdict == "fault"

    def of_a_rounded_circle(x: jax.Array) -> jax.Array:
        return jnp.cos(x % np.float32(2 * np.pi))

    assert machine.function_units("cos", of_a_rounded_circle).verdict == "fault"
    assert machine.function_units("cos").verdict == "within rounding"


@pytest.mark.usefixtures("few")
def test_neighbours_of_a_batch_invariant_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = api.load(slots=8, batch_invariant=True).engine
    found = {f.check: f for f in machine._companions(engine)}
    for name in ("among others", "after a prefix hit"):
        one = found[f"texts {name}, beside alone"]
        assert (one.verdict, one.evidence) == ("exact", "all 3 texts have the same bits")
    real = companions.answers

    def nudged(engine: Engine, prompts: list[list[int]]) -> list[companions.Answer]:
        """A text among others gets other log-probabilities."""
        first, *rest = real(engine, prompts)
        if rest:
            first = first._replace(logprobs=tuple(p - 0.5 for p in first.logprobs))
        return [first, *rest]

    monkeypatch.setattr(companions, "answers", nudged)
    for one in machine._companions(engine):
        assert one.verdict == "fault"
        assert one.evidence.startswith("of 3 texts 2 have the same bits, 3 the same tokens")
        assert one.evidence.endswith("up to 0.5 apart")


def test_log_probabilities_are_compared_as_far_as_tokens_are_the_same() -> None:
    alone = [companions.Answer((1, 2, 3), (-1.0, -2.0, -3.0))]
    other = [companions.Answer((1, 5, 3), (-1.25, -9.0, -9.0))]
    found = companions.Companions.of(alone, other)
    assert found == companions.Companions(1, 0, 0, 0.25)
