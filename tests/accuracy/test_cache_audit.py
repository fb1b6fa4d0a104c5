"""Engines whose cache goes wrong, by JAX code changed under them, are caught and named."""

import contextlib
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pallas_kernels
from qwen_jax.accuracy.cache_audit import audit_cache, cache_table, scenarios
from qwen_jax.accuracy.cache_faults import FAULTS
from qwen_jax.accuracy.cache_slots import Row, Scenario, simulate
from qwen_jax.engine import steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.weights import pack
from qwen_jax.errors import UserError
from qwen_jax.model import cache as cache_module
from qwen_jax.model import decoder
from tests.engines import device_parameters, random_engine, random_tokens
from tests.golden_cases import Case, odd_config
from tests.tiny_checkpoints import tiny_config

CONFIG = odd_config(num_layers=2, tied=True, context_length=96)
TEXT = random_tokens(CONFIG, 48, seed=5)


class FaultyEngine(Engine):
    """An engine that is traced while something is wrong."""

    def __init__(self, fault, dtype="float32"):
        self._fault = fault
        super().__init__(CONFIG, device_parameters(Case(CONFIG, 3).parameters(), dtype))

    def _jit(self, function, *bound, **options):
        @functools.wraps(function)
        def faulty(*args):
            with self._fault():
                return function(*args)

        return super()._jit(faulty, *bound, **options)


def replaced(owner, name, make):
    """A fault that puts `make(what was there)` in its place."""
    return lambda: mock.patch.object(owner, name, make(getattr(owner, name)))


def prefill_attention(change):
    return replaced(
        pallas_kernels,
        "gqa_prefill_attention",
        lambda right: (
            lambda q, k, v, offsets, lengths, **o: right(
                q, k, v, *change(offsets, lengths, q.shape[1]), **o
            )
        ),
    )


def decode_attention(lengths_of):
    return replaced(
        pallas_kernels,
        "gqa_decode_attention",
        lambda right: (
            lambda q, k, v, lengths, **o: right(q, k, v, lengths_of(lengths, k.shape[2]), **o)
        ),
    )


def rotation(change):
    """Other positions for q and k."""

    def make(right):
        def rope(q, k, positions, *args, **options):
            at_q, at_k = change(positions, positions.shape[1] == 1)
            return right(q, k, at_q, *args, **options)[0], right(q, k, at_k, *args, **options)[1]

        return rope

    return replaced(pallas_kernels, "rope", make)


def both(place):
    return rotation(lambda p, decode: (place(p, decode),) * 2)


def hole(right):
    def call(self, tokens, cache, start, lengths):
        step = int(tokens.shape[1] == 1)
        return right(self, tokens, cache, start + step, lengths + step)

    return call


def clamped(right):
    """As with dynamic_update_slice, which moves what doesn't fit."""

    def write(cache, new, positions):
        def row(cache, new, at):
            return lax.dynamic_update_slice(cache, new.astype(cache.dtype), (0, at, 0))

        return jax.vmap(row)(cache, new.swapaxes(1, 2), positions)

    return write


def early(right):
    return lambda cache, new, at: right(cache, new, at - (new.shape[1] == 1))


def lost(right):
    return lambda cache, new, at: right(cache, new, at) if new.shape[1] > 1 else cache


LATER = {"prompt, then decoding", "used cache"}
# The engine's fault, where it is sought, and what it is called there.
CASES = {
    "causal mask aligned top-left": (
        prefill_attention(lambda offsets, lengths, steps: (0 * offsets, lengths)),
        {"chunks", "full cache"},
        "mask-top-left",
    ),
    "no causal mask": (
        prefill_attention(lambda offsets, lengths, steps: (offsets + steps - 1, lengths)),
        {"one call", "chunks"},
        "mask-missing",
    ),
    "position stuck at the prompt's end": (
        both(lambda p, decode: jnp.full_like(p, 24) if decode else p),
        {"prompt, then decoding"},
        "position-stuck",
    ),
    "positions count from 0 in each call": (
        both(lambda p, decode: p - p[:, :1]),
        {"chunks", "token by token"},
        "position-restarts",
    ),
    "a hole before the decoded tokens": (
        replaced(decoder.Qwen2, "__call__", hole),
        {"prompt, then decoding"},
        "hole",
    ),
    "position off by one": (
        both(lambda p, decode: p + decode),
        {"prompt, then decoding"},
        "position-plus-one",
    ),
    "one position for all keys of a call": (
        rotation(lambda p, decode: (p, jnp.broadcast_to(p[:, :1], p.shape))),
        {"chunks"},
        "keys-share-position",
    ),
    "slots of an earlier text": (
        decode_attention(lambda lengths, capacity: jnp.maximum(lengths, 64)),
        {"used cache"},
        "stale-slots-seen",
    ),
    "every slot": (
        decode_attention(lambda lengths, capacity: jnp.full_like(lengths, capacity)),
        {"prompt, then decoding", "NaN in unused slots"},
        "unused-slots-seen",
    ),
    "written over the one before": (
        replaced(cache_module, "write", early),
        {"prompt, then decoding"},
        "slot-off-by-one",
    ),
    "decoded tokens never written": (
        replaced(cache_module, "write", lost),
        {"prompt, then decoding"},
        "write-lost",
    ),
    "write clamped at the end": (
        replaced(cache_module, "write", clamped),
        {"full cache"},
        "write-clamped",
    ),
    "last block of 16 left out": (
        decode_attention(lambda lengths, _: jnp.maximum(lengths // 16 * 16, 1)),
        {"prompt, then decoding"},
        "edge-block-16",
    ),
}


def causes(engine, tokens=TEXT, ways=None):
    return {
        f.scenario: {c.name for c in f.causes}
        for f in audit_cache(engine, tokens, ways=ways)
        if f.verdict == "fault"
    }


class TestNoAlarm:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_right_engine(self, dtype):
        findings = audit_cache(random_engine(CONFIG, 3, dtype), TEXT)
        assert {f.verdict for f in findings} == {"within rounding"}
        assert 0.001 < max(f.ratio for f in findings) < 1
        text = cache_table(findings)
        assert text.startswith("cache: 10 ways through it, no fault\n")
        assert max(map(len, text.splitlines())) <= 100

    def test_packed_weights_and_one_array_of_caches(self):
        config = tiny_config(
            num_layers=2, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn_size=384,
            vocab_size=320, context_length=96,
        )  # fmt: skip
        params = device_parameters(Case(config, 3).parameters(), "float32")
        packed = pack(config, params.items(), jnp.dtype(jnp.float32), "xla")
        engine = Engine(config, packed, implementation="xla")
        assert engine.fuses(4)
        assert not causes(engine, TEXT, {"chunks", "prompt, then decoding", "used cache"})

    def test_stop_tokens_and_padding_rows(self):
        params = device_parameters(Case(CONFIG, 3).parameters(), "float32")
        engine = Engine(CONFIG, params, stop_ids=range(40), valid_tokens=55)
        ways = {"chunks", "prompt, then decoding"}
        assert not causes(engine, [t % 55 for t in TEXT], ways)


class TestFaults:
    """Rows 21 to 27 and 34 of the catalogue of known faults."""

    @pytest.mark.parametrize("case", CASES)
    def test_is_named(self, case):
        fault, where, name = CASES[case]
        assert causes(FaultyEngine(fault), ways=where) == {way: {name} for way in where}

    def test_without_a_fault_the_same_engine_is_right(self):
        assert not causes(FaultyEngine(contextlib.nullcontext), ways=LATER)

    def test_in_bfloat16(self):
        fault, where, name = CASES["a hole before the decoded tokens"]
        found = causes(FaultyEngine(fault, "bfloat16"), ways=where)
        assert all(name in found[scenario] for scenario in where)

    def test_the_table_fits(self):
        engine = FaultyEngine(CASES["slots of an earlier text"][0])
        text = cache_table(audit_cache(engine, TEXT, ways={"chunks", *LATER}))
        assert max(map(len, text.splitlines())) <= 100
        assert "stale-slots-seen" in text and "unknown" in text

    def test_outside_the_catalogue(self):
        """Values shifted by a slot in decoding: nothing planted gives it."""
        fault = replaced(
            pallas_kernels,
            "gqa_decode_attention",
            lambda right: lambda q, k, v, n, **o: right(q, k, jnp.roll(v, 1, axis=2), n, **o),
        )
        ways = {"chunks", "prompt, then decoding"}
        findings = audit_cache(FaultyEngine(fault), TEXT, ways=ways)
        found = {f.scenario: f for f in findings}
        assert found["chunks"].verdict == "within rounding"
        decoding = found["prompt, then decoding"]
        assert decoding.verdict == "fault" and not decoding.causes
        assert "keys of layer 1, in slot 24 of 48" in decoding.evidence


class TestBatches:
    """Faults of what stands around the compiled functions."""

    @pytest.fixture
    def engine(self):
        return FaultyEngine(contextlib.nullcontext)

    @staticmethod
    def rows():
        texts = scenarios(TEXT, other(), CONFIG.context_length)
        return next(s for s in texts if s.name == "batch").rows

    def in_batches(self, engine, **changed):
        """Replaces functions of the engine where three rows run together."""
        for name, change in changed.items():
            right = getattr(engine, name)

            def call(weights, first, *args, right=right, change=change):
                if _batch(first) == 1:
                    return right(weights, first, *args)
                return change(right, weights, first, *args)

            setattr(engine, name, call)
        return causes(engine, ways={"batch"})

    def test_padding_on_the_left(self, engine):
        rows = self.rows()
        longest = max(row.prompt for row in rows)
        padded = np.zeros((3, 48), np.int32)
        for b, row in enumerate(rows):
            padded[b, longest - row.prompt : longest] = row.tokens[: row.prompt]
        full = np.full(3, longest, np.int32)

        def chunk(right, weights, cache, last, tokens, start, lengths):
            part = padded[:, start : start + tokens.shape[1]]
            return right(weights, cache, last, part, start, full)

        def begin(right, weights, last, fields, *rest):
            return right(weights, last, (full, full + 48, fields[2]), *rest)

        found = self.in_batches(engine, _prefill_chunk=chunk, _begin=begin)
        assert found == {"batch, row 0": {"padded-left"}, "batch, row 2": {"padded-left"}}

    def test_padding_is_seen(self, engine):
        longest = max(row.prompt for row in self.rows())
        full = np.full(3, longest, np.int32)

        def begin(right, weights, last, fields, *rest):
            return right(weights, last, (full, full + 48, fields[2]), *rest)

        found = self.in_batches(engine, _begin=begin)
        assert set(found) == {"batch, row 0", "batch, row 2"}

    def test_the_last_column_is_read(self, engine):
        longest = max(row.prompt for row in self.rows())

        @jax.jit
        def last_column(weights, cache, last, tokens, start, lengths):
            hidden, cache = steps._run_chunk(
                engine.make_model, weights, cache, tokens, start, lengths
            )
            at = jnp.clip(longest - 1 - start, 0, tokens.shape[1] - 1)
            return cache, hidden[:, at]

        def chunk(right, *args):
            return last_column(*args)

        found = self.in_batches(engine, _prefill_chunk=chunk)
        assert found == {"batch, row 0": {"last-column"}, "batch, row 2": {"last-column"}}


def other():
    return np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 48))[1].tolist()


def _batch(first):
    """Rows of a cache, or of hidden states."""
    return first.rows if hasattr(first, "rows") else len(first)


class TestSimulation:
    def test_right_rules_give_causal_attention(self):
        for scenario in scenarios(TEXT, other(), CONFIG.context_length):
            for row in scenario.rows:
                entries = simulate(scenario, row)
                seen = entries.sees[np.ix_(entries.output, entries.output)]
                shown = slice(0, len(row.tokens))
                np.testing.assert_array_equal(seen[shown], np.tri(len(row.tokens)))
                np.testing.assert_array_equal(
                    entries.sees[entries.output].sum(axis=1), range(1, len(row.tokens) + 1)
                )
                np.testing.assert_array_equal(entries.slots, entries.output)
                np.testing.assert_array_equal(entries.query[entries.output], range(len(row.tokens)))

    def test_every_fault_changes_some_scenario(self):
        every = scenarios(TEXT, other(), CONFIG.context_length)
        for fault in FAULTS:
            assert any(
                not simulate(s, row, fault.rules).same(simulate(s, row))
                for s in every
                for row in s.rows
            ), fault.name

    def test_a_hole_by_hand(self):
        scenario = Scenario("", (Row((7, 8, 9), 2),), (2,), 4)
        rules = next(f.rules for f in FAULTS if f.name == "hole")
        entries = simulate(scenario, scenario.rows[0], rules)
        # Two of the prompt, the decoded one in slot 3 behind an empty slot 2.
        assert entries.tokens.tolist() == [7, 8, 9, 0]
        assert entries.sees[2].tolist() == [1, 1, 1, 1]
        assert entries.key.tolist() == [0, 1, 3, 0]
        assert entries.slots.tolist() == [0, 1, 3]


def test_refusals():
    with pytest.raises(UserError, match="needs 48 at least"):
        audit_cache(random_engine(CONFIG, 3), TEXT[:20])
    with pytest.raises(UserError, match="each below 61"):
        audit_cache(random_engine(CONFIG, 3), [61] * 48)
