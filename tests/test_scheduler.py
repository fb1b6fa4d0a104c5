"""Texts through one engine: each as if alone, in order, whoever waits, ends early or is left."""

import functools
from typing import Any

import numpy as np
import pytest

from qwen_jax.engine import steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.texts import News, Text
from qwen_jax.errors import UserError
from tests.engines import random_tokens, run_to_end
from tests.numpy_reference import log_softmax
from tests.schedules import CONFIG, Outcome, again, alone, drawn_text, many_rows, watched

COUNT = 60
AHEAD = {"ahead": True}
AS_ON_A_GPU = {"ahead": True, "lengths": (128,), "pieces": (1, 4, 16)}
"""Pieces of several texts, and several of one, in a call."""

every_way = pytest.mark.parametrize(
    "options", [{}, AHEAD, AS_ON_A_GPU], ids=["cpu", "ahead", "as on a gpu"]
)


@functools.cache
def drawn() -> tuple[Text, ...]:
    rng = np.random.default_rng(5)
    return tuple(drawn_text(rng) for _ in range(COUNT))


@functools.cache
def expected() -> tuple[Outcome, ...]:
    """Of each text alone."""
    return tuple(alone(drawn()))


def assert_as_alone(
    texts: list[Text], told: list[News], right: tuple[Outcome, ...], *, bits: bool = True
) -> None:
    for i, (text, one) in enumerate(zip(texts, right, strict=True)):
        outcome = Outcome.of(text, told)
        assert outcome.over and outcome.tokens == one.tokens, f"text {i}"
        if bits:
            assert outcome == one, f"text {i}"


# ---- Each as if alone


@pytest.mark.parametrize(
    ("cache_tokens", "options"),
    [
        (1024, {}),
        (1024, AHEAD),
        (1024, AS_ON_A_GPU),
        # The longest text's three pages: often one runs, and the others wait for it.
        (384, AHEAD),
    ],
    ids=["room for some", "ahead", "as on a gpu", "room for one"],
)
def test_texts_are_those_of_running_alone(cache_tokens: int, options: dict[str, Any]) -> None:
    """Bit for bit: with neighbours, in other rows, behind prefixes that others have computed."""
    texts = [again(text) for text in drawn()]
    told = watched(many_rows(cache_tokens, **options), texts)
    assert all(len(one.tokens) == text.limit for text, one in zip(texts, expected(), strict=True))
    # Other programs, of longer pieces or for another cache, are other products.
    assert_as_alone(texts, told, expected(), bits=cache_tokens == 1024 and "pieces" not in options)


def test_another_order_changes_no_bit() -> None:
    order = np.random.default_rng(1).permutation(COUNT)[:40]
    texts = [again(drawn()[i]) for i in order]
    assert_as_alone(texts, watched(many_rows(), texts), tuple(expected()[i] for i in order))


@pytest.mark.parametrize(
    ("cache_tokens", "options"),
    [(1024, {}), (1024, AS_ON_A_GPU), (384, AHEAD)],
    ids=["cpu", "as on a gpu", "room for one"],
)
def test_texts_that_are_cancelled_leave_the_others_alone(
    cache_tokens: int, options: dict[str, Any]
) -> None:
    """Wherever they are: nothing more is told of them, and what was told before is right."""
    rng = np.random.default_rng(8)
    texts = [again(text) for text in drawn()]
    cancelled: dict[Text, int] = {}

    def cancel_some(scheduler: Scheduler, told: list[News]) -> None:
        there = [t for t in texts if (t.pages or t in scheduler._entrance.waiting) and not t.over]
        if there and rng.random() < 0.3:
            text = there[rng.integers(len(there))]
            scheduler.cancel(text)
            cancelled[text] = len(Outcome.of(text, told).tokens)

    told = watched(many_rows(cache_tokens, **options), texts, cancel_some)
    assert len(cancelled) > 20
    for i, (text, one) in enumerate(zip(texts, expected(), strict=True)):
        outcome = Outcome.of(text, told)
        if text in cancelled:
            assert len(outcome.tokens) == cancelled[text]
            assert outcome.tokens == one.tokens[: cancelled[text]], f"text {i}"
        else:
            assert outcome.over and outcome.tokens == one.tokens, f"text {i}"


# ---- Shared prefixes


def beginning_alike(limit: int = 6) -> list[Text]:
    """Texts that have 0 to 3 pages in common with others, and pages less a token or plus one."""
    base, rng = random_tokens(CONFIG, 400), np.random.default_rng(3)
    texts = []
    for pages in (0, 3, 1, 2, 3):
        for tail in (1, 2, 100):
            tokens = base[: 128 * pages] + rng.integers(0, 61, tail).tolist()
            texts.append(Text(tokens, limit, top=2))
    return [*texts, Text(base[:128], limit, top=2), Text(base[:129], limit, top=2)]


@functools.cache
def right_alike() -> tuple[Outcome, ...]:
    return tuple(alone(beginning_alike()))


def pages_in_common(text: Text, others: list[Text]) -> int:
    """Full pages that the text's beginning, all but its last token, shares with an earlier one."""
    most = 0
    for other in others:
        n = min(text.entering, other.entering) // 128
        same = [text.tokens[: 128 * k] == other.tokens[: 128 * k] for k in range(1, n + 1)]
        most = max(most, sum(same))
    return most


@every_way
def test_what_texts_begin_with_is_computed_once(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    real, put = steps.extend, []

    def extend(*given: Any) -> Any:
        start, lengths = given[-2:]
        put.append(int((lengths - start).sum()))
        return real(*given)

    right = right_alike()  # before what is put is counted
    monkeypatch.setattr(steps, "extend", extend)
    engine = many_rows(4096, **options)
    texts = beginning_alike()
    told = watched(engine, texts)
    for i, text in enumerate(texts):
        assert text.shared_tokens == 128 * pages_in_common(text, texts[:i])
    assert sum(put) == sum(text.entering - text.shared_tokens for text in texts)
    assert {text.shared_tokens for text in texts} == {0, 128, 256, 384}
    assert_as_alone(texts, told, right, bits=False)
    # And again, of texts that are long over.
    put.clear()
    later = beginning_alike()
    assert_as_alone(later, watched(engine, later), right, bits=False)
    assert sum(put) == sum(text.entering % 128 for text in later)


def test_shared_pages_change_no_bit() -> None:
    engine, texts = many_rows(), beginning_alike()
    assert_as_alone(texts, watched(engine, texts), right_alike())


def test_what_is_shared_goes_when_its_room_is_needed() -> None:
    """Four pages: what was used last stays, and what has gone is computed anew."""
    engine = many_rows(512)
    a, b = (random_tokens(CONFIG, 257, seed) for seed in (1, 2))

    def shared(tokens: list[int]) -> int:
        text = Text(tokens, 2, top=0)
        (one,) = alone([text])
        assert Outcome.of(text, run_to_end(engine, [text])).tokens == one.tokens
        return text.shared_tokens

    assert shared(a) == 0
    assert shared(a) == 256
    # Of three pages for b one was free, and one was a's last, of its last token; a's second goes.
    assert shared(b) == 0
    assert shared(a) == 128
    assert shared(b) == 128


# ---- Who is cancelled, or all of them left


@pytest.mark.parametrize(("before", "turns"), [(0, 0), (300, 1), (0, 1), (0, 3)])
@every_way
def test_pages_of_a_cancelled_text_that_others_share(
    options: dict[str, Any], before: int, turns: int
) -> None:
    """Before it begins, while its prompt enters, and while it runs."""
    base = random_tokens(CONFIG, 300)
    texts = [Text(base[:-1], 9, top=1), Text([*base[:256], 5], 9, top=1), Text(base, 20, top=1)]
    right = alone(texts[1:])
    scheduler, told = Scheduler(many_rows(4096, **options)), []
    if before:
        scheduler.add(Text(random_tokens(CONFIG, before, 7), 3))
    for text in texts:
        scheduler.add(text)
    for _ in range(turns):
        told += scheduler.turn()
    scheduler.cancel(texts[0])
    while not scheduler.idle:
        told += scheduler.turn()
    assert [Outcome.of(text, told).tokens for text in texts[1:]] == [one.tokens for one in right]
    engine = scheduler.engine
    assert engine.pool.available == engine.pool.size


def with_scores(texts: list[Text]) -> list[Text]:
    """Every third is to be scored."""
    return [
        Text(text.tokens, score_from=max(1, len(text.tokens) // 2))
        if i % 3 == 0 and len(text.tokens) > 1
        else again(text)
        for i, text in enumerate(texts)
    ]


@pytest.mark.parametrize("turns", [1, 2, 4, 20])
@every_way
def test_a_scheduler_closed_in_the_middle_leaves_a_usable_engine(
    options: dict[str, Any], turns: int
) -> None:
    """All pages are free, and none is remembered that was never filled."""
    engine = many_rows(**options)
    engine.pages = engine.pages + np.nan  # what was never filled shows
    scheduler = Scheduler(engine)
    for text in with_scores(beginning_alike()):
        scheduler.add(text)
    for _ in range(turns):
        scheduler.turn()
    scheduler.close()
    assert engine.pool.available == engine.pool.size
    texts = beginning_alike()
    assert_as_alone(texts, watched(engine, texts), right_alike(), bits=False)


@pytest.mark.parametrize(
    ("program", "calls"),
    [("extend", 0), ("extend", 1), ("extend", 2), ("score", 0), ("score", 1), ("step", 0)],
)
@every_way
def test_a_call_that_fails_leaves_a_usable_engine(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], calls: int, program: str
) -> None:
    """As compiling may, for want of memory."""
    engine, real, done = many_rows(**options), getattr(steps, program), []
    engine.pages = engine.pages + np.nan

    def failing(*given: Any) -> Any:
        done.append(program)
        if len(done) > calls:
            raise MemoryError
        return real(*given)

    scheduler = Scheduler(engine)
    for text in with_scores(beginning_alike()):
        scheduler.add(text)
    with monkeypatch.context() as patch:
        patch.setattr(steps, program, failing)
        with pytest.raises(MemoryError):
            while not scheduler.idle:
                scheduler.turn()
    scheduler.close()
    assert engine.pool.available == engine.pool.size
    texts = beginning_alike()
    assert_as_alone(texts, watched(engine, texts), right_alike(), bits=False)


# ---- Two schedulers


@every_way
def test_two_schedulers_take_turns(options: dict[str, Any]) -> None:
    """As two streams do of which a piece is taken in turn: each has slots of its own."""
    texts = [again(text) for text in drawn()[:6]]
    told = in_turns(many_rows(4096, **options), texts)
    assert_as_alone(texts, told, expected()[:6], bits=False)


@every_way
def test_pages_that_another_scheduler_has_still_to_fill_are_not_shared(
    options: dict[str, Any],
) -> None:
    base = random_tokens(CONFIG, 400)
    texts = [Text(random_tokens(CONFIG, 500, 1 + i), 3) for i in range(6)]
    texts += [Text([*base, i], 5) for i in range(2)]
    right = tuple(alone(texts))
    assert_as_alone(texts, in_turns(many_rows(4096, **options), texts), right, bits=False)


def in_turns(engine: Engine, texts: list[Text]) -> list[News]:
    """The last text is the second scheduler's first."""
    engine.pages = engine.pages + np.nan  # what was never filled shows
    schedulers, told = (Scheduler(engine), Scheduler(engine)), []
    for text in texts[:-1]:
        schedulers[0].add(text)
    schedulers[1].add(texts[-1])
    while not all(scheduler.idle for scheduler in schedulers):
        for scheduler in schedulers:
            told += scheduler.turn()
    assert engine.pool.available == engine.pool.size
    return told


def test_who_can_wait_for_nobody_of_its_own_is_told_so() -> None:
    """Rather than to wait forever for what another scheduler holds."""
    engine = many_rows(384)
    first, second = Scheduler(engine), Scheduler(engine)
    first.add(Text(random_tokens(CONFIG, 300), 50))
    first.turn()
    second.add(Text(random_tokens(CONFIG, 100), 50))
    with pytest.raises(UserError, match=r"Other texts .* hold the whole cache"):
        second.turn()
    second.close()
    while not first.idle:
        first.turn()
    assert engine.pool.available == engine.pool.size


# ---- Scores


@every_way
def test_scores_are_the_logits_log_softmax(options: dict[str, Any]) -> None:
    """Of texts of one page or more, behind shared pages too, beside others that generate."""
    rng, engine = np.random.default_rng(2), many_rows(**options)
    texts = []
    for i in range(40):
        text = again(drawn()[i])
        texts.append(text)
        length = int(rng.integers(2, 300))
        tokens = list(drawn()[int(rng.integers(4))].tokens[:200]) if i % 2 else []
        tokens = (tokens + rng.integers(0, 61, length).tolist())[: CONFIG.context_length]
        if i % 4 == 0:
            tokens = tokens[:2]
        start = int(rng.integers(1, len(tokens))) if i % 5 else [1, len(tokens) - 1][i % 2]
        texts.append(Text(tokens, score_from=start))
    texts.append(Text(texts[-1].tokens, score_from=1))
    told = watched(engine, texts)
    reader = many_rows()
    for text in texts:
        if text.score_from is None:
            continue
        ((logprob, best, likeliest),) = Outcome.of(text, told).scores
        targets, first = np.array(text.tokens[text.score_from :]), text.score_from - 1
        logits = reader.logits(text.tokens)[first:-1]
        every = log_softmax(logits)
        right = every[np.arange(len(targets)), targets]
        np.testing.assert_allclose(logprob, right, rtol=0, atol=1e-5)
        np.testing.assert_allclose(best, every.max(axis=1), rtol=0, atol=1e-5)
        assert likeliest == logits.argmax(axis=1).tolist()
    assert any(text.shared_tokens for text in texts if text.score_from is not None)


# ---- Too large


def test_texts_larger_than_the_cache_are_refused_with_sums() -> None:
    engine = many_rows(256)
    tokens = random_tokens(CONFIG, 200)
    # 57 tokens more: all but the last enter the cache.
    assert engine.room(tokens, 57) == 57
    text = Text(tokens, 57)
    assert len(Outcome.of(text, run_to_end(engine, [text])).tokens) == 57
    with pytest.raises(UserError) as caught:
        engine.room(tokens, 58)
    each = 2 * 2 * 1 * CONFIG.head_dim * 4  # K and V, layers, heads, dimensions, bytes
    assert f"needs {257 * each / 1000:.1f} kB for keys and values" in str(caught.value)
    assert f"room for 256 tokens, {256 * each / 1000:.1f} kB" in str(caught.value)
    assert "lower max_tokens, or shorten the prompt" in str(caught.value)
    assert engine.logits(random_tokens(CONFIG, 256)).shape == (256, 61)
    for length in (257, 258, 400):
        with pytest.raises(UserError, match="room for 256 tokens"):
            engine.logits(random_tokens(CONFIG, length))


def test_logits_beside_texts_that_run() -> None:
    engine, tokens = many_rows(512), random_tokens(CONFIG, 200)
    right = engine.logits(tokens)
    scheduler = Scheduler(engine)
    text = Text(tokens, 50)
    scheduler.add(text)
    scheduler.turn()
    np.testing.assert_array_equal(engine.logits(tokens), right)
    with pytest.raises(UserError, match="taken by texts that are being generated"):
        engine.logits(random_tokens(CONFIG, 400))
    told = []
    while not scheduler.idle:
        told += scheduler.turn()
    assert Outcome.of(text, told).tokens[0] == right[-1].argmax()
