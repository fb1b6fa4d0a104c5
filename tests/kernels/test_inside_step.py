"""What the decode step's kernels record of themselves, on NumPy and held against float64."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_step import ModelShape, StepPlan, of_few_rows, recorded
from pallas_kernels.decode_step.common import phases
from pallas_kernels.decode_step.common.attention import Attention
from pallas_kernels.decode_step.few_rows import mosaic_gpu as few_rows
from pallas_kernels.decode_step.few_rows.step import Step as FewStep
from pallas_kernels.decode_step.many_rows import mosaic_gpu as many_rows
from pallas_kernels.decode_step.many_rows.step import Step as ManyStep
from pallas_kernels.decode_step.packed import scales
from pallas_kernels.decode_step.packed.plan import DOWN, O_PROJ, QKV
from pallas_kernels.decode_step.ptx import thread as t
from pallas_kernels.decode_step.ptx.formats import Format
from qwen_jax.accuracy.inside import audit, recording
from qwen_jax.accuracy.inside.judging import judge
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.weights import PackedWeights, pack
from qwen_jax.model.rotary import inverse_frequencies
from tests.kernels.emulated_step import (
    GROUPS,
    ODD,
    SEED,
    SMALL,
    UNEVEN,
    UNEVEN_BLOCKS,
    Case,
    drawn,
    run,
    run_recorded,
    scratch_of,
)
from tests.kernels.inside_step import config_of, emulated, recordable
from tests.kernels.test_blocks import MIXED, SHAPE
from tests.tiny_checkpoints import canonical, random_parameters

pytestmark = pytest.mark.emulated

KERNELS = {"few": few_rows, "many": many_rows}
Alter = Callable[[pytest.MonkeyPatch], None]


@pytest.mark.parametrize(
    ("kernel", "shape", "blocks", "positions", "stored", "cache"),
    [
        # Shared by several blocks; parts of the down projection of other lengths.
        ("few", ODD, 6, [300, 17], "bfloat16", "bfloat16"),
        ("few", SMALL, 16, [401], "float16", "bfloat16"),
        ("few", SMALL, 16, [*range(8)], "float16", "float16"),
        ("few", SMALL, 5, [40], ("q2_k", "q4_k", "q5_k", "q4_1", "q3_k"), "bfloat16"),
        ("few", SMALL, 7, [40, 0, 9], ("q8_0", "q6_k", "iq4_xs", "q5_0", "q5_1"), "float16"),
        ("few", SHAPE, 7, [3, 40, 17], MIXED, "bfloat16"),
        ("few", UNEVEN, 7, [40, 3], "bfloat16", "bfloat16"),
        ("few", SMALL, 5, [9], ("int4", "int8", "int8", "int4", "q6_k"), "bfloat16"),
        ("many", ODD, 20, [300, 17, 200, 3, 129], "bfloat16", "bfloat16"),
        ("many", SMALL, 5, [9], "float16", "float16"),
        ("many", GROUPS[8], 11, [*range(64)], "bfloat16", "bfloat16"),
        ("many", SMALL, 5, [0, 21, 7, 9, 3], ("q6_k", "q4_k", "q2_k", "q5_1", "q3_k"), "bfloat16"),
        ("many", SHAPE, 7, [3, 40, 17], MIXED, "float16"),
        (
            "many",
            UNEVEN_BLOCKS,
            7,
            [3, 40, 17],
            ("q8_0", "q4_k", "q4_k", "q4_1", "q8_0"),
            "bfloat16",
        ),
        ("many", SMALL, 5, [9, 2], ("int4", "int8", "iq4_nl", "q8_0", "q4_0"), "bfloat16"),
    ],
)
def test_every_operation_is_within_rounding(
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    shape: ModelShape,
    blocks: int,
    positions: list[int],
    stored: str | tuple[str, ...] | StepPlan,
    cache: str,
) -> None:
    """And none by far: where a bound were ten thousand times too wide, nothing would be found."""
    case = drawn(shape, blocks, positions, 4, stored, cache=cache)
    found = emulated(monkeypatch, case, KERNELS[kernel])
    assert [f for f in found if f.verdict == "fault"] == [], SEED
    many = {"attn_norm", "ffn_norm"} if kernel == "many" else set()
    in_layers = {
        *("q_proj", "k_proj", "v_proj", "q_rope", "k_rope", "v_cache", "attn_out"),
        *("attn_residual", "ffn_act", "down_proj", "ffn_residual"),
    }
    for layer in range(shape.layers):
        assert {f.operation for f in found if f.layer == layer} == in_layers | many
    assert min(f.residual.ratio for f in found if f.operation != "embed") > 1e-3


@pytest.mark.parametrize(
    ("kernel", "stored", "cache"),
    [
        ("few", "float16", "float16"),
        ("few", ("q2_k", "q4_k", "q5_k", "q4_1", "q3_k"), "bfloat16"),
        ("many", "bfloat16", "bfloat16"),
        ("many", ("q6_k", "q8_0", "iq4_xs", "q5_0", "q5_1"), "float16"),
    ],
)
def test_outliers_raise_no_alarm(
    monkeypatch: pytest.MonkeyPatch, kernel: str, stored: str | tuple[str, ...], cache: str
) -> None:
    """Two embeddings of a row are 2,000 times the others, biases of keys 150, norms far from 1."""
    case, rng = drawn(SMALL, 7, [100, 3], 1, stored, cache=cache), np.random.default_rng(SEED)
    hidden, pages, bias = case.hidden.copy(), case.pages.copy(), case.packed.bias.copy()
    hidden[:, [3, 77]] *= 2000
    far, first = np.asarray([150, -150, 75, -75], np.float32), SMALL.heads * SMALL.head_dim
    bias[:, first : first + 4] = far
    pages[: SMALL.layers, ..., :4] += far.astype(pages.dtype)
    norms = case.packed.norms * np.exp(rng.normal(0, 1.5, case.packed.norms.shape))
    # Many rows' embeddings enter the first product without a norm's scale: float16 ends at 65504.
    norms[0, [3, 77]] = norms[0, [3, 77]].clip(max=4)
    packed = case.packed._replace(bias=bias, norms=norms.astype(np.float32))
    case = case._replace(hidden=hidden, pages=pages, packed=packed)
    found = emulated(monkeypatch, case, KERNELS[kernel])
    assert [f for f in found if f.verdict == "fault"] == [], SEED


@pytest.mark.parametrize("kernel", KERNELS)
def test_recording_changes_no_bit(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    case = drawn(SMALL, 16, [300, 3], 3, "bfloat16")
    plain = run(monkeypatch, case, SEED, kernel=KERNELS[kernel])
    logits, new, _ = run_recorded(monkeypatch, case, SEED, kernel=KERNELS[kernel])
    assert np.array_equal(plain[0], logits)
    assert np.array_equal(plain[1], new)


def without_bias(patch: pytest.MonkeyPatch) -> None:
    """The epilogue of queries, keys and values adds nothing."""
    for step in (FewStep, ManyStep):
        real = step.product

        def product(
            self: Any, streams: Any, phase: int, layer: Any, epilogue: Any, prepare: Any = None,
            height: int = 16, real: Any = real,
        ) -> Any:  # fmt: skip
            def nothing(*_: Any) -> list[t.V]:
                return [t.integer(0)] * self.consecutive

            given = prepare or phases.nothing
            return real(
                self, streams, phase, layer, epilogue, nothing if phase == QKV else given, height
            )

        patch.setattr(step, "product", product)


def sums_of(phase: int, change: Callable[[Any, Any, t.V, list[t.V]], list[t.V]]) -> Alter:
    """A mistake: the epilogue of a phase gets other sums than the product's.

    Args:
        change: from the step, the layer, the address of the block's hidden state there, and the
            sums.
    """

    def alter(patch: pytest.MonkeyPatch) -> None:
        for step in (FewStep, ManyStep):

            def product(
                self: Any, streams: Any, which: int, layer: Any, epilogue: Any, *rest: Any,
                real: Any = step.product, **others: Any,
            ) -> Any:  # fmt: skip
                def wrong(m_tile: t.V, row: t.V, out: t.V, total: Any, ready: Any) -> None:
                    own = self.own + ((m_tile * self.rows + row) * 16 + out) * 4
                    epilogue(m_tile, row, out, lambda b: change(self, layer, own, total(b)), ready)

                given = wrong if which == phase else epilogue
                return real(self, streams, which, layer, given, *rest, **others)

            patch.setattr(step, "product", product)

    return alter


def again_in_layer_1(step: Any, layer: Any, own: t.V, sums: list[t.V]) -> list[t.V]:
    """The hidden state, which the epilogue adds as well."""
    before = t.load_shared_floats(own, step.consecutive)
    there = layer.index.equals(1)
    return [x + t.select(there, y, 0.0) for x, y in zip(sums, before, strict=True)]


def a_thousandth_more(step: Any, layer: Any, own: t.V, sums: list[t.V]) -> list[t.V]:
    return [x * 1.001 for x in sums]


def patched(target: Any, name: str, wrong: Callable[..., Any]) -> Alter:
    """A mistake: a function in the place of one, which it is given first."""

    def alter(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(target, name, functools.partial(wrong, getattr(target, name)))

    return alter


def patched_method(target: type, name: str, wrong: Callable[..., Any]) -> Alter:
    def alter(patch: pytest.MonkeyPatch) -> None:
        real = getattr(target, name)
        patch.setattr(target, name, lambda *given: wrong(real, *given))

    return alter


def without_rests(real: Any, self: Format, low: t.V, high: t.V) -> tuple[t.V, t.V]:
    """Inputs in 16 bits where two such numbers are promised."""
    return real(self, low, high)[0], t.integer(0)


def one_off(real: Any, self: Any, word: t.V, firsts: Any, by: t.V, offset: int = 0) -> Any:
    """Scales of Q6_K that are all one more."""
    return real(self, word, firsts, by, offset - 1 if offset else 0)


def half_of(real: Any, self: Any, words: list[t.V], number: int) -> Any:
    """Minima that count half."""
    operand, scales = real(self, words, number)
    return operand, tuple(x * 0.5 for x in scales) if self.minimum else scales


SCALES_ONE_OFF = patched_method(scales.Integers, "_times", one_off)
WITHOUT_NEW_TOKEN = patched_method(
    Attention, "_new_token", lambda real, self, split: real(self, split + 1)
)
MIXED_ONCE = ("q8_0", "q8_0", "q4_k", "q6_k", "q8_0")
ALL_PRODUCTS = {"q_proj", "k_proj", "v_proj", "attn_residual", "ffn_act", "down_proj", "logits"}


@pytest.mark.parametrize(
    ("kernel", "stored", "alter", "operations", "layers"),
    [
        ("few", "bfloat16", without_bias, {"q_proj", "k_proj", "v_proj"}, {0, 1}),
        ("many", "bfloat16", without_bias, {"q_proj", "k_proj", "v_proj"}, {0, 1}),
        ("few", "bfloat16", sums_of(O_PROJ, again_in_layer_1), {"attn_residual"}, {1}),
        ("many", "float16", sums_of(O_PROJ, again_in_layer_1), {"attn_residual"}, {1}),
        ("few", "q8_0", sums_of(DOWN, a_thousandth_more), {"down_proj"}, {0, 1}),
        ("many", "bfloat16", sums_of(DOWN, a_thousandth_more), {"down_proj"}, {0, 1}),
        ("few", "bfloat16", patched_method(Format, "split", without_rests), ALL_PRODUCTS, {0, 1}),
        ("few", MIXED_ONCE, SCALES_ONE_OFF, {"down_proj"}, {0, 1}),
        ("many", MIXED_ONCE, SCALES_ONE_OFF, {"down_proj"}, {0, 1}),
        (
            *("few", MIXED_ONCE),
            patched_method(scales.Integers, "addend_operand", half_of),
            *({"ffn_act"}, {0, 1}),
        ),
        (
            *("few", "bfloat16"),
            patched(phases, "gated", lambda real, gate, up: gate * up),
            *({"ffn_act"}, {0, 1}),
        ),
        ("few", "bfloat16", WITHOUT_NEW_TOKEN, {"attn_out"}, {0, 1}),
        ("many", "bfloat16", WITHOUT_NEW_TOKEN, {"attn_out"}, {0, 1}),
        (
            *("many", "bfloat16"),
            patched_method(ManyStep, "scale", lambda real, self, row: real(self, row) * 1.02),
            *({"q_proj", "k_proj", "v_proj", "ffn_act", "logits"}, {0, 1}),
        ),
    ],
)
def test_a_mistake_in_the_thread_code_is_named(
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    stored: str | tuple[str, ...],
    alter: Alter,
    operations: set[str],
    layers: set[int],
) -> None:
    """Operation and layer, and nothing else."""
    case = drawn(SMALL, 7, [100, 3], 2, stored, cache="bfloat16")
    found = emulated(monkeypatch, case, KERNELS[kernel], alter)
    wrong = [f for f in found if f.verdict == "fault"]
    assert {f.operation for f in wrong} == operations, SEED
    assert {f.layer for f in wrong} - {None} == layers


def test_what_is_recorded_on_a_gpu_is_what_is_asked_for() -> None:
    """Nobody else would see before a GPU does that the two have come apart."""
    signature = inspect.signature(recorded)
    signature.bind(**recordable(drawn(SMALL, 7, [100, 3], 2, "bfloat16", cache="bfloat16")))


def test_an_engine_is_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own prefill, then steps of both kernels, as `run.py compare --parts=inside` asks."""
    config = config_of(SMALL)
    weights = {name: jnp.asarray(x) for name, x in canonical(random_parameters(config, 1)).items()}
    plan = StepPlan.uniform(SMALL, 7, "bfloat16")
    packed = pack(config, weights.items(), jnp.dtype("bfloat16"), "xla", plan)
    engine = Engine(config, packed, cache_tokens=1024)
    monkeypatch.setattr(audit, "why_not", lambda engine, rows: None)
    monkeypatch.setattr(recording, "launched", functools.partial(launched, monkeypatch))
    found = audit.audit_inside(engine, [3, 1, 4, 1, 5, 9], (1, 3, 9), "1:")
    assert [f for f in found if f.verdict == "fault"] == []
    assert {(f.rows, f.kernel) for f in found} == {
        (1, "few rows"),
        (3, "few rows"),
        (9, "many rows"),
    }
    assert {f.layer for f in found} == {None, 1}
    text = audit.inside_table(found).text()
    assert f"{len(found)} operations: all within rounding" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    wrong = packed.packed._replace(norms=packed.packed.norms.at[2].mul(1.01))
    engine.weights = dataclasses.replace(packed, packed=wrong)
    steps = [recording.record_step(engine, audit.texts_of([3, 1, 4], 2, 64))]
    faults = [f for f in judge(steps, packed.packed, plan, config) if f.verdict == "fault"]
    assert {(f.layer, f.operation) for f in faults} == {
        (1, f"{name}_proj") for name in ("q", "k", "v")
    }
    assert "FAULT in 1 layers, first 1" in audit.inside_table(faults).text()


def launched(
    patch: pytest.MonkeyPatch, weights: PackedWeights, pages: Any, tables: Any, token: Any, at: Any
) -> tuple[Any, ...]:
    """A step on the emulated kernel that a GPU would take."""
    hidden = np.asarray(weights.look_up(token), np.float32)
    packed = weights.packed._replace(stream=np.asarray(weights.packed.stream))
    arrays = map(np.asarray, (pages, tables, at, inverse_frequencies(weights.config)))
    case = Case(weights.plan, packed, hidden, *arrays)
    kernel = few_rows if of_few_rows(weights.plan, len(at), pages.dtype) else many_rows
    logits, new, scratch = scratch_of(patch, case, kernel)
    return hidden, logits, new, scratch
