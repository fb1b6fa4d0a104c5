"""Metrics against formulas written out, SciPy, and steps of nextafter."""

import ml_dtypes
import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qwen_jax.accuracy.measures.metrics import log_softmax, logit_metrics, metrics, ulp_distance

VALUES = st.floats(-1e3, 1e3, width=32)
DTYPES = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)


def pair(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A reference in float64 and a float32 candidate 1 % away from it."""
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=shape)
    return (reference * (1 + 0.01 * rng.normal(size=shape))).astype(np.float32), reference


@given(arrays(np.float32, (3, 4), elements=VALUES), arrays(np.float64, (3, 4), elements=VALUES))
def test_errors_follow_their_definitions(candidate: np.ndarray, reference: np.ndarray) -> None:
    found = metrics(candidate, reference)
    difference = candidate.astype(np.float64) - reference
    assert found.max_abs == np.linalg.norm(difference.ravel(), np.inf)
    assert found.rms_abs == pytest.approx(np.sqrt(np.mean(difference**2)))
    if np.linalg.norm(reference) > 1e-100:  # squares that do not underflow
        relative = np.linalg.norm(difference) / np.linalg.norm(reference)
        assert found.rms_rel == pytest.approx(relative)
        assert found.nmse == pytest.approx(relative**2)
        assert found.max_rel == pytest.approx(found.max_abs / np.abs(reference).max())


def test_cosine_is_scipys() -> None:
    candidate, reference = pair((5, 7))
    expected = scipy.stats.pearsonr(
        np.concatenate([candidate.ravel(), -candidate.ravel()]),  # centred: cosine = correlation
        np.concatenate([reference.ravel(), -reference.ravel()]),
    ).statistic
    assert metrics(candidate, reference).cosine == pytest.approx(expected, abs=1e-12)


def test_equal_tensors_have_no_error_and_zero_ones_no_division() -> None:
    for x in (np.arange(6, dtype=np.float32), np.zeros(6, np.float32)):
        found = metrics(x, x.astype(np.float64))
        assert (found.max_abs, found.max_rel, found.rms_rel, found.nmse) == (0, 0, 0, 0)
        assert (found.cosine, found.max_ulp, found.median_ulp) == (1, 0, 0)
    found = metrics(np.ones(3, np.float32), np.zeros(3))
    assert (found.rms_rel, found.cosine) == (np.inf, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@given(value=st.floats(-100, 100), steps=st.integers(0, 40))
def test_ulps_count_steps_of_nextafter(dtype: type, value: float, steps: int) -> None:
    start = np.array([value]).astype(dtype)
    end = start
    for _ in range(steps):
        end = np.nextafter(end, np.array([np.inf]).astype(dtype))
    assert ulp_distance(start, end) == steps == ulp_distance(end, start)


def test_ulps_across_zero_and_the_whole_range() -> None:
    tiny = np.array([np.nextafter(np.float32(0), np.float32(1))])
    assert ulp_distance(-tiny, tiny) == 2
    assert ulp_distance(np.float32([-0.0]), np.float32([0.0])) == 0
    largest = np.array([np.finfo(np.float64).max])
    finite = 2 * (2046 * 2**52 + 2**52 - 1)  # 2,047 exponents but that of infinity, both signs
    assert int(ulp_distance(-largest, largest)[0]) == finite


def test_ulps_are_of_the_dtype_named() -> None:
    """bfloat16 has 8 significant bits: 1 + 2^-7 follows 1."""
    candidate, reference = np.float32([1 + 2.0**-7, 4.0]), np.array([1.0, 4.0])
    found = metrics(candidate, reference, np.dtype(ml_dtypes.bfloat16))
    assert (found.max_ulp, found.median_ulp, found.dtype) == (1, 0.5, "bfloat16")
    assert metrics(candidate, reference).max_ulp == 2**16


def test_nonfinite_values_are_counted_located_and_left_out() -> None:
    candidate, reference = pair((4, 6))
    expected = metrics(np.delete(candidate, 3, 0), np.delete(reference, 3, 0))
    candidate[3] = [np.nan, np.inf, -np.inf, np.nan, -np.inf, np.inf]
    reference[3, 2] = -np.inf  # masked on both sides
    found = metrics(candidate, reference)
    assert (found.nans, found.infs, found.first_bad) == (2, 3, (3, 0))
    assert found.rms_abs == pytest.approx(expected.rms_abs)
    assert metrics(candidate[:3], reference[:3]).first_bad is None


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        metrics(np.zeros(2), np.zeros(3))


@given(arrays(np.float32, (40, 9), elements=st.floats(-50, 50, width=32)))
def test_log_softmax_is_scipys(logits: np.ndarray) -> None:
    expected = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    np.testing.assert_allclose(log_softmax(logits), expected, rtol=1e-14, atol=1e-14)


def test_logits_are_compared_as_scipy_does() -> None:
    candidate, reference = pair((70, 50))
    candidate[5] = candidate[5, ::-1]
    p, q = (scipy.special.softmax(x.astype(np.float64), axis=-1) for x in (reference, candidate))
    found = logit_metrics(candidate, reference, k=3)
    np.testing.assert_allclose(found.kld, scipy.special.rel_entr(p, q).sum(-1), rtol=1e-9)
    assert found.mean_kld == pytest.approx(scipy.stats.entropy(p, q, axis=-1).mean())
    assert found.max_kld == found.kld[5]
    assert found.top1 == np.mean(p.argmax(-1) == q.argmax(-1))
    tops = [[set(np.argsort(row)[-3:]) for row in x] for x in (reference, candidate)]
    shared = [len(a & b) / 3 for a, b in zip(*tops, strict=True)]
    assert found.topk == pytest.approx(np.mean(shared))


def test_impossible_tokens_add_nothing_and_lost_ones_are_infinitely_far() -> None:
    base, other = np.float32([[0, 0, -np.inf]]), np.float32([[0, 0, 0]])
    assert logit_metrics(other, base).kld[0] == pytest.approx(np.log(3) - np.log(2))
    assert logit_metrics(base, other).kld[0] == np.inf
