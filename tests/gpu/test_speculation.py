"""Steps with drafts on a GPU: bit for bit the steps without, through both kernels."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_step import decode_step, of_few_rows
from qwen_jax.engine import decoding
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Sampling
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.texts import Text
from qwen_jax.engine.weights import PackedWeights, pack
from qwen_jax.model.rotary import inverse_frequencies
from tests.drafting import AtRandom, accepted
from tests.gpu.test_decode_step import CONFIGS, PAGE_SLOTS, SEED, parameters

QWEN = Sampling(temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05)


def packed(name: str, dtype: str = "bfloat16") -> PackedWeights:
    config = CONFIGS[name]
    return pack(config, parameters(config, SEED, dtype).items(), jnp.dtype(dtype), "auto")


def lengths_of(rows: int) -> tuple[list[int], list[int]]:
    """Positions of some texts' rows, and how many rows before each are its text's."""
    rng, position, preceding = np.random.default_rng(SEED), [], []
    while len(position) < rows:
        width = min(int(rng.integers(1, 9)), rows - len(position))
        first = int(rng.choice([0, 3, 120, 127, 250, 600, 2047, 8190]))
        position += range(first, first + width)
        preceding += range(width)
    return position, preceding


@pytest.mark.parametrize("rows", [2, 4, 8, 16, 64])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "bfloat16") for name in ("small", "small, H 128", "0.5b", "1.5b", "7b")]
    + [("0.5b", "float16")],
)
def test_the_bits_are_those_of_a_cache_that_has_the_rows_before(
    name: str, dtype: str, rows: int
) -> None:
    config, weights = CONFIGS[name], packed(name, dtype)
    if not weights.serves(rows):
        pytest.skip(f"no kernel for {rows} rows")
    position, preceding = lengths_of(rows)
    width = 1 + max(position) // PAGE_SLOTS
    rng = np.random.default_rng(SEED)
    # Every row has pages of its own, so that those of one text can differ in what they hold.
    tables = rng.permutation(rows * width).reshape(rows, width).astype(np.int32)
    shape = (2 * config.num_layers, rows * width, config.num_kv_heads, PAGE_SLOTS, config.head_dim)
    pages = jax.random.normal(jax.random.key(SEED), shape, dtype)
    firsts = [row - before for row, before in enumerate(preceding)]
    pages = pages.at[:, tables].set(pages[:, tables[firsts]])
    hidden = weights.look_up(rng.integers(0, config.vocab_size, rows))

    def step(pages: jax.Array, preceding: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        return decode_step(
            weights.packed,
            weights.plan,
            hidden,
            pages,
            jnp.asarray(tables),
            jnp.asarray(position, jnp.int32),
            jnp.asarray(inverse_frequencies(config)),
            preceding=preceding,
            implementation="mosaic_gpu",
        )

    cached = np.asarray(position) - preceding
    poisoned = _poisoned(pages, tables, cached)
    logits, new = jax.jit(step)(poisoned, jnp.asarray(preceding, jnp.int32))
    for row, before in enumerate(preceding):
        for back in range(1, before + 1):
            page, slot = divmod(position[row] - back, PAGE_SLOTS)
            pages = pages.at[:, tables[row, page], :, slot].set(new[:, row - back])
    right = jax.jit(lambda pages: step(pages, None))(pages)
    np.testing.assert_array_equal(np.asarray(logits), np.asarray(right[0]))
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (new, right[1])))
    # And they are the same when it is done again.
    again = jax.jit(step)(poisoned, jnp.asarray(preceding, jnp.int32))
    np.testing.assert_array_equal(np.asarray(logits), np.asarray(again[0]))


def _poisoned(pages: jax.Array, tables: np.ndarray, cached: np.ndarray) -> jax.Array:
    """NaN in all slots that are not in the cache."""
    held = np.zeros((pages.shape[1], PAGE_SLOTS), bool)
    for table, count in zip(tables, cached, strict=True):
        for n, page in enumerate(table):
            held[page, : max(0, int(count) - n * PAGE_SLOTS)] = True
    return jnp.where(held[None, :, None, :, None], pages, jnp.nan)


def test_both_kernels_were_seen() -> None:
    plans = packed("0.5b").plan, packed("7b").plan
    found = {of_few_rows(plan, rows, "bfloat16") for plan in plans for rows in (2, 8, 64)}
    assert found == {True, False}


def repetitive(vocab: int, count: int) -> list[Text]:
    """Texts of which parts come again, greedy and drawn; every third has three tokens to choose
    from, so that some of what is looked up is right, which random weights seldom are."""
    rng = np.random.default_rng(SEED)
    texts = []
    for i in range(count):
        part = rng.integers(0, vocab, int(rng.integers(2, 90))).tolist()
        tokens = [*part, *part, *part[: int(rng.integers(1, len(part) + 1))]]
        sampling = dataclasses.replace(QWEN, seed=i) if i % 2 else Sampling()
        if i % 3 == 0:
            few = dict.fromkeys(part[:3], 100.0)
            sampling = dataclasses.replace(sampling, logit_bias=few)
        texts.append(Text(tokens, int(rng.integers(20, 120)), sampling, 3))
    return texts


def run(engine: Engine, texts: Sequence[Text]) -> tuple[list[Any], int]:
    """Tokens and log-probabilities of each, and how many tokens were accepted of drafts."""
    fresh = [Text(t.tokens, t.limit, t.sampling, t.top) for t in texts]
    scheduler, found = Scheduler(engine), {text: [] for text in fresh}
    for text in fresh:
        scheduler.add(text)
    while not scheduler.idle:
        for news in scheduler.turn():
            found[news.text] += zip(news.tokens, news.logprobs or [], strict=True)
    return list(found.values()), accepted(fresh)


@pytest.mark.parametrize("name", ["small", "0.5b", "7b"])
@pytest.mark.parametrize("at_random", [False, True], ids=["as it pays", "at random"])
@pytest.mark.parametrize("drafter", ["lookup", "itself"])
def test_texts_have_the_bits_of_those_without_drafts(
    monkeypatch: pytest.MonkeyPatch, name: str, at_random: bool, drafter: str
) -> None:
    """With steps of one size: 64 rows, of which drafts take those that no text has."""
    if at_random:
        monkeypatch.setattr(decoding, "Drafts", AtRandom)
    config, weights = dataclasses.replace(CONFIGS[name], context_length=4096), packed(name)

    def engine(tokens: int) -> Engine:
        sizes: dict[str, Any] = {"slots": 64, "batch_invariant": True, "cache_tokens": 100_000}
        one = Engine(config, weights, draft_tokens=tokens, **sizes)
        if tokens and drafter == "itself":
            one.drafts_with(Engine(config, weights, **sizes))
        return one

    texts = repetitive(config.vocab_size, 20)
    plain, none = run(engine(0), texts)
    drafted, some = run(engine(7), texts)
    assert [len(found) for found in plain] == [text.limit for text in texts]
    assert drafted == plain, f"seed {SEED}"
    assert none == 0
    if drafter == "lookup" or at_random:  # to draft for itself is too dear where that has to pay
        assert some > 0, f"seed {SEED}"
