"""Which implementation runs: taken by its name, never replaced in silence."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from absl import logging

import pallas_kernels
from pallas_kernels.sample_tokens import settings

X = np.ones((1, 1, 2, 4), np.float32)
PAGES = np.ones((2, 1, 3, 4), np.float32)
ONE = np.ones(1, np.int32)
TABLE = np.zeros((1, 1), np.int32)

CALLS: dict[str, Callable[..., Any]] = {
    "rope": lambda **kw: pallas_kernels.rope(X, X, ONE[None], np.ones(2, np.float32), **kw),
    "gqa_prefill_attention": lambda **kw: pallas_kernels.gqa_prefill_attention(
        X, PAGES, TABLE, TABLE, 0 * ONE, ONE, **kw
    ),
    "gqa_decode_attention": lambda **kw: pallas_kernels.gqa_decode_attention(
        X[:, 0], PAGES, TABLE, TABLE, ONE, **kw
    ),
    # Only traced: which one runs is decided before anything is computed.
    "sample_tokens": lambda **kw: jax.eval_shape(
        lambda: pallas_kernels.sample_tokens(
            X[0, 0], settings(2), np.zeros(2, np.int32), valid_tokens=4, top_logprobs=1, **kw
        )
    ),
}


def test_the_operations_of_a_layer_are_covered() -> None:
    assert set(CALLS) <= set(pallas_kernels.OPERATIONS)


@pytest.mark.parametrize("operation", CALLS)
def test_a_kernel_that_cannot_run_on_a_cpu_is_refused_by_name(operation: str) -> None:
    with pytest.raises(pallas_kernels.UnsupportedError, match=f"'mosaic_gpu'.*{operation} "):
        CALLS[operation](implementation="mosaic_gpu")


@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize("name", ["", "triton", "XLA", "mosaic"])
def test_unknown_names_are_refused(operation: str, name: str) -> None:
    with pytest.raises(ValueError, match="must be one of auto, mosaic_gpu, xla"):
        CALLS[operation](implementation=name)


@pytest.mark.parametrize("operation", CALLS)
def test_auto_chooses_xla_and_says_so_once(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging, "info", lambda text, *args: said.append(text % args))
    pallas_kernels.choose.cache_clear()
    for _ in range(3):
        CALLS[operation]()
    assert len(said) == 1
    assert said[0].startswith(f"{operation} runs on XLA")
