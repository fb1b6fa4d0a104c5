"""The models behind tests/golden: `tools/make_golden.py` writes them, test_parity.py reads them.

Parameters and prompts are drawn from a seed, so that a golden file need hold only what
transformers made of them, and a fingerprint that shows when the draws have changed.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from qwen_jax.config import ModelConfig, YarnScaling
from tests.tiny_checkpoints import Parameters, random_parameters, tiny_config

GOLDEN = Path(__file__).parent / "golden"
PROMPT = 512
CONTINUATION = 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One model; odd sizes on purpose: N/K = 3, N * H = 192 is not D, nothing a power of two."""

    config: ModelConfig
    seed: int

    def parameters(self) -> Parameters:
        """Random parameters with queries three times as long.

        Attention of plain random ones is all but uniform, and greedy text one token repeated;
        peaked attention makes it follow the context, so that a wrong cache shows.
        """
        drawn = random_parameters(self.config, self.seed)
        queries = [name for name in drawn if name.endswith("q_proj.weight")]
        return drawn | {name: 3 * drawn[name] for name in queries}

    def prompt(self) -> list[int]:
        rng = np.random.default_rng([self.seed, 1])
        return rng.integers(0, self.config.vocab_size, PROMPT).tolist()


def odd_config(**changes: object) -> ModelConfig:
    """A vocabulary of 61 keeps the logits of 512 positions at 125 kB."""
    sizes = {"num_layers": 3, "hidden_size": 96, "ffn_size": 224, "vocab_size": 61}
    return tiny_config(**sizes | changes)


# With these, pairs 0 and 1 keep their frequency, 4 to 15 are slowed, 2 and 3 lie between.
YARN = YarnScaling.create(4.0, 160, beta_fast=8.0)

CASES = {
    "tied": Case(odd_config(tied=True), seed=3),
    "untied": Case(odd_config(tied=False), seed=6),
    "yarn": Case(odd_config(tied=True, yarn=YARN, context_length=640), seed=2),
}


def fingerprint(params: Mapping[str, np.ndarray]) -> np.ndarray:
    """One float64 a tensor that moves with every value and its place."""
    return np.array(
        [x.ravel().astype(np.float64) @ np.cos(np.arange(x.size)) for x in params.values()]
    )
