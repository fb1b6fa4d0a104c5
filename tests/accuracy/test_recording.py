"""Recording our own engine: every name, in chunks and token by token, and no number changed."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qwen_jax
from qwen_jax import Constraint, Sampling
from qwen_jax.accuracy.traces import recording
from qwen_jax.accuracy.traces.recording import (
    Recorder,
    parse_positions,
    plan_calls,
    trace_generation,
)
from qwen_jax.accuracy.traces.trace import Trace, names
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.shapes import pieces_of, shapes_for
from qwen_jax.engine.spec import Spec
from qwen_jax.engine.weights import Forward, PackedWeights, pack
from qwen_jax.errors import UserError
from qwen_jax.model.cache import Cache
from tests.engines import (
    decoded_logprobs,
    device_parameters,
    random_engine,
    random_tokens,
    relative,
)
from tests.golden_cases import Case, odd_config
from tests.numpy_reference import forward
from tests.tiny_checkpoints import random_parameters, tiny_config

CONFIG = odd_config(num_layers=2)
TOKENS = random_tokens(CONFIG, 30)
SAME = "Recording changes no bit of the logits."


@functools.cache
def recorder() -> Recorder:
    return Recorder(random_engine(CONFIG))


def assert_equals_float64(trace: Trace) -> None:
    exact = forward(CONFIG, Case(CONFIG, 0).parameters(), list(trace.header.tokens))
    part = slice(trace.header.start, trace.header.stop)
    for name, expected in exact.items():
        assert relative(trace.tensors[name], expected[part]) <= 1e-5, name


@pytest.mark.parametrize(
    ("prompt", "chunk", "chunks"),
    [
        (None, None, (16, 14)),
        (20, 7, (7, 7, 6) + (1,) * 10),
        (None, 30, (30,)),
        (0, None, (1,) * 30),
    ],
)
def test_every_tensor_equals_float64(
    prompt: int | None, chunk: int | None, chunks: tuple[int, ...]
) -> None:
    trace = recorder().record(TOKENS, prompt_length=prompt, chunk=chunk)
    assert list(trace.tensors) == names(CONFIG)
    assert trace.header.chunks == chunks
    assert trace.header.notes == (SAME,)
    assert_equals_float64(trace)
    future = ~np.tril(np.ones((30, 30), bool))[:, None].repeat(CONFIG.num_heads, 1)
    for i in range(CONFIG.num_layers):
        probs = trace.tensors[f"layers.{i}.attn_probs"]
        assert np.isneginf(trace.tensors[f"layers.{i}.attn_scores"][future]).all()
        assert not probs[future].any()
        np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_recording_changes_no_bit(dtype: str) -> None:
    """Of the engine's own programs, which know nothing of recordings.

    The decode loop shows its numbers only as log-probabilities.
    """
    engine, tokens = random_engine(odd_config(num_layers=1), dtype=dtype), TOKENS[:12]
    recorder = Recorder(engine)
    prefilled, decoded = recorder.record(tokens), recorder.record(tokens, prompt_length=0)
    np.testing.assert_array_equal(prefilled.tensors["logits"], engine.logits(tokens))
    logits = jnp.asarray(decoded.tensors["logits"])
    logprobs = np.asarray(logits - jax.nn.logsumexp(logits, axis=1, keepdims=True))
    # The softmax of 61 logits below 8, compiled twice: two units in the last place.
    np.testing.assert_allclose(decoded_logprobs(engine, tokens), logprobs, rtol=0, atol=2e-6)
    for trace in (prefilled, decoded):
        assert trace.header.notes == (SAME,)
        assert trace.header.dtype == trace.header.cache_dtype == dtype
        wide = "float32" if dtype == "float16" else dtype
        assert trace.header.activation_dtype == trace.tensors["embed"].dtype.name == wide


def test_decode_steps_in_one_kernel_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded is the plain model's; a note says how far the kernel's logits are."""
    config = tiny_config(num_layers=1, num_heads=4, head_dim=64, ffn_size=384)
    params = device_parameters(random_parameters(config), "float32")
    engine = Engine(config, pack(config, params.items(), jnp.dtype(jnp.float32), "xla"))
    tokens, step = random_tokens(config, 12), PackedWeights.forward

    def forward(self: PackedWeights, spec: Spec, rows: int) -> Forward:
        right = step(self, spec, rows)

        def shifted(*args: Any) -> tuple[jax.Array, Cache]:
            logits, cache = right(*args)
            return logits + 0.5, cache

        return shifted

    monkeypatch.setattr(PackedWeights, "forward", forward)
    trace = Recorder(engine, "logits").record(tokens, prompt_length=10)
    kernel, change = trace.header.notes
    assert "decode-step kernel" in kernel
    assert change == "Recording changes the logits, by 0.5 at most."
    plain = Recorder(Engine(config, params), "logits").record(tokens, prompt_length=10)
    np.testing.assert_array_equal(trace.tensors["logits"], plain.tensors["logits"])


def test_names_and_positions_are_cut_from_the_whole() -> None:
    whole = recorder().record(TOKENS, prompt_length=20, chunk=16)
    some = Recorder(random_engine(CONFIG), "embed, layers.1.attn_*,*.k_proj")
    part = some.record(TOKENS, prompt_length=20, chunk=16, start=10, stop=23)
    assert set(part.tensors) == {
        *("embed", "layers.0.k_proj", "layers.1.k_proj", "layers.1.attn_norm"),
        *("layers.1.attn_scores", "layers.1.attn_probs", "layers.1.attn_out"),
        "layers.1.attn_residual",
    }
    for name, tensor in part.tensors.items():
        expected = whole.tensors[name][10:23]
        keys = 23 if name.endswith(("scores", "probs")) else None
        np.testing.assert_array_equal(tensor, expected[..., :keys], err_msg=name)


def test_a_position_keeps_no_larger_array() -> None:
    """Of a call it is a view of all of it, padding included."""
    part = recorder().record(TOKENS, start=19, stop=20)
    assert all(x.base is None or x.base.nbytes == x.nbytes for x in part.tensors.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_length": 31}, "prompt_length is 31"),
        ({"prompt_length": -1}, "prompt_length is -1"),
        ({"chunk": 0}, "chunk is 0"),
        ({"chunk": 129}, "chunk is 129"),
        ({"start": 30}, "positions 30 to 30"),
        ({"stop": 31}, "positions 0 to 31"),
    ],
)
def test_lengths_outside_the_text_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recorder().record(TOKENS, **arguments)


def test_texts_that_cannot_run_are_refused() -> None:
    for tokens, message in [([], "0 tokens"), ([61], "go from 61"), ([0] * 1025, "1025 tokens")]:
        with pytest.raises(UserError, match=message):
            recorder().record(tokens)
    with pytest.raises(UserError, match=r"'layers.9.q_proj' matches none"):
        Recorder(random_engine(CONFIG), "layers.9.q_proj")


def test_calls_are_padded_as_the_engine_pads() -> None:
    cpu, gpu = shapes_for("cpu"), shapes_for("gpu")
    assert [tuple(call) for call in plan_calls(262, 259, None, cpu)] == [
        *((0, 128, 128), (128, 128, 128), (256, 3, 16)),
        *((259, 1, 1), (260, 1, 1), (261, 1, 1)),
    ]
    assert [tuple(call) for call in plan_calls(130, None, None, gpu)] == [
        *((0, 64, 64), (64, 64, 64), (128, 2, 64)),
    ]
    assert [tuple(call) for call in plan_calls(5, None, 2, cpu)] == [
        *((0, 2, 2), (2, 2, 2), (4, 1, 2)),
    ]


@pytest.mark.parametrize(
    ("text", "expected"), [(":", (0, 9)), ("2:", (2, 9)), (":4", (0, 4)), ("-3:-1", (6, 8))]
)
def test_positions_are_slices(text: str, expected: tuple[int, int]) -> None:
    assert parse_positions(text, 9) == expected


@pytest.mark.parametrize("text", ["", "3", "a:b", "1:2:3", "5:5", "9:"])
def test_positions_that_hold_nothing_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="positions"):
        parse_positions(text, 9)


@functools.cache
def bundled() -> qwen_jax.Model:
    return qwen_jax.load()


@pytest.fixture
def compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay makes a recorder of its own, whose programs are those of every other replay."""
    monkeypatch.setattr(recording, "Recorder", one_recorder)


one_recorder = functools.cache(Recorder)


@pytest.mark.usefixtures("compiled_once")
def test_choices_that_were_not_the_logits_alone_are_not_held_against_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    others: list[Any] = [
        {"constraint": Constraint.choice(["yes"])},
        {"sampling": Sampling(logit_bias={97: 100.0})},
        {"sampling": Sampling(repetition_penalty=9.0)},
    ]
    for options in others:
        request = bundled().request("haiku: snow", max_tokens=3, **options)
        (completion,) = (piece.completion for piece in bundled().run([request]) if piece.completion)
        trace = trace_generation(bundled(), request, completion, names="logits,embed")
        chosen = trace.tensors["logits"][len(request.tokens) - 1 :].argmax(1).tolist()
        assert chosen != list(completion.tokens)
        assert "a constraint, a bias or a penalty had a say" in trace.header.notes[1]
        assert not caplog.records


@pytest.mark.usefixtures("compiled_once")
def test_a_generation_is_replayed_and_chooses_the_same() -> None:
    model = bundled()
    request = model.request("haiku: snow", max_tokens=12)
    (completion,) = (piece.completion for piece in model.run([request]) if piece.completion)
    trace = trace_generation(model, request, completion, names="logits,embed", positions="-12:")
    prompt = len(request.tokens)
    assert trace.header.tokens == (*request.tokens, *completion.tokens[:-1])
    pieces = tuple(piece.length for piece in pieces_of(0, prompt - 1, model.engine.shapes))
    assert trace.header.chunks == pieces + (1,) * len(completion.tokens)
    assert trace.tensors["logits"].argmax(1).tolist() == list(completion.tokens)
    assert trace.header.notes == (
        "A replay of the generated tokens, made after the run.",
        "Its logits choose the tokens of the run, every one.",
        SAME,
    )
    other = [*completion.tokens]
    other[4] += 1
    wrong = trace_generation(
        model, request, dataclasses.replace(completion, tokens=tuple(other)), names="logits,embed"
    )
    assert f"first after position {prompt + 3}" in wrong.header.notes[1]
