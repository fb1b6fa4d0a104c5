"""The account of pages: nothing is held twice or lost, full pages are found again, the oldest go
first."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from qwen_jax.engine.pool import Pool, page_keys
from qwen_jax.model.cache import NOBODY, PAGE

PAGES = 7
KEYS = [f"key {i}".encode() for i in range(5)]


class Texts(RuleBasedStateMachine):
    """Texts that take, share, remember, forget and release pages, and a model of it in lists."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(PAGES)
        self.texts: list[list[int]] = []
        self.keys: dict[int, bytes] = {}  # page to key, of all that is remembered
        self.fillers: dict[int, str] = {}  # page to who is still to fill it
        self.idle: list[int] = []  # remembered and held by nobody, the oldest first

    def holders(self) -> Counter[int]:
        return Counter(page for text in self.texts for page in text)

    @rule(
        shared=st.integers(0, len(KEYS)),
        first=st.integers(0, 2),
        own=st.integers(0, PAGES),
        by=st.sampled_from("xy"),
    )
    def begin(self, shared: int, first: int, own: int, by: str) -> None:
        """As the scheduler seats a text: what is shared, and own pages where there is room."""
        asked = KEYS[first : first + shared]
        expected = []
        for key in asked:
            found = [page for page, known in self.keys.items() if known == key]
            if not found or self.fillers.get(found[0], by) != by:
                break
            expected += found
        pages = self.pool.shared(asked, by)
        assert pages == expected
        self.idle = [page for page in self.idle if page not in pages]
        if own > self.pool.available:
            self.texts.append(pages)
            self.release(len(self.texts) - 1)
            return
        mine = self.pool.take(own)
        assert len(mine) == len(set(mine)) == own
        assert not set(mine) & (set(self.holders()) | set(pages)), "held by another"
        evicted = [page for page in mine if page in self.keys]
        oldest = self.idle[: len(evicted)]
        assert set(evicted) == set(oldest), "those let go longest ago go first"
        unknown = set(range(1, PAGES)) - set(self.holders()) - set(pages) - set(self.keys)
        assert not evicted or unknown <= set(mine), "as long as others are free, none goes"
        for page in evicted:
            del self.keys[page]
            self.fillers.pop(page, None)
            self.idle.remove(page)
        self.texts.append(pages + mine)

    @precondition(lambda self: self.texts)
    @rule(data=st.data(), key=st.sampled_from(KEYS), by=st.sampled_from("xy"))
    def remember(self, data: st.DataObject, key: bytes, by: str) -> None:
        """One key is one page, and one page one key: what is known first stays."""
        text = data.draw(st.sampled_from(self.texts))
        if text:
            page = data.draw(st.sampled_from(text))
            self.pool.remember(page, key, by)
            if key not in self.keys.values() and page not in self.keys:
                self.keys[page], self.fillers[page] = key, by

    @precondition(lambda self: self.fillers)
    @rule(data=st.data())
    def fill(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.fillers)))
        self.pool.filled(page)
        del self.fillers[page]

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        text = data.draw(st.sampled_from(self.texts))
        cut = data.draw(st.integers(0, len(text)))
        self.pool.forget(text[cut:])
        for page in text[cut:]:
            self.keys.pop(page, None)
            self.fillers.pop(page, None)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.release(data.draw(st.integers(0, len(self.texts) - 1)))

    def release(self, index: int) -> None:
        pages = self.texts.pop(index)
        self.pool.release(pages)
        held = self.holders()
        self.idle += [page for page in reversed(pages) if page in self.keys and page not in held]

    @invariant()
    def nothing_is_lost(self) -> None:
        held = self.holders()
        assert NOBODY not in held
        assert self.pool.available == self.pool.size - len(held) == PAGES - 1 - len(held)
        assert set(self.idle) == set(self.keys) - set(held)

    def teardown(self) -> None:
        while self.texts:
            self.release(0)
        assert self.pool.available == self.pool.size
        everything = self.pool.take(self.pool.size)
        assert sorted(everything) == list(range(1, PAGES))
        assert self.pool.shared(KEYS, "x") == []


TestTexts = Texts.TestCase
TestTexts.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_the_beginning_of_a_text_outlives_its_end() -> None:
    """A page is of no use without those before it, so that the last ones go first."""
    pool = Pool(5)
    text = pool.take(3)
    for page, key in zip(text, KEYS, strict=False):
        pool.remember(page, key, "x")
    pool.release(text)
    other = pool.take(2)
    assert text[2] in other
    assert pool.shared(KEYS, "x") == text[:2]


def test_more_than_there_is_cannot_be_taken() -> None:
    with pytest.raises((KeyError, IndexError)):
        Pool(3).take(3)


def test_a_key_stands_for_a_page_and_all_before_it() -> None:
    tokens = np.random.default_rng(0).integers(0, 1000, 3 * PAGE + 5).tolist()
    keys = list(page_keys(tokens))
    assert len(keys) == 3 == len(set(keys)) and all(len(key) == 16 for key in keys)
    assert list(page_keys(tokens[: 3 * PAGE])) == keys
    assert list(page_keys(tokens[: 3 * PAGE - 1])) == keys[:2]
    assert list(page_keys(tokens[: PAGE - 1])) == list(page_keys([])) == []
    for at in (0, PAGE - 1, PAGE, 3 * PAGE - 1):
        other = [*tokens[:at], tokens[at] ^ 1, *tokens[at + 1 :]]
        same = at // PAGE
        found = list(page_keys(other))
        assert found[:same] == keys[:same]
        assert not set(found[same:]) & set(keys)
    # The same page behind another one is another.
    assert next(page_keys(tokens[PAGE:])) != keys[1]
    first = hashlib.blake2b(np.asarray(tokens[:PAGE], "<i4").tobytes(), digest_size=16).digest()
    assert keys[0] == first
