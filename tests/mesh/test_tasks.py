"""What is asked of a model is answered on a mesh as on one device: constraints, HTTP, the cache."""

import dataclasses
import functools

import jax
import pytest

import qwen_jax
from qwen_jax import Constraint, Sampling
from qwen_jax.accuracy.beside import Beside
from qwen_jax.accuracy.cache.audit import audit_cache
from qwen_jax.accuracy.exact.parameters import CheckpointSource
from qwen_jax.accuracy.tensors.diagnosis import diagnose
from qwen_jax.accuracy.tensors.planting import planted
from qwen_jax.accuracy.traces.recording import record
from qwen_jax.engine.engine import Engine
from qwen_jax.experiments.tasks.perplexity import sizes
from qwen_jax.mesh import part
from tests.engines import random_engine
from tests.mesh.test_split import TOKENS, engine, tiny
from tests.serving.conftest import served

pytestmark = pytest.mark.hosts
WARM = Sampling(temperature=1.0)


@functools.cache
def model(mesh: str | None) -> qwen_jax.Model:
    return qwen_jax.load(mesh=mesh, slots=2)


def test_constrained_answers() -> None:
    """Drawn with masks that the host finds while devices compute; beside one that is free."""
    held = Constraint.regex("[a-z]{4,8}( [a-z]{2,6}){2}")
    asked = {"sampling": WARM, "max_tokens": 24, "constraint": held}
    found = [
        [one.text for one in model(mesh).generate(["haiku: snow", "haiku: ice"], **asked)]
        for mesh in ("tp=2", "dp=2,tp=2", None)
    ]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 2


def test_serving() -> None:
    body = {"messages": [{"role": "user", "content": "haiku: moss"}], "max_tokens": 20}
    expected = model(None).generate("haiku: moss", max_tokens=20).text
    for mesh in ("tp=2", "dp=2,tp=2"):
        with served(model(mesh)) as server:
            said = server.post("/v1/chat/completions", body).json()
            assert said["choices"][0]["message"]["content"] == expected
            server.settle()


def test_replicas_of_a_model_in_blocks() -> None:
    """That is not dealt out lies on each device in whatever form it has on one."""
    both = qwen_jax.load(mesh="dp=2", weights="packed", slots=1)
    engines = (both.engine, *both.engine.others)
    assert all(engine.weights.in_blocks for engine in engines)
    assert [engine.weights.devices() for engine in engines] == [{d} for d in jax.devices()[:2]]
    prompts = ["haiku: snow", "haiku: moss"]
    one = qwen_jax.load(weights="packed", slots=1)
    assert both.generate(prompts, max_tokens=20) == one.generate(prompts, max_tokens=20)


@pytest.mark.parametrize(("mesh", "parts"), [("tp=2", 2), ("dp=2", 1)])
def test_sizes_are_of_each_device(mesh: str, parts: int) -> None:
    one = model(mesh)
    assert sizes(one)["device_bytes"] == part(one.config, parts).num_parameters * 4


def test_the_cache_is_right() -> None:
    """Each key/value head is on three devices, of which one shows it."""
    findings = audit_cache(engine(6), ways=["several texts", "shared page"])
    assert len(findings) == 5 and all(f.verdict == "within rounding" for f in findings)


def test_programs_are_given_to_all_devices_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads would each have their own, and devices wait for each other."""
    ahead = dataclasses.replace(engine(6).shapes, ahead=True)
    monkeypatch.setattr(Engine, "shapes", ahead)
    with Beside(engine(6)) as several, Beside(random_engine(tiny().config)) as one:
        assert (several.apart, one.apart) == (False, True)


@pytest.mark.parametrize("fault", ["zero_qkv_bias", "gate_up_exchanged"])
def test_a_planted_fault_is_named(fault: str) -> None:
    """Whose parameters, and whose arithmetic, are dealt out like the right ones."""
    with planted(engine(6), fault) as wrong:
        assert wrong.weights.devices() == engine(6).weights.devices()
        trace = record(wrong, TOKENS[:12], prompt_length=8)
    assert diagnose(trace, CheckpointSource(tiny(), "float32")).named == (fault,)
