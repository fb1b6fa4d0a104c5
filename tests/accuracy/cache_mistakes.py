"""Mistakes in an engine's cache, made by changing our code under it, and what they are called."""

import contextlib
from unittest import mock

import jax.numpy as jnp
import numpy as np

import pallas_kernels
from qwen_jax.accuracy.cache.scenarios import PROMPT
from qwen_jax.engine import steps, weights
from qwen_jax.engine.rows import Rows
from qwen_jax.model import decoder
from qwen_jax.model.cache import PAGE, Cache


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
    later[:, Rows._fields.index("start")] += -PROMPT % PAGE
    return spec, held, pages, tables, state, extras, later, *rest


def still_counting(spec, held, pages, tables, state, extras, packed, *rest):
    """A fresh row's count is what its slot has counted."""
    counted, generated = packed.copy(), np.asarray(state.generated)
    slot, fresh = (packed[:, Rows._fields.index(name)] for name in ("slot", "fresh"))
    for row in np.flatnonzero(fresh):
        counted[row, Rows._fields.index("generated")] = generated[slot[row]]
    return spec, held, pages, tables, state, extras, counted, *rest


def other_tables(old, new):
    def change(spec, held, pages, tables, *rest):
        same = (tables == old).all(axis=1, keepdims=True)
        return spec, held, pages, np.where(same, np.array(new, np.int32), tables), *rest

    return change


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
            replaced(weights, "step", alive),
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

# Programs are given something else and are right themselves, so that they need not be traced anew.
OF_CALLS = {
    "the table that the slot's last text had",
    "the count that the slot's last text had",
    "behind the prompt's padding",
    "a page shared that is not the same",
}
