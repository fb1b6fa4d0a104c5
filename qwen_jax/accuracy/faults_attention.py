"""Faults of attention: scale, heads, mask, cache, and the precision of its numbers."""

import numpy as np

from qwen_jax.accuracy.faults import Change, Fault, area, turn
from qwen_jax.accuracy.operations import Array, Calls
from qwen_jax.config import ModelConfig

READS = ("attn_scores", "attn_out")
NOWHERE = 1 << 30
"""A slot past every cache: what is written there is dropped."""


def tiled(config: ModelConfig) -> np.ndarray:
    return np.arange(config.num_heads) % config.num_kv_heads


def first_only(config: ModelConfig) -> np.ndarray:
    return np.zeros(config.num_heads, np.int64)


def windows(config: ModelConfig) -> list[Change]:
    """Of every power of two."""

    def window(size: int) -> Change:
        def visible(calls: Calls, slot: Array) -> Array:
            at = calls.position[:, None]
            return (slot <= at) & (slot > at - size)

        return {"visible": visible}

    return [window(1 << power) for power in (4, 1, 2, 3, *range(5, 17))]


def top_left(calls: Calls, slot: Array) -> Array:
    return slot <= (calls.position - calls.start)[:, None]


def whole_call(calls: Calls, slot: Array) -> Array:
    return slot < calls.stop[:, None]


def without_earlier_calls(calls: Calls, slot: Array) -> Array:
    return (slot <= calls.position[:, None]) & (slot >= calls.start[:, None])


def decode_without_itself(calls: Calls, slot: Array) -> Array:
    return slot <= (calls.position - calls.decode)[:, None]


def never_written(calls: Calls) -> Array:
    """Slots of decoded tokens stay empty."""
    return np.where(calls.decode, -1, calls.position)


def hole(calls: Calls) -> Array:
    """Decoded tokens one slot later; the first of these slots stays empty."""
    before = np.concatenate([[False], calls.decode[:-1]])
    return np.where(before, calls.position - 1, np.where(calls.decode, -1, calls.position))


ATTENTION = area(
    "attention",
    (
        Fault(
            "scale_missing",
            ("attn_scores",),
            "scores are not divided by sqrt(H)",
            knobs=turn(scale=lambda c: 1.0),
        ),
        Fault(
            "scale_twice",
            ("attn_scores",),
            "scores are divided by sqrt(H) twice",
            knobs=turn(scale=lambda c: 1 / c.head_dim),
        ),
        Fault(
            "scale_of_hidden_size",
            ("attn_scores",),
            "scores are divided by sqrt(D)",
            knobs=turn(scale=lambda c: c.hidden_size**-0.5),
            possible=lambda c: c.hidden_size != c.head_dim,
        ),
        Fault(
            "kv_heads_tiled",
            READS,
            "query head n reads key/value head n % K, not n // G",
            "ekzhang/jax-js#180",
            knobs=turn(kv_head=tiled),
            possible=lambda c: 1 < c.num_kv_heads < c.num_heads,
        ),
        Fault(
            "kv_heads_first_only",
            READS,
            "every query head reads key/value head 0",
            knobs=turn(kv_head=first_only),
            possible=lambda c: c.num_kv_heads > 1,
        ),
        Fault(
            "heads_inner",
            ("attn_out",),
            "attn_out has the heads as its inner axis",
            knobs=turn(dims_first=True),
            possible=lambda c: c.num_heads > 1,
        ),
    ),
)

MASK = area(
    "mask",
    (
        Fault(
            "mask_top_left",
            ("attn_scores",),
            "the causal mask counts from the call's start",
            "pytorch/executorch#21749",
            knobs=turn(visible=top_left),
        ),
        Fault(
            "mask_missing",
            ("attn_scores",),
            "a query sees all of its call, later tokens too",
            "huggingface/transformers#26569",
            knobs=turn(visible=whole_call),
        ),
        Fault(
            "mask_call_only",
            ("attn_scores",),
            "a query sees its own call alone",
            knobs=turn(visible=without_earlier_calls),
        ),
        Fault(
            "mask_decode_late",
            ("attn_scores",),
            "a decode step doesn't see its own token",
            knobs=turn(visible=decode_without_itself),
        ),
        Fault(
            "sliding_window",
            ("attn_scores",),
            "a query sees a window of a power of two positions",
            "huggingface/transformers#38002",
            knobs=windows,
        ),
    ),
)

CACHE = area(
    "cache",
    (
        Fault(
            "cache_stale",
            READS,
            "keys and values of decode steps are not written, and empty slots are read",
            "ggml-org/llama.cpp#27148",
            knobs=turn(held=never_written),
            slots=lambda start, decode: start + NOWHERE * decode,
        ),
        Fault(
            "cache_hole",
            READS,
            "decode steps write one slot late and leave a hole after the prompt",
            "microsoft/onnxruntime-genai#2354",
            knobs=turn(held=hole),
            slots=lambda start, decode: start + decode,
        ),
    ),
)
