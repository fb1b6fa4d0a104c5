"""The snippets of docs/logprobs.md write what is read, from what the libraries give.

vLLM doesn't run here: its outputs are stand-ins with the fields of version 0.33, each position a
dict of tokens' `Logprob`, the chosen token's and perhaps the likeliest ones'.
"""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qwen_jax.accuracy.logprobs.reading import Logged, read
from tests.golden_cases import Case, odd_config
from tests.tiny_checkpoints import write_hf

PAGE = Path(__file__).parents[2] / "docs" / "logprobs.md"
TRAINER, SERVER, SECOND, _ = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)

TEXTS = [("snow", [2, 4, 6], [8, 10]), ("rain", [1], [3, 5, 7]), ("alone", [], [9, 11])]
RNG = np.random.default_rng(0)
VALUES = {name: (-RNG.exponential(size=len(a + b))).tolist() for name, a, b in TEXTS}
"""Of every token, those of prompts included."""


@dataclasses.dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


def positions(tokens: list[int], values: list[float], likeliest: int) -> list[dict[int, Logprob]]:
    """The token's own, and of so many others."""
    others = {60 + rank: Logprob(-0.1 * rank, rank) for rank in range(1, likeliest + 1)}
    return [{t: Logprob(x, 9)} | others for t, x in zip(tokens, values, strict=True)]


def written(
    snippet: str, file: str, monkeypatch: pytest.MonkeyPatch, folder: Path, **known: Any
) -> dict[str, Logged]:
    monkeypatch.chdir(folder)
    exec(snippet, {"json": json, **known})
    return read(file)


def assert_logged(log: dict[str, Logged], values: dict[str, list[float]]) -> None:
    assert [(x.name, list(x.prompt), list(x.tokens)) for x in log.values()] == TEXTS
    for name, expected in values.items():
        np.testing.assert_array_equal(log[name].logprobs, np.array(expected))


@pytest.mark.parametrize("likeliest", [0, 3])
def test_a_server(likeliest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    for name, prompt, tokens in TEXTS:
        logprobs = positions(tokens, VALUES[name][len(prompt) :], likeliest)
        done = SimpleNamespace(token_ids=tuple(tokens), logprobs=logprobs)
        outputs.append(SimpleNamespace(prompt_token_ids=prompt, outputs=[done]))
    names = [name for name, _, _ in TEXTS]
    log = written(SERVER, "server.jsonl", monkeypatch, tmp_path, names=names, outputs=outputs)
    assert_logged(log, {name: VALUES[name][len(prompt) :] for name, prompt, _ in TEXTS})


def test_a_second_opinion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class LLM:
        def generate(self, prompts: list[dict[str, list[int]]], params: Any) -> list[Any]:
            assert (params.prompt_logprobs, params.max_tokens) == (0, 1)
            known = {tuple(a + b): VALUES[name] for name, a, b in TEXTS}
            outputs = []
            for ids in (prompt["prompt_token_ids"] for prompt in prompts):
                logprobs = [None, *positions(ids[1:], known[tuple(ids)][1:], 0)]
                outputs.append(SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=logprobs))
            return outputs

    given = {"llm": LLM(), "SamplingParams": SimpleNamespace, "texts": TEXTS}
    log = written(SECOND, "second.jsonl", monkeypatch, tmp_path, **given)
    expected = {name: VALUES[name][len(prompt) :] for name, prompt, _ in TEXTS}
    expected["alone"][0] = np.nan
    assert_logged(log, expected)


@pytest.mark.live
def test_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="the snippet is of PyTorch: pip install '.[hf]'")
    transformers = pytest.importorskip("transformers", reason="pip install '.[hf]'")
    case = Case(odd_config(num_layers=2), seed=3)
    path = write_hf(tmp_path / "model", case.config, case.parameters()).path
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    texts = TEXTS[:2]  # of a text without prompt the first token has none
    log = written(TRAINER, "trainer.jsonl", monkeypatch, tmp_path, model=model, texts=texts)
    for name, prompt, tokens in texts:
        with torch.no_grad():
            z = model(torch.tensor([prompt + tokens])).logits[0].double().numpy()
        z -= np.log(np.exp(z).sum(-1, keepdims=True))
        expected = [z[len(prompt) + i - 1, token] for i, token in enumerate(tokens)]
        np.testing.assert_allclose(log[name].logprobs, expected, rtol=0, atol=1e-5)
