"""Kernels lowered for CUDA at the shapes of every size, with the JAX at hand and without a GPU.

Layouts that don't fit, copies that can't be described and shared memory that isn't there show
here. An operation adds its arguments to `ARGUMENTS` and its kernels' names to `KERNELS`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import ShapeDtypeStruct

import pallas_kernels
from pallas_kernels.gqa_prefill_attention.tiling import Shape, best_tiling
from pallas_kernels.sample_tokens import Counts, settings, words
from tests.kernels import hopper
from tests.kernels.sizes import HEADS


def paged_cache(kv_heads, dim, rows, capacity, dtype, page=128) -> tuple[Any, ...]:
    """Pages of two layers' keys and values, and the block tables of both."""
    tables = ShapeDtypeStruct((rows, capacity // page), jnp.int32)
    pages = 2 * 2 * (rows * capacity // page + 1)
    return ShapeDtypeStruct((pages, kv_heads, page, dim), dtype), tables, tables


def decode_arguments(heads, kv_heads, dim, rows, capacity, dtype, page=128) -> tuple[Any, ...]:
    cache = paged_cache(kv_heads, dim, rows, capacity, dtype, page)
    q = ShapeDtypeStruct((rows, heads, dim), dtype)
    return q, *cache, ShapeDtypeStruct((rows,), jnp.int32)


def prefill_arguments(
    heads, kv_heads, dim, rows, capacity, dtype, steps=512, page=128
) -> tuple[Any, ...]:
    cache = paged_cache(kv_heads, dim, rows, capacity, dtype, page)
    q = ShapeDtypeStruct((rows, steps, heads, dim), dtype)
    where = ShapeDtypeStruct((rows,), jnp.int32)
    return q, *cache, where, where


def rope_arguments(heads, kv_heads, dim, rows, capacity, dtype) -> tuple[Any, ...]:
    q = ShapeDtypeStruct((rows, capacity, heads, dim), dtype)
    k = ShapeDtypeStruct((rows, capacity, kv_heads, dim), dtype)
    positions = ShapeDtypeStruct((rows, capacity), jnp.int32)
    return q, k, positions, ShapeDtypeStruct((dim // 2,), jnp.float32)


pytestmark = pytest.mark.usefixtures("as_if_on_hopper")

ARGUMENTS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "gqa_decode_attention": decode_arguments,
    "gqa_prefill_attention": prefill_arguments,
    "rope": rope_arguments,
}
KERNELS = {
    "gqa_decode_attention": ("gqa_decode_attention", "gqa_decode_attention_combine"),
    "gqa_prefill_attention": ("gqa_prefill_attention",),
    "rope": ("rope",),
}


def lower(operation: str, arguments: tuple[Any, ...]) -> str:
    def run(*args):
        return getattr(pallas_kernels, operation)(*args, implementation="mosaic_gpu")

    return hopper.lower(run, *arguments)


@pytest.mark.lower
@pytest.mark.parametrize(
    ("rows", "capacity", "dtype"),
    [(1, 32768, "bfloat16"), (8, 512, "float16")],
    ids=["1 long row", "8 short rows"],
)
@pytest.mark.parametrize("size", HEADS)
@pytest.mark.parametrize("operation", ARGUMENTS)
def test_lowers_at_real_shapes(operation, size, rows, capacity, dtype):
    text = lower(operation, ARGUMENTS[operation](*HEADS[size], rows, capacity, dtype))
    assert text.count("mosaic_gpu") >= len(KERNELS[operation])
    for name in KERNELS[operation]:
        assert name in text


@pytest.mark.lower
@pytest.mark.parametrize(
    ("rows", "capacity", "page"), [(1, 128, 128), (3, 768, 384), (64, 1024, 256), (300, 256, 128)]
)
def test_decode_attention_lowers_at_awkward_shapes(rows, capacity, page):
    arguments = decode_arguments(14, 2, 64, rows, capacity, "bfloat16", page)
    text = lower("gqa_decode_attention", arguments)
    # 300 rows keep all multiprocessors busy whole, and nothing is left to combine.
    assert ("gqa_decode_attention_combine" in text) == (rows < 300 and capacity > 128)


@pytest.mark.lower
@pytest.mark.parametrize(
    ("steps", "rows", "capacity", "page"),
    [
        (16, 1, 128, 128),
        (16, 300, 768, 384),
        (32, 3, 8192, 128),
        (64, 1, 8192, 256),
        (128, 64, 640, 128),
        (8192, 1, 8192, 128),
    ],
)
@pytest.mark.parametrize("size", ["0.5b", "14b"])
def test_prefill_attention_lowers_at_awkward_shapes(size, steps, rows, capacity, page):
    arguments = prefill_arguments(*HEADS[size], rows, capacity, "bfloat16", steps, page)
    lower("gqa_prefill_attention", arguments)


@pytest.mark.lower
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("size", ["0.5b", "7b"])
def test_prefill_attention_lowers_for_the_engines_chunks(size, rows):
    lower(
        "gqa_prefill_attention",
        prefill_arguments(*HEADS[size], rows, 32768, "bfloat16", steps=128),
    )


@pytest.mark.lower
@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("size", HEADS)
def test_a_large_table_alone_does_not_split_prefill_attention(size, rows):
    heads, kv_heads, dim = HEADS[size]
    large, small = (
        best_tiling(Shape(rows, 128, heads, kv_heads, capacity, dim)) for capacity in (32768, 2048)
    )
    assert large == small


@pytest.mark.lower
@pytest.mark.parametrize("pairs", [16, 32])
def test_rope_lowers_with_a_partial_rotary_dimension(pairs):
    q, k, positions, _ = rope_arguments(14, 2, 128, 3, 1, "bfloat16")
    lower("rope", (q, k, positions, ShapeDtypeStruct((pairs,), jnp.float32)))


def sampling_arguments(rows, vocab=151_936, dtype="float32", everything=True) -> tuple[Any, ...]:
    """Logits, settings and step; then bias, counts and mask, or none of them."""
    chosen = jax.tree.map(lambda x: ShapeDtypeStruct(x.shape, x.dtype), settings(rows))
    logits = ShapeDtypeStruct((rows, vocab), dtype)
    step = ShapeDtypeStruct((rows,), jnp.int32)
    if not everything:
        return logits, chosen, step, None, None, None
    mask = ShapeDtypeStruct((rows, words(vocab)), jnp.uint32)
    generated = ShapeDtypeStruct((rows, vocab), jnp.int32)
    bias = ShapeDtypeStruct((rows, vocab), jnp.float32)
    return logits, chosen, step, bias, Counts(mask, generated), mask


def lower_sampling(arguments: tuple[Any, ...], top_logprobs: int = 20) -> str:
    def run(logits, chosen, step, bias, counts, allowed):
        return pallas_kernels.sample_tokens(
            logits, chosen, step, bias=bias, counts=counts, allowed=allowed,
            valid_tokens=logits.shape[1] - 1, top_logprobs=top_logprobs,
            implementation="mosaic_gpu",
        )  # fmt: skip

    return hopper.lower(run, *arguments)


@pytest.mark.lower
@pytest.mark.parametrize(("rows", "everything"), [(1, True), (256, False)])
def test_sampling_lowers_for_one_row_and_for_more_than_multiprocessors(rows, everything):
    assert "sample_tokens" in lower_sampling(sampling_arguments(rows, everything=everything))


@pytest.mark.parametrize(
    ("arguments", "top_logprobs", "why"),
    [
        (sampling_arguments(2, dtype="bfloat16"), 20, "not bfloat16"),
        (sampling_arguments(2, vocab=1002), 20, "in fours, not 1002"),
        (sampling_arguments(2, vocab=2**18), 20, "not 262144"),
        (sampling_arguments(2), 300, "256 likeliest tokens, not 300"),
    ],
)
def test_what_the_sampling_kernel_cannot_serve_is_refused(arguments, top_logprobs, why):
    with pytest.raises(pallas_kernels.UnsupportedError, match=f"sample_tokens.*{why}"):
        lower_sampling(arguments, top_logprobs)


def prefill_refused(dtype="bfloat16", dim=64, page=128, steps=64) -> tuple[Any, ...]:
    return prefill_arguments(14, 2, dim, 1, 256, dtype, steps, page)


REFUSED = [
    ("gqa_prefill_attention", prefill_refused(dtype="float32"), "not float32"),
    ("gqa_prefill_attention", prefill_refused(dim=96), "64 or 128, not 96"),
    ("gqa_prefill_attention", prefill_refused(steps=8), "positions, not 8"),
    ("gqa_prefill_attention", prefill_refused(steps=96), "positions, not 96"),
    ("gqa_prefill_attention", prefill_refused(page=64), "128 slots, not 64"),
    ("gqa_prefill_attention", prefill_refused(page=192), "128 slots, not 192"),
    ("gqa_decode_attention", decode_arguments(14, 2, 64, 1, 256, "float32"), "not float32"),
    ("gqa_decode_attention", decode_arguments(14, 2, 96, 1, 256, "bfloat16"), "64 or 128, not 96"),
    ("gqa_decode_attention", decode_arguments(18, 2, 64, 1, 256, "bfloat16"), "8 query.*not 9"),
    ("gqa_decode_attention", decode_arguments(14, 2, 64, 1, 256, "bfloat16", 64), "not 64"),
    ("gqa_decode_attention", decode_arguments(14, 2, 64, 1, 384, "bfloat16", 192), "not 192"),
    ("rope", rope_arguments(14, 2, 64, 1, 256, "float32"), "not float32"),
    ("rope", rope_arguments(14, 2, 64, 1, 9, "bfloat16"), "positions, not 9"),
    ("rope", rope_arguments(14, 2, 80, 1, 16, "bfloat16"), "not 40 of 80"),
]


@pytest.mark.parametrize(("operation", "arguments", "why"), REFUSED)
def test_what_a_kernel_cannot_serve_is_refused_with_the_value(operation, arguments, why):
    """Asked for by name it raises; "auto" takes the reference, which serves everything."""
    with pytest.raises(pallas_kernels.UnsupportedError, match=f"{operation}.*{why}"):
        lower(operation, arguments)
    outputs = jax.eval_shape(getattr(pallas_kernels, operation), *arguments)
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    assert first.shape == arguments[0].shape
