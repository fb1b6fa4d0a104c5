"""What the device does while the host works is what it does alone."""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qwen_jax.accuracy.beside import AT_ONCE, Beside
from qwen_jax.accuracy.cache.audit import CacheAudit, audit_cache
from qwen_jax.accuracy.tensors.planting import planted
from qwen_jax.accuracy.traces.recording import Recorder
from qwen_jax.accuracy.traces.trace import Trace
from qwen_jax.engine.engine import Engine
from qwen_jax.errors import UserError
from qwen_jax.model.cache import PAGE
from tests.accuracy.test_child import wait
from tests.engines import fresh_engine, random_engine, random_tokens, reshape
from tests.golden_cases import odd_config

CONFIG = odd_config(num_layers=1, num_heads=2, num_kv_heads=2, tied=True, context_length=3 * PAGE)


def on_a_gpu() -> Engine:
    """An engine whose host has its own work while steps run."""
    engine = fresh_engine(CONFIG, 3)
    reshape(engine, ahead=True)
    return engine


def test_work_begins_at_once() -> None:
    begun = threading.Event()
    with Beside(on_a_gpu()) as device:
        result = device.begin(lambda: begun.set() or 5)
        assert device.apart and begun.wait(30) and result() == 5


def test_a_planted_fault_follows_one_trace_at_a_time() -> None:
    with planted(on_a_gpu(), "rope_interleaved") as wrong, Beside(wrong) as device:
        assert not device.apart
        (found,) = audit_cache(wrong, ways={"pieces"})
    assert found.verdict == "fault"


def test_where_the_device_is_the_host_it_waits() -> None:
    done: list[int] = []
    with Beside(random_engine(CONFIG, 3)) as device:
        result = device.begin(done.append, 1)
        assert not device.apart and not done
        result()
    assert done == [1]


def test_an_error_comes_with_the_result() -> None:
    def wrong() -> None:
        raise ValueError("lost")

    with pytest.raises(ValueError, match="lost"), Beside(on_a_gpu()) as device:
        result = device.begin(wrong)
        result()


def test_an_interrupt_waits_for_nobody_and_begins_nothing() -> None:
    go_on, done = threading.Event(), list[int]()
    try:
        with pytest.raises(KeyboardInterrupt), Beside(on_a_gpu()) as device:
            for _ in range(AT_ONCE):
                device.begin(go_on.wait)
            device.begin(done.append, 1)
            raise KeyboardInterrupt
    finally:
        go_on.set()
    assert not done


def test_an_audit_of_the_cache_finds_the_same() -> None:
    ways = {"pieces", "several texts"}
    here, apart = (audit_cache(e, ways=ways) for e in (random_engine(CONFIG, 3), on_a_gpu()))
    assert len(here) == 4
    for one, other in zip(here, apart, strict=True):
        # NumPy's sums depend on where in memory an array lies: 1e-16 beside an error of 1e-7.
        figures = {name: pytest.approx(getattr(one, name), rel=1e-6) for name in ("ratio", "error")}
        assert other == dataclasses.replace(one, **figures)


def recorded(engine: Engine) -> tuple[Trace, set[int]]:
    """A trace, and the threads on which its programs were called."""
    recorder, threads = Recorder(engine), set[int]()

    def noting(function: Any) -> Any:
        def called(*args: Any) -> Any:
            threads.add(threading.get_ident())
            return function(*args)

        called.lower = function.lower  # type: ignore[attr-defined]
        return called

    recorder._plain, recorder._traced = noting(recorder._plain), noting(recorder._traced)
    return recorder.record(random_tokens(CONFIG, PAGE + 3), prompt_length=PAGE), threads


def test_an_error_ends_what_is_under_way_elsewhere() -> None:
    with pytest.raises(ValueError, match="lost"), Beside(on_a_gpu()) as device:
        result = device.begin(device.elsewhere(wait))
        raise ValueError("lost")
    with pytest.raises(UserError, match="ended with the code -9"):
        result()


def test_a_recording_is_the_same() -> None:
    (here, one), (apart, several) = recorded(random_engine(CONFIG, 3)), recorded(on_a_gpu())
    assert len(one) == 1 and len(several) > 1
    assert here.header.notes == apart.header.notes
    assert here.tensors.keys() == apart.tensors.keys()
    assert all(np.array_equal(x, apart.tensors[name]) for name, x in here.tensors.items())


@pytest.mark.parametrize("make", [on_a_gpu, lambda: random_engine(CONFIG, 3)])
def test_truths_are_counted_while_they_are_worked_out(make: Callable[[], Engine]) -> None:
    audit, told = CacheAudit(make(), ways={"pieces"}), list[tuple[int, int]]()
    with Beside(audit.engine) as device:
        audit.begin(device)
        audit.work_out(lambda done, total: told.append((done, total)))
    # Another process may have begun before anybody listens.
    assert told == [(1, 3), (2, 3), (3, 3)][3 - len(told) :]
    assert len(told) == 3 or device.apart
