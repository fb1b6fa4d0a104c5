"""Who asks a model at the same time shares its steps, and hears of nothing but its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import qwen_jax
from qwen_jax import UserError
from qwen_jax.engine import calls
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.replicas import line_for
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.shared import Client
from qwen_jax.engine.texts import Text
from tests.engines import Prompt, generate, random_tokens
from tests.schedules import CONFIG, many_rows


def drawn(count: int) -> list[Prompt]:
    return [
        Prompt(random_tokens(CONFIG, 5 + 29 * (i % 9), i), 3 + 7 * (i % 7)) for i in range(count)
    ]


def run(client: Client, text: Text) -> list[int]:
    """Its tokens, from wherever it is."""
    found = list[int]()
    while not client.idle:
        for news in client.turn():
            assert news.text is text and news.error is None
            found += news.tokens
    return found


def begun(engine: Engine, prompt: Prompt) -> tuple[Client, Text]:
    client, text = line_for(engine), Text(*prompt)
    client.add(text)
    return client, text


def assert_let_go(engine: Engine) -> None:
    assert engine.pool.available == engine.pool.size
    assert engine.shared._scheduler is None and not engine.shared._owners


def test_threads_share_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as one list of all would take."""
    engine, asked = many_rows(4096), drawn(8)
    expected = generate(many_rows(4096), asked).tokens
    steps, step = list[int](), calls.step
    monkeypatch.setattr(calls, "step", lambda *args: steps.append(1) or step(*args))
    generate(engine, asked)
    together = len(steps)
    clients = [begun(engine, prompt) for prompt in asked]
    steps.clear()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda one: run(*one), clients)) == expected
    assert len(steps) == together
    for client, _ in clients:
        client.close()
    assert_let_go(engine)


@pytest.mark.parametrize("cache_tokens", [512, 4096])
def test_many_come_and_go(cache_tokens: int) -> None:
    """Of which few fit together; some are left in the middle."""
    engine, asked = many_rows(cache_tokens), drawn(36)
    alone = [generate(many_rows(4096), [one]).tokens[0] for one in asked]

    def one(number: int) -> bool:
        client, _ = begun(engine, asked[number])
        found = list[int]()
        while not client.idle:
            found += [token for news in client.turn() for token in news.tokens]
            if number % 5 == 4 and found:
                break
        client.close()
        left = number % 5 == 4
        return found == (alone[number][: len(found)] if left else alone[number])

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(one, range(36)))
    assert_let_go(engine)


def test_a_text_that_nobody_asks_for_goes_on_with_others() -> None:
    """One thread has begun a text, and asks for another, for which there is no room beside it."""
    engine = many_rows(384)
    asked = [Prompt(random_tokens(CONFIG, 300), 20), Prompt(random_tokens(CONFIG, 200, 1), 30)]
    expected = [generate(many_rows(384), [one]).tokens[0] for one in asked]
    first, text = begun(engine, asked[0])
    first.turn()
    second = begun(engine, asked[1])
    assert run(*second) == expected[1]
    assert run(first, text) == expected[0]
    first.close()
    second[0].close()
    assert_let_go(engine)


def test_what_ends_a_turn_ends_all_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever had it hears why; the others that they must ask again; then all is well."""
    engine, (prompt, other) = many_rows(1024), drawn(2)
    clients = [begun(engine, prompt), begun(engine, other)]

    def broken(self: Scheduler) -> Any:
        raise FloatingPointError("the device is on fire")

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError, match="on fire"):
        patch.setattr(Scheduler, "turn", broken)
        clients[0][0].turn()
    with pytest.raises(UserError, match=r"FloatingPointError: the device is on fire.*ask again"):
        clients[1][0].turn()
    assert clients[0][0].idle and clients[1][0].idle and clients[1][0].turn() == []
    again = begun(engine, prompt)
    assert run(*again) == generate(many_rows(1024), [prompt]).tokens[0]
    for client, _ in [*clients, again]:
        client.close()
    assert_let_go(engine)


def test_who_leaves_while_another_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves after it; who comes, comes in after it."""
    engine, (prompt, other) = many_rows(1024), drawn(2)
    client, text = begun(engine, prompt)
    leaver, left = begun(engine, other)
    inside, go_on, turn = threading.Event(), threading.Event(), Scheduler.turn

    def slow(self: Scheduler) -> Any:
        inside.set()
        assert go_on.wait(60)
        return turn(self)

    monkeypatch.setattr(Scheduler, "turn", slow)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, client, text)
        assert inside.wait(60)
        leaver.close()
        comer, late = begun(engine, other)
        assert leaver.idle and not left.over and comer.waiting == 1
        go_on.set()
        assert running.result() == generate(many_rows(1024), [prompt]).tokens[0]
    assert left.over
    assert run(comer, late) == generate(many_rows(1024), [other]).tokens[0]
    client.close()
    comer.close()
    assert_let_go(engine)


@pytest.fixture(scope="module")
def model() -> Iterator[qwen_jax.Model]:
    yield qwen_jax.load(slots=4, batch_invariant=True)


def test_asyncio(model: qwen_jax.Model) -> None:
    """More calls at once than the cache has room for."""
    words = [f"haiku: {word}" for word in ("snow", "ice", "moss", "rust", "rain", "fern")]
    prompts = [words[i % 6] for i in range(30)]

    async def all_of_them() -> list[qwen_jax.Completion]:
        return await asyncio.gather(*(model.agenerate(prompt) for prompt in prompts))

    found = asyncio.run(all_of_them())
    alone = {word: model.generate(word).text for word in words}
    assert [one.text for one in found] == [alone[prompt] for prompt in prompts]
    assert_let_go(model.engine)


def test_a_stream_beside_another_call(model: qwen_jax.Model) -> None:
    """In one thread, in the middle of the first."""
    alone = model.generate("haiku: snow").text
    pieces = list[str]()
    for piece in model.stream("haiku: snow"):
        pieces.append(piece)
        if len(pieces) == 1:
            assert model.generate("haiku: snow").text == alone
    assert "".join(pieces) == alone
    assert_let_go(model.engine)
