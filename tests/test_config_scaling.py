"""Rotary settings in all their spellings: what transformers and llama.cpp take them for."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from qwen_jax.config import YarnScaling
from qwen_jax.model.rotary import inverse_frequencies
from tests.numpy_reference import rope_frequencies
from tests.test_config import from_gguf, from_hf, refusal, released_gguf, released_hf
from tests.tiny_checkpoints import gguf_metadata, hf_config, tiny_config

PLAIN = from_hf(released_hf("7B"))
YARN = YarnScaling.create(4.0, 32768)
GGUF_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}


def gguf(keys: dict[str, Any]) -> Any:
    own = {f"qwen2.{key}": value for key, value in keys.items()}
    return from_gguf(released_gguf("7B") | own, vocab_size=152_064, tied=False)


def hf(**changes: Any) -> Any:
    return from_hf(released_hf("7B", **changes))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope.scale_linear": 2.0}, {"linear_factor": 2.0, "context_length": 65536}),
        ({"rope.scaling.factor": 2.0}, {"linear_factor": 2.0, "context_length": 65536}),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
            | {"rope.scaling.original_context_length": 8192},
            {"linear_factor": 4.0},
        ),
        ({"rope.scaling.type": "linear"}, {}),
        ({"rope.scaling.factor": 0.0}, {}),
        ({"rope.scaling.factor": 1}, {}),
        ({"rope.scaling.factor": 2.0, "rope.scale_linear": 2.0, "rope.scaling.type": "none"}, {}),
        (GGUF_YARN, {"yarn": YARN, "context_length": 131072}),
        (
            {"rope.scaling.type": "yarn", "rope.scale_linear": 4.0},
            {"yarn": YARN, "context_length": 131072},
        ),
        (
            GGUF_YARN | {"rope.scaling.original_context_length": 0},
            {"yarn": YARN, "context_length": 131072},
        ),
        ({"rope.dimension_count": 64}, {"rope_dim": 64}),
        ({"rope.dimension_count": 128}, {}),
    ],
    ids=str,
)
def test_what_gguf_says(keys: dict[str, Any], expected: dict[str, Any]) -> None:
    """As llama.cpp's load_hparams reads it; without a type, a factor is linear."""
    assert gguf(keys) == dataclasses.replace(PLAIN, **expected)


HF_YARN = {"type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            {"linear_factor": 2.0, "context_length": 65536},
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}},
            {"linear_factor": 2.0, "context_length": 65536},
        ),
        (
            {
                "rope_scaling": {
                    "type": "linear",
                    "factor": 2.0,
                    "original_max_position_embeddings": 9,
                }
            },
            {"linear_factor": 2.0},
        ),
        ({"rope_scaling": HF_YARN}, {"yarn": YARN, "context_length": 131072}),
        (
            {"rope_scaling": HF_YARN | {"original_max_position_embeddings": None}},
            {"yarn": YARN, "context_length": 131072},
        ),
        (
            {"rope_scaling": HF_YARN, "original_max_position_embeddings": 8192},
            {"yarn": YarnScaling.create(4.0, 8192)},
        ),
        (
            {"rope_scaling": HF_YARN, "rope_parameters": HF_YARN | {"rope_type": "yarn"}},
            {"yarn": YARN, "context_length": 131072},
        ),
        (
            {"rope_scaling": HF_YARN, "rope_parameters": {"rope_theta": 1e6}},
            {"yarn": YARN, "context_length": 131072},
        ),
        (
            {"rope_parameters": {"full_attention": HF_YARN, "sliding_attention": None}},
            {"yarn": YARN, "context_length": 131072},
        ),
        ({"rope_scaling": {"factor": 1.0}}, {}),
        ({"rope_scaling": {}}, {}),
        ({"rope_scaling": {"rope_type": None, "rope_theta": 1e6}}, {}),
        ({"partial_rotary_factor": 0.5}, {"rope_dim": 64}),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, {"rope_dim": 32}),
        ({"partial_rotary_factor": 1}, {}),
        (
            {"dual_chunk_attention_config": {"chunk_size": 9000, "local_size": 1000}},
            {"context_length": 8000},
        ),
    ],
    ids=str,
)
def test_what_config_json_says(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    assert hf(**changes) == dataclasses.replace(PLAIN, **expected)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        *(
            ({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, f"rope_scaling is {kind!r}, and")
            for kind in ("dynamic", "longrope", "llama3", "mrope", "proportional", "su", "none")
        ),
        ({"rope_scaling": {"factor": 4}}, "rope_scaling has the factor 4 and no rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "'rope_scaling.factor' is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0.0, but it must be above"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "yarn"}},
            "rope_scaling.type is 'linear'",
        ),
        ({"rope_scaling": 4}, "rope_scaling is 4, and no mapping"),
        ({"rope_scaling": []}, "rope_scaling is [], and no mapping"),
        ({"rope_parameters": {"full_attention": None}}, "full_attention is None, and no mapping"),
        (
            {"rope_scaling": HF_YARN, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling is {'type': 'yarn', 'factor': 4.0}, but rope_parameters is {'rope_type':",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4}},
            "rope_theta is 1000000.0, but rope_parameters.rope_theta is 10000.0; keep",
        ),
        (
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}},
            "partial_rotary_factor is 0.5, but rope_parameters.partial_rotary_factor is 0.25",
        ),
        (
            {
                "rope_scaling": HF_YARN | {"original_max_position_embeddings": 32768},
                "original_max_position_embeddings": 8192,
            },
            "original_max_position_embeddings is 8192, but rope_scaling.original_max_position_emb",
        ),
        *(
            ({"partial_rotary_factor": part}, f"partial_rotary_factor is {part}, and of a head's")
            for part in (0.4, 0.001, 1.5, -0.5, 0.0)  # 51 dimensions, 0, 192, ...
        ),
        ({"rope_scaling": HF_YARN | {"factor": 1e308}}, "a factor up to 1e+06"),
        ({"rope_scaling": {"type": "linear", "factor": 1e-300}}, "and from 1e-06 to 1e+06"),
        ({"rope_scaling": HF_YARN | {"attention_factor": 1e300}}, "needs a positive attention_fa"),
        ({"rope_theta": 1e200}, "rope_theta is 1e+200, but it must be a finite number above 1"),
        ({"rope_scaling": {"type": "", "factor": 4.0}}, "rope_scaling has the factor 4.0 and no"),
        ({"rope_scaling": HF_YARN, "max_position_embeddings": 10**400}, "not a size"),
        ({"partial_rotary_factor": 0.5, "head_dim": 10**400}, "not a size"),
        ({"partial_rotary_factor": 10**400}, "not a finite number"),
    ],
    ids=str,
)
def test_contradictions_and_other_scalings_are_refused(changes: dict[str, Any], says: str) -> None:
    assert says in refusal(from_hf, released_hf("7B", **changes))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"rope.scaling.type": "longrope"}, "qwen2.rope.scaling.type is 'longrope'"),
        ({"rope.scaling.type": "yarn"}, "'qwen2.rope.scaling.factor' is missing"),
        ({"rope.scaling.factor": -2.0}, "factor is -2.0, but it must be above 0"),
        (
            {"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0},
            "qwen2.rope.scaling.factor is 2.0, but qwen2.rope.scale_linear is 4.0",
        ),
        *(
            ({"rope.dimension_count": count}, f"rope_dim (the rotated part of a head) is {count}")
            for count in (63, 130)
        ),
        ({"rope.dimension_count": 0}, "rope_dim is 0, but it must be at least 1"),
    ],
    ids=str,
)
def test_other_gguf_scalings_are_refused(keys: dict[str, Any], says: str) -> None:
    own = {f"qwen2.{key}": value for key, value in keys.items()}
    assert says in refusal(from_gguf, released_gguf("7B") | own)


ODD = {
    "partial": tiny_config(rope_dim=12),
    "linear": tiny_config(linear_factor=4.0),
    "partial and linear": tiny_config(rope_dim=24, linear_factor=2.0),
    "partial and YaRN": tiny_config(rope_dim=24, yarn=YarnScaling.create(4.0, 256, beta_fast=8.0)),
    "plain": tiny_config(),
}


@pytest.mark.parametrize("name", ODD)
def test_both_formats_say_it(name: str) -> None:
    config = ODD[name]
    metadata = gguf_metadata(config) | {"general.architecture": "qwen2"}
    assert from_gguf(metadata, vocab_size=320) == from_hf(hf_config(config)) == config


@pytest.mark.parametrize("name", ODD)
def test_frequencies(name: str) -> None:
    ours = inverse_frequencies(ODD[name])
    assert ours.shape == (ODD[name].rope_dim // 2,) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, rope_frequencies(ODD[name]), rtol=2**-23)
