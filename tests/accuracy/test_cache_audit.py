"""Engines whose cache goes wrong, by code changed under them, are caught and named."""

import contextlib
import copy
import dataclasses
import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from qwen_jax.accuracy.cache import audit as cache_audit
from qwen_jax.accuracy.cache.audit import audit_cache, cache_table
from qwen_jax.accuracy.cache.faults import FAULTS
from qwen_jax.accuracy.cache.scenarios import LENGTH, PROMPT, scenarios
from qwen_jax.accuracy.cache.slots import Part, Row, Scenario, simulate
from qwen_jax.accuracy.tensors.planting import planted
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.shapes import shapes_for
from qwen_jax.engine.weights import PackedWeights, pack
from qwen_jax.errors import UserError
from qwen_jax.model.cache import PAGE
from tests.accuracy.cache_mistakes import AMONG_ROWS, CASES, OF_CALLS, replaced
from tests.engines import device_parameters, random_engine, random_tokens
from tests.golden_cases import Case, odd_config
from tests.tiny_checkpoints import tiny_config

CONFIG = odd_config(num_layers=1, num_heads=2, num_kv_heads=2, tied=True, context_length=3 * PAGE)
TWO_LAYERS = dataclasses.replace(CONFIG, num_layers=2)
"""Where keys that depend on what went wrong have to be seen."""
TEXT, OTHER = (random_tokens(CONFIG, LENGTH, seed) for seed in (5, 6))
LATER = {"prompt, then decoding", "used slot and pages"}


def engine_of_its_own(config=CONFIG, dtype="float32"):
    """One that shares no program: what is traced may be wrong."""
    engine = Engine(config, device_parameters(Case(config, 3).parameters(), dtype))
    spec = dataclasses.replace(engine.spec, variant=object())
    engine.layout = engine.layout._replace(spec=spec)
    return engine


@pytest.fixture(autouse=True, scope="module")
def worked_out_once():
    """What right and faulty caches would hold is the same in every test: it depends on the way, the
    fault and the model alone, whose parameters are drawn from one seed."""
    simulate, forward = functools.cache(cache_audit.simulate), cache_audit.forward
    found = {}

    def let_go(made, last):
        """The logits come last: what else the pass holds, 10 MB, is let go of before them."""
        for number, expected in made:
            if expected.layer is None and number == last:
                made.close()
            yield number, expected

    def remembered(source, texts, arithmetic, used, every):
        key = source.config, tuple(map(id, texts)), arithmetic, used.tobytes(), every
        if key not in found:  # the entries too, lest others get their id
            made = let_go(forward(source, texts, arithmetic, used, every), len(texts) - 1)
            found[key] = *itertools.tee(made, 1), texts
        return copy.copy(found[key][0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_audit, "simulate", simulate)
        patch.setattr(cache_audit, "forward", remembered)
        yield


def causes(engine, tokens=TEXT, ways=None, fault=contextlib.nullcontext):
    with fault():
        findings = audit_cache(engine, tokens, ways=ways)
    return {f.scenario: {c.name for c in f.causes} for f in findings if f.verdict == "fault"}


class TestNoAlarm:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_right_engine(self, dtype):
        findings = audit_cache(random_engine(CONFIG, 3, dtype), TEXT)
        assert {f.verdict for f in findings} == {"within rounding"}
        assert 0.001 < max(f.ratio for f in findings) < 1
        text = cache_table(findings).text()
        assert text.startswith("cache: 15 ways through it, no fault\n")
        assert max(map(len, text.splitlines())) <= 100

    @pytest.mark.long
    def test_packed_weights_in_the_decode_step(self):
        config = tiny_config(
            num_layers=2, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn_size=384,
            vocab_size=320, context_length=384,
        )  # fmt: skip
        params = device_parameters(Case(config, 3).parameters(), "float32")
        packed = pack(config, params.items(), jnp.dtype(jnp.float32), "xla")
        engine = Engine(config, packed, implementation="xla")
        assert isinstance(packed, PackedWeights) and packed.serves(3)
        assert not causes(engine, TEXT, {"pieces", *LATER, "several texts"})

    def test_stop_tokens_and_padding_rows(self):
        params = device_parameters(Case(CONFIG, 3).parameters(), "float32")
        engine = Engine(CONFIG, params, stop_ids=range(40), valid_tokens=55, unused_ids=(3, 9, 50))
        ways = {"pieces", "prompt, then decoding"}
        assert not causes(engine, [t % 55 for t in TEXT], ways)

    def test_fewer_log_probabilities_of_a_large_vocabulary(self, monkeypatch):
        monkeypatch.setattr(cache_audit, "MOST", 3 * PAGE * CONFIG.vocab_size // 4)
        assert not causes(random_engine(CONFIG, 3), ways={"pieces", "several texts"})


class TestFaults:
    """Rows 21 to 27 and 34 of the catalogue of known faults."""

    @pytest.mark.parametrize("case", CASES)
    def test_is_named(self, case):
        fault, where, name = CASES[case]
        config = TWO_LAYERS if case.startswith("causal mask") else CONFIG
        engine = random_engine(CONFIG, 3) if case in OF_CALLS else engine_of_its_own(config)
        found = causes(engine, ways=where, fault=fault)
        assert found == {way: {name} for way in where}

    @pytest.mark.parametrize("case", AMONG_ROWS)
    def test_is_named_where_it_is(self, case):
        fault, where, name = AMONG_ROWS[case]
        ways = {row.split(",")[0] for row in where}
        engine = random_engine(CONFIG, 3) if case in OF_CALLS else engine_of_its_own()
        found = causes(engine, ways=ways, fault=fault)
        assert found == {row: {name} for row in where}

    def test_in_the_last_layer_of_a_large_vocabulary(self, monkeypatch):
        """Nothing but log-probabilities shows it, and not all of these are looked at."""
        monkeypatch.setattr(cache_audit, "MOST", 3 * PAGE * CONFIG.vocab_size // 4)
        engine = engine_of_its_own()
        layers = itertools.cycle(range(CONFIG.num_layers))

        def forgetful(right):
            def attend(q, pages, ks, vs, lengths, **options):
                if next(layers) == CONFIG.num_layers - 1:
                    lengths = jnp.where(lengths > PROMPT + 9, 1, lengths)
                return right(q, pages, ks, vs, lengths, **options)

            return attend

        with replaced(pallas_kernels, "gqa_decode_attention", forgetful)():
            (found,) = audit_cache(engine, TEXT, ways={"prompt, then decoding"})
        assert found.verdict == "fault"
        assert f"logits, after position {PROMPT + 12} of {LENGTH}" in found.evidence

    def test_in_bfloat16(self):
        fault, where, name = CASES["a hole before the decoded tokens"]
        found = causes(engine_of_its_own(dtype="bfloat16"), ways=where, fault=fault)
        assert all(name in found[scenario] for scenario in where)

    def test_the_table_fits(self):
        with CASES["slots of an earlier text"][0]():
            found = audit_cache(engine_of_its_own(), TEXT, ways={"pieces", *LATER})
            text = cache_table(found).text()
        assert max(map(len, text.splitlines())) <= 100
        assert "stale-slots-seen" in text and "unknown" in text

    def test_outside_the_catalogue(self):
        """Values shifted by a slot in decoding: nothing planted gives it."""
        fault = replaced(
            pallas_kernels,
            "gqa_decode_attention",
            lambda right: (
                lambda q, pages, ks, vs, *rest, **o: right(
                    q, pages.at[vs].set(jnp.roll(pages[vs], 1, axis=3)), ks, vs, *rest, **o
                )
            ),
        )
        with fault():
            ways = {"pieces", "prompt, then decoding"}
            findings = audit_cache(engine_of_its_own(TWO_LAYERS), TEXT, ways=ways)
        found = {f.scenario: f for f in findings}
        assert found["pieces"].verdict == "within rounding"
        decoding = found["prompt, then decoding"]
        assert decoding.verdict == "fault" and not decoding.causes
        assert f"keys of layer 1, in slot {PROMPT} of {LENGTH}" in decoding.evidence


class TestSimulation:
    every = scenarios(TEXT, OTHER, shapes_for("cpu")) + scenarios(TEXT, OTHER, shapes_for("gpu"))

    def test_right_rules_give_causal_attention(self):
        for scenario in self.every:
            for row, entries in zip(scenario.rows, simulate(scenario), strict=True):
                if row.gone:
                    continue
                own = slice(row.shared, None)
                of_all = np.where(entries.output < 0, entries.slots, entries.output)
                np.testing.assert_array_equal(of_all, entries.slots)
                seen = entries.sees[np.ix_(of_all, of_all)]
                np.testing.assert_array_equal(seen, np.tri(len(row.tokens)))
                np.testing.assert_array_equal(
                    entries.sees[of_all].sum(axis=1), range(1, len(row.tokens) + 1)
                )
                assert (entries.output[own] >= 0).all()
                np.testing.assert_array_equal(entries.tokens[of_all], row.tokens)
                for positions in (entries.query, entries.key):
                    np.testing.assert_array_equal(positions[of_all], range(len(row.tokens)))

    def test_every_fault_changes_some_scenario(self):
        for fault in FAULTS:
            assert any(
                not wrong.same(right)
                for s in self.every
                for wrong, right in zip(simulate(s, fault.rules), simulate(s), strict=True)
            ), fault.name

    def test_a_hole_by_hand(self):
        parts = Part(0, 0, 2, 2), Part(0, 2, 1, 1, decode=True)
        scenario = Scenario("", (Row((7, 8, 9), 2),), tuple((part,) for part in parts))
        rules = next(f.rules for f in FAULTS if f.name == "hole")
        (entries,) = simulate(scenario, rules)
        # Two of the prompt, the decoded one in slot 3 behind an empty slot 2.
        assert entries.tokens.tolist() == [7, 8, 9, 0]
        assert entries.sees[2].tolist() == [1, 1, 1, 1]
        assert entries.key.tolist() == [0, 1, 3, 0]
        assert entries.slots.tolist() == [0, 1, 3]

    def test_the_stale_page_of_another_text_by_hand(self):
        first, second = Row((7,) * 2, 2, (2,), gone=True), Row((8, 9), 1, (1,))
        calls = (Part(0, 0, 2, 2),), (Part(1, 0, 1, 2),), (Part(1, 1, 1, 1, decode=True),)
        rules = next(f.rules for f in FAULTS if f.name == "table-left-by-text")
        entries = simulate(Scenario("", (first, second), calls), rules)[1]
        # The decoded token is in the other page, sees the other's first, and leaves none here.
        assert entries.tokens.tolist() == [7, 8, 9, 0]
        assert entries.sees[2].tolist() == [1, 0, 1, 0]
        assert entries.slots.tolist() == [1, 3]


def test_refusals():
    with pytest.raises(UserError, match=f"needs {LENGTH} at least"):
        audit_cache(random_engine(CONFIG, 3), TEXT[:20])
    with pytest.raises(UserError, match="each below 61"):
        audit_cache(random_engine(CONFIG, 3), [61] * LENGTH)
    short = odd_config(num_layers=1, context_length=256)
    with pytest.raises(UserError, match="context of 256 is too short"):
        audit_cache(random_engine(short))


def test_planted_arithmetic_is_that_of_every_row():
    """Several texts in a call: an operation is computed again for each of them."""
    with planted(random_engine(CONFIG, 3), "rope_interleaved") as wrong:
        found = audit_cache(wrong, TEXT, ways={"several texts"})
    assert len(found) == 3 and all(f.verdict == "fault" for f in found)
    assert all("keys of layer 0, in slot 1" in f.evidence for f in found)
