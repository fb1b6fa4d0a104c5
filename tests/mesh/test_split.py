"""A model on two or six devices is the model on one: weights, numbers, tokens, traces, memory."""

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import api
from qwen_jax.accuracy.traces.recording import record
from qwen_jax.accuracy.traces.trace import names
from qwen_jax.engine import steps
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.form import load_packed_on, stored_plan
from qwen_jax.engine.replicas import Replicas, line_for
from qwen_jax.engine.rows import FIELDS
from qwen_jax.engine.sampling import Plan, Sampling
from qwen_jax.engine.scheduler import Scheduler
from qwen_jax.engine.split_packed import pack_split
from qwen_jax.engine.split_weights import SplitWeights, splits_of
from qwen_jax.engine.steps import State
from qwen_jax.engine.texts import Text
from qwen_jax.mesh import MeshShape
from qwen_jax.model.cache import PAGE
from qwen_jax.model.split import Split
from qwen_jax.scoring import scored
from qwen_jax.weights.checkpoint import Checkpoint, open_checkpoint
from qwen_jax.weights.loader import load_parameters
from qwen_jax.weights.names import parameters as names_of
from qwen_jax.weights.shards import iter_split, part_of
from tests.engines import relative, reshape
from tests.mesh.eight import collectives
from tests.numpy_reference import forward, log_softmax
from tests.tiny_checkpoints import random_parameters, tiny_config, write_gguf, write_hf

CONFIG = tiny_config(
    num_layers=1, hidden_size=64, head_dim=8, ffn_size=96, vocab_size=312, tied=False
)
"""Six query heads on two key/value heads: of two devices each has one of these, of six each has a
copy of one."""

WIDE = tiny_config(
    num_layers=1, hidden_size=128, num_heads=4, num_kv_heads=2, head_dim=64, ffn_size=300,
    vocab_size=320,
)  # fmt: skip
"""Whose parts are whole tiles of the decode-step kernel's weight stream, but for the feed-forward,
which the stream pads."""

PARAMETERS = random_parameters(CONFIG)
TOKENS = [int(n) for n in np.random.default_rng(3).integers(0, 312, 150)]
"""More than a page, so that texts share one."""


@functools.cache
def tiny() -> Checkpoint:
    return open_checkpoint(write_hf(Path(tempfile.mkdtemp()), CONFIG, PARAMETERS).path)


def on(split: Split, dtype: str) -> Engine:
    weights = SplitWeights(dict(iter_split(tiny(), dtype, split)), CONFIG, split)
    return small(Engine(CONFIG, weights, slots=2, split=split, cache_tokens=1024))


def small(made: Engine) -> Engine:
    """With one program of each kind."""
    reshape(made, rows=(2,), lengths=(16,))
    return made


@functools.cache
def engine(tp: int, dtype: str = "float32") -> Engine:
    """One that nothing stops, on so many devices."""
    if tp > 1:
        return on(*splits_of(MeshShape(tp=tp)), dtype)
    named = load_parameters(tiny(), dtype)
    return small(Engine(CONFIG, named, slots=2, cache_tokens=1024))


def generated(line: Scheduler | Replicas, *texts: Text) -> list[tuple[list[int], list[float]]]:
    found: dict[Text, tuple[list[int], list[float]]] = {text: ([], []) for text in texts}
    for text in texts:
        line.add(text)
    while not line.idle:
        for news in line.turn():
            tokens, logprobs = found[news.text]
            tokens.extend(news.tokens)
            logprobs.extend(logprob for logprob, _ in news.logprobs or ())
    return [found[text] for text in texts]


def unstopped(made: Engine) -> Engine:
    """Of programs for whole pages, and with no token that ends a text."""
    reshape(made, rows=(1,), lengths=(PAGE,))
    spec = dataclasses.replace(made.spec, stop_ids=())
    made.layout = made.layout._replace(spec=spec)
    return made


@pytest.mark.hosts
def test_the_bundled_model_on_two_devices() -> None:
    """256 tokens chosen on two are what one finds the likeliest, at every place; and the logits
    agree, whose sums over heads and feed-forward float32 rounds anew, for they begin with other
    terms. Twice two devices were asked for, and the other two have the same."""
    model = api.load(mesh="dp=2,tp=2", slots=1)
    prompt, two = model.tokens("haiku: snow", raw=True), unstopped(model.engine)
    (other,) = two.others
    assert two.weights.devices() | other.weights.devices() == set(jax.devices()[:4])
    for ours, theirs in zip(*map(jax.tree.leaves, (two.weights, other.weights)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    ((chosen, _),) = generated(Scheduler(two), Text(prompt, 256))
    text = [*prompt, *chosen]
    logits, expected = two.logits(text), unstopped(api.load(slots=1).engine).logits(text)
    assert len(chosen) == 256
    assert chosen == expected[len(prompt) - 1 : -1].argmax(axis=-1).tolist()
    assert relative(logits, expected) < 1e-6


@pytest.mark.hosts
def test_random_tokens() -> None:
    """What no model was trained on rounds worst: one device and two may be 1.0e-6 apart, as far as
    one is from float64, whose sums are the longer ones; two are nearer."""
    one, two = (api.load(mesh=mesh, slots=1) for mesh in (None, "tp=2"))
    whole, named = one.engine.weights.parameters(), {}
    for parameter in names_of(one.config, "safetensors"):
        rows = np.asarray(whole[parameter.name], np.float64)
        for name, (size, *_) in parameter.sources.items():
            named[name], rows = rows[:size], rows[size:]
    for seed in range(3):
        tokens = np.random.default_rng(seed).integers(0, one.config.vocab_size, 100).tolist()
        exact = forward(one.config, named, tokens)["logits"]
        errors = [relative(model.logits(tokens), exact) for model in (one, two)]
        assert errors[1] < errors[0] < 1e-6


def test_logits() -> None:
    """Beside float64, within what one device is allowed."""
    ours = engine(6).logits(TOKENS[:16])
    assert relative(ours, engine(1).logits(TOKENS[:16])) < 1e-6
    assert relative(ours, forward(CONFIG, PARAMETERS, TOKENS[:16])["logits"]) < 1e-5


def test_bfloat16() -> None:
    """Each of a layer's two sums is of tp terms rounded to 8 bits, where one device rounds once:
    sqrt(tp) times the error, were all of it from there."""
    exact = engine(1).logits(TOKENS[:16])
    one, two = (relative(engine(n, "bfloat16").logits(TOKENS[:16]), exact) for n in (1, 2))
    assert two < 2**0.5 * one


@pytest.mark.parametrize("tp", [2, 6])
def test_every_device_has_its_part_and_no_more(tp: int) -> None:
    made = engine(tp)
    part = made.spec.split.part(CONFIG)
    each = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(made.weights))
    assert each == 4 * part.num_parameters
    assert (part.num_kv_heads, part.vocab_size * tp) == (1, CONFIG.vocab_size)
    assert [shard.data.shape[2] for shard in made.pages.addressable_shards] == [1] * tp


@pytest.mark.parametrize("tp", [2, 6])
def test_parts_make_up_the_checkpoint(tp: int) -> None:
    """And dealt out by the devices it comes to lie as it does from a file."""
    weights = engine(tp).weights
    assert isinstance(weights, SplitWeights)
    whole, made = engine(1).weights.parameters(), weights.parameters()
    assert whole.keys() == made.keys()
    dealt = SplitWeights.deal(CONFIG, engine(tp).spec.split, whole.items()).named
    for name in whole:
        np.testing.assert_array_equal(made[name], whole[name], err_msg=name)
        np.testing.assert_array_equal(dealt[name], weights.named[name], err_msg=name)
        assert dealt[name].sharding == weights.named[name].sharding


@pytest.mark.hosts
def test_slots_prefixes_samples_and_logprobs() -> None:
    """Texts more than there are slots, which begin alike, of which one is greedy; and nothing is
    compiled for the second of them, since state and pages come back as they went in."""

    def texts() -> list[Text]:
        drawn = [Sampling(temperature=1, top_p=0.9, repetition_penalty=1.1, seed=s) for s in (1, 2)]
        return [Text(TOKENS, 12, sampling, 2) for sampling in (*drawn, Sampling())]

    ours, theirs = texts(), texts()
    found = generated(Scheduler(engine(2)), *ours)
    for (tokens, logprobs), (others, expected) in zip(
        found, generated(Scheduler(engine(1)), *theirs), strict=True
    ):
        assert tokens == others and len(tokens) == 12
        np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-5)
    assert [t.shared_tokens for t in ours] == [t.shared_tokens for t in theirs] == [0, 128, 128]
    before = [f._cache_size() for f in (steps.step, steps.extend, steps.insert)]
    generated(Scheduler(engine(2)), *texts())
    assert [f._cache_size() for f in (steps.step, steps.extend, steps.insert)] == before


def test_traces() -> None:
    """Every tensor as float64 has it, of the shape it has on one device: of a key/value head that
    is on several devices one is shown."""
    trace = record(engine(6), TOKENS[:7], prompt_length=0)
    assert "Recording changes no bit of the logits." in trace.header.notes
    assert trace.tensors.keys() == set(names(CONFIG))
    for name, expected in forward(CONFIG, PARAMETERS, TOKENS[:7]).items():
        found = trace.tensors[name]
        assert found.shape == expected.shape, name
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), name
    for name in ("attn_scores", "attn_probs"):
        assert trace.tensors[f"layers.0.{name}"].shape[1] == CONFIG.num_heads


def compiled(tp: int) -> jax.stages.Compiled:
    made = engine(tp)

    def ints(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    tables, state = ints(2, made.layout.table_width), made.spec.split.placed(State.create(2))
    given = made.spec, made.weights, made.pages, tables, state, None, ints(2, FIELDS)
    return steps.step.lower(*given, Plan(), 1).compile()


def test_collectives_of_a_step() -> None:
    """Two all-reduces a layer and one of the embedding's rows; the logits are gathered. Copies of a
    key/value head cost none."""
    found = collectives(compiled(6).as_text())
    assert found == {"all-reduce": 2 * CONFIG.num_layers + 1, "all-gather": 1}


def test_memory_of_a_step() -> None:
    """The pool is dealt out, and goes on in place: what programs for a CPU copy of it depends on
    XLA's version, and `tests/kernels/test_mesh_lowering.py` looks at those for GPUs."""
    one, two = (compiled(tp).memory_analysis() for tp in (1, 2))
    pool = engine(1).pages.nbytes
    assert one.alias_size_in_bytes >= pool and two.alias_size_in_bytes >= pool // 2
    assert two.argument_size_in_bytes < 0.51 * one.argument_size_in_bytes


def test_replicas() -> None:
    """Two models of two devices each share the texts, and say what one says."""
    first, second = splits_of(MeshShape(dp=2, tp=2))
    made, other = engine(2), on(second, "float32")
    assert made.weights.devices() | other.weights.devices() == set(jax.devices()[:4])
    both = small(Engine(CONFIG, made.weights, slots=2, split=first, cache_tokens=1024))
    both.others = (other,)

    def texts() -> list[Text]:
        return [Text(TOKENS[start : start + 20], 9) for start in range(0, 100, 20)]

    ours = texts()
    assert generated(line_for(both), *ours) == generated(Scheduler(engine(1)), *texts())
    # Every page has come back, and each engine has had some.
    assert all(e.pool.available == e.pool.size and e._rows for e in (both, other))
    pairs = [(TOKENS[:10], TOKENS[10:15]), (TOKENS[:20], TOKENS[20:22]), (TOKENS[:3], TOKENS[3:9])]
    for score, (context, rest) in zip(scored(both, pairs), pairs, strict=True):
        expected = log_softmax(engine(1).logits([*context, *rest])[len(context) - 1 : -1])
        picked = expected[np.arange(len(rest)), rest]
        np.testing.assert_allclose(score.logprobs, picked, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "tied",
    [pytest.param(True, marks=pytest.mark.hosts), pytest.param(False, marks=pytest.mark.long)],
)
def test_packed_for_the_step_kernel(tied: bool) -> None:
    """Every device's part in a stream of its own: products with the streams, and the parameters
    read back."""
    config = dataclasses.replace(WIDE, tied=tied)
    (split,) = splits_of(MeshShape(tp=2))
    assert isinstance(split, Split)
    rng = np.random.default_rng(5)
    drawn = {
        p.name: jnp.asarray(rng.standard_normal(p.shape, np.float32) * 0.1 + p.keep_float32)
        for p in names_of(config, "gguf")
    }
    dealt = SplitWeights.deal(config, split, drawn.items())
    packed = pack_split(config, dealt.named.items(), jnp.dtype("float32"), "auto", split)
    for name, value in packed.parameters().items():
        np.testing.assert_array_equal(value, drawn[name])
    options: dict[str, Any] = {"slots": 1, "split": split, "cache_tokens": 1024}
    ours, theirs = (small(Engine(config, each, **options)) for each in (packed, dealt))
    tokens = [n % config.vocab_size for n in TOKENS[:14]]
    assert relative(ours.logits(tokens), theirs.logits(tokens)) < 1e-6


@pytest.mark.long
def test_blocks_packed_for_the_step_kernel(tmp_path: Path) -> None:
    """Each device's part stays in the file's blocks, of which the last tile may have few, or is
    expanded where these would be cut."""
    config = tiny_config(
        num_layers=1, hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn_size=448,
        vocab_size=320, tied=False,
    )  # fmt: skip
    kinds = {"embed_tokens": "Q4_K", "k_proj": "Q6_K", "o_proj": "Q4_K", "down_proj": "Q8_0"}
    params = random_parameters(config)
    types = {
        name: next((kind for part, kind in kinds.items() if part in name.split(".")), "Q4_K")
        for name in params
        if name.endswith("weight") and "norm" not in name
    }
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", config, params, types=types).path)
    (split,) = splits_of(MeshShape(tp=2))
    assert isinstance(split, Split)
    dtype = jnp.dtype("float32")
    plan = stored_plan(part_of(checkpoint, 2, 0), dtype)
    assert plan is not None
    # Half of a row of 256 is half of a block of Q4_K.
    assert plan.layers[0] == ("q4_k", "q6_k", "q4_k", "float32", "q4_k", "q8_0")
    weights = load_packed_on(split, checkpoint, plan, dtype, "auto")
    assert weights.in_blocks
    expected = load_parameters(checkpoint, "float32")
    for name, value in weights.parameters().items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
