"""A step that recorded, as the accuracy laboratory takes it: of an emulated kernel, or a GPU's."""

import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_step import ModelShape, of_few_rows, read_inside, recorded
from pallas_kernels.decode_step.inside import Inside
from qwen_jax.accuracy.inside.judging import InsideFinding, RecordedStep, judge
from qwen_jax.config import ModelConfig
from tests.kernels.emulated_step import SEED, Case, few_rows, poisoned, run_recorded


def config_of(shape: ModelShape) -> ModelConfig:
    """A model of these sizes, whose angles are those of drawn cases."""
    sizes = (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim)
    return ModelConfig(*sizes, shape.ffn, shape.vocab, 16384, 1e6, shape.eps, tied=False)


def emulated(
    patch: pytest.MonkeyPatch,
    case: Case,
    kernel: types.ModuleType,
    alter: Callable[[pytest.MonkeyPatch], None] = lambda patch: None,
) -> list[InsideFinding]:
    """The findings of an emulated step; `alter` puts a mistake into the kernel."""
    logits, new, inside = run_recorded(patch, case, SEED, alter, kernel)
    return _judged(case, kernel is few_rows, logits, new.astype(case.pages.dtype), inside)


def recordable(case: Case) -> dict[str, Any]:
    """What `recorded` is given: the laboratory's rows are texts of their own."""
    assert case.preceding is None
    return {name: x for name, x in case._asdict().items() if name != "preceding"} | {
        "pages": poisoned(case)
    }


def on_gpu(case: Case) -> tuple[np.ndarray, np.ndarray, list[InsideFinding]]:
    """A step's logits, new keys and values, and findings."""
    step = jax.jit(recorded, static_argnames="plan")
    logits, new, scratch = map(np.asarray, step(**recordable(case)))
    rows, cache = len(case.position), case.pages.dtype
    inside = read_inside(scratch, case.plan, rows, cache)
    few = of_few_rows(case.plan, rows, cache)
    return logits, new, _judged(case, few, logits, new, inside)


def _judged(
    case: Case, few: bool, logits: np.ndarray, new: np.ndarray, inside: Inside
) -> list[InsideFinding]:
    given: dict[str, Any] = {name: getattr(case, name) for name in ("hidden", "pages", "tables")}
    step = RecordedStep(few, **given, position=case.position, logits=logits, new=new, inside=inside)
    packed = case.packed._replace(stream=jnp.asarray(case.packed.stream))
    return judge([step], packed, case.plan, config_of(case.plan.shape))


def worst(findings: list[InsideFinding]) -> dict[str, float]:
    """Of each operation the largest part of its bound."""
    found: dict[str, float] = {}
    for finding in findings:
        ratio = finding.residual.ratio
        found[finding.operation] = max(found.get(finding.operation, 0.0), ratio)
    return found
