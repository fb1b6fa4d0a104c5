"""Prompts that are repeated with their log-probabilities, and what reads tokens from elsewhere."""

import codecs
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


ACCENTS = "héé 😀 x"


def characters(model: qwen_jax.Model, ids: list[int]) -> list[int]:
    """How many are known before each token, each time from the beginning."""
    parts = [model.tokenizer.token_bytes(token) for token in ids]
    begun = [b"".join(parts[:i]) for i in range(len(ids))]
    return [len(codecs.getincrementaldecoder("utf-8")("replace").decode(text)) for text in begun]


def test_offsets_are_characters(haiku: Served, model: qwen_jax.Model) -> None:
    """Of the text, whatever tokens of a part of a character are called."""
    create = haiku.client().completions.create
    ids = model.tokenizer.encode(ACCENTS)
    assert len(ids) > len(ACCENTS)  # some characters have several tokens
    ask = {"model": "haiku", "prompt": ACCENTS, "logprobs": 0, "max_tokens": 4}
    whole = create(**ask, echo=True).choices[0]
    answer = model.generate(ACCENTS, raw=True, max_tokens=4)
    right = characters(model, ids)
    assert right[:8] == [0, 1, 1, 2, 2, 3, 4, 4]  # h, é in two, é in two, a space, 😀 in four
    right += [len(ACCENTS) + at for at in characters(model, [*answer.tokens])]
    assert whole.logprobs.text_offset == right
    silent = create(**ask | {"max_tokens": 0}, echo=True).choices[0]
    assert silent.logprobs.text_offset == right[:-4]

    # The same of an answer, whole and in pieces, and of one that a stop cuts.
    for stop, text in ((None, ACCENTS), ("😀 x", "héé ")):
        held = {"choice": [ACCENTS]}
        more = {"max_tokens": 40, "stop": stop, "extra_body": held}
        found = create(**ask | more).choices[0]
        chunks = [c.choices[0] for c in create(**ask | more, stream=True)]
        tokens = model.generate(
            ACCENTS, raw=True, max_tokens=40, constraint=qwen_jax.Constraint.choice([ACCENTS])
        ).tokens
        count = len(found.logprobs.tokens)
        offsets = [min(at, len(text)) for at in characters(model, [*tokens])][:count]
        assert found.text == text and found.logprobs.text_offset == offsets
        assert "".join(c.text for c in chunks) == text
        streamed = [at for c in chunks for at in (c.logprobs.text_offset if c.logprobs else ())]
        assert streamed == offsets


def test_a_prompt_that_fills_the_context(haiku: Served, model: qwen_jax.Model) -> None:
    """Can be repeated, since no answer has to fit; one that is longer can't."""
    context = model.config.context_length
    ask = {"echo": True, "max_tokens": 0, "logprobs": 0}
    for more in (ask, ask | {"logprobs": None}):
        whole = haiku.post("/v1/completions", {"prompt": [300] * context, **more})
        assert whole.status_code == 200, whole.text
        assert whole.json()["usage"]["prompt_tokens"] == context
        longer = haiku.post("/v1/completions", {"prompt": [300] * (context + 1), **more})
        error = longer.json()["error"]
        assert error["message"].endswith("this model has a context of 512; shorten the prompt.")
    logprobs = haiku.post("/v1/completions", {"prompt": [300] * context, **ask}).json()["choices"]
    assert len(logprobs[0]["logprobs"]["token_logprobs"]) == context
    answered = haiku.post("/v1/completions", {"prompt": [300] * context, **ask, "max_tokens": 1})
    error = answered.json()["error"]
    assert "the answer needs at least one" in error["message"]
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    haiku.settle()


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
    error = haiku.post("/detokenize", {"tokens": [99999]}).json()["error"]
    assert error["message"] == "this model: there is no token 99999, only 0 to 2047."
    assert error["param"] == "tokens"
    info = httpx.get(f"{haiku.url}/tokenizer_info").json()
    assert model.tokenizer.encode(info["eos_token"]) == [model.tokenizer.stop_ids[0]]
    assert "im_start" in info["chat_template"]
