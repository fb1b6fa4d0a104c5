"""Engines whose cache goes wrong, by code changed under them, are caught and named."""

import contextlib
import dataclasses
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from qwen_jax.accuracy.cache_audit import audit_cache, cache_table
from qwen_jax.accuracy.cache_faults import FAULTS
from qwen_jax.accuracy.cache_scenarios import LENGTH, PROMPT, scenarios
from qwen_jax.accuracy.cache_slots import Part, Row, Scenario, simulate
from qwen_jax.engine import steps, weights
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.shapes import shapes_for
from qwen_jax.engine.weights import PackedWeights, pack
from qwen_jax.errors import UserError
from qwen_jax.model import decoder
from qwen_jax.model.cache import PAGE, Cache
from tests.engines import device_parameters, random_engine, random_tokens
from tests.golden_cases import Case, odd_config
from tests.tiny_checkpoints import tiny_config

CONFIG = odd_config(num_layers=2, tied=True, context_length=3 * PAGE)
TEXT, OTHER = (random_tokens(CONFIG, LENGTH, seed) for seed in (5, 6))


def engine_of_its_own(dtype="float32"):
    """One that shares no program: what is traced may be wrong."""
    engine = Engine(CONFIG, device_parameters(Case(CONFIG, 3).parameters(), dtype))
    engine.spec = dataclasses.replace(engine.spec, variant=object())
    return engine


def replaced(owner, name, make):
    """A fault that puts `make(what was there)` in its place."""
    return lambda: mock.patch.object(owner, name, make(getattr(owner, name)))


def together(*faults):
    @contextlib.contextmanager
    def all_of_them():
        with contextlib.ExitStack() as stack:
            for fault in faults:
                stack.enter_context(fault())
            yield

    return all_of_them


def prefill_attention(change):
    return replaced(
        pallas_kernels,
        "gqa_prefill_attention",
        lambda right: (
            lambda q, pages, ks, vs, offsets, lengths, **o: right(
                q, pages, ks, vs, *change(offsets, lengths, q.shape[1]), **o
            )
        ),
    )


def decode_attention(lengths_of):
    return replaced(
        pallas_kernels,
        "gqa_decode_attention",
        lambda right: (
            lambda q, pages, ks, vs, lengths, **o: right(
                q, pages, ks, vs, lengths_of(lengths, ks.shape[1] * PAGE), **o
            )
        ),
    )


def tables_read(change):
    """Other tables for all attention."""

    def make(right):
        return lambda q, pages, ks, vs, *rest, **o: right(
            q, pages, change(ks), change(vs), *rest, **o
        )

    names = "gqa_prefill_attention", "gqa_decode_attention"
    return together(*(replaced(pallas_kernels, name, make) for name in names))


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


def written(change):
    """Another start and other lengths for what a call writes; None for nothing."""

    def make(right):
        def write(self, i, k, v, start, lengths):
            changed = change(start, lengths, k.shape[1])
            return self if changed is None else right(self, i, k, v, *changed)

        return write

    return replaced(Cache, "write", make)


def places(change):
    """Other places for what a decode step writes."""

    def make(right):
        def find(self, positions, kept):
            if positions.shape[1] == 1:
                return change(right, self, positions, kept)
            return right(self, positions, kept)

        return find

    return replaced(Cache, "_places", make)


def call_of(name, change):
    """Other arguments for a program: what the scheduler might get wrong."""
    return replaced(steps, name, lambda right: lambda *args: right(*change(*args)))


def hole(right):
    def call(self, tokens, cache, start, lengths):
        step = int(tokens.shape[1] == 1)
        return right(self, tokens, cache, start + step, lengths + step)

    return call


def alive(right):
    """Who is over goes on."""
    return lambda model, token, cache, position, live: right(
        model, token, cache, position, jnp.ones_like(live)
    )


def blind(right):
    """Every row with the pages as they were before, but for its own."""

    def attend(q, pages, ks, vs, offsets, lengths, **options):
        rows = range(len(q))
        out = []
        for row in rows:
            seen = pages
            for other in set(rows) - {row}:
                at = offsets[other] // PAGE
                seen = seen.at[ks[other, at]].set(0).at[vs[other, at]].set(0)
            one = slice(row, row + 1)
            out.append(right(q[one], seen, ks[one], vs[one], offsets[one], lengths[one], **options))
        return jnp.concatenate(out)

    return attend


def padding_stays(spec, held, pages, tables, tokens, start, lengths):
    return spec, held, pages, tables, tokens, start, start + tokens.shape[1]


def behind_padding(spec, held, pages, tables, state, extras, packed, *rest):
    later = packed.copy()
    later[:, steps.Rows._fields.index("start")] += -PROMPT % PAGE
    return spec, held, pages, tables, state, extras, later, *rest


def still_counting(spec, held, pages, tables, state, extras, packed, *rest):
    """A fresh row's count is what its slot has counted."""
    counted, generated = packed.copy(), np.asarray(state.generated)
    slot, fresh = (packed[:, steps.Rows._fields.index(name)] for name in ("slot", "fresh"))
    for row in np.flatnonzero(fresh):
        counted[row, steps.Rows._fields.index("generated")] = generated[slot[row]]
    return spec, held, pages, tables, state, extras, counted, *rest


def other_tables(old, new):
    def change(spec, held, pages, tables, *rest):
        same = (tables == old).all(axis=1, keepdims=True)
        return spec, held, pages, np.where(same, np.array(new, np.int32), tables), *rest

    return change


LATER = {"prompt, then decoding", "used slot and pages"}
# The engine's fault, where it is sought, and what it is called there.
CASES = {
    "causal mask aligned top-left": (
        prefill_attention(lambda offsets, lengths, steps: (0 * offsets, lengths)),
        {"pieces", "full cache"},
        "mask-top-left",
    ),
    "no causal mask": (
        prefill_attention(lambda offsets, lengths, steps: (offsets + steps - 1, lengths)),
        {"one call", "pieces"},
        "mask-missing",
    ),
    "position stuck at the prompt's end": (
        both(lambda p, decode: jnp.full_like(p, PROMPT) if decode else p),
        {"prompt, then decoding"},
        "position-stuck",
    ),
    "positions count from 0 in each call": (
        both(lambda p, decode: p - p[:, :1]),
        {"pieces", "prompt, then decoding"},
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
        {"pieces"},
        "keys-share-position",
    ),
    "slots of an earlier text": (
        decode_attention(lambda lengths, capacity: jnp.maximum(lengths, 3 * PAGE - 4)),
        {"used slot and pages"},
        "stale-slots-seen",
    ),
    "every slot": (
        decode_attention(lambda lengths, capacity: jnp.full_like(lengths, capacity)),
        {"prompt, then decoding", "NaN in unused slots"},
        "unused-slots-seen",
    ),
    "the last page to its end": (
        decode_attention(lambda lengths, capacity: -(-lengths // PAGE) * PAGE),
        {"prompt, then decoding", "used slot and pages"},
        "last-page-whole",
    ),
    "written over the one before": (
        written(lambda start, lengths, steps: (start - (steps == 1), lengths - (steps == 1))),
        {"prompt, then decoding"},
        "slot-off-by-one",
    ),
    "decoded tokens never written": (
        written(lambda start, lengths, steps: (start, lengths) if steps > 1 else None),
        {"prompt, then decoding"},
        "write-lost",
    ),
    "write clamped at the end": (
        together(
            replaced(weights, "_step", alive),
            places(
                lambda right, self, positions, kept: right(
                    self, jnp.minimum(positions, self.capacity - 1), kept
                )
            ),
        ),
        {"full cache"},
        "write-clamped",
    ),
    "last block of 16 left out": (
        decode_attention(lambda lengths, _: jnp.maximum(lengths // 16 * 16, 1)),
        {"prompt, then decoding"},
        "edge-block-16",
    ),
    "last page left out where it is not full": (
        decode_attention(lambda lengths, _: jnp.maximum(lengths // PAGE * PAGE, 1)),
        {"prompt, then decoding"},
        "edge-block-128",
    ),
    "a page's first token in the page before": (
        places(
            lambda right, self, positions, kept: (
                right(self, positions - 1, kept)[0],
                positions % PAGE,
            )
        ),
        {"prompt, then decoding", "pages in any order"},
        "page-late",
    ),
    "tables are not looked at": (
        tables_read(lambda tables: tables[:, :1] + jnp.arange(tables.shape[1])),
        {"pages in any order"},
        "table-ignored",
    ),
    "the table that the slot's last text had": (
        call_of("step", other_tables([5, 4, 6], [1, 2, 3])),
        {"used slot"},
        "table-left-by-text",
    ),
    "the count that the slot's last text had": (
        call_of("step", still_counting),
        {"used slot"},
        "count-left-by-text",
    ),
    "pieces of one call apart": (
        replaced(pallas_kernels, "gqa_prefill_attention", blind),
        {"pieces in one call"},
        "pieces-blind",
    ),
    "behind the prompt's padding": (
        together(call_of("extend", padding_stays), call_of("step", behind_padding)),
        {"prompt, then decoding"},
        "padding-seen",
    ),
}

# The same where some rows only are wrong.
AMONG_ROWS = {
    "all rows have the first one's positions": (
        both(lambda p, decode: p - p[:, :1] + p[:1, :1]),
        {"several texts, row 1", "several texts, row 2"},
        "start-shared",
    ),
    "all rows read the first one's pages": (
        tables_read(lambda tables: jnp.broadcast_to(tables[:1], tables.shape)),
        {"several texts, row 1", "several texts, row 2"},
        "table-of-first-row",
    ),
    "a page shared that is not the same": (
        together(
            *(call_of(name, other_tables([1, 4, 5], [1, 2, 5])) for name in ("extend", "step"))
        ),
        {"shared page, row 0", "shared page, row 1"},
        "page-shared-too-far",
    ),
}


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
        text = cache_table(findings)
        assert text.startswith("cache: 15 ways through it, no fault\n")
        assert max(map(len, text.splitlines())) <= 100

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


class TestFaults:
    """Rows 21 to 27 and 34 of the catalogue of known faults."""

    @pytest.mark.parametrize("case", CASES)
    def test_is_named(self, case):
        fault, where, name = CASES[case]
        found = causes(engine_of_its_own(), ways=where, fault=fault)
        assert found == {way: {name} for way in where}

    @pytest.mark.parametrize("case", AMONG_ROWS)
    def test_is_named_where_it_is(self, case):
        fault, where, name = AMONG_ROWS[case]
        ways = {row.split(",")[0] for row in where}
        found = causes(engine_of_its_own(), ways=ways, fault=fault)
        assert found == {row: {name} for row in where}

    def test_in_bfloat16(self):
        fault, where, name = CASES["a hole before the decoded tokens"]
        found = causes(engine_of_its_own("bfloat16"), ways=where, fault=fault)
        assert all(name in found[scenario] for scenario in where)

    def test_the_table_fits(self):
        with CASES["slots of an earlier text"][0]():
            text = cache_table(audit_cache(engine_of_its_own(), TEXT, ways={"pieces", *LATER}))
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
            findings = audit_cache(engine_of_its_own(), TEXT, ways=ways)
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
