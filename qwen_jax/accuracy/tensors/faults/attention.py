"""Faults of attention: scale, heads, mask, cache, and the precision of its numbers."""

from collections.abc import Callable

import ml_dtypes
import numpy as np

from qwen_jax.accuracy.exact.operations import Array, Calls
from qwen_jax.accuracy.tensors.faults.fault import Change, Fault, area, turn
from qwen_jax.config import ModelConfig

READS = ("attn_scores", "attn_out")
NOWHERE = 1 << 30
"""A slot past every cache: what is written there is dropped."""


def tiled(config: ModelConfig) -> np.ndarray:
    return np.arange(config.num_heads) % config.num_kv_heads


def first_only(config: ModelConfig) -> np.ndarray:
    return np.zeros(config.num_heads, np.int64)


def windows(first: int) -> Callable[[ModelConfig], list[Change]]:
    """Of every power of two, with so many first positions that stay visible."""

    def window(size: int) -> Change:
        def visible(calls: Calls, slot: Array) -> Array:
            at = calls.position[:, None]
            return (slot <= at) & ((slot > at - size) | (slot < first))

        return {"visible": visible}

    sizes = [1 << power for power in (4, 1, 2, 3, *range(5, 17))]
    return lambda config: list(map(window, sizes))


def one_ahead(calls: Calls, slot: Array) -> Array:
    return (slot <= calls.position[:, None] + 1) & (slot < calls.stop[:, None])


def one_behind(calls: Calls, slot: Array) -> Array:
    """The first position has nothing else to see, so it sees itself."""
    at = calls.position[:, None]
    return (slot < at) | ((slot == 0) & (at == 0))


def strictly_behind(calls: Calls, slot: Array) -> Array:
    return slot < calls.position[:, None]


def added(number: float) -> Change:
    return {"hidden": lambda score: score + number}


def instead(number: float) -> Change:
    return {"hidden": lambda score: number}


def finite_masks(config: ModelConfig) -> list[Change]:
    """Round numbers and dtypes' least. A score added to one beyond 1e9 is lost in float32."""
    least = [float(ml_dtypes.finfo(dtype).min) for dtype in ("float16", "bfloat16", "float32")]
    small = [-1e4, least[0], -1e5, -1e6, -1e8, -100.0]
    large = [-1e9, -1e10, -1e30, *least[1:], least[2] / 2, 0.7 * least[2]]
    return [*map(instead, large), *map(added, small), *map(instead, small)]


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
            "softmax_sink",
            ("attn_probs",),
            "a sink of score 0 takes part in the softmax: its sum is 1 more",
            knobs=turn(sink=0.0),
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
            "mask_one_ahead",
            ("attn_scores",),
            "a query sees the token after its own",
            knobs=turn(visible=one_ahead),
        ),
        Fault(
            "mask_one_behind",
            ("attn_scores",),
            "a query doesn't see its own token",
            knobs=lambda config: ({"visible": one_behind}, {"visible": strictly_behind}),
        ),
        Fault(
            "mask_finite",
            ("attn_scores",),
            "masked scores are a number such as -1e9, not -inf, and no mapping says so",
            knobs=finite_masks,
        ),
        Fault(
            "sliding_window",
            ("attn_scores",),
            "a query sees a window of a power of two positions",
            "huggingface/transformers#38002",
            knobs=windows(0),
        ),
        Fault(
            "sink_window",
            ("attn_scores",),
            "a query sees a window of a power of two positions, and the first four as sinks",
            knobs=windows(4),
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
