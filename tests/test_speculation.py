"""Steps with drafts: the same texts as without, in fewer steps, if drafts pay at all."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.engine import decoding
from qwen_jax.engine.drafts import Drafts, Grant, Record
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.lookup import LONGEST, NO_DRAFT, SHORTEST, Lookup, lookup
from qwen_jax.engine.texts import Text
from tests.engines import fresh_engine, reshape
from tests.schedules import CONFIG, Outcome, again, alone, drawn_text, watched

WIDTH = 48


def looked_up(tokens: Sequence[int], most: int) -> list[int]:
    """The definition, place by place."""
    best = (0, -1)
    for end in range(len(tokens) - 1):
        n = 0
        while n < LONGEST and n <= end and tokens[end - n] == tokens[len(tokens) - 1 - n]:
            n += 1
        if n >= SHORTEST:
            best = max(best, (n, end))
    if best[1] < 0:
        return []
    longer = list(tokens)
    for _ in range(most):
        longer.append(longer[best[1] + 1 + len(longer) - len(tokens)])
    return longer[len(tokens) :]


texts = st.lists(st.integers(0, 2), min_size=1, max_size=WIDTH)


@settings(deadline=None)
@given(texts, st.integers(0, WIDTH - 1))
def test_host_and_device_look_up_what_the_definition_says(tokens: list[int], begun: int) -> None:
    begun = min(begun, len(tokens) - 1)
    growing = tokens[: begun + 1]
    host = Lookup(growing)
    for token in tokens[begun + 1 :]:
        growing.append(token)
        host.grown()
    right = looked_up(tokens, 7)
    assert host.draft(7) == right
    history = np.full((1, WIDTH), 1, np.int32)  # what is behind the end counts for nothing
    history[0, : len(tokens)] = tokens
    found = _device(jnp.asarray(history), jnp.asarray([len(tokens)])).tolist()[0]
    assert found == (right or [NO_DRAFT] * 7)


_device = jax.jit(functools.partial(lookup, most=7))


# ---- The same texts


def speculating(tokens: int = 7, cache_tokens: int = 1024, **shapes: Any) -> Engine:
    """Steps of eight rows, as `schedules.many_rows` has, with drafts."""
    engine = fresh_engine(
        CONFIG, cache_tokens=cache_tokens, batch_invariant=True, draft_tokens=tokens
    )
    reshape(engine, **shapes)
    return engine


class AtRandom(Drafts):
    """Drafts for anyone, of any length, paid or not."""

    rng = np.random.default_rng(11)

    def grant(self, records: Sequence[Record]) -> Grant | None:
        size = self._shapes.rows[-1]
        widths = [1] * len(records)
        for _ in range(int(self.rng.integers(0, size - len(records) + 1))):
            widths[int(self.rng.integers(len(records)))] += 1
        widths = [min(width, 1 + self._most) for width in widths]
        return Grant(size, widths, 1.0) if max(widths) > 1 else None


def repetitive(rng: np.random.Generator) -> Text:
    """A prompt of which parts come again, so that some of what is looked up may be right."""
    text = drawn_text(rng, 100, 40)
    part = list(text.tokens[: int(rng.integers(1, 40))])
    return dataclasses.replace(text, tokens=(part * 3 + list(text.tokens))[:200])


@functools.cache
def drawn() -> tuple[Text, ...]:
    rng = np.random.default_rng(7)
    return tuple(repetitive(rng) for _ in range(20))


@functools.cache
def expected() -> tuple[Outcome, ...]:
    """Of each text alone, without drafts."""
    return tuple(alone(drawn()))


@pytest.mark.parametrize(
    "options",
    [{}, {"ahead": True}],
    ids=["cpu", "ahead"],
)
def test_texts_are_those_without_drafts(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Bit for bit, log-probabilities too: greedy and hot, filtered, penalised, biased, beside
    others that have drafts or none."""
    monkeypatch.setattr(decoding, "Drafts", AtRandom)
    texts = [again(text) for text in drawn()]
    told = watched(speculating(**options), texts)
    for i, (text, right) in enumerate(zip(texts, expected(), strict=True)):
        assert Outcome.of(text, told) == right, f"text {i}"
    records = [text.record for text in texts if text.record is not None]
    assert sum(record.accepted for record in records) > 50
    penalised = [t.record for t in texts if t.sampling.repetition_penalty != 1]
    assert sum(record.accepted for record in penalised if record is not None) > 0
