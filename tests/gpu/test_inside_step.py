"""The decode step's kernels on a GPU from inside: every operation of theirs beside float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_step import StepPlan, decode_step
from qwen_jax.accuracy.inside.audit import audit_inside, inside_table
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.weights import pack
from tests.gpu.test_blocks import SHAPES, plan_of
from tests.gpu.test_decode_step import CACHE, CONFIGS, parameters
from tests.kernels.emulated_step import SEED, Case, drawn, poisoned
from tests.kernels.inside_step import on_gpu, worst

ROWS = (1, 8, 64)


def check(case: Case) -> None:
    """Recording changes no bit, and no operation is past its bound."""
    step = jax.jit(decode_step, static_argnames=("plan", "implementation"))
    inputs = case._asdict() | {"pages": poisoned(case), "implementation": "mosaic_gpu"}
    plain = step(**inputs)
    logits, new, found = on_gpu(case)
    assert np.array_equal(plain[0], logits)
    assert np.array_equal(plain[1], new)
    print(f"seed {SEED}:", {name: f"{ratio:.3f}" for name, ratio in worst(found).items()})
    faults = [f for f in found if f.verdict == "fault"]
    assert faults == []


def positions(rows: int) -> list[int]:
    """Of rows of many lengths; from 257 on several blocks share one of few rows."""
    return [(700 - 97 * n) % 1000 for n in range(rows)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("name", "stored", "cache"),
    [
        *(("0.5b", *dtypes) for dtypes in itertools.product(("bfloat16", "float16"), repeat=2)),
        ("1.5b", "bfloat16", "bfloat16"),
        ("7b", "bfloat16", "bfloat16"),
        ("7b", "float16", "float16"),
    ],
)
def test_numbers(name: str, stored: str, cache: str, rows: int) -> None:
    plan = StepPlan.uniform(SHAPES[name], jax.local_devices()[0].core_count, stored)
    check(drawn(plan.shape, plan.blocks, positions(rows), 8, plan, cache=cache))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("name", "mix"),
    [
        *itertools.product(["0.5b"], ["q8_0", "simple", "0.5b"]),
        *itertools.product(["1.5b"], ["k", "others", "integers", "layers"]),
        *itertools.product(["7b"], ["q8_0", "q4_k"]),
    ],
)
def test_blocks(name: str, mix: str, rows: int) -> None:
    plan = plan_of(name, mix)
    check(drawn(plan.shape, plan.blocks, positions(rows), 8, plan, cache="bfloat16"))


@pytest.mark.parametrize("rows", [*range(2, 18), 24, 33, 48, 63])
def test_other_numbers_of_rows(rows: int) -> None:
    plan = plan_of("small", "q8_0")
    check(drawn(plan.shape, plan.blocks, positions(rows), 8, plan, cache="float16"))
    plan = StepPlan.uniform(plan.shape, plan.blocks, "bfloat16")
    check(drawn(plan.shape, plan.blocks, positions(rows), 8, plan, cache="bfloat16"))


def test_an_engine() -> None:
    """As `run.py compare --parts=inside` does it, with keys and values of the engine's prefill."""
    config = CONFIGS["0.5b"]
    packed = pack(config, parameters(config, SEED).items(), jnp.dtype("bfloat16"), "mosaic_gpu")
    engine = Engine(config, packed, cache_tokens=CACHE)
    found = audit_inside(engine, list(range(100, 140)), ROWS)
    print(inside_table(found).text())
    assert [f for f in found if f.verdict == "fault"] == []
    assert {f.rows for f in found} == set(ROWS)
    assert {f.layer for f in found} == {None, *range(config.num_layers)}
