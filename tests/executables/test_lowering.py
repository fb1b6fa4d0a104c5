"""Programs are lowered one after another, and calls find what is compiled so."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp

from qwen_jax.executables.lowering import compiled


def test_one_at_a_time() -> None:
    inside, most = 0, 0
    lock = threading.Lock()

    def slow(x: jax.Array) -> jax.Array:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.05)
        with lock:
            inside -= 1
        return x + 1

    functions = [jax.jit(lambda x, i=i: slow(x) * i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda f: compiled(f, jnp.arange(3)), functions))
    assert most == 1
    assert [program(jnp.arange(3)).tolist() for program in made] == [
        [i, 2 * i, 3 * i] for i in range(4)
    ]


def test_a_call_finds_it() -> None:
    traces = 0

    def count(x: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return x * 2

    function = jax.jit(count)
    compiled(function, jax.ShapeDtypeStruct((2,), jnp.int32))
    x, compiles = jnp.arange(2, dtype=jnp.int32), list[str]()

    def heard(event: str, seconds: float, **_: str | int) -> None:
        compiles.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        assert function(x).tolist() == [0, 2]
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert traces == 1
    assert not any("backend_compile" in event for event in compiles)
