"""Faults of the rotary embedding: pairs, frequencies, positions, precision of the angle."""

import dataclasses
from collections.abc import Callable

import numpy as np

from qwen_jax.accuracy.exact.operations import Array, Calls
from qwen_jax.accuracy.tensors.faults.fault import Change, Fault, area, turn
from qwen_jax.config import ModelConfig, YarnScaling
from qwen_jax.model.rotary import inverse_frequencies

Frequencies = Callable[[ModelConfig], np.ndarray]

ROPE = ("q_rope", "k_rope")


def theta(value: float) -> Frequencies:
    return lambda config: inverse_frequencies(dataclasses.replace(config, rope_theta=value))


def rotated(part: Callable[[ModelConfig], int]) -> Frequencies:
    return lambda config: inverse_frequencies(dataclasses.replace(config, rope_dim=part(config)))


def first_pairs(share: float) -> Frequencies:
    """The other pairs of the same dimensions stand still."""

    def frequencies(config: ModelConfig) -> np.ndarray:
        right = inverse_frequencies(config)
        return np.where(np.arange(len(right)) < share * len(right), right, 0)

    return frequencies


def parts_of_head(config: ModelConfig) -> list[Change]:
    """Half, a quarter and three quarters: the first dimensions with frequencies of their own, as
    GPT-NeoX, or the first pairs."""
    shares = (0.5, 0.25, 0.75)
    sizes = [int(share * config.rope_dim) for share in shares]
    own = [rotated(lambda config, size=size: size) for size in sizes if size % 2 == 0]  # type: ignore[misc]
    return [{"frequencies": f} for f in (*own, *map(first_pairs, shares))]


def yarn(config: ModelConfig) -> np.ndarray:
    scaled = YarnScaling.create(4.0, 32768)
    return inverse_frequencies(dataclasses.replace(config, yarn=scaled, linear_factor=1.0))


def unscaled(config: ModelConfig) -> np.ndarray:
    return inverse_frequencies(dataclasses.replace(config, yarn=None, linear_factor=1.0))


def restarted(calls: Calls) -> Array:
    return calls.position - calls.start


def late(calls: Calls) -> Array:
    return calls.position - calls.decode


def ahead(calls: Calls) -> Array:
    return calls.position + calls.decode


PLAIN = YarnScaling.create(4.0, 32768).attention_factor


FAULTS = area(
    "rope",
    (
        Fault(
            "rope_interleaved",
            ROPE,
            "dimensions 2i and 2i + 1 are rotated as a pair, not i and i + H/2",
            "huggingface/candle#3410",
            knobs=turn(interleaved=True),
        ),
        Fault(
            "rope_theta_1e4",
            ROPE,
            "theta is 10,000",
            "vllm-project/vllm#56066",
            knobs=turn(frequencies=theta(1e4)),
            possible=lambda c: c.rope_theta != 1e4,
        ),
        Fault(
            "rope_theta_5e5",
            ROPE,
            "theta is 500,000",
            knobs=turn(frequencies=theta(5e5)),
            possible=lambda c: c.rope_theta != 5e5,
        ),
        Fault("rope_missing", ROPE, "nothing is rotated", knobs=turn(direction=0)),
        Fault("rope_reversed", ROPE, "the rotation turns the other way", knobs=turn(direction=-1)),
        Fault(
            "rope_part_of_head",
            ROPE,
            "only a part of what should be is rotated: half, a quarter or three quarters",
            knobs=parts_of_head,
            possible=lambda c: not c.rope_dim % 4,
        ),
        Fault(
            "rope_whole_head",
            ROPE,
            "all of every head is rotated where only a part should be",
            knobs=turn(frequencies=rotated(lambda c: c.head_dim)),
            possible=lambda c: c.rope_dim < c.head_dim,
        ),
        Fault(
            "rope_unscaled",
            ROPE,
            "the scaling of the context is left out",
            knobs=turn(frequencies=unscaled, attention_factor=1.0),
            possible=lambda c: c.yarn is not None or c.linear_factor != 1,
        ),
        Fault(
            "rope_yarn",
            ROPE,
            "YaRN of factor 4 is applied to a model without it",
            knobs=turn(frequencies=yarn, attention_factor=PLAIN),
            possible=lambda c: c.yarn is None,
        ),
        Fault(
            "rope_phase_bf16",
            ROPE,
            "position, frequency and angle are bfloat16",
            "huggingface/candle#3520",
            knobs=turn(phase="bfloat16"),
        ),
        Fault(
            "rope_phase_f16",
            ROPE,
            "position, frequency and angle are float16",
            knobs=turn(phase="float16"),
        ),
        Fault(
            "rope_from_one",
            ROPE,
            "positions count from one",
            knobs=turn(position=lambda calls: calls.position + 1),
        ),
        Fault(
            "rope_restarted",
            ROPE,
            "positions start from zero in every call, so decoding is stuck there",
            "Blaizzy/mlx-vlm#1983",
            knobs=turn(position=restarted),
        ),
        Fault(
            "rope_decode_late",
            ROPE,
            "decode steps rotate by the position before",
            "Blaizzy/mlx-vlm#1983",
            knobs=turn(position=late),
        ),
        Fault(
            "rope_decode_ahead",
            ROPE,
            "decode steps rotate by the position after",
            "microsoft/onnxruntime-genai#2354",
            knobs=turn(position=ahead),
        ),
        Fault(
            "rope_k_constant",
            ("k_rope",),
            "all keys of a call are rotated by its first position",
            "jundot/omlx#2363",
            knobs=turn(position=lambda calls: calls.start),
        ),
        Fault("rope_k_missing", ("k_rope",), "keys are not rotated", knobs=turn(direction=0)),
        Fault("rope_q_missing", ("q_rope",), "queries are not rotated", knobs=turn(direction=0)),
    ),
)
