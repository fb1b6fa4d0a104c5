"""record_jax.py on engines of Flax and of plain JAX."""

import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qwen_jax.accuracy.traces.foreign import open_trace
from qwen_jax.accuracy.traces.trace import AXES
from tests.golden_cases import Case, odd_config
from tests.recorders.jax_engines import LinenHead, Qwen2, scanned
from tests.recorders.judging import copied, judged, kinds, read
from tests.tiny_checkpoints import write_hf

CASE = Case(odd_config(num_layers=2, tied=False), seed=6)
TOKENS = CASE.prompt()[:20]


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.chdir(tmp_path)
    return copied("jax", tmp_path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(write_hf(tmp_path / "model", CASE.config, CASE.parameters()).path)


def nnx_model(recorder: Any, fault: str = "", dtype: str = "float32") -> Qwen2:
    return Qwen2(CASE.config, CASE.parameters(), recorder.tap, fault=fault, dtype=dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_clean_engine_of_flax(
    dtype: str, path: str, recorder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiled before it is recorded, and the same afterwards."""
    model, ids = nnx_model(recorder, dtype=dtype), jnp.array([TOKENS])
    before, modules = model(ids), dict(nnx.iter_modules(model)).keys()
    with recorder.recording("dump.safetensors", model, source=path, engine="mine 1.0"):
        during = model(ids)
    out = capsys.readouterr().out
    trace, found = read(out), judged(out)
    assert trace.header.tokens == tuple(TOKENS) and trace.header.dtype == dtype
    assert trace.header.implementation == "mine 1.0" and kinds(trace) == AXES.keys()
    assert not found.faulty and not found.skipped, found.first
    np.testing.assert_array_equal(np.asarray(trace.tensors["logits"]), np.asarray(during[0]))
    assert dict(nnx.iter_modules(model)).keys() == modules
    np.testing.assert_array_equal(np.asarray(model(ids)), np.asarray(before))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("fault", ["zero_qkv_bias", "rope_interleaved", "rope_theta_1e4"])
def test_a_fault_in_it(
    fault: str, path: str, recorder: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nnx_model(recorder, fault, "bfloat16")
    with recorder.recording("dump.safetensors", model, source=path):
        model(jnp.array([TOKENS]))
    found = judged(capsys.readouterr().out)
    assert found.named == (fault,) and not found.unknown
    assert found.causes[0].layers == (0, 1)


def test_layers_in_a_scan(path: str, recorder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    forward = scanned(CASE.config, CASE.parameters(), recorder.tap)
    with recorder.recording("dump.safetensors", source=path):
        forward(jnp.array(TOKENS))
    out = capsys.readouterr().out
    found = judged(out)
    missing = {"o_proj", "gate_proj", "up_proj", "ffn_act", "down_proj"}
    assert kinds(read(out)) == AXES.keys() - missing
    assert not found.faulty and not found.skipped, found.first


def test_modules_of_linen(path: str, recorder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, ids = LinenHead(CASE.config.rms_eps), jnp.array([TOKENS])
    variables = model.init(jax.random.key(0), ids)
    with recorder.recording("dump.safetensors", source=path):
        logits = jax.jit(model.apply)(variables, ids)
    trace = read(capsys.readouterr().out)
    assert kinds(trace) == {"embed", "final_norm", "logits", "ffn_residual"}
    np.testing.assert_array_equal(trace.tensors["logits"], logits[0])
    np.testing.assert_array_equal(trace.tensors["embed"], trace.tensors["layers.0.ffn_residual"])


def test_a_call_for_every_token(path: str, recorder: Any) -> None:
    table = jnp.asarray(CASE.parameters()["model.embed_tokens.weight"])
    look_up = jax.jit(lambda ids: recorder.tap("embed", table[recorder.tap("tokens", ids)]))
    with recorder.recording("dump.safetensors", source=path):
        for ids in ([4, 34, 54], [38], [18]):
            look_up(jnp.array(ids))
    trace = open_trace("dump.safetensors", CASE.config)
    assert trace.header.tokens == (4, 34, 54, 38, 18) and trace.header.chunks == (3, 1, 1)
    np.testing.assert_array_equal(trace.tensors["embed"], table[np.array([4, 34, 54, 38, 18])])


def test_what_cannot_be_recorded(recorder: Any) -> None:
    def refused(message: str, call: Any, *args: Any, **named: Any) -> None:
        raises = pytest.raises(recorder.RecorderError, match=message)
        with raises as caught, recorder.recording(*args, **named):
            call()
        assert "\n" not in str(caught.value) and not Path("dump.safetensors").exists()

    model = nnx_model(recorder)
    program = jax.jit(lambda x: recorder.tap("embed", x) + 1).lower(jnp.ones((2, 3))).compile()
    path, two = "dump.safetensors", jnp.array([[1, 2], [3, 4]])
    refused("The batch holds 2 texts", lambda: model(two), path, model)
    refused("No tap and no module was heard", lambda: None, path)
    refused("No tap and no module was heard", lambda: program(jnp.ones((2, 3))), path)
    refused("is a int, but must be an nnx.Module", lambda: None, path, 3)
    refused("Norm has no module named in MODULES", lambda: None, path, model.final_norm)
    refused("name must end in .safetensors", lambda: None, "dump.npz")
    x = jnp.ones((1, 2, 3, 4))
    refused("embed came before the token ids", lambda: recorder.tap("embed", x), path)
    refused("say its axes", lambda: recorder.tap("embed", x), path, tokens=[1, 2])

    def twice() -> None:
        for _ in range(2):
            recorder.tap("embed", x, "1 T 1+[1] D")

    refused("embed came twice in a call", twice, path, tokens=[1, 2])
    refused("A recording is open already", lambda: recorder.recording(path).__enter__(), path)
