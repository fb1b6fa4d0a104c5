"""A text's bits on a GPU: alone, beside others, in other slots, on pages it shares with others."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.texts import Text
from qwen_jax.engine.weights import pack
from qwen_jax.model.cache import PAGE
from tests.gpu.test_decode_step import CONFIGS, SEED, parameters

QWEN = Sampling(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05)


def engine(name: str, slots: int = 64) -> Engine:
    config = dataclasses.replace(CONFIGS[name], context_length=8192)
    packed = pack(config, parameters(config, SEED).items(), jnp.dtype(jnp.bfloat16), "auto")
    return Engine(config, packed, slots=slots, cache_tokens=200_000, batch_invariant=True)


def drawn(vocab: int, count: int) -> list[Text]:
    """Texts of any length, of which some begin with the same pages and some draw."""
    rng = np.random.default_rng(SEED)
    common = rng.integers(0, vocab, 3 * PAGE).tolist()
    texts = []
    for i in range(count):
        length = int(rng.choice([1, 2, 60, 127, 128, 129, 300, 700, 1500]))
        tokens = rng.integers(0, vocab, length).tolist()
        if i % 3 == 0:
            tokens = common[: PAGE * int(rng.integers(1, 4))] + tokens
        sampling = dataclasses.replace(QWEN, seed=i) if i % 2 else Sampling()
        texts.append(Text(tokens, int(rng.integers(1, 40)), sampling, 3))
    return texts


def run(engine: Engine, texts: Sequence[Text]) -> list[Any]:
    """Tokens and log-probabilities of each."""
    fresh = [Text(t.tokens, t.limit, t.sampling, t.top) for t in texts]
    scheduler, found = Scheduler(engine), {text: [] for text in fresh}
    for text in fresh:
        scheduler.add(text)
    while not scheduler.idle:
        for news in scheduler.turn():
            found[news.text] += zip(news.tokens, news.logprobs or [], strict=True)
    return list(found.values())


@pytest.mark.parametrize("name", ["small", "0.5b", "7b"])
def test_a_text_has_the_same_bits_whatever_runs_beside_it(name: str) -> None:
    texts = drawn(CONFIGS[name].vocab_size, 90)
    order = np.random.default_rng(SEED + 1).permutation(len(texts)).tolist()
    one = engine(name)
    together = run(one, texts)
    assert [len(found) for found in together] == [text.limit for text in texts]
    again = run(one, texts)  # with the pages of the first time
    assert again == together, f"seed {SEED}"
    shuffled = dict(zip(order, run(engine(name), [texts[i] for i in order]), strict=True))
    assert [shuffled[i] for i in range(len(texts))] == together, f"seed {SEED}"
    for i in order[:16]:
        assert run(engine(name) if i % 4 == 0 else one, [texts[i]]) == [together[i]], f"seed {SEED}"
