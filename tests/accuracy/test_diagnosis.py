"""Causes: the first exam, several faults at once, ties, gaps, and what no catalogue holds."""

import dataclasses

import numpy as np
import pytest

from qwen_jax.accuracy.exact.operations import INNER, OPERATIONS
from qwen_jax.accuracy.exact.parameters import EngineSource, Weights
from qwen_jax.accuracy.measures.error_shape import describe, ranges
from qwen_jax.accuracy.tensors.diagnosis import diagnose
from qwen_jax.accuracy.tensors.faults.catalogue import FAULTS
from qwen_jax.accuracy.tensors.faults.fault import parse
from qwen_jax.accuracy.tensors.planting import planted
from qwen_jax.accuracy.traces.trace import Trace, split_name
from qwen_jax.engine.engine import Engine
from qwen_jax.errors import UserError
from tests.accuracy.planted_traces import CASE, Once, diagnosis, source, trace
from tests.engines import random_engine, random_tokens, relative

EXAM = "zero_qkv_bias,rope_interleaved"


def test_the_first_exam_both_faults_from_one_run() -> None:
    found = diagnosis(EXAM)
    biases, rope = found.causes
    assert (biases.fault.name, rope.fault.name) == ("zero_qkv_bias", "rope_interleaved")
    assert biases.operations == ("q_proj", "k_proj", "v_proj") and biases.layers == (0, 1)
    assert rope.operations == ("q_rope", "k_rope") and rope.layers == (0, 1)
    for cause in found.causes:
        assert cause.before.ratio > 1000 and cause.after.ratio <= 1
        assert cause.after.relative < 1e-6 < 0.1 < cause.before.relative
        assert not (cause.ties or cause.against or cause.together)
    assert not found.unknown and found.first is not None
    assert found.first.name == "layers.0.q_proj"
    # At position 0 RoPE is the identity, whatever its pairs: the story's red herring.
    assert next(f for f in found.faulty if f.operation == "q_rope").position == 1


def test_clean_runs_have_no_causes() -> None:
    found = diagnosis()
    assert found.named == () and found.first is None and not found.unknown


def test_two_faults_of_one_operation_in_one_layer_alone() -> None:
    found = diagnosis("rope_theta_1e4@1,rope_from_one@1,relu,compiler@0")
    assert set(found.named) == {"rope_theta_1e4", "rope_from_one", "relu", "compiler"}
    theta = next(c for c in found.causes if c.fault.name == "rope_theta_1e4")
    assert theta.layers == (1,) and theta.together == ("rope_from_one",)
    assert next(c for c in found.causes if c.fault.name == "relu").layers == (0, 1)
    compiler = next(c for c in found.causes if c.fault.name == "compiler")
    assert compiler.operations == ("attn_norm", "ffn_norm") and compiler.layers == (0,)
    assert not found.unknown and not compiler.ties


def test_cache_and_mask_faults_are_planted_for_real() -> None:
    """The cache fault moves keys in the engine; its catalogue entry only says what is read."""
    found = diagnosis("cache_hole@0,sliding_window@1,head_tied")
    assert set(found.named) == {"cache_hole", "sliding_window", "head_tied"}
    assert [c.layers for c in found.causes] == [(0,), (1,), (None,)]


def test_a_piece_of_one_token_counts_as_a_decode_step() -> None:
    with planted(random_engine(CASE.config, CASE.seed), "cache_hole") as engine:
        tokens = random_tokens(CASE.config, 20)
        found = diagnose(Once(engine).record(tokens, prompt_length=17, chunk=16), source())
    assert found.named == ("cache_hole",) and not found.unknown


def test_without_the_tensors_in_between_the_span_is_diagnosed() -> None:
    """An engine that keeps no scores: its mask and cache faults show in attn_out alone."""
    base = trace("cache_hole@0,sliding_window@1,head_tied")
    gone = ("attn_scores", "attn_probs", "ffn_norm")
    kept = {n: x for n, x in base.tensors.items() if split_name(n)[1] not in gone}
    found = diagnose(Trace(base.header, kept), source())
    assert set(found.named) == {"cache_hole", "sliding_window", "head_tied"}
    assert {f.operation for f in found.faulty} == {"attn_out", "logits"}
    assert not any(cause.ties for cause in found.causes)


class WithoutBiases(EngineSource):
    def get(self, name: str) -> np.ndarray:
        value = super().get(name)
        return 0 * value if name.endswith("bias") else value


def test_candidates_that_fit_equally_well_are_all_listed() -> None:
    """Where biases are zero nobody can tell whether they were permuted with the weights."""
    bare = WithoutBiases(random_engine(CASE.config, CASE.seed))
    normed = trace().tensors["layers.0.attn_norm"]
    tensors = {"layers.0.attn_norm": normed}
    for name in ("q_proj", "k_proj"):
        (weight, _), dim = Weights(bare, 0)[name], CASE.config.head_dim
        pairs = weight.reshape(-1, dim // 2, 2, weight.shape[1]).transpose(0, 2, 1, 3)
        y = normed.astype(np.float64) @ pairs.reshape(weight.shape).T
        tensors[f"layers.0.{name}"] = y.reshape(len(y), -1, dim).astype(np.float32)
    (cause,) = diagnose(Trace(trace().header, tensors), bare).causes
    assert {(cause.fault.name,), *cause.ties} == {("qk_unpermuted",), ("qk_unpermuted_weight",)}


def test_a_fault_that_shows_in_one_of_two_operations_is_the_narrower_one() -> None:
    """rope_missing explains q_rope as well as rope_q_missing does, but k_rope is right."""
    base, q, k = trace(), "layers.0.q_rope", "layers.0.k_rope"
    kept = {n: base.tensors[n] for n in ("layers.0.q_proj", "layers.0.k_proj", k)}
    found = diagnose(Trace(base.header, {**kept, q: base.tensors["layers.0.q_proj"]}), source())
    (cause,) = found.causes
    assert cause.fault.name == "rope_q_missing" and not cause.ties and not cause.against


def test_a_fault_in_part_of_its_operations_says_where_it_is_not() -> None:
    """Only q has lost its bias: zero_qkv_bias reproduces q_proj, and contradicts k and v."""
    engine = random_engine(CASE.config, CASE.seed)
    clean, wrong = trace(), trace(EXAM)
    mixed = {n: x for n, x in clean.tensors.items() if split_name(n)[1] in ("attn_norm", "k_proj")}
    mixed |= {"layers.0.attn_norm": wrong.tensors["layers.0.attn_norm"]}
    mixed |= {"layers.0.q_proj": wrong.tensors["layers.0.q_proj"]}
    found = diagnose(Trace(clean.header, mixed), EngineSource(engine))
    (cause,) = found.causes
    assert cause.fault.name == "zero_qkv_bias" and cause.operations == ("q_proj",)
    assert cause.against == ("k_proj",)


def test_outside_the_catalogue_the_operation_is_named_and_the_error_described() -> None:
    tensor = trace().tensors["layers.1.gate_proj"].copy()
    tensor[3:8, 16:32] *= 1.5
    found = diagnose(
        Trace(trace().header, {**trace().tensors, "layers.1.gate_proj": tensor}), source()
    )
    assert found.named == ()
    gate = found.unknown[0]
    assert gate.finding.name == "layers.1.gate_proj" and gate.finding.position == 3
    assert gate.shape.positions == "3-7" and gate.shape.dimensions == "16-31"


@pytest.mark.parametrize(
    ("change", "look"),
    [
        (lambda x: 0.9 * x, "0.9 times"),
        (lambda x: 0 * x, "zero"),
        (lambda x: x + np.arange(6.0), "same at every position"),
        (lambda x: np.where(x > 1, np.inf, x), "not finite"),
    ],
)
def test_simple_errors_are_described(change, look: str) -> None:  # type: ignore[no-untyped-def]
    x = np.random.default_rng(0).normal(size=(5, 6))
    assert look in str(describe(change(x), x, np.full(x.shape, 1e-9)))


def test_ranges_for_people() -> None:
    assert ranges([True] * 3) == "all" and ranges([False]) == "none"
    assert ranges([0, 1, 1, 0, 1]) == "1-2, 4"
    assert ranges([1, 0] * 8) == "0, 2, 4, 6, and 4 more up to 14"


def test_the_catalogue_is_whole() -> None:
    assert len(FAULTS) >= 30
    for name, fault in FAULTS.items():
        assert fault.name == name and fault.line and fault.area
        assert set(fault.operations) <= set(OPERATIONS)
        assert fault.parameters or fault.knobs(CASE.config)
        if fault.report:
            owner, number = fault.report.split("#")
            assert "/" in owner and number.isdecimal()


def test_unknown_faults_and_layers_are_refused() -> None:
    config = CASE.config
    for text, message in [
        ("rope_interleaving", "did you mean 'rope_interleaved'"),
        ("gelu@2", "layers 0 to 1"),
        ("gelu@x", "layer 'x'"),
        ("head_tied@1", "leave out '@1'"),
        ("qk_exchanged", "can't have"),
    ]:
        with pytest.raises(UserError, match=message):
            parse(text, config)
    assert [str(p) for p in parse("gelu@1, relu", config)] == ["gelu@1", "relu"]
    assert parse("", config) == ()


def test_planting_leaves_the_engine_as_it_was() -> None:
    engine = random_engine(CASE.config, CASE.seed)
    before = {name: np.asarray(x) for name, x in engine.weights.parameters().items()}
    tokens = list(range(20))
    clean = engine.logits(tokens)
    with planted(engine, "zero_qkv_bias,transposed_o_proj") as wrong:
        assert relative(wrong.logits(tokens), clean) > 0.1
        kv = CASE.config.num_kv_heads * CASE.config.head_dim
        bias = np.asarray(wrong.weights.parameters()["layers.0.qkv_proj.bias"])
        assert not bias.any() and bias.size == CASE.config.num_heads * CASE.config.head_dim + 2 * kv
    for name, x in before.items():
        np.testing.assert_array_equal(np.asarray(engine.weights.parameters()[name]), x)
    np.testing.assert_array_equal(Engine(engine.config, engine.weights).logits(tokens), clean)


def test_wrong_layer_of_the_header_is_no_part_of_the_verdict() -> None:
    """A candidate's own config may be wrong; that is what it is diagnosed for."""
    base = trace(EXAM)
    header = dataclasses.replace(base.header, config=base.header.config | {"rope_theta": 1e4})
    assert diagnose(Trace(header, base.tensors), source()).named == diagnosis(EXAM).named
    assert len(INNER) == 17


@pytest.mark.parametrize("name", ["scores_bf16", "scores_f16"])
def test_a_rounding_explains_no_more_than_it_is_worth(name: str) -> None:
    """In an engine whose activations are bfloat16, where float16 is the finer one: scores rounded
    to either are told from each other."""
    found = diagnose(trace(name, "bfloat16"), source("bfloat16"))
    assert found.named == (name,) and not found.unknown
    assert not any(cause.ties for cause in found.causes)
