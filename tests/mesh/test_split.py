"""A model on two or four devices is the model on one: weights, numbers, tokens, traces, memory."""

import collections
import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import api, opening
from qwen_jax.accuracy.traces.recording import record
from qwen_jax.engine import steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.sampling import Plan, Sampling
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.shapes import shapes_for
from qwen_jax.engine.split_weights import SplitWeights, splits_of
from qwen_jax.engine.steps import State
from qwen_jax.engine.texts import Text
from qwen_jax.loading import read_tokenizer
from qwen_jax.mesh import MeshShape
from qwen_jax.weights.checkpoint import open_checkpoint
from qwen_jax.weights.loader import load_parameters
from qwen_jax.weights.shards import iter_split
from tests.engines import relative
from tests.tiny_checkpoints import random_parameters, tiny_config, write_hf

LAYERS = 5
LENGTH = 256
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
PROMPT = [int(n) for n in np.random.default_rng(3).integers(0, 2000, 150)]
"""More than a page, so that texts share one."""


@functools.cache
def engine(tp: int, dtype: str = "float32") -> Engine:
    """The bundled model, which nothing stops, on so many devices."""
    checkpoint = open_checkpoint(opening.locate())
    if tp == 1:
        return Engine(checkpoint.config, load_parameters(checkpoint, dtype), slots=2)
    (split,) = splits_of(MeshShape(tp=tp))
    named = dict(iter_split(checkpoint, dtype, split))
    weights = SplitWeights(named, checkpoint.config, split)
    return Engine(checkpoint.config, weights, slots=2, split=split)


def generated(made: Engine, *texts: Text) -> list[tuple[list[int], list[float]]]:
    scheduler = Scheduler(made)
    found: dict[Text, tuple[list[int], list[float]]] = {text: ([], []) for text in texts}
    for text in texts:
        scheduler.add(text)
    while not scheduler.idle:
        for news in scheduler.turn():
            tokens, logprobs = found[news.text]
            tokens.extend(news.tokens)
            logprobs.extend(logprob for logprob, _ in news.logprobs or ())
    return [found[text] for text in texts]


@functools.cache
def greedy(tp: int) -> list[int]:
    """A haiku, and whatever comes after it."""
    prompt = read_tokenizer(open_checkpoint(opening.locate())).encode("haiku: snow")
    ((tokens, _),) = generated(engine(tp), Text(prompt, LENGTH))
    return tokens


@pytest.mark.parametrize("tp", [2, 4])
def test_every_device_has_its_part_and_no_more(tp: int) -> None:
    made = engine(tp)
    part = dataclasses.replace(made.spec.split.part(made.config))
    each = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(made.weights))
    assert each == 4 * part.num_parameters
    assert part.num_kv_heads == 1 and part.vocab_size * tp == made.config.vocab_size
    pages = made.pages.addressable_shards
    assert [shard.data.shape[2] for shard in pages] == [1] * tp


@pytest.mark.parametrize("tp", [2, 4])
def test_parts_make_up_the_checkpoint(tp: int) -> None:
    whole, made = engine(1).weights.parameters(), engine(tp).weights.parameters()
    assert whole.keys() == made.keys()
    for name in whole:
        np.testing.assert_array_equal(made[name], whole[name], err_msg=name)


@pytest.mark.parametrize("tp", [2, 4])
def test_logits(tp: int) -> None:
    """The sums over heads and feed-forward are of other terms first: float32 rounds them anew."""
    text = greedy(1)[:100]
    ours, theirs = engine(tp).logits(text), engine(1).logits(text)
    assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("tp", [2, 4])
def test_256_greedy_tokens(tp: int) -> None:
    assert len(greedy(tp)) == LENGTH and greedy(tp) == greedy(1)


def test_slots_prefixes_samples_and_logprobs() -> None:
    """Texts more than there are slots, which begin alike, of which one is greedy."""

    def texts() -> list[Text]:
        settings = [
            Sampling(temperature=1, top_p=0.9, repetition_penalty=1.1, seed=s) for s in (1, 2)
        ]
        return [Text(PROMPT, 12, sampling, 2) for sampling in (*settings, Sampling())]

    ours, theirs = texts(), texts()
    for (tokens, logprobs), (others, expected) in zip(
        generated(engine(2), *ours), generated(engine(1), *theirs), strict=True
    ):
        assert tokens == others and len(tokens) == 12
        np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-5)
    assert [t.shared_tokens for t in ours] == [t.shared_tokens for t in theirs] == [0, 128, 128]


@pytest.mark.parametrize("tp", [2, 4])
def test_traces(tp: int) -> None:
    """Every tensor, of the shape it has on one device: a head on two devices is shown once."""
    tokens = PROMPT[:9]
    ours, theirs = (record(engine(n), tokens, prompt_length=7) for n in (tp, 1))
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert "Recording changes no bit of the logits." in ours.header.notes
    for name, expected in theirs.tensors.items():
        found = ours.tensors[name]
        assert found.shape == expected.shape, name
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(finite, np.isfinite(found))
        scale = np.abs(expected[finite]).max()
        assert np.abs(found - expected)[finite].max() <= 1e-5 * scale, name


def test_bfloat16() -> None:
    """A layer adds two sums in which tp partial sums are rounded to 8 bits, where one device rounds
    once: 2 L sqrt(tp) roundings of 2^-9 against 2 L of them, which add up like a random walk."""
    exact = engine(1).logits(PROMPT)
    one, two = (relative(engine(n, "bfloat16").logits(PROMPT), exact) for n in (1, 2))
    assert two < 2**0.5 * one


def compiled(tp: int, steps_: int = 1) -> jax.stages.Compiled:
    made = engine(tp)
    layout, split = made.layout, made.spec.split

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    return steps.step.lower(
        made.spec,
        made.weights,
        made.pages,
        ints(2, layout.table_width),
        split.placed(State.create(2)),
        None,
        ints(2, steps.FIELDS),
        Plan(),
        steps_,
    ).compile()


@pytest.mark.parametrize("tp", [2, 4])
def test_collectives_of_a_step(tp: int) -> None:
    """Two all-reduces a layer and one of the embedding's rows; the logits are gathered. Copies of a
    key/value head cost none."""
    found = collections.Counter(
        re.findall(rf" ({COLLECTIVES})(?:-start)?\(", compiled(tp).as_text())
    )
    assert found == {"all-reduce": 2 * LAYERS + 1, "all-gather": 1}


def test_memory_of_a_step() -> None:
    """The pool is dealt out, and goes on in place."""
    one, two = (compiled(tp).memory_analysis() for tp in (1, 2))
    pool = engine(1).pages.nbytes
    assert one.alias_size_in_bytes >= pool and two.alias_size_in_bytes >= pool // 2
    assert two.argument_size_in_bytes < 0.51 * one.argument_size_in_bytes
    assert two.temp_size_in_bytes < 0.6 * one.temp_size_in_bytes


def test_nothing_is_compiled_twice() -> None:
    """State, extras and pages come back as they went in."""
    greedy(2)
    before = steps.step._cache_size(), steps.extend._cache_size()
    generated(engine(2), Text(PROMPT[20:40], 30))
    assert (steps.step._cache_size(), steps.extend._cache_size()) == before


def test_a_head_of_its_own(tmp_path: Path) -> None:
    """Untied, with sizes that divide by nothing else: a directory, as users load it."""
    config = tiny_config(num_layers=1, num_heads=6, num_kv_heads=2, ffn_size=36, tied=False)
    write_hf(tmp_path, config, random_parameters(config))
    for tp in (2, 6):
        one, split = api.load(tmp_path, slots=1), api.load(tmp_path, slots=1, mesh=f"tp={tp}")
        tokens = list(range(1, 20))
        assert relative(split.logits(tokens), one.logits(tokens)) < 1e-6


def test_replicas() -> None:
    """Two models of two devices each share the texts, and say what one says."""
    one, four = api.load(slots=2), api.load(slots=2, mesh="dp=2,tp=2")
    assert four.engine.shapes == shapes_for("cpu", 2)
    (other,) = four.engine.others
    used = four.engine.weights.devices() | other.weights.devices()
    assert used == set(jax.devices()[:4])
    prompts = [f"haiku: {word}" for word in ("snow", "rivers", "moss", "bread", "salt")]
    sampling = Sampling(temperature=1, seed=5)
    ours, theirs = (m.generate(prompts, sampling=sampling, max_tokens=8) for m in (four, one))
    assert [c.tokens for c in ours] == [c.tokens for c in theirs]
    held = [e.pool.size - len(e.pool._free) for e in (four.engine, other)]
    assert held == [0, 0]
    pairs = [(PROMPT[:10], PROMPT[10:15]), (PROMPT[:20], PROMPT[20:22]), (PROMPT[:3], PROMPT[3:9])]
    for a, b in zip(four.score(pairs), one.score(pairs), strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-5)
