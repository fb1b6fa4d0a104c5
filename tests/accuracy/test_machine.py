"""The machine under us: sound ones raise no alarm, and what is less than declared is found."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

from qwen_jax import api
from qwen_jax.accuracy import machine

FLOAT32, HIGHEST = jnp.dtype(jnp.float32), lax.Precision.HIGHEST


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_alarm_here(dtype: str) -> None:
    heard = []
    found = machine.audit_machine(
        api.load(dtype=dtype).engine, lambda done, all_: heard.append((done, all_))
    )
    assert [f for f in found if f.verdict == machine.FAULT] == []
    assert len(found) == len(heard) == heard[-1][1] == 19
    by_check = {f.check: f.evidence for f in found}
    bits = {"float32": 23, "bfloat16": 7}[dtype]
    assert by_check[f"products of 64 rows in {dtype}: bits of an input"] == (
        f"all {bits} after the first"
    )
    assert by_check[f"products of 1 row in {dtype}: width of sums"] == (
        "2^23 + 1 - 2^23 is 1 in any order"
    )


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
