"""Experiments over the fake task, run by run.py in this process."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.cli.conftest import loaded, model, nothing_loads, refuses, run
from tests.fake_hub import hub_server

# As in the other conftest, JAX must not be imported yet.
if TYPE_CHECKING:
    from qwen_jax.experiments.task import Metrics, Task, Work

__all__ = ["experiment", "hub_server", "loaded", "model", "nothing_loads", "refuses", "run"]

CONFIG = '''"""What this is about."""
from ml_collections import ConfigDict
from qwen_jax.experiments import axis, chain, product, zipped
from qwen_jax.settings import get_config as defaults
def get_config(variant=""):
    config = defaults()
    config.experiment.task = "tests.experiments.fake:Count"
    {config}
    return config
def get_sweep():
    return {sweep}
'''
SWEEP = 'product(axis("sampling.seed", range(4)), axis("dtype", ["float32", "bfloat16"]))'


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[..., list[str]]:
    """Writes a config file; returns the arguments that run it in `tmp_path / "w"`."""

    def experiment(sweep: str = SWEEP, config: str = "", workdir: str = "w") -> list[str]:
        path = tmp_path / "config.py"
        path.write_text(CONFIG.format(config=config or "pass", sweep=sweep))
        return ["experiment", f"--config={path}", f"--workdir={tmp_path / workdir}"]

    return experiment


@pytest.fixture(autouse=True)
def metrics_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a task of this program measures in any test here, it said so before."""
    from qwen_jax.experiments.task import TASKS, task_class

    def run(task: Task, work: Work, real: Callable[..., Metrics]) -> Metrics:
        metrics, known = real(task, work), task.known_metrics()
        said = {name for name in metrics if not name.endswith("_error")}
        assert known is None or said <= set(known), said - set(known)
        return metrics

    for name in TASKS:
        kind = task_class(name)
        monkeypatch.setattr(kind, "run", functools.partialmethod(run, real=vars(kind)["run"]))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
