"""What compiles and what does not: position, text and numbers are data; shapes and plans are not.

`Engine.compiled` counts traces; JAX's own count of compilations is the witness.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import pytest
from jax import monitoring

from qwen_jax.engine.engine import Engine, Prompt
from qwen_jax.engine.sampling import Sampling
from tests.engines import device_parameters, generate, random_tokens
from tests.golden_cases import Case, odd_config

CONFIG = odd_config(num_layers=1, context_length=2048)
WARM = Sampling(temperature=0.8, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=1)


class Compilations:
    """How many programs XLA has compiled while this listens."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, event: str, duration: float, **_: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations() -> Iterator[Compilations]:
    heard = Compilations()
    monitoring.register_event_duration_secs_listener(heard)
    yield heard
    monitoring.unregister_event_duration_listener(heard)


@pytest.fixture
def engine() -> Engine:
    return Engine(CONFIG, device_parameters(Case(CONFIG, 0).parameters(), "float32"))


def answer(engine: Engine, length: int, most: int, sampling: Sampling, rows: int = 1) -> None:
    prompts = [Prompt(random_tokens(CONFIG, length, seed), most) for seed in range(rows)]
    generate(engine, prompts, [sampling] * rows)


def test_nothing_compiles_as_a_text_grows(engine: Engine, compilations: Compilations) -> None:
    answer(engine, 20, 17, WARM)
    programs, heard = engine.compiled, compilations.count
    assert heard >= programs >= 4, "cache, prefill, first token, decode"
    answer(engine, 20, 230, WARM)
    assert (engine.compiled, compilations.count) == (programs, heard)


def test_prompts_of_one_bucket_share_their_programs(
    engine: Engine, compilations: Compilations
) -> None:
    answer(engine, 17, 40, WARM)
    programs, heard = engine.compiled, compilations.count
    for length in (18, 25, 31, 32):
        answer(engine, length, 40, WARM)
    assert (engine.compiled, compilations.count) == (programs, heard)
    answer(engine, 33, 40, WARM)
    assert engine.compiled == programs + 1, "a bucket of 64: one more prefill and nothing else"


def test_long_prompts_need_one_program_a_bucket(engine: Engine) -> None:
    answer(engine, 600, 10, WARM)
    programs = engine.compiled
    # 512 and a rest of 65 to 128: as before, only the rest's bucket may differ.
    for length in (577, 601, 639, 640):
        answer(engine, length, 10, WARM)
    assert engine.compiled == programs


def test_other_numbers_of_a_plan_compile_nothing(
    engine: Engine, compilations: Compilations
) -> None:
    answer(engine, 20, 20, WARM, rows=2)
    programs, heard = engine.compiled, compilations.count
    for change in (
        {"temperature": 1.7, "seed": 99},
        {"top_k": 0},
        {"top_p": 1.0},
        {"min_p": 0.0},
        {"repetition_penalty": 1.0, "presence_penalty": 0.3},
        {"frequency_penalty": -0.5},
    ):
        answer(engine, 20, 20, dataclasses.replace(WARM, **change), rows=2)
    assert (engine.compiled, compilations.count) == (programs, heard)


def test_another_plan_compiles_once(engine: Engine) -> None:
    answer(engine, 20, 20, WARM)
    programs = engine.compiled
    for _ in range(2):
        answer(engine, 20, 20, Sampling())
    assert engine.compiled == programs + 2, "the first token and the decode loop"


def test_logits_compile_once_a_bucket(engine: Engine, compilations: Compilations) -> None:
    engine.logits(random_tokens(CONFIG, 20))
    programs, heard = engine.compiled, compilations.count
    for length in (17, 21, 32):
        engine.logits(random_tokens(CONFIG, length))
    assert (engine.compiled, compilations.count) == (programs, heard)


def test_compiled_counts_what_xla_compiles(engine: Engine, compilations: Compilations) -> None:
    """The witness hears every program the engine counts; small helpers may add to it."""
    before = compilations.count
    engine.logits(random_tokens(CONFIG, 20))
    assert compilations.count - before >= engine.compiled == 2
    assert jax.config.values["jax_enable_compilation_cache"] is False
