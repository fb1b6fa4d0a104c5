"""Prompts that are repeated with their log-probabilities, and what reads tokens from elsewhere."""

from typing import Any

import httpx
import numpy as np
import openai
import pytest
from scipy.special import log_softmax

import qwen_jax
from tests.serving.conftest import Served

TEXTS = ["an old silent pond", "snow falls"]


def prompt_logprobs(model: qwen_jax.Model, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of each token but the first, and of the likeliest in its place, by the logits."""
    found = log_softmax(model.logits(ids[:-1]).astype(np.float64), axis=-1)
    return found[np.arange(len(ids) - 1), ids[1:]], found.max(axis=-1)


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_a_prompt_is_repeated(haiku: Served, model: qwen_jax.Model, max_tokens: int) -> None:
    """With its log-probabilities and an answer, or without one."""
    create = haiku.client().completions.create
    found = create(model="haiku", prompt=TEXTS, echo=True, logprobs=1, max_tokens=max_tokens, n=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    for index, choice in enumerate(found.choices):
        text = TEXTS[index // 2]
        ids = model.tokenizer.encode(text)
        answer = model.generate(text, raw=True, max_tokens=4, top_logprobs=1)
        assert choice.text == text + (answer.text if max_tokens else "")
        own, best = prompt_logprobs(model, ids)
        logprobs = choice.logprobs
        assert len(logprobs.tokens) == len(ids) + max_tokens
        assert "".join(logprobs.tokens).startswith(text)
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        shown = logprobs.token_logprobs[1 : len(ids)]
        np.testing.assert_allclose(shown, own, atol=1e-4)
        tops = [max(top.values()) for top in logprobs.top_logprobs[1 : len(ids)]]
        np.testing.assert_allclose(tops, best, atol=1e-4)
        if max_tokens:
            right = [entry.logprob for entry in answer.logprobs]
            assert logprobs.token_logprobs[len(ids) :] == right
        else:
            assert choice.finish_reason == "length"
    assert found.usage.prompt_tokens == sum(len(model.tokenizer.encode(text)) for text in TEXTS)
    assert found.usage.completion_tokens == 4 * max_tokens
    haiku.settle()


def test_without_log_probabilities(haiku: Served, model: qwen_jax.Model) -> None:
    create = haiku.client().completions.create
    right = model.generate("snow", raw=True, max_tokens=4).text
    found = create(model="haiku", prompt="snow", echo=True, max_tokens=4).choices[0]
    assert (found.text, found.logprobs) == ("snow" + right, None)
    (token, *_) = model.tokenizer.encode("snow")
    one = create(model="haiku", prompt=[token], echo=True, logprobs=0, max_tokens=0).choices[0]
    assert one.logprobs.token_logprobs == [None] and one.logprobs.top_logprobs == [None]


@pytest.mark.parametrize(
    "body, words",
    [
        ({"echo": True, "stream": True}, "leave stream out"),
        ({"echo": True, "logprobs": 2}, "from 0 to 1"),
        ({"echo": True, "suffix": "x"}, "exclude each other"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_refused(haiku: Served, body: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        haiku.client().completions.create(model="haiku", prompt="snow", **body)


def test_tokens_there_and_back(haiku: Served, model: qwen_jax.Model) -> None:
    """As vLLM's server has it, which lm-evaluation-harness asks."""
    text = "snow<|im_end|> é"
    asked = {"prompt": text, "add_special_tokens": False}
    tokens = haiku.post("/tokenize", asked).json()["tokens"]
    assert tokens == model.tokenizer.encode(text)
    assert haiku.post("/detokenize", {"tokens": tokens}).json() == {"prompt": text}
    assert haiku.post("/detokenize", {"tokens": [99999]}).status_code == 400
    info = httpx.get(f"{haiku.url}/tokenizer_info").json()
    assert model.tokenizer.encode(info["eos_token"]) == [model.tokenizer.stop_ids[0]]
    assert "im_start" in info["chat_template"]
