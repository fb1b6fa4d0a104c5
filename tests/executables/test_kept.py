"""Kept functions: a new process traces nothing, and whatever decides a program tells it apart.

A `Kept` over a function made anew stands for a process: neither it nor JAX remembers anything.
"""

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.engine import calls
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Sampling
from qwen_jax.executables import identity, kept
from qwen_jax.executables.kept import Kept, keep_in
from qwen_jax.executables.per_user import use_compilation_cache
from qwen_jax.model.tap import intervening
from tests.engines import Prompt, fresh_engine, generate, random_tokens
from tests.golden_cases import odd_config


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    keep_in(tmp_path)
    yield tmp_path
    keep_in(None)


class Process(ModuleType):
    """A module with a jitted function, which counts its traces."""

    def __init__(self, **options: Any):
        super().__init__("of_the_test")
        self.traces = 0

        def double(x: Any, times: Any, name: Any) -> dict[str, jax.Array | None]:
            self.traces += 1
            return {"out": 2 * x + times["n"], "none": None}

        self.double = jax.jit(double, static_argnums=2, donate_argnums=0)
        self.kept = Kept(self, "double", static=(2,), **options)

    def __call__(self, x: Any, n: int = 1, name: Any = "") -> np.ndarray:
        return np.asarray(self.kept(jnp.asarray(x), {"n": np.int32(n)}, name)["out"])


def test_the_next_process_traces_nothing(folder: Path) -> None:
    first, second = Process(), Process()
    for process in first, second:
        for n in range(3):
            assert process(np.arange(4), n).tolist() == [n, 2 + n, 4 + n, 6 + n]
    assert (first.traces, second.traces) == (1, 0)


def test_what_is_donated_is_gone(folder: Path) -> None:
    for process in Process(), Process():
        given = jnp.arange(4)
        process.kept(given, {"n": np.int32(1)}, "")
        assert given.is_deleted()


def test_shapes_alone_prepare_a_call(folder: Path) -> None:
    process, shape = Process(), jax.ShapeDtypeStruct
    process.kept.prepare(shape((4,), jnp.int32), {"n": shape((), jnp.int32)}, "")
    process(np.arange(4))
    assert process.traces == 1


@pytest.mark.parametrize("other", [{"x": np.arange(5)}, {"x": np.zeros(4)}, {"name": "b"}])
def test_other_shapes_dtypes_and_statics_are_other_programs(
    folder: Path, other: dict[str, Any]
) -> None:
    Process()(np.arange(4))
    process = Process()
    process(**{"x": np.arange(4)} | other)
    assert process.traces == 1


def test_other_surroundings_are_other_programs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Process()(np.arange(4))
    with monkeypatch.context() as patch:
        patch.setattr(identity, "_sources", lambda: "of another version")
        process = Process()
        process(np.arange(4))
        assert process.traces == 1
    for name, value in {"XLA_FLAGS": "--xla_dump_to=", "JAX_UNKNOWN": "1"}.items():
        monkeypatch.setenv(name, value)
        process = Process()
        process(np.arange(4))
        assert process.traces == (name == "XLA_FLAGS")


@pytest.mark.parametrize("content", [b"", b"not pickled", None])
def test_a_file_that_is_none_of_ours_is_overwritten(folder: Path, content: bytes | None) -> None:
    Process()(np.arange(4))
    (path,) = folder.iterdir()
    if content is None:
        path.write_bytes(path.read_bytes()[:-1])
    else:
        assert kept._store is not None
        kept._store.put(path.name, content)
    for traces in 1, 0:
        process = Process()
        assert process(np.arange(4), 0).tolist() == [0, 2, 4, 6]
        assert process.traces == traces


def test_a_static_argument_without_a_name_is_not_kept(folder: Path) -> None:
    process = Process()
    process(np.arange(4), name=object())
    assert process.traces == 1 and not list(folder.iterdir())


def test_what_is_not_to_be_kept_and_without_a_folder_is_the_function_itself(
    tmp_path: Path, folder: Path
) -> None:
    Process(unless=lambda x, n, name: name == "a")(np.arange(4), name="a")
    keep_in(None)
    Process()(np.arange(4))
    assert not list(folder.iterdir())


def test_arrays_elsewhere_are_the_function_s_own_affair(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = jnp.arange(4)
    monkeypatch.setattr(jax, "local_devices", lambda: ["another device"])
    assert Process()(given).tolist() == [1, 3, 5, 7]
    assert not list(folder.iterdir())


def test_inside_a_program_it_is_a_function_like_any_other(folder: Path) -> None:
    process = Process()
    inner = jax.jit(lambda x: process.kept(x, {"n": np.int32(1)}, "")["out"])
    assert inner(jnp.arange(4)).tolist() == [1, 3, 5, 7]
    assert not list(folder.iterdir())


def test_the_source_of_a_config_decides_nothing_and_every_other_field_does() -> None:
    config = odd_config(num_layers=1)
    text = identity.described(config)
    assert identity.described(dataclasses.replace(config, source="another.gguf")) == text
    assert identity.described(dataclasses.replace(config, rope_theta=2.0)) != text


CONFIG = odd_config(num_layers=1, context_length=256)


def texts(engine: Engine) -> list[list[int]]:
    prompts = [Prompt(random_tokens(CONFIG, 20), 6), Prompt(random_tokens(CONFIG, 9, 1), 6)]
    samplings = [Sampling(), Sampling(temperature=1.0, repetition_penalty=1.2, seed=3)]
    return generate(engine, prompts, samplings).tokens


def test_an_engine_says_the_same_whoever_compiled_its_programs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_in(None)
    expected = texts(fresh_engine(CONFIG))
    keep_in(folder)
    assert texts(fresh_engine(CONFIG)) == expected
    names = {path.name.split("-")[0] for path in folder.iterdir()}
    assert names == {"extend", "step", "insert"}
    for name in names:
        again = Kept(
            calls.steps,
            name,
            static=getattr(calls, name)._static,
            large=getattr(calls, name)._large,
        )
        monkeypatch.setattr(again, "_compile", lambda args: pytest.fail("it was compiled again"))
        monkeypatch.setattr(calls, name, again)
    assert texts(fresh_engine(CONFIG)) == expected


def test_a_model_that_is_looked_into_is_never_kept(folder: Path) -> None:
    engine, tokens = fresh_engine(CONFIG), random_tokens(CONFIG, 9)
    plain = engine.logits(tokens)
    kept_before = sorted(folder.iterdir())
    engine.layout = engine.layout._replace(
        spec=dataclasses.replace(engine.spec, variant="half the logits")
    )
    half = functools.partial(lambda name, x: x / 2 if name == "logits" else x)
    with intervening(half):
        assert np.array_equal(engine.logits(tokens), plain / 2)
    assert sorted(folder.iterdir()) == kept_before


def test_where_compilations_are_not_cached_nothing_is_kept(folder: Path) -> None:
    before = jax.config.values["jax_enable_compilation_cache"]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        use_compilation_cache()
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
    assert kept._store is None


HEAVY = ("flax", "jax.experimental.pallas", "qwen_jax.model.decoder", "matplotlib", "jinja2")


def test_a_second_run_imports_neither_flax_nor_pallas(tmp_path: Path) -> None:
    code = (
        "import sys; from qwen_jax import cli; cli.main(['--max_tokens=3']); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    changed = {"XDG_CACHE_HOME": str(tmp_path), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    for heavy in True, False:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | changed,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("flax" in done.stdout.splitlines()[-1]) == heavy
    assert done.stdout.splitlines()[-1] == "[]"
