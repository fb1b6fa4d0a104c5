"""Rotary frequencies of a model, scaled ones included; `pallas_kernels.rope` rotates."""

import math

import numpy as np

from qwen_jax.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Radians per position of each of the R/2 pairs, float32 `[R/2]`.

    Source: Su et al., 2021, section 3.2.2; for linear scaling, Chen et al., 2023, which divides
    positions; for YaRN, Peng et al., 2023, section 3.2:
    pairs that turn more than beta_fast times in the original context keep their frequency,
    those that turn less than beta_slow times are slowed by the factor, with a linear ramp
    over the pair's index between them.
    """
    half, theta = config.rope_dim // 2, config.rope_theta
    plain = theta ** (-np.arange(half, dtype=np.float64) / half)
    yarn = config.yarn
    if yarn is None:
        return (plain / config.linear_factor).astype(np.float32)

    def pair_that_turns(times: float) -> float:
        return half * math.log(yarn.original_context / (times * 2 * math.pi)) / math.log(theta)

    # Whole indices, at least 0 and at most R - 1, as in the authors' code and transformers.
    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), config.rope_dim - 1)
    ramp = np.clip((np.arange(half) - low) / max(high - low, 0.001), 0, 1)
    return (plain * (1 - ramp) + plain / yarn.factor * ramp).astype(np.float32)
