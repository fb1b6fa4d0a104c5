"""200 callers at once, again and again: nothing is lost, nothing mixed, and memory stays flat."""

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

import qwen_jax
from qwen_jax import Constraint, Sampling

REPOSITORY = Path(__file__).parents[2]
CALLERS, PROMPTS = 200, 10
WORDS = ["a pond", "a crow", "a kite"]


class Running(NamedTuple):
    """A server of its own, whose memory is no client's."""

    url: str
    pid: int

    @property
    def megabytes(self) -> float:
        """Of it that are in memory and no file's."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"RssAnon:\s*(\d+)", status)
        assert found is not None
        return int(found[1]) / 1024


@pytest.fixture
def running() -> Iterator[Running]:
    command = [sys.executable, "run.py", "serve", "--port=0", "--batch_invariant"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = ""
    while not (found := re.search(r"at (http://\S+?),", said)):
        line = process.stderr.readline()
        assert line, said
        said += line
    # Its log is read as it comes: it waits for room to write.
    threading.Thread(target=process.stderr.read, daemon=True).start()
    try:
        yield Running(found[1], process.pid)
    finally:
        process.terminate()
        assert process.wait(60) == 0


class Asked(NamedTuple):
    """A caller's body, and the texts that are right."""

    body: dict[str, Any]
    right: list[str]


def asked(model: qwen_jax.Model) -> list[Asked]:
    """Every kind of answer: plain, sampled, several of a prompt, held to a choice."""
    found = []
    for number in range(PROMPTS):
        prompt, seed = [300 + number], 1000 + number
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": 5, "seed": seed, "temperature": 2.0}
        options: dict[str, Any] = {"max_tokens": 5, "n": 1}
        if number % 3 == 1:
            body["n"] = options["n"] = 2
        if number % 3 == 2:
            body |= {"choice": WORDS, "max_tokens": 20}
            options |= {"constraint": Constraint.choice(WORDS), "max_tokens": 20}
        if number == 0:
            body["frequency_penalty"] = 0.5
        sampling = Sampling(
            temperature=2.0, seed=seed, frequency_penalty=body.get("frequency_penalty", 0.0)
        )
        answers = model.generate([prompt], sampling=sampling, **options)
        found.append(Asked(body, [answer.text for answer in answers]))
    return found


async def crowd(url: str, wanted: list[Asked]) -> list[bool]:
    """All callers at once: of five, two want the whole, one a stream, one leaves in the middle of
    one, and one is refused. Whether each got what it should."""

    async def one(client: httpx.AsyncClient, number: int) -> bool:
        body, right = wanted[number // 5 % PROMPTS]
        kind = number % 5
        if kind == 0:
            answer = await client.post("/v1/completions", json=body | {"top_p": "x" * number})
            return answer.status_code == 400 and answer.json()["error"]["param"] == "top_p"
        if kind in (1, 2):
            answer = await client.post("/v1/completions", json=body)
            return [choice["text"] for choice in answer.json()["choices"]] == right
        texts = [""] * len(right)
        last = ""
        asking = client.stream("POST", "/v1/completions", json=body | {"stream": True})
        async with asking as answer:
            async for line in answer.aiter_lines():
                last = line or last
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        texts[choice["index"]] += choice["text"]
                    if kind == 4:
                        break
        begun = all(whole.startswith(text) for whole, text in zip(right, texts, strict=True))
        return begun if kind == 4 else texts == right and last == "data: [DONE]"

    limits = httpx.Limits(max_connections=CALLERS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        return await asyncio.gather(*(one(client, number) for number in range(CALLERS)))


def settle(url: str) -> dict[str, float]:
    """The server's own numbers, once nothing is being answered."""
    while True:
        text = httpx.get(f"{url}/metrics").text
        found = dict(re.findall(r"^qwen_jax_(\w+)(?:_total)? ([\d.e+]+)$", text, re.MULTILINE))
        if float(found["answers_present"]) == 0:
            return {name: float(value) for name, value in found.items()}


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_200_callers_six_times(model: qwen_jax.Model, running: Running) -> None:
    wanted = asked(model)
    assert len({text for each in wanted for text in each.right}) > 10
    memory = []
    for _ in range(6):
        assert all(asyncio.run(crowd(running.url, wanted)))
        settle(running.url)
        memory.append(running.megabytes)
    # What 600 callers leave behind; the first 600 have filled caches and pools.
    assert max(memory[3:]) - memory[2] < 3, memory
