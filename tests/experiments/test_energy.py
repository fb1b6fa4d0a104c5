"""Energy per token, with a stand-in for NVML that has the answers of an H200's counter."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from qwen_jax import api
from qwen_jax.experiments import energy
from tests.experiments.conftest import lines

READ = [81_234_567_890, 81_234_742_215, 81_235_098_431, 81_236_001_007]
"""Millijoules since a driver was loaded, one read after the other."""
H200 = "NVIDIA H200"
DEVICE = types.SimpleNamespace(platform="gpu", local_hardware_id=0)
CPU = types.SimpleNamespace(platform="cpu", local_hardware_id=0)


class NVMLError(Exception):
    """As nvidia-ml-py raises it."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Puts a stand-in in pynvml's place; returns the list of GPUs that are read."""

    def nvml(read: Iterable[Any] = READ, names: tuple[str, ...] = (H200,)) -> list[Any]:
        asked: list[Any] = []
        values = iter(read)

        def energy_of(handle: Any) -> int:
            asked.append(handle)
            value = next(values)
            if isinstance(value, Exception):
                raise value
            return value

        stand_in = types.ModuleType("pynvml")
        vars(stand_in).update(
            NVMLError=NVMLError,
            nvmlInit=lambda: None,
            nvmlDeviceGetCount=lambda: len(names),
            nvmlDeviceGetHandleByIndex=lambda index: index,
            nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
            nvmlDeviceGetName=lambda handle: names[handle],
            nvmlDeviceGetTotalEnergyConsumption=energy_of,
        )
        monkeypatch.setitem(sys.modules, "pynvml", stand_in)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
        return asked

    return nvml


def meter(*devices: Any) -> energy.Meter | None:
    return energy.meter(devices)


def test_joules_a_token(nvml: Callable[..., list[Any]]) -> None:
    nvml()
    found = meter(DEVICE)
    assert found is not None
    assert found.per_token(512) == pytest.approx((81_234_742.215 - 81_234_567.890) / 512)
    found.restart(100)
    assert found.per_token(612) == pytest.approx((81_236_001.007 - 81_235_098.431) / 512)


def test_of_several_gpus_the_sum(nvml: Callable[..., list[Any]]) -> None:
    asked = nvml([0, 0, 1000, 5000, 4000, 6000], (H200, H200))
    found = meter(DEVICE, types.SimpleNamespace(platform="gpu", local_hardware_id=1))
    assert found is not None and asked == [0, 1]
    found.restart()
    assert found.per_token(2) == pytest.approx(2.0)


def test_nothing_where_nothing_can_be_known(
    nvml: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml()
    assert meter(CPU) is None
    nvml([NVMLError("Not Supported")])
    assert meter(DEVICE) is None
    nvml(names=(H200, "NVIDIA L4"))  # of which CUDA may call either the first
    assert meter(DEVICE) is None
    nvml([*READ[:2], *[NVMLError("GPU is lost")] * 2])
    found = meter(DEVICE)
    assert found is not None
    found.restart()
    assert found.per_token(5) is None and found.per_token(0) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as where it isn't installed
    assert meter(DEVICE) is None


@pytest.mark.parametrize(
    ("variables", "read"),
    [
        ({"CUDA_VISIBLE_DEVICES": "1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f6c"}, "GPU-8f6c"),
        ({"CUDA_VISIBLE_DEVICES": "1, 0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, 1),
    ],
)
def test_which_gpu_is_meant(
    nvml: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    read: Any,
) -> None:
    asked = nvml(names=(H200, H200))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert meter(DEVICE) is not None and set(asked) == {read}


@pytest.mark.parametrize(
    ("task", "fields"),
    [
        ("generate", ""),
        ("serve", "config.experiment.serve.requests = 2; config.experiment.serve.repeats = 1"),
    ],
)
@pytest.mark.usefixtures("loaded")
def test_in_an_experiment(
    nvml: Callable[..., list[Any]],
    experiment: Callable[..., list[str]],
    run: Callable,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    model: api.Model,
    task: str,
    fields: str,
) -> None:
    config = f"config.experiment.task = {task!r}; config.prompt = 'haiku: snow'; {fields}"
    argv = experiment('axis("max_tokens", [4, 8])', config)
    # A CPU counts nothing, and nothing is said of it.
    assert "joules" not in run(*argv).out
    # A counter that grows by 6 J from one read to the next.
    nvml(itertools.count(1_000_000, 6_000))
    monkeypatch.setattr(energy, "of_engine", lambda engine: energy.meter([DEVICE]))
    argv = experiment('axis("max_tokens", [4, 8])', config, workdir="v")
    model.generate("haiku: snow", max_tokens=8)  # nothing is left to compile
    assert "joules_per_token" in run(*argv).out
    ends = [e for e in lines(tmp_path / "v" / "metrics.jsonl") if e["event"] == "finished"]
    tokens = [4, 8] if task == "generate" else [8, 16]
    found = [e["metrics"]["joules_per_token"] for e in ends]
    assert found == pytest.approx([6 / n for n in tokens])
    assert run("report", str(tmp_path / "v"), "--metric=joules_per_token").out.startswith(
        "On joules_per_token max_tokens=8 has the best mean"
    )
