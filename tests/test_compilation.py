"""What compiles and what does not: position, text, numbers and mixes of requests are data.

JAX's own count of compilations is the witness. Programs are known by their spec, so that each test
has a config of its own, which no other test has compiled anything for.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from jax import monitoring

from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.texts import Text
from tests.engines import Prompt, fresh_engine, generate, random_tokens, run_to_end
from tests.golden_cases import odd_config
from tests.listed import Listed
from tests.schedules import drawn_text, watched

CONFIG = odd_config(num_layers=1, context_length=2048)
WARM = Sampling(temperature=0.8, top_k=5, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=1)
OURS = {f"jit({name})" for name in ("extend", "score", "logits", "step", "insert")}
numbers = itertools.count(1)


class Compilations:
    """Which programs XLA has compiled while this listens."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, event: str, duration: float, **of: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(str(of.get("fun_name")))

    def new(self) -> list[str]:
        """Those since the last time it was asked."""
        names, self.names = self.names, []
        return names


@pytest.fixture
def compilations() -> Iterator[Compilations]:
    heard = Compilations()
    monitoring.register_event_duration_secs_listener(heard)
    yield heard
    monitoring.unregister_event_duration_listener(heard)


@pytest.fixture
def engine() -> Engine:
    config = dataclasses.replace(CONFIG, rope_theta=1e6 + next(numbers))
    return fresh_engine(config, slots=5)  # `insert` knows no more of a model than its vocabulary


def answer(engine: Engine, length: int, most: int, sampling: Sampling, rows: int = 1) -> None:
    prompts = [Prompt(random_tokens(CONFIG, length, seed), most) for seed in range(rows)]
    generate(engine, prompts, [sampling] * rows)


def test_the_witness_hears_every_program(engine: Engine, compilations: Compilations) -> None:
    assert jax.config.values["jax_enable_compilation_cache"] is False
    answer(engine, 150, 5, WARM)
    engine.logits(random_tokens(CONFIG, 20))
    run_to_end(engine, [Text(random_tokens(CONFIG, 9), score_from=1)])
    heard = Counter(compilations.new())
    assert {name: heard[name] for name in OURS} == {
        "jit(extend)": 2,  # a page, and a part of one
        "jit(step)": 1,
        "jit(insert)": 1,
        "jit(logits)": 1,
        "jit(score)": 1,
    }


def test_nothing_compiles_as_a_text_grows(engine: Engine, compilations: Compilations) -> None:
    answer(engine, 20, 5, WARM)
    compilations.new()
    answer(engine, 20, 230, WARM)
    assert compilations.new() == []


def test_prompts_of_any_length_share_their_programs(
    engine: Engine, compilations: Compilations
) -> None:
    answer(engine, 224, 5, WARM)  # a page, and short pieces
    compilations.new()
    for length in (1, 2, 17, 96, 97, 128, 129, 600, 2000):
        answer(engine, length, 5, WARM)
    assert compilations.new() == []


def test_other_numbers_of_a_plan_compile_nothing(
    engine: Engine, compilations: Compilations
) -> None:
    answer(engine, 20, 20, WARM, rows=2)
    compilations.new()
    for change in (
        {"temperature": 1.7, "seed": 99},
        {"temperature": 0.0},
        {"top_k": 0},
        {"top_p": 1.0},
        {"min_p": 0.0},
        {"repetition_penalty": 1.0, "presence_penalty": 0.3},
        {"frequency_penalty": -0.5},
        {"logit_bias": {3: 1.0}},
    ):
        answer(engine, 20, 20, dataclasses.replace(WARM, **change), rows=2)
    assert compilations.new() == []


def test_another_plan_compiles_once(engine: Engine, compilations: Compilations) -> None:
    answer(engine, 20, 20, WARM)
    compilations.new()
    answer(engine, 20, 20, Sampling())
    assert compilations.new() == ["jit(step)"]
    answer(engine, 20, 20, Sampling())
    answer(engine, 20, 20, WARM)
    assert compilations.new() == []


def test_logits_compile_once_a_length_of_pieces(engine: Engine, compilations: Compilations) -> None:
    engine.logits(random_tokens(CONFIG, 150))
    compilations.new()
    for length in (1, 17, 96, 97, 128, 600):
        engine.logits(random_tokens(CONFIG, length))
    assert compilations.new() == []


def requests(seed: int, count: int) -> list[Text]:
    """Prompts of any length, with any mix of settings and log-probabilities; some to be scored."""
    rng = np.random.default_rng(seed)
    texts = [drawn_text(rng, longest=200, most=9) for _ in range(count)]
    return [
        Text(text.tokens, score_from=1) if i % 9 == 0 and len(text.tokens) > 1 else text
        for i, text in enumerate(texts)
    ]


def run_some(engine: Engine, texts: list[Text], seed: int) -> None:
    """And cancels some."""
    rng = np.random.default_rng(seed)

    def cancel_one(scheduler: Any, told: Any) -> None:
        there = [text for text in texts if text.pages and not text.over]
        if there and rng.random() < 0.05:
            scheduler.cancel(there[rng.integers(len(there))])

    watched(engine, texts, cancel_one)


def test_a_thousand_requests_need_a_dozen_programs(
    engine: Engine, compilations: Compilations
) -> None:
    """And once each kind has been met, none."""
    for part in range(3):
        run_some(engine, requests(part, 100), part)
    heard = Counter(compilations.new())
    assert sum(heard[name] for name in OURS) <= 12, heard
    # What is left makes empty arrays, and is a handful that all engines share.
    assert sum(heard.values()) <= 24, heard
    for part in range(3, 10):
        run_some(engine, requests(part, 100), part)
    assert compilations.new() == []


def test_what_is_compiled_ahead_is_all_that_is_needed(
    engine: Engine, compilations: Compilations
) -> None:
    engine.compile()
    compilations.new()
    answer(engine, 150, 20, WARM, rows=9)
    answer(engine, 150, 20, Sampling())
    assert not set(compilations.new()) & OURS


def test_so_it_is_for_texts_with_a_constraint(engine: Engine, compilations: Compilations) -> None:
    engine.compile(constrained=True)
    compilations.new()
    held = [Listed([[token] for token in range(2, 40)]), Listed([[2, 3]] * 20)]
    texts = [Text([3] * 150, 20, WARM, constraint=each) for each in held]
    run_to_end(engine, [*texts, Text([3], 20, constraint=Listed([[2], [3]] * 15))])
    assert not set(compilations.new()) & (OURS | {"jit(advance)", "jit(choose)"})


def test_a_prompt_needs_no_program_of_the_tokenizer(compilations: Compilations) -> None:
    """Which is read while that program is looked for."""
    config = dataclasses.replace(CONFIG, rope_theta=1e6 + next(numbers))
    for stop_ids, valid in ((1,), 40), ((2, 3), 39):
        engine = fresh_engine(config, slots=5, stop_ids=stop_ids, valid_tokens=valid)
        generate(engine, [Prompt(random_tokens(config, 40), 2)])
    assert Counter(compilations.new())["jit(extend)"] == 1
