"""The engine against transformers as it is installed, on models drawn afresh in every run.

Needs the 'parity' extra. A failure's test id holds the seed; QWEN_JAX_LIVE_SEED repeats the run
(the seeds of all tests follow from it).
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="live parity needs pip install '.[hf]'")
pytest.importorskip("transformers", reason="live parity needs pip install '.[hf]'")

from transformers import AutoModelForCausalLM

from qwen_jax.config import ModelConfig, YarnScaling
from qwen_jax.engine.engine import Engine
from qwen_jax.model.rotary import inverse_frequencies
from qwen_jax.weights.loader import load_parameters, open_checkpoint
from tests import transformers_reference
from tests.engines import Prompt, device_parameters, generate, relative
from tests.golden_cases import CASES, CONTINUATION, Case, odd_config
from tests.tiny_checkpoints import hf_config, write_gguf, write_hf

pytestmark = pytest.mark.live

FLOAT32_BOUND = 1e-5
SEEDS = np.random.default_rng(int(os.environ["QWEN_JAX_LIVE_SEED"])).integers(2**31, size=2)
NEAR_TIE = 1e-3
"""Two tokens closer than this, some hundred times the logits' error, may honestly swap."""

seeds = pytest.mark.parametrize("seed", SEEDS.tolist())


@seeds
@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_text(name: str, seed: int) -> None:
    case = dataclasses.replace(CASES[name], seed=seed)
    params, prompt = case.parameters(), case.prompt()
    reference = transformers_reference.model(case.config, params)
    engine = Engine(case.config, device_parameters(params, "float32"))
    assert_same_logits(engine, reference, prompt)

    theirs, margins = transformers_reference.greedy(reference, prompt, CONTINUATION)
    ours = generate(engine, [Prompt(prompt, CONTINUATION)]).tokens[0]
    certain = int(np.argmin([*(margins > NEAR_TIE), False]))
    assert ours[:certain] == theirs[:certain]


def assert_same_logits(engine: Engine, reference: object, prompt: list[int]) -> None:
    theirs = transformers_reference.logits(reference, prompt)
    assert relative(engine.logits(prompt), theirs) <= FLOAT32_BOUND


@seeds
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_K", "HF float32", "HF bfloat16"])
def test_checkpoint_from_disk(tmp_path: Path, kind: str, tied: bool, seed: int) -> None:
    """One file through our loader; its values, decoded by gguf or transformers, through theirs."""
    # Rows of 256 are the least that k-quants hold.
    case = Case(odd_config(hidden_size=256, num_layers=2, tied=tied), seed)
    if kind.startswith("HF"):
        written = write_hf(
            tmp_path / "hf", case.config, case.parameters(), dtype=kind[3:], shards=2
        )
        reference = AutoModelForCausalLM.from_pretrained(
            written.path, dtype="float32", attn_implementation="eager"
        ).eval()
    else:
        written = write_gguf(
            tmp_path / "model.gguf", case.config, case.parameters(), types=kind, seed=seed
        )
        reference = transformers_reference.model(case.config, written.parameters)
    checkpoint = open_checkpoint(written.path)
    engine = Engine(checkpoint.config, load_parameters(checkpoint, "float32"))
    assert_same_logits(engine, reference, case.prompt())


@pytest.mark.parametrize("hidden", [896, 1536])
def test_yarn_frequencies_of_real_shapes(hidden: int) -> None:
    """32,768 positions stretched four times, as the Qwen2.5 model cards say."""
    head_dim = 64 if hidden == 896 else 128
    yarn = YarnScaling.create(4.0, 32768)
    config = odd_config(
        hidden_size=hidden, head_dim=head_dim, yarn=yarn, context_length=131072, num_layers=1
    )
    assert_same_frequencies(config)


@seeds
def test_yarn_frequencies_of_random_settings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        yarn = YarnScaling.create(
            float(rng.uniform(1, 40)), int(rng.integers(64, 40000)),
            beta_fast=float(rng.uniform(8, 64)), beta_slow=float(rng.uniform(0.1, 4)),
        )  # fmt: skip
        config = odd_config(
            yarn=yarn,
            rope_theta=float(10 ** rng.uniform(3, 7)),
            head_dim=int(rng.choice([32, 64, 128])),
        )
        assert_same_frequencies(config)


def assert_same_frequencies(config: ModelConfig) -> None:
    from transformers import Qwen2Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert config.yarn is not None
    theirs, factor = ROPE_INIT_FUNCTIONS["yarn"](Qwen2Config(**hf_config(config)), "cpu")
    # transformers computes powers of theta in float32: a few units in the last place.
    np.testing.assert_allclose(inverse_frequencies(config), theirs.numpy(), rtol=1e-6)
    assert config.yarn.attention_factor == pytest.approx(factor, rel=1e-12)
