"""An operation in pieces is the whole operation, and so is its bound."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from qwen_jax.accuracy import spread
from qwen_jax.accuracy.exact import pieces
from qwen_jax.accuracy.exact.bounds import Arithmetic, bounded
from qwen_jax.accuracy.exact.forward import forward
from qwen_jax.accuracy.exact.operations import (
    Calls,
    Context,
    Knobs,
    input_names,
    schedule,
)
from qwen_jax.accuracy.exact.parameters import EngineSource, Weights
from qwen_jax.accuracy.tensors.faults.attention import hole
from tests.engines import random_engine, random_tokens
from tests.golden_cases import odd_config

CONFIG = odd_config(num_layers=1)
SOURCE = EngineSource(random_engine(CONFIG, 3))
CHUNKS = [13, 1, 1, 4, 1, 1]
ROUGH = Arithmetic(2.0**-8, 2.0**-11, 2.0**-8, least=2.0**-24)
KNOBS = {
    "as it stands": {},
    "others' slots": dict.fromkeys(("attn_scores", "attn_out"), Knobs(held=hole)),
    "by calls": {
        "q_rope": Knobs(position=lambda calls: calls.position - calls.start),
        "attn_scores": Knobs(
            visible=lambda calls, slot: slot < calls.stop[:, None], hidden=lambda score: score - 1e4
        ),
    },
    "operands rounded": dict.fromkeys(("q_proj", "down_proj", "logits"), Knobs(operand="float16")),
    "heads inside": {"attn_out": Knobs(dims_first=True), "attn_probs": Knobs(sink=0.0)},
}


def every_bound(knobs: dict[str, Knobs], arithmetic: Arithmetic, off: float) -> list[np.ndarray]:
    """Values and bounds of all operations, of inputs that may be off by some part of themselves."""
    tokens = np.array(random_tokens(CONFIG, sum(CHUNKS)))
    right = dict(forward(SOURCE, tokens.tolist(), CHUNKS, knobs))
    weights = {layer: Weights(SOURCE, layer) for layer in (None, 0)}
    found: list[np.ndarray] = []
    for layer, name in schedule(CONFIG):
        ctx = Context(CONFIG, Calls.of(CHUNKS), tokens, knobs.get(name, Knobs()))
        inputs = [
            (x, off * np.nan_to_num(np.abs(x), posinf=0.0) if off else 0.0)
            for x in (right[n] for n in input_names(name, layer, CONFIG))
        ]
        found += bounded(name, ctx, arithmetic, inputs, weights[layer][name])
    return [*right.values(), *found]


@settings(max_examples=12, deadline=None)
@given(
    cores=st.integers(2, 9),
    values=st.sampled_from([1, 40, 300, 2000]),
    most=st.sampled_from([50, 700, 1 << 21]),
    kind=st.sampled_from(list(KNOBS)),
    arithmetic=st.sampled_from([Arithmetic(), ROUGH]),
    off=st.sampled_from([0.0, 1e-6]),
)
def test_all_pieces_are_the_whole(
    cores: int, values: int, most: int, kind: str, arithmetic: Arithmetic, off: float
) -> None:
    def cut(cores: int, values: int, most: int) -> list[np.ndarray]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(spread, "CORES", cores)
            patch.setattr(spread, "VALUES", values)
            patch.setattr(pieces, "LEAST", 1)
            patch.setattr(pieces, "MOST", most)
            patch.setattr(pieces, "MOST_MADE", most)
            return every_bound(KNOBS[kind], arithmetic, off)

    for one, whole in zip(cut(cores, values, most), cut(1, 1 << 40, 1 << 40), strict=True):
        np.testing.assert_allclose(one, whole, rtol=1e-9, atol=1e-15)


@given(
    count=st.integers(1, 400),
    unit=st.integers(1, 64),
    least=st.integers(0, 90),
    most=st.integers(0, 500),
)
def test_slices_are_all_of_it(count: int, unit: int, least: int, most: int) -> None:
    found = spread.slices(count * unit, unit, least, most)
    assert [i for s in found for i in range(s.start, s.stop)] == list(range(count * unit))
    assert all((s.stop - s.start) % unit == 0 for s in found)
    assert all(s.stop - s.start < max(most, 1) + unit for s in found)
    assert all(s.stop - s.start >= min(least, most) for s in found[:-1])


def test_arrays_are_put_together_along_an_axis() -> None:
    whole = np.random.default_rng(0).standard_normal((4, 9, 3))
    places = [slice(0, 2), slice(2, 3), slice(3, 9)]
    for axis in (0, 1):
        x = whole.swapaxes(0, 1) if axis == 0 else whole
        parts = [x[p] if axis == 0 else x[:, p] for p in places]
        found, twice = spread.gathered(lambda part: (part, 2 * part), parts, places, axis)
        np.testing.assert_array_equal(found, x)
        np.testing.assert_array_equal(twice, 2 * x)
