"""Work spread over threads gives what it gives on one."""

import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.accuracy import spread
from qwen_jax.accuracy.cache.forward import forward
from qwen_jax.accuracy.cache.truths import alone
from qwen_jax.accuracy.exact.bounds import Arithmetic
from qwen_jax.accuracy.exact.parameters import EngineSource
from qwen_jax.accuracy.measures.residuals import residual
from tests.engines import random_engine, random_tokens
from tests.golden_cases import odd_config


def test_results_stand_in_the_order_of_the_items() -> None:
    assert spread.each(lambda i: i * i, range(100)) == [i * i for i in range(100)]
    assert spread.each(lambda i: i, []) == []


def test_work_inside_of_work_stays_on_its_thread() -> None:
    """On a pool that is full of waiting work it would wait for ever."""

    def outer(i: int) -> set[str]:
        names = spread.each(lambda _: threading.current_thread().name, range(4))
        return {*names, threading.current_thread().name}

    assert all(len(names) == 1 for names in spread.each(outer, range(64)))


class Library:
    """A BLAS whose limit is its process's."""

    def __init__(self) -> None:
        self.threads, self.by = 2, set[int]()

    def limit(self, limits: int, user_api: str) -> "Library":
        return self

    def __enter__(self) -> None:
        self.before, self.threads = self.threads, 1
        self.by.add(threading.get_ident())

    def __exit__(self, *error: object) -> None:
        self.threads = self.before
        self.by.add(threading.get_ident())


def test_blas_has_its_threads_back_when_all_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads whose work overlaps: who came first goes first."""
    blas, inside, leave = Library(), threading.Event(), threading.Event()
    monkeypatch.setattr(spread, "_libraries", lambda: blas)

    def stay(stays: bool) -> None:
        if stays:
            inside.set()
            assert leave.wait(30)

    def let_go(first: bool) -> int:
        if first:
            leave.set()
            other.join()
        return blas.threads

    other = threading.Thread(target=spread.each, args=(stay, [True, False]))
    other.start()
    assert inside.wait(30)
    assert spread.each(let_go, [True, False]) == [1, 1]
    assert blas.threads == 2 and len(blas.by) == 1


def test_who_traces_meanwhile_takes_short_turns() -> None:
    before = sys.getswitchinterval()
    turns = spread.each(lambda _: sys.getswitchinterval(), range(4))
    assert turns == pytest.approx([spread.TURN] * 4) and before > spread.TURN
    assert sys.getswitchinterval() == before


def test_an_error_is_the_first_item_s() -> None:
    def wrong(i: int) -> int:
        if i in (7, 40):
            raise ValueError(str(i))
        return i

    with pytest.raises(ValueError, match=r"^7$"):
        spread.each(wrong, range(64))


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 300), width=st.integers(1, 900), seed=st.integers(0, 99))
def test_rows_at_a_time_are_all_rows(rows: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, rows, width))
    parts = spread.parts(rows, width)
    (found,) = spread.gathered(
        lambda some: (x[some] * 0.5 + y[some].max(-1, keepdims=True),), parts, parts
    )
    assert np.array_equal(found, x * 0.5 + (y.max(-1, keepdims=True) if rows else 0))
    assert sum(part.stop - part.start for part in parts) == rows


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    dtype=st.sampled_from(["float16", "float32"]),
    moved=st.integers(0, 3),
)
def test_a_residual_in_parts_is_that_of_the_whole(seed: int, dtype: str, moved: int) -> None:
    rng = np.random.default_rng(seed)
    right = rng.standard_normal((300, 400)).astype(np.float32)
    held = right.astype(dtype)
    places = rng.choice(held.size, moved, replace=False)
    held.reshape(-1)[places] += 1
    found = residual(held, right)
    d = held.astype(np.float64) - right
    assert found.outside == moved and found.exact == (moved == 0)
    assert found.error == pytest.approx(np.linalg.norm(d) / np.linalg.norm(right, None), rel=1e-6)
    assert np.array_equal(found.rows, np.bincount(places // 400, minlength=300))


def test_texts_side_by_side_are_each_alone() -> None:
    engine = random_engine(odd_config(num_layers=2, tied=True), 3)
    source, used = EngineSource(engine), np.arange(engine.config.vocab_size)
    texts = [alone(tuple(random_tokens(engine.config, n, n))) for n in (19, 7)]
    together = list(forward(source, texts, Arithmetic(), used, 2))
    for number, text in enumerate(texts):
        own = [e for i, e in together if i == number]
        for found, (_, right) in zip(
            own, forward(source, [text], Arithmetic(), used, 2), strict=True
        ):
            assert found.name == right.name
            np.testing.assert_allclose(found.value, right.value, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(found.bound, right.bound, rtol=1e-10)
