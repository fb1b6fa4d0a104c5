"""The engine against transformers' own numbers, from the files tools/make_golden.py wrote.

Errors are relative: ||ours - theirs|| / ||theirs||, at each position by itself.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.config import ModelConfig
from qwen_jax.engine.engine import Engine
from tests.engines import Prompt, decoded_logprobs, device_parameters, generate, relative
from tests.golden_cases import CASES, CONTINUATION, GOLDEN, PROMPT, fingerprint
from tests.numpy_reference import log_softmax

FLOAT32_BOUND = 1e-5

cases = pytest.mark.parametrize("name", CASES)


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def engine(name: str, dtype: str = "float32") -> Engine:
    case = CASES[name]
    return Engine(case.config, device_parameters(case.parameters(), dtype))


@functools.cache
def prefill_logits(name: str, dtype: str = "float32") -> np.ndarray:
    return engine(name, dtype).logits(CASES[name].prompt())


def worst_position(ours: np.ndarray, theirs: np.ndarray) -> float:
    return max(relative(a, b) for a, b in zip(ours, theirs, strict=True))


def rounding_bound(config: ModelConfig, dtype: str) -> float:
    """What rounding to `dtype` may do to the logits, as a relative error.

    One rounding changes a vector by u / sqrt(3) of its norm, u = eps / 2, since errors are
    uniform. On the way to the logits lie the embedding, the final norm and the head and, in each
    layer, 18: 6 weight matrices, 2 norms, qkv, rope, softmax weights, attn_out, o_proj, gate_up,
    ffn_act, down_proj and 2 residual sums. Independent errors add in quadrature. Four of a
    layer's (norm, qkv's weights, qkv, rope) pass through the softmax, which turns a relative
    error of its scores into an absolute one: they grow by the scores' standard deviation, 4 in
    these models (queries 3.2, keys 1.2 long in each dimension).
    """
    score = 4.0
    roundings = 3 + config.num_layers * (14 + 4 * score**2)
    return float(jnp.finfo(dtype).eps) / 2 * math.sqrt(roundings / 3)


@cases
def test_parameters_and_prompt_are_those_of_the_golden_file(name: str) -> None:
    np.testing.assert_allclose(
        fingerprint(CASES[name].parameters()),
        golden(name)["fingerprint"],
        rtol=1e-6,
        err_msg="NumPy or random_parameters draws differently; run python -m tools.make_golden",
    )
    assert golden(name)["logits"].shape == (PROMPT, CASES[name].config.vocab_size)


@cases
def test_logits_at_every_position(name: str) -> None:
    theirs = golden(name)["logits"]
    assert worst_position(prefill_logits(name), theirs) <= FLOAT32_BOUND
    assert relative(prefill_logits(name), theirs) <= FLOAT32_BOUND


@cases
def test_decoding_token_by_token_equals_prefill(name: str) -> None:
    prefill, theirs = prefill_logits(name), golden(name)["logits"]
    decoded = decoded_logprobs(engine(name), CASES[name].prompt())
    # A decode step reports log-probabilities; adding the constant back makes them logits.
    constant = (theirs - log_softmax(theirs)).mean(axis=-1, keepdims=True)
    assert worst_position(decoded + constant, prefill) <= FLOAT32_BOUND
    assert worst_position(decoded + constant, theirs) <= FLOAT32_BOUND
    assert (decoded.argmax(-1) == prefill.argmax(-1)).all()


@cases
def test_greedy_continuation_is_identical(name: str) -> None:
    prompts = [Prompt(CASES[name].prompt(), CONTINUATION)]
    ours = generate(engine(name), prompts).tokens[0]
    theirs = golden(name)["continuation"].tolist()
    assert ours == theirs
    assert len(set(theirs)) > 8, "a text of few tokens would prove little"


def test_yarn_matters_in_the_golden_files() -> None:
    case = CASES["yarn"]
    plain = dataclasses.replace(case.config, yarn=None)
    without = Engine(plain, device_parameters(case.parameters(), "float32"))
    assert relative(without.logits(case.prompt()), golden("yarn")["logits"]) > 0.1


@cases
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_within_its_rounding(name: str, dtype: str) -> None:
    error = relative(prefill_logits(name, dtype), golden(name)["logits"])
    assert error <= rounding_bound(CASES[name].config, dtype)
    assert error > FLOAT32_BOUND, "half precision that is this exact is not half precision"
