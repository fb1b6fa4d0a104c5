"""Many callers, callers who leave, and an end that finishes what runs."""

import asyncio
import json
import threading
import time
from typing import Any

import httpx
import openai
import pytest

import qwen_jax
from qwen_jax.engine import steps
from qwen_jax.options import Options
from qwen_jax.serving import app
from qwen_jax.serving.limits import Limits
from tests.serving.conftest import served

SNOW = [{"role": "user", "content": "haiku: snow"}]


def endless(model: qwen_jax.Model, tokens: int = 400) -> dict[str, Any]:
    """A body whose answer is as long as that: nothing that ends a text is likely."""
    bias = {str(token): -100 for token in model.tokenizer.stop_ids}
    return {"messages": SNOW, "max_tokens": tokens, "logit_bias": bias}


CHAT = "/v1/chat/completions"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take a while, whatever machine this is."""
    from qwen_jax.engine import calls

    right = calls.step

    def step(*given: Any) -> Any:
        time.sleep(0.05)
        return right(*given)

    monkeypatch.setattr(calls, "step", step)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_slot(model: qwen_jax.Model, stream: bool) -> None:
    with served(model) as found:
        found.post(CHAT, endless(model, 1))  # compiles, which may take long
        body = endless(model) | {"stream": stream, "n": 12}
        with pytest.raises(httpx.TimeoutException):
            if stream:
                with httpx.stream("POST", found.url + CHAT, json=body, timeout=0.6) as answer:
                    for _ in answer.iter_lines():
                        if found.server.worker.waiting:  # 12 of them, for 8 slots
                            raise httpx.ReadTimeout("seen enough")
            else:
                httpx.post(found.url + CHAT, json=body, timeout=0.6)
        begun = time.monotonic()
        found.settle()
        assert time.monotonic() - begun < 4, "12 answers of 400 tokens would take 10 s"
        assert found.post(CHAT, {"messages": SNOW, "max_tokens": 2}).status_code == 200


@pytest.mark.usefixtures("slow")
def test_a_full_line(model: qwen_jax.Model) -> None:
    with served(model, queue=2) as found:
        too_many = found.post(CHAT, endless(model) | {"n": 11})
        assert too_many.status_code == 400 and "10 fit" in too_many.text
        with httpx.stream(
            "POST", found.url + CHAT, json=endless(model) | {"n": 10, "stream": True}
        ):
            full = found.post(CHAT, {"messages": SNOW})
            assert full.status_code == 429 and int(full.headers["Retry-After"]) >= 1
            assert full.json()["error"]["type"] == "rate_limit_error"
            with pytest.raises(openai.RateLimitError):
                found.client().chat.completions.create(model="haiku", messages=SNOW)
        found.settle()
        assert found.post(CHAT, {"messages": SNOW, "max_tokens": 2}).status_code == 200


@pytest.mark.usefixtures("slow")
def test_an_answer_that_takes_too_long(model: qwen_jax.Model) -> None:
    with served(model, timeout=0.5) as found:
        whole = found.post(CHAT, endless(model))
        assert whole.status_code == 504 and whole.json()["error"]["code"] == "timeout"
        stream = found.client().chat.completions.create(
            model="haiku", stream=True, **endless(model)
        )
        with pytest.raises(openai.APIError, match=r"more than 0\.5 s"):
            list(stream)
        found.settle()


def test_a_stream_that_is_not_read(model: qwen_jax.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is given up, and holds no slot: the caller takes its beginning and no more."""
    monkeypatch.setattr(app, "UNREAD_SECONDS", 0.2)
    limits = Limits(timeout=1.0)
    options = Options(max_tokens=4, sampling=qwen_jax.Sampling())
    server = app.Server(model, "haiku", options, limits)
    body = json.dumps({"prompt": "a", "stream": True}).encode()
    kept: list[bytes] = []

    async def ask() -> None:
        told = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            return told.pop() if told else await asyncio.Future()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                kept.append(message["body"])
                await asyncio.Future()

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
        async with server.app.router.lifespan_context(server.app):
            await asyncio.wait_for(server.app(scope | {"query_string": b""}, receive, send), 20)
            while server.worker.present:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(ask(), 60))
    assert len(kept) == 1 and kept[0].startswith(b"data: {")


@pytest.mark.usefixtures("slow")
def test_the_end_finishes_what_runs(model: qwen_jax.Model) -> None:
    body = endless(model, 40)
    with served(model) as found:
        right = found.post(CHAT, body).json()["choices"]
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(found.post(CHAT, body)))
        asking.start()
        while not found.server.worker.present:
            time.sleep(0.005)
        found.stop()
        asking.join(20)
        assert answers[0].status_code == 200 and answers[0].json()["choices"] == right
        assert found.ended.wait(20)
        with pytest.raises(httpx.ConnectError):
            found.post(CHAT, body)


def test_a_failure_of_one_and_of_all(
    model: qwen_jax.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that overflow end one answer; a device that fails ends those on it. Both are told, and
    the next one is answered."""
    from qwen_jax.engine import calls

    right = calls.step

    def overflowing(*given: Any) -> Any:
        pages, state, extras, emitted = right(*given)
        return pages, state, extras, emitted._replace(token=emitted.token * 0 + steps.NOT_FINITE)

    def failing(*given: Any) -> Any:
        raise RuntimeError("the device is gone")

    with served(model) as found:
        for broken, status, words in ((overflowing, 400, "not finite"), (failing, 500, "failed")):
            monkeypatch.setattr(calls, "step", broken)
            answer = found.post(CHAT, {"messages": SNOW})
            assert answer.status_code == status and words in answer.json()["error"]["message"]
            monkeypatch.setattr(calls, "step", right)
            found.settle()
            assert found.post(CHAT, {"messages": SNOW, "max_tokens": 2}).status_code == 200


def test_200_clients(model: qwen_jax.Model) -> None:
    """Nothing is lost and nothing mixed."""
    with served(model) as found:
        assert all(asyncio.run(crowd(model, found.url, 4)))
        found.settle()
        assert found.server.worker.timings.generated_tokens == 200 * 4


async def crowd(model: qwen_jax.Model, url: str, tokens: int) -> list[bool]:
    """200 callers at once, half of them of streams; whether each gets what its own prompt gets
    alone. Prompts are of one token each, so that the test is about callers."""
    prompts = [[token] for token in range(300, 310)]
    samplings = [qwen_jax.Sampling(temperature=2.0, seed=seed) for seed in range(10)]
    answers = model.generate(prompts, samplings=samplings, max_tokens=tokens)
    right = [answer.text for answer in answers]
    assert len(set(right)) == 10

    async def one(client: httpx.AsyncClient, number: int) -> bool:
        body = {"prompt": prompts[number % 10], "max_tokens": tokens, "stream": number % 2 == 0}
        body |= {"temperature": 2.0, "seed": number % 10}
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        if number % 2:
            text = answer.json()["choices"][0]["text"]
        else:
            *events, done = answer.text.strip().split("\n\n")
            assert done == "data: [DONE]"
            choices = [json.loads(e.removeprefix("data: "))["choices"][0] for e in events]
            text = "".join(choice["text"] for choice in choices)
        return text == right[number % 10]

    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(one(client, number) for number in range(200)))
