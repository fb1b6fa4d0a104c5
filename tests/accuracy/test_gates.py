"""Gates: parsed, refused, held against values."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_jax.accuracy.gates import METRICS, Gate, check, parse
from qwen_jax.errors import UserError


def test_several_gates_are_read_with_and_without_spaces() -> None:
    assert parse("mean_kld > 0.01,top1<=0.9 , faults != 0") == (
        Gate("mean_kld", ">", 0.01),
        Gate("top1", "<=", 0.9),
        Gate("faults", "!=", 0),
    )
    assert parse("") == ()


@given(
    metric=st.sampled_from(sorted(METRICS)),
    sign=st.sampled_from([">", ">=", "<", "<=", "==", "!="]),
    limit=st.floats(-1e6, 1e6),
    value=st.floats(-1e6, 1e6),
)
def test_a_gate_fails_where_its_condition_holds(
    metric: str, sign: str, limit: float, value: float
) -> None:
    (gate,) = parse(f"{metric} {sign} {limit!r}")
    (outcome,) = check((gate,), {metric: value})
    assert outcome.failed == eval(f"{value!r} {sign} {limit!r}")


def test_nan_fails_whatever_the_condition() -> None:
    for sign in (">", "<", "=="):
        (outcome,) = check(parse(f"mean_kld {sign} 1"), {"mean_kld": math.nan})
        assert outcome.failed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mean_kld", "is no condition"),
        ("mean_kld > ", "is no condition"),
        ("mean_kld > x", "'x', which is no number"),
        ("mean_kld > nan", "which is no number"),
        ("mean_kdl > 1", "did you mean mean_kld\\? All are compiler_faults, faults"),
        ("zzz > 1", "no metric 'zzz'; they are compiler_faults"),
    ],
)
def test_what_is_no_gate_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(text)


def test_a_metric_that_was_not_measured_is_refused() -> None:
    with pytest.raises(UserError, match=r"mean_kld .* was not measured; this run has faults\."):
        check(parse("mean_kld > 1"), {"faults": 0.0})
